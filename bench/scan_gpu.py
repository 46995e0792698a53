"""How good the rules of kernels/gpu/tuning.py are on a GPU: the launch parameters that they give for an int4 linear,
timed against their neighbours; and the table of those that are better, kernels/gpu/measured.json.

    python bench/scan_gpu.py [--shapes 6144x4096 ...] [--rows 16 64 ...] [--dtype float16] [--json FILE] [--write TABLE]

Neighbours differ from the rule's choice in how many programs share a tile, in another parameter, or in both; on a
Hopper, from 17 rows on, the other kernel's choice and its neighbours are tried too. For each shape and number of rows a
line says how long the rule's choice takes and the best, in microseconds, and which that was; then the three best
follow. Where a line's ratio is far above 1, the rules want another number there: they are measured on sm_90 alone.
Times are taken as in bench/dense_gpu.py. A kernel that is off by more than 1 % ends the run; one that the device cannot
run is left out.

--write replaces what the table has of these shapes and rows on this device: with the best, if it is 3 % faster than the
rule's choice when the two are timed once more, by themselves. All is for symmetric weights in groups of 128.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from dense_gpu import WORKING_SET, bytes_of, weight
from gpu_time import DEVICE, about, copy_rate, medians, recorded
from torch import Tensor

from inductor_ext.kernels import Packed
from inductor_ext.kernels.gpu import linear, measured, planes, runtime, tuning
from inductor_ext.kernels.gpu.hopper import launch as hopper

GROUP = 128
SHAPES = (
    *("6144x4096", "4096x4096", "28672x4096", "4096x14336", "1024x4096", "14336x4096"),  # Llama-3-8B
    *("3584x3584", "18944x3584", "3584x18944"),  # Qwen2.5-7B
    *("8192x8192", "28672x8192", "8192x28672"),  # Llama-3-70B
)
WORTH = 1.03

Config = tuning.Config | tuning.Hopper


def starts(M: int, N: int, K: int, packed: Packed, x: Tensor) -> list[Config]:
    """What the rules choose, were nothing ever dequantised for a dense matmul; and a choice of the other kernel."""
    count, arch = runtime.processors(x.device), runtime.arch_of(x.device)
    fused: Config = tuning.dense(M, N, K, arch, count, plain=True)
    if M <= 16 or not hopper.can(packed, x):
        return [fused]
    many = tuning.hopper(M, N, K, count, plain=True)
    return [fused, tuning.Hopper(128, 64, fused.SPLITS, 4)] if many is None else [many, fused]


def neighbours(config: Config, M: int, K: int) -> list[Config]:
    shares = {config.SPLITS + step for step in (-1, 0, 1)} | {2 * config.SPLITS, config.SPLITS // 2}
    others: list[dict[str, Any]] = [{}] + [{"STAGES": config.STAGES + step} for step in (-1, 1)]
    if isinstance(config, tuning.Hopper):
        others += [{"BN": 128}, {"BN": 192}, {"BN": 256}, {"BM": config.BM // 2}, {"BM": 2 * config.BM}]
    else:
        others += [{"WIDTH": 96 - config.WIDTH}, {"ROUNDED": not config.ROUNDED}]
        for times in (0.5, 2):
            others.append({"BN": int(config.BN * times), "num_warps": int(config.num_warps * times)})
    found = [dataclasses.replace(config, SPLITS=n, **other) for n, other in itertools.product(shares, others)]
    return [each for each in dict.fromkeys(found) if possible(each, M, K)]


def possible(config: Config, M: int, K: int) -> bool:
    tiles = -(-K // 256)
    whole = 1 <= config.SPLITS <= tiles and (config.SPLITS - 1) * -(-tiles // config.SPLITS) < tiles
    if isinstance(config, tuning.Hopper):
        return whole and config.BM in (32, 64, 128) and 2 * M > config.BM and config.STAGES >= 2
    sizes = config.BN in (32, 64, 128) and config.num_warps in (1, 2, 4, 8)
    return whole and sizes and config.STAGES >= 2


def call(config: Config, x: Tensor, packed: Packed, out: Tensor) -> Callable[[], None]:
    launch = hopper.dense if isinstance(config, tuning.Hopper) else linear.launch
    return functools.partial(launch, config, x, packed, None, GROUP, out)  # type: ignore[arg-type]


def runs(config: Config, x: Tensor, packed: Packed, wanted: Tensor) -> bool:
    """Whether the device can; compiles it."""
    out = torch.full_like(wanted, float("nan"), dtype=x.dtype)
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


Cell = tuple[int, int, int, torch.dtype]


def candidates(cell: Cell) -> list[Config]:
    """The rule's choice first, then others that this device can run. Leaves them in the compiler's cache."""
    N, K, M, dtype = cell
    with torch.no_grad():
        one = weight(N, K, GROUP, "none", dtype, 0)
        packed, x = planes.pack(one), torch.randn(M, K, dtype=dtype, device=DEVICE)
        wanted = x.float() @ one.dequantize().t()
        first = starts(M, N, K, packed, x)
        some = dict.fromkeys([first[0], *(each for start in first for each in neighbours(start, M, K))])
        return [config for config in some if runs(config, x, packed, wanted)]


def scan(cell: Cell, some: list[Config]) -> dict[str, Any]:
    N, K, M, dtype = cell
    copies = max(2, -(-WORKING_SET // bytes_of(weight(N, K, GROUP, "none", dtype, 0))))
    packed = [planes.pack(weight(N, K, GROUP, "none", dtype, seed)) for seed in range(copies)]
    x, out = torch.randn(M, K, dtype=dtype, device=DEVICE), torch.empty(M, N, dtype=dtype, device=DEVICE)
    graphs = {config: recorded([call(config, x, p, out) for p in packed], long=M >= 1024) for config in some}
    seconds = medians({str(config): graph for config, graph in graphs.items()}, 5)
    rule, best = some[0], min(some, key=lambda config: seconds[str(config)])
    once_more = medians({"rule": graphs[rule], "best": graphs[best]}, 15)
    found = {"N": N, "K": K, "M": M, "rule": str(rule), "seconds": seconds}
    return found | {"best": dataclasses.asdict(best), "ratio": once_more["rule"] / once_more["best"]}


def told(result: dict[str, Any]) -> Iterator[str]:
    times = sorted((time, config) for config, time in result["seconds"].items())
    rule, best = result["seconds"][result["rule"]] * 1e6, times[0][0] * 1e6
    yield (
        f"{result['N']}x{result['K']} M={result['M']}: rule {rule:.1f}, best of {len(times)} {best:.1f};"
        f" by themselves {result['ratio']:.2f}"
    )
    for time, config in times[:3]:
        yield f"    {time * 1e6:8.1f}  {config}{'  (the rule)' if config == result['rule'] else ''}"


def write(table: Path, results: list[dict[str, Any]]) -> None:
    device = torch.device(DEVICE, torch.cuda.current_device())
    document = json.loads(table.read_text())
    mine = document.setdefault(measured.key(runtime.arch_of(device), runtime.processors(device)), {})
    layers = mine.setdefault("dense", {})
    for result in results:
        layer = layers.setdefault(f"{result['N']}x{result['K']}", {})
        layer.pop(str(result["M"]), None)
        if result["ratio"] >= WORTH:
            layer[str(result["M"])] = result["best"]
    mine["dense"] = {name: layer for name, layer in layers.items() if layer}
    mine["measured"] = about() | {"date": datetime.date.today().isoformat()}
    table.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="NxK")
    parser.add_argument("--rows", nargs="+", type=int, choices=measured.ROWS, default=measured.ROWS, help="M")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no GPU that torch can use.")
    dtype = getattr(torch, options.dtype)
    cells: list[Cell] = []
    for shape, M in itertools.product(options.shapes, options.rows):
        N, K = map(int, shape.split("x"))
        cells.append((N, K, M, dtype))
    # What takes long is the compiler.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(candidates, cells))
    copy_rate()  # brings up the clocks
    results = []
    for cell, some in zip(cells, found, strict=True):
        results.append(scan(cell, some))
        print("\n".join(told(results[-1])), flush=True)
    if options.json:
        options.json.write_text(json.dumps(about() | {"dtype": options.dtype, "results": results}, indent=1) + "\n")
    if options.write:
        write(options.write, results)


if __name__ == "__main__":
    with torch.no_grad():
        main()
