"""Time and memory of every conversion to another kernel's or checkpoint's layout, and back (`inductor_ext/layouts/`).

    python bench/convert.py [--json FILE] [--rounds 3] [--experts 128] [--hidden 2048] [--intermediate 768]
                            [--group 128]

The experts of one layer, by default of Qwen3-30B-A3B's shapes: w13 [E, 2 I, H] and w2 [E, H, I], symmetric, and also
asymmetric where the layout has zeros. GB/s counts the bytes of the packed codes; the time is the median of the rounds,
each into new memory, as when a model is loaded; a plain copy is measured beside them. "result" is what a conversion
gives, "peak" the most memory that it takes besides what it is given, the result among it; both by the bytes of the
packed codes. It is read from the system, so that weights of less than 64 MB tell nothing. FlashInfer's layout takes
groups of 32; its weights are split into such groups before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inductor_ext.layouts import Experts, adjust, awq, emulation, flashinfer, gptq, marlin, rdna3, triton, wmma, xpu


class Way(NamedTuple):
    name: str
    weight: Experts
    pack: Callable[[Experts], Any]
    unpack: Callable[[Any], Experts]


def experts(E: int, N: int, K: int, G: int, zeros: bool) -> Experts:
    codes = torch.randint(-(2**31), 2**31 - 1, (E, N, K // 8), dtype=torch.int32)
    scales = (torch.rand(E, N, K // G) + 0.1).bfloat16()
    return Experts(codes, scales, torch.randint(1, 16, scales.shape, dtype=torch.uint8) if zeros else None)


def copy(weight: Experts) -> Experts:
    return Experts(weight.codes.clone(), weight.scales.clone())


def ways(weight: Experts, gated: bool) -> Iterator[Way]:
    kind = "symmetric" if weight.zeros is None else "asymmetric"
    if weight.zeros is None:
        yield Way("(a copy)", weight, copy, copy)
    yield Way(f"marlin, {kind}", weight, marlin.pack, marlin.unpack)
    yield Way(f"gptq, {kind}", weight, gptq.pack, gptq.unpack)
    yield Way(f"awq, {kind}", weight, awq.pack, awq.unpack)
    yield Way(f"triton, {kind}", weight, triton.pack, triton.unpack)
    yield Way(f"rdna3, {kind}", weight, rdna3.pack, rdna3.unpack)

    def codes(dense: Tensor) -> Experts:
        return emulation.unpack(dense, weight.scales, weight.zeros)

    yield Way(f"emulation, {kind}", weight, emulation.pack, codes)
    if weight.zeros is None:
        yield Way("xpu", weight, xpu.pack, xpu.unpack)
        yield Way("wmma gfx1100", weight, lambda w: wmma.pack(w, "gfx1100"), wmma.unpack)
        yield Way("wmma gfx1151", weight, lambda w: wmma.pack(w, "gfx1151"), wmma.unpack)
        yield Way(
            "flashinfer",
            adjust.finer(weight, 32),
            lambda w: flashinfer.pack(w, gated),
            lambda packed: flashinfer.unpack(packed, gated),
        )


def measure(call: Callable[[Any], Any], given: Any, rounds: int) -> tuple[float, int]:
    """Seconds, and the most bytes that were taken at once."""
    seconds, peak = [], 0
    for _ in range(rounds):
        before = _resident(reset=True)
        begin = time.perf_counter()
        result = call(given)
        seconds.append(time.perf_counter() - begin)
        peak = max(peak, _resident() - before)
        del result
    return statistics.median(seconds), peak


def _resident(reset: bool = False) -> int:
    """The most bytes that this process has had in memory, since the last reset. Linux only."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def size(result: Any) -> int:
    tensors = [result] if isinstance(result, Tensor) else [t for t in vars_of(result) if isinstance(t, Tensor)]
    return sum(t.untyped_storage().nbytes() for t in tensors)


def vars_of(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, tuple) else tuple(vars(result).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    for name, value in (("experts", 128), ("hidden", 2048), ("intermediate", 768), ("group", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    E, H, I, G = options.experts, options.hidden, options.intermediate, options.group  # noqa: E741

    load = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    print(f"{'':4} {'layout':24} {'there GB/s':>10} {'peak':>6} {'result':>6} {'back GB/s':>10} {'peak':>6}")
    for name, N, K in (("w13", 2 * I, H), ("w2", H, I)):
        for zeros in (False, True):
            for way in ways(experts(E, N, K, G, zeros), name == "w13"):
                nbytes = way.weight.codes.nbytes
                packed = way.pack(way.weight)
                there, most = measure(way.pack, way.weight, options.rounds)
                back, most_back = measure(way.unpack, packed, options.rounds)
                row = {
                    "projection": name, "layout": way.name, "bytes": nbytes,
                    "there_s": there, "there_peak": most, "result_bytes": size(packed),
                    "back_s": back, "back_peak": most_back,
                }  # fmt: skip
                rows.append(row)
                print(
                    f"{name:4} {way.name:24} {nbytes / there / 1e9:10.2f} {most / nbytes:6.2f}"
                    f" {row['result_bytes'] / nbytes:6.2f} {nbytes / back / 1e9:10.2f} {most_back / nbytes:6.2f}",
                    flush=True,
                )
                del packed
    if options.json:
        machine = {"threads": torch.get_num_threads(), "cpus": os.cpu_count(), "load": [load, os.getloadavg()[0]]}
        shapes = {"experts": E, "hidden": H, "intermediate": I, "group": G}
        document = machine | {"torch": torch.__version__, "shapes": shapes, "results": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
