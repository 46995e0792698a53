"""How good the rules of kernels/gpu/tuning.py are on a GPU: the launch parameters that they give for an int4 linear,
timed against their neighbours.

    python bench/scan_gpu.py [--shapes 6144x4096 ...] [--rows 1 16 ...] [--dtype float16] [--json FILE]

Neighbours differ from the rule's choice in one parameter or two. For each shape and number of rows a line says how long
the rule's choice takes and the best, in microseconds, and which that was; then the three best follow. Where a line's
ratio is far above 1, the rules want another number there: they are measured on sm_90 alone. Times are taken as in
bench/dense_gpu.py. A kernel that is off by more than 1 % ends the run; one that the device cannot run is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from dense_gpu import WORKING_SET, bytes_of, weight
from gpu_time import DEVICE, about, copy_rate, medians, recorded
from torch import Tensor

from inductor_ext.kernels import Packed
from inductor_ext.kernels.gpu import linear, planes, tuning
from inductor_ext.kernels.gpu.hopper import launch as hopper

GROUP = 128
FACTORS = {"BN": (0.5, 2), "BM": (0.5, 2), "WIDTH": (0.5, 2), "SPLITS": (0.5, 2), "num_warps": (0.5, 2)}
FLAGS = ("WIDE", "ROUNDED")

Config = tuning.Config | tuning.Hopper


def chosen(M: int, N: int, K: int, packed: Packed, x: Tensor) -> Config:
    """By the rules, were nothing ever dequantised for a dense matmul."""
    count = linear.processors(x.device)
    many = tuning.hopper(M, N, K, count, False) if hopper.can(packed, x) else None
    return many or tuning.dense(M, N, K, linear.arch_of(x.device), count)


def changes(config: Config) -> list[dict[str, Any]]:
    """To one parameter each."""
    found: list[dict[str, Any]] = [{"STAGES": config.STAGES + step} for step in (-1, 1)]
    for name, factors in FACTORS.items():
        if hasattr(config, name):
            found += [{name: int(getattr(config, name) * factor)} for factor in factors]
    return found + [{name: not getattr(config, name)} for name in FLAGS if hasattr(config, name)]


def possible(config: Config, M: int, K: int) -> bool:
    tiles = -(-K // 256)
    whole = 1 <= config.SPLITS <= tiles and (config.SPLITS - 1) * -(-tiles // config.SPLITS) < tiles
    if isinstance(config, tuning.Hopper):
        return whole and config.BN in (128, 256) and config.BM in (16, 32, 64, 128, 256) and config.STAGES >= 2
    heights = [height for height in (8, 16, 32, 64, 128) if height < 4 * max(M, 8)]
    sizes = config.BN in (32, 64, 128, 256) and config.BM in heights
    return whole and sizes and config.WIDTH in (32, 64) and config.num_warps in (1, 2, 4, 8) and config.STAGES >= 1


def neighbours(config: Config, M: int, K: int) -> list[Config]:
    found = {config}
    single = changes(config)
    for one, other in itertools.product(single, [{}, *single]):
        found.add(dataclasses.replace(config, **(one | other)))
    return [each for each in found if possible(each, M, K)]


def call(config: Config, x: Tensor, packed: Packed, out: Tensor) -> Callable[[], None]:
    launch = hopper.dense if isinstance(config, tuning.Hopper) else linear.launch
    return functools.partial(launch, config, x, packed, None, GROUP, out)  # type: ignore[arg-type]


def runs(config: Config, x: Tensor, packed: Packed, wanted: Tensor) -> bool:
    """Whether the device can; compiles it."""
    out = torch.empty_like(wanted, dtype=x.dtype)
    try:
        call(config, x, packed, out)()
        torch.cuda.synchronize()
    except Exception as error:  # too much shared memory, a layout that the compiler refuses
        if "CUDA error" in str(error):
            raise
        return False
    off = float((out.float() - wanted).norm() / wanted.norm())
    if not off <= 0.01:
        raise SystemExit(f"{config} is off by {off:.1e}")
    return True


def scan(N: int, K: int, rows: list[int], dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    one = weight(N, K, GROUP, "none", dtype, 0)
    dense = one.dequantize()
    copies = max(2, -(-WORKING_SET // bytes_of(one)))
    packed = [planes.pack(weight(N, K, GROUP, "none", dtype, seed)) for seed in range(copies)]
    for M in rows:
        x = torch.randn(M, K, dtype=dtype, device=DEVICE)
        out, wanted = torch.empty(M, N, dtype=dtype, device=DEVICE), x.float() @ dense.t()
        rule = chosen(M, N, K, packed[0], x)
        some = neighbours(rule, M, K)
        with ThreadPoolExecutor() as pool:  # what takes long is the compiler, in a process of its own
            can = list(pool.map(functools.partial(runs, x=x, packed=packed[0], wanted=wanted), some))
        some = [config for config, fine in zip(some, can, strict=True) if fine]
        graphs = {str(c): recorded([call(c, x, p, out) for p in packed], long=M >= 1024) for c in some}
        yield {"N": N, "K": K, "M": M, "rule": str(rule), "seconds": medians(graphs, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["6144x4096", "4096x14336"], help="NxK")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64, 256, 1024], help="M")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no GPU that torch can use.")
    copy_rate()  # brings up the clocks
    results = []
    for shape in options.shapes:
        N, K = map(int, shape.split("x"))
        for result in scan(N, K, options.rows, getattr(torch, options.dtype)):
            results.append(result)
            best = sorted((time, config) for config, time in result["seconds"].items())
            rule = result["seconds"][result["rule"]]
            ratio, count = rule / best[0][0], len(best)
            print(
                f"{shape} M={result['M']}: rule {rule * 1e6:.1f}, best of {count} {best[0][0] * 1e6:.1f}: {ratio:.2f}"
            )
            for time, config in best[:3]:
                print(
                    f"    {time * 1e6:8.1f}  {config}{'  (the rule)' if config == result['rule'] else ''}", flush=True
                )
    if options.json:
        options.json.write_text(json.dumps(about() | {"dtype": options.dtype, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
