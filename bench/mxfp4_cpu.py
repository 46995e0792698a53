"""Time of the CPU ops for one gpt-oss layer's experts: MXFP4 with 16-bit and with fp8 activations, and int4 beside it.

    python bench/mxfp4_cpu.py [--rounds 9] [--tokens 1 16 64 512] [--experts 32] [--top-k 4] [--size 2880] [--isa avx2]

The same sizes, biases and activation for all; int4 is symmetric with groups of 32. The ways take turns, of eight calls
with other tokens each, as in bench/moe_cpu.py. ms of a call: the median over the turns and the best one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from moe_cpu import Inputs, inputs
from torch import Tensor

import inductor_ext.ops  # noqa: F401  registers the ops
from inductor_ext import kernels
from inductor_ext.formats import PackedInt4, PackedMxfp4
from inductor_ext.kernels import cpu

SETTINGS = {"activation": "swigluoai", "gate_up": "interleaved", "limit": 7.0, "kernel": "cpu"}


def ways(E: int, size: int) -> dict[str, Callable[..., Tensor]]:
    mxfp4: list[Tensor] = []
    int4: list[Tensor | None] = []
    for N, K in ((2 * size, size), (size, size)):
        codes = torch.randint(256, (E * N, K // 2), dtype=torch.uint8)
        exponents = torch.randint(118, 124, (E * N, K // 32), dtype=torch.uint8)
        first = kernels.load_mxfp4("cpu").pack(PackedMxfp4(codes, exponents), E)
        scales = (torch.rand(E * N, K // 32) * 0.02).bfloat16()
        second = kernels.load_moe("cpu").pack(PackedInt4(codes.clone().view(torch.int32), scales), E)
        bias = torch.randn(E, N).bfloat16()
        mxfp4 += [first.qweight, first.scales, bias]
        int4 += [second.qweight, second.scales, None, bias]
    input_scales, ops = (torch.tensor(0.02), torch.tensor(0.05)), torch.ops.w4a16
    groups = {"intermediate_size": size, "w13_group_size": 32, "w2_group_size": 32}
    return {
        "int4": lambda x, ids, w: ops.moe(x, w, ids, *int4, None, **groups, **SETTINGS),
        "mxfp4": lambda x, ids, w: ops.moe_mxfp4(x, w, ids, *mxfp4, None, size, **SETTINGS),
        "mxfp4, fp8": lambda x, ids, w: ops.moe_gemm_a8w4(x, w, ids, *mxfp4, None, *input_scales, size, **SETTINGS),
    }


def measure(way: Callable[..., Tensor], examples: list[Inputs]) -> float:
    way(*examples[-1])
    begin = time.perf_counter()
    for example in examples:
        way(*example)
    return (time.perf_counter() - begin) / len(examples)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 512])
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--size", type=int, default=2880, help="hidden and intermediate")
    parser.add_argument("--isa", help="one of the CPU kernel's instruction sets, instead of the best")
    given = parser.parse_args()
    if (reason := cpu.usable()) is not None:
        raise SystemExit(reason)
    if given.isa:
        torch.ops.w4a16_cpu.set_isa(given.isa)
    all_ways = ways(given.experts, given.size)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for T in given.tokens:
        examples = inputs(T, given.experts, given.top_k, given.size)
        times: dict[str, list[float]] = {name: [] for name in all_ways}
        for _ in range(given.rounds):
            for name, way in all_ways.items():
                times[name].append(measure(way, examples) * 1e3)
        told = (f"{name} {statistics.median(t):.2f}, best {min(t):.2f}" for name, t in times.items())
        print(f"T={T}: " + " | ".join(told), flush=True)


if __name__ == "__main__":
    main()
