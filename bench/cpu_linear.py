"""Time of one int4 linear on the CPU: ours against PyTorch's own ways to compute it.

    python bench/cpu_linear.py [--json FILE] [--rounds 15] [--shapes 4096x4096 14336x4096] [--rows 1 4 16 128]
                               [--group 128] [--isa avx2]

The ways: "ours" in bf16, fp16 and fp32; "aten int4" is _weight_int4pack_mm_for_cpu (rounds its weights to bf16);
"dense" is F.linear on a weight that was dequantised before; "dequantise + dense" does both each time, as a model
that is left alone does. Each way walks over copies of its weight that do not fit the cache together, as the layers
of a model do. The ways take turns; the numbers are the median over the rounds, and the
best one, which says more on a machine that others use too. The rates are those of the median.
GB/s counts the bytes of the weight as that way stores it, GFLOP/s 2 M N K.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from inductor_ext.formats import PackedInt4
from inductor_ext.kernels import Packed, cpu

# More than the caches of this generation of machines hold for one or two cores.
WORKING_SET = 160 << 20

Way = tuple[str, torch.dtype, int, Callable[[Tensor], Tensor]]


def over_copies(weight: tuple[Tensor, ...], call: Callable[..., Tensor]) -> tuple[int, Callable[[Tensor], Tensor]]:
    """The bytes of the weight, and a function of x that calls with another copy of it each time."""
    size = sum(t.numel() * t.element_size() for t in weight)
    copies = [weight, *(tuple(t.clone() for t in weight) for _ in range(WORKING_SET // size))]
    turn = itertools.cycle(copies)
    return size, lambda x: call(x, *next(turn))


def ways(N: int, K: int, G: int) -> Iterator[Way]:
    codes = torch.randint(-(2**31), 2**31 - 1, (N, K // 8), dtype=torch.int32)
    scales = torch.rand(N, K // G).bfloat16() * 0.01
    weight = PackedInt4(codes, scales)

    def ours(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        return cpu.run(x, Packed(codes, scales, None, None), None, G)

    def aten(x: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, G, scales_and_zeros)
        return y

    def dequantise(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        return linear(x, PackedInt4(codes, scales).dequantize(torch.bfloat16))

    aten_codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.stored_codes().int(), 1)
    aten_scales = torch.stack((scales.T, torch.zeros_like(scales.T)), -1).contiguous()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield ("ours", dtype, *over_copies((codes, scales), ours))
    yield ("aten int4", torch.bfloat16, *over_copies((aten_codes, aten_scales), aten))
    for dtype in (torch.bfloat16, torch.float32):
        dense = weight.dequantize(dtype)
        yield ("dense", dtype, *over_copies((dense,), linear))
    yield ("dequantise + dense", torch.bfloat16, *over_copies((codes, scales), dequantise))


def measure(all_ways: list[Way], M: int, K: int, rounds: int) -> list[tuple[float, float]]:
    """Seconds of a call, for each way: median and best."""
    inputs = [torch.randn(M, K).to(dtype) for _, dtype, _, _ in all_ways]
    times: list[list[float]] = [[] for _ in all_ways]
    for i in range(rounds + 1):
        for way, x, seconds in zip(all_ways, inputs, times, strict=True):
            begin = time.perf_counter()
            way[3](x)
            if i > 0:
                seconds.append(time.perf_counter() - begin)
    return [(statistics.median(t), min(t)) for t in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096"], help="NxK")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 128], help="M")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--isa", help="one of the instruction sets, instead of the best")
    options = parser.parse_args()
    if (reason := cpu.usable()) is not None:
        raise SystemExit(reason)
    if options.isa:
        torch.ops.w4a16_cpu.set_isa(options.isa)

    results: list[dict[str, Any]] = []
    print(f"{'N':>6} {'K':>6} {'M':>4}  {'way':<20} {'dtype':<9} {'ms':>9} {'best':>9} {'GB/s':>7} {'GFLOP/s':>8}")
    for shape in options.shapes:
        N, K = (int(n) for n in shape.split("x"))
        all_ways = list(ways(N, K, options.group))
        for M in options.rows:
            times = measure(all_ways, M, K, options.rounds)
            for (name, dtype, size, _), (seconds, best) in zip(all_ways, times, strict=True):
                short, gbytes, gflops = str(dtype)[6:], size / seconds / 1e9, 2 * M * N * K / seconds / 1e9
                print(f"{N:6} {K:6} {M:4}  {name:<20} {short:<9} {seconds * 1e3:9.3f} {best * 1e3:9.3f}", end=" ")
                print(f"{gbytes:7.1f} {gflops:8.1f}")
                row = {"N": N, "K": K, "M": M, "way": name, "dtype": short}
                results.append(row | {"seconds": seconds, "best": best, "gbytes_per_s": gbytes, "gflops": gflops})
    if options.json:
        machine = {"isas": torch.ops.w4a16_cpu.usable_isas(), "isa": options.isa, "threads": torch.get_num_threads()}
        document = machine | {"torch": torch.__version__, "group_size": options.group, "results": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
