"""Time of one layer of gpt-oss's routed experts on a GPU, MXFP4 weights: ours against other ways to compute it.

    python bench/mxfp4_gpu.py [--shapes gpt-oss-20b gpt-oss-120b] [--tokens 1 16 ...] [--ways ours w4a8 ...]
                              [--rounds 9] [--json FILE]
    python bench/mxfp4_gpu.py --kernels     us of each kernel of ours, by torch's profiler
    python bench/mxfp4_gpu.py --scan        ours with other launch parameters than those of kernels/gpu/tuning.py

bfloat16, with biases. The ways: "ours" is kernel triton of w4a16::moe_mxfp4 (W4A16), sorting and adding up included;
"w4a8" that of w4a16::moe_gemm_a8w4; "dot_scaled" the same layer with Triton's own decoding of MXFP4, tl.dot_scaled, in
the loop; "grouped_mm" is torch._grouped_mm on weights that were dequantised before and tokens that were sorted before,
with the activation between in one kernel that Inductor made: no bias, sorting, weighting or adding up; "routed" is the
same with all of that, in torch ops. A way that is off by more than 1 % (3 % with fp8, whose rounding a bfloat16 h tips)
ends the run.

Times are taken as in bench/moe_gpu.py. "floor" is the larger of the time to read the chosen experts' codes and scales
and x and to write the result at 4.25 TB/s, and of the time of the products at 790 TFLOP/s, which are an H200's.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_time import DEVICE, about, copy_rate, medians, recorded
from moe_gpu import Given, Shape, Way, draws, routes
from torch import Tensor

from inductor_ext import kernels
from inductor_ext.formats import PackedMxfp4
from inductor_ext.fp8 import to_fp8
from inductor_ext.kernels import Mlp, Routing
from inductor_ext.kernels.gpu import tuning
from inductor_ext.kernels.gpu.tuning import MoeConfig

TOKENS = (1, 16, 256, 4096)
SHAPES = {
    "gpt-oss-20b": Shape(32, 4, 2880, 2880, TOKENS),
    "gpt-oss-120b": Shape(128, 4, 2880, 2880, TOKENS),
}
MLP = Mlp("swigluoai", "interleaved", alpha=1.702, limit=7.0)
BYTES_PER_S, FLOPS_PER_S = 4.25e12, 790e12


# -- weights -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Layer:
    """The rows of all experts, one after the other."""

    w13: PackedMxfp4
    w2: PackedMxfp4
    w13_bias: Tensor
    w2_bias: Tensor

    @property
    def bytes(self) -> int:
        return sum(t.numel() for w in (self.w13, self.w2) for t in (w.codes, w.scales))


def made(shape: Shape, seed: int) -> Layer:
    random = torch.Generator(device=DEVICE).manual_seed(seed)
    integers = functools.partial(torch.randint, dtype=torch.uint8, device=DEVICE, generator=random)

    def weight(N: int, K: int) -> PackedMxfp4:
        return PackedMxfp4(integers(256, (shape.E * N, K // 2)), integers(118, 122, (shape.E * N, K // 32)))

    def bias(N: int) -> Tensor:
        return torch.randn(shape.E, N, device=DEVICE, generator=random) / 8

    H, I = shape.H, shape.I  # noqa: E741
    return Layer(weight(2 * I, H), weight(H, I), bias(2 * I), bias(H))


def dense(weight: PackedMxfp4, E: int) -> Tensor:
    """bfloat16 [E, N, K]"""
    N = weight.N // E
    out = torch.empty(E, N, weight.K, dtype=torch.bfloat16, device=DEVICE)
    for e in range(E):
        rows = slice(e * N, (e + 1) * N)
        out[e] = PackedMxfp4(weight.codes[rows], weight.scales[rows]).dequantize(torch.bfloat16)
    return out


# -- ways --------------------------------------------------------------------------------------------------------------

SCALES = (1 / 64, 1 / 8)


def ours(shape: Shape, layers: tuple[Layer, Layer], kernel: str, fp8: bool = False) -> Way:
    experts = kernels.load_mxfp4(kernel)
    packed = [[experts.pack(w, shape.E) for w in (layer.w13, layer.w2)] for layer in layers]
    scales = tuple(torch.tensor([s], device=DEVICE) for s in SCALES) if fp8 else None

    def way(i: int, given: Given) -> Callable[[], Tensor]:
        routing = Routing(given.weights, given.ids, None, shape.E)
        (w13, w2), layer = packed[i % 2], layers[i % 2]
        return lambda: experts.run(given.x, routing, w13, w2, layer.w13_bias, layer.w2_bias, MLP, shape.I, scales)

    return way


@torch.compile(dynamic=True)
def act(h: Tensor) -> Tensor:
    gate, up = h[:, ::2].float(), h[:, 1::2].float()
    gate, up = gate.clamp(max=MLP.limit), up.clamp(-MLP.limit, MLP.limit)
    return ((up + 1) * gate * torch.sigmoid(gate * MLP.alpha)).bfloat16()


class Dense:
    """Dequantised weights, and what they compute."""

    def __init__(self, shape: Shape, layer: Layer) -> None:
        self.shape, self.layer = shape, layer
        self.w13, self.w2 = dense(layer.w13, shape.E), dense(layer.w2, shape.E)

    def projections(self, rows: Tensor, ends: Tensor) -> Tensor:
        h = torch._grouped_mm(rows, self.w13.transpose(-2, -1), offs=ends)
        return torch._grouped_mm(act(h), self.w2.transpose(-2, -1), offs=ends)

    def grouped_mm(self, i: int, given: Given) -> Callable[[], Tensor]:
        order, ends = routes(given.ids, self.shape.E)
        rows = given.x[order // self.shape.k]
        return lambda: self.projections(rows, ends)

    def routed(self, i: int, given: Given) -> Callable[[], Tensor]:
        return lambda: self.whole(given)

    def whole(self, given: Given, fp8: bool = False) -> Tensor:
        order, ends = routes(given.ids, self.shape.E)
        chosen = given.ids.reshape(-1)[order]
        rows = _rounded(given.x, SCALES[0], fp8)[order // self.shape.k]
        h = torch._grouped_mm(rows, self.w13.transpose(-2, -1), offs=ends) + self.layer.w13_bias[chosen]
        h = _rounded(act(h), SCALES[1], fp8)
        y = torch._grouped_mm(h, self.w2.transpose(-2, -1), offs=ends) + self.layer.w2_bias[chosen]
        y = y * given.weights.reshape(-1)[order].unsqueeze(-1)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return y[place].view(*given.ids.shape, self.shape.H).sum(dim=1).bfloat16()


def _rounded(x: Tensor, scale: float, fp8: bool) -> Tensor:
    return (to_fp8(x, torch.tensor(scale, device=DEVICE)).float() * scale).bfloat16() if fp8 else x


WAYS = ("ours", "w4a8", "dot_scaled", "grouped_mm", "routed")


# -- time --------------------------------------------------------------------------------------------------------------


def check(name: str, y: Tensor, wanted: Tensor, limit: float) -> None:
    off = float((y.float() - wanted.float()).norm() / wanted.float().norm())
    if not off <= limit:
        raise SystemExit(f"{name} is off by {off:.1e}")


def floor(shape: Shape, T: int, experts: float, layer: Layer) -> float:
    moved = experts * layer.bytes / shape.E + 2 * T * shape.H * 2
    return max(moved / BYTES_PER_S, 6 * T * shape.k * shape.H * shape.I / FLOPS_PER_S)


def measure(options: argparse.Namespace, name: str) -> Iterator[dict[str, Any]]:
    """A result for each number of tokens."""
    shape = SHAPES[name]
    layers = made(shape, 0), made(shape, 1)
    plain = Dense(shape, layers[0])
    make: dict[str, Callable[[], Way]] = {
        "ours": lambda: ours(shape, layers, "triton"),
        "w4a8": lambda: ours(shape, layers, "triton", fp8=True),
        "dot_scaled": lambda: ours(shape, layers, "dot_scaled"),
        "grouped_mm": lambda: plain.grouped_mm,
        "routed": lambda: plain.routed,
    }
    ways = {way: make[way]() for way in options.ways}
    drawn = {T: draws(shape, T) for T in options.tokens}
    own = [way for way in ways if way in ("ours", "w4a8", "dot_scaled")]
    compiled([ways[way](0, calls[0]) for calls in drawn.values() for way in own])
    for T, calls in drawn.items():
        graphs = {}
        for way, call in ways.items():
            if way in own:
                fp8 = way == "w4a8"
                check(way, call(0, calls[0])(), plain.whole(calls[0], fp8), 0.03 if fp8 else 0.01)
            graphs[way] = recorded([call(i, given) for i, given in enumerate(calls)], long=T >= 1024)
        chosen = sum(len(given.ids.unique()) for given in calls) / len(calls)
        found = {"floor": floor(shape, T, chosen, layers[0])} | medians(graphs, options.rounds)
        yield {"shape": name, "T": T, "experts": chosen} | found


def compiled(calls: Iterable[Callable[[], Any]]) -> list[Any]:
    """Runs each once, and gives the results. Compiling is what takes the time of a short run, and threads share it."""
    with ThreadPoolExecutor(16) as threads:
        results = list(threads.map(lambda call: call(), calls))
    torch.cuda.synchronize()
    return results


def line(options: argparse.Namespace, result: dict[str, Any]) -> str:
    cells = [f"{result[name] * 1e6:11.1f}" for name in ("floor", *options.ways)]
    ratio = f"  {result['ours'] / result['grouped_mm']:.2f}" if {"ours", "grouped_mm"} <= result.keys() else ""
    return f"{result['shape']:>12} {result['T']:5} {result['experts']:8.1f} " + "".join(cells) + ratio


# -- where the time goes, and other parameters -------------------------------------------------------------------------


def by_kernel(options: argparse.Namespace, name: str) -> None:
    """us of each kernel of a call, their median over the calls."""
    shape = SHAPES[name]
    way = ours(shape, (made(shape, 0), made(shape, 1)), "triton")
    for T in options.tokens:
        calls = [way(i, given) for i, given in enumerate(draws(shape, T))]
        for call in calls:
            call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for call in calls * 3:
                call()
            torch.cuda.synchronize()
        times: dict[str, list[float]] = {}
        for event in profile.events():
            times.setdefault(event.name, []).append(event.device_time)
        told = {key: sorted(values)[len(values) // 2] for key, values in times.items() if "kernel" in key}
        print(f"{name:>12} {T:5} " + ", ".join(f"{key} {value:.1f}" for key, value in told.items()), flush=True)


def candidates(up: MoeConfig, down: MoeConfig, T: int) -> Iterator[tuple[MoeConfig, MoeConfig]]:
    """Parameters of both projections, which have the same blocks: those given, then one changed at a time."""
    blocks = {1: (8,), 16: (8, 16), 256: (8, 16, 32, 64)}.get(T, (64, 128, 256))
    for BM in blocks:
        replace = functools.partial(dataclasses.replace, BM=BM)
        yield replace(up), replace(down)
        for BN, warps, stages in _tiles(BM):
            if (BN, warps, stages) != (up.BN, up.num_warps, up.STAGES):
                yield replace(up, BN=BN, num_warps=warps, STAGES=stages), replace(down)
            if (BN, warps, stages) != (down.BN, down.num_warps, down.STAGES):
                yield replace(up), replace(down, BN=BN, num_warps=warps, STAGES=stages)


def _tiles(BM: int) -> list[tuple[int, int, int]]:
    """BN, num_warps, STAGES"""
    if BM == 8:
        return [(32, 1, 4), (32, 2, 4), (64, 2, 3), (64, 2, 4), (64, 2, 5), (64, 4, 4), (128, 4, 3), (128, 4, 4)]
    if BM <= 32:
        return [(64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3), (128, 8, 4)]
    if BM == 64:
        return [(64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3), (128, 8, 4), (256, 8, 3)]
    if BM == 128:
        return [(64, 4, 3), (128, 4, 2), (128, 8, 3), (128, 8, 4), (256, 8, 2), (256, 8, 3)]
    return [(128, 8, 2), (128, 8, 3)]


def scan(options: argparse.Namespace, name: str) -> None:
    """us of a layer with each pair of parameters, the fastest first."""
    shape, chosen, now = SHAPES[name], tuning.mxfp4, threading.local()
    way = ours(shape, (made(shape, 0), made(shape, 1)), "triton")
    tuning.mxfp4 = lambda *_: now.pair
    for T in options.tokens:
        calls, own = draws(shape, T), chosen(T * shape.k, shape.E, "sm_90")

        def runs(pair: tuple[MoeConfig, MoeConfig], calls: list[Given] = calls) -> bool:
            now.pair = pair
            try:
                way(0, calls[0])()
            except triton.runtime.errors.OutOfResources as error:
                print(f"# {[_short(c) for c in pair]}: {error}", flush=True)
                return False
            return True

        pairs = list(dict.fromkeys(candidates(*own, T)))
        found = []
        for now.pair in itertools.compress(pairs, compiled([functools.partial(runs, pair) for pair in pairs])):
            graph = recorded([way(i, given) for i, given in enumerate(calls)], long=T >= 1024)
            found.append((medians({"ours": graph}, 5)["ours"], now.pair))
        print(f"{name} T={T}; (BN, BM, warps, stages) of up and down; now {[_short(c) for c in own]}")
        for time, pair in sorted(found, key=lambda entry: entry[0])[:12]:
            print(
                f"  {time * 1e6:9.1f}  {_short(pair[0])}  {_short(pair[1])}{'  now' if pair == own else ''}", flush=True
            )


def _short(c: MoeConfig) -> tuple[int, ...]:
    return c.BN, c.BM, c.num_warps, c.STAGES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--scan", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no GPU that torch can use.")
    rate, document = copy_rate(), about()
    print("# " + ", ".join(f"{key} {value}" for key, value in document.items()))
    print(f"# copied {rate / 1e12:.2f} TB/s; microseconds", flush=True)
    with torch.no_grad():
        if options.scan or options.kernels:
            for name in options.shapes:
                (scan if options.scan else by_kernel)(options, name)
            return
        names = "".join(f"{name:>11}" for name in ("floor", *options.ways))
        print(f"{'shape':>12} {'T':>5} {'experts':>8} {names}  ours/grouped_mm")
        results = []
        for name in options.shapes:
            for result in measure(options, name):
                results.append(result)
                print(line(options, result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(document | {"copy_bytes_per_s": rate, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
