"""Time of one layer of routed experts on a GPU: ours against other ways to compute it.

    python bench/moe_gpu.py [--shapes qwen3 mixtral] [--tokens 1 16 ...] [--group 128] [--ways ours grouped_mm ...]
                            [--rounds 9] [--json FILE] [--plot FILE]
    python bench/moe_gpu.py --read FILE --plot FILE

bfloat16, symmetric int4. The ways: "ours" is w4a16::moe with the kernel that is chosen here, or with --kernel, its
sorting and adding up included; "grouped_mm" is torch._grouped_mm on weights that were dequantised before and tokens
that were sorted before, with the activation between, as the field measures it: neither sorting nor weighting nor adding
up; "routed" is the same with all of that, in torch ops; "inductor" is torch.compile(backend="inductor") of a module
that gathers the packed weights of each choice, dequantises and multiplies, for one token only. A way that is off by
more than 1 % ends the run.

A time is that of a CUDA graph of calls, divided by the calls. Each has another routing, drawn at random, and every
second one another copy of our weights, so that little of what a call reads is in the cache; one token's choices are of
experts that no other call of the graph has. The ways take turns; a number is the median over the rounds, in
microseconds. "floor" is the time to read the chosen experts' packed weights and x and to write the result, at the rate
at which this device copied a large tensor in the same run. --json keeps seconds. --plot draws from what that holds; it
needs matplotlib (the extra "bench").
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_time import DEVICE, about, copy_rate, kernel_here, medians, recorded
from moe_cpu import Gather
from torch import Tensor

from inductor_ext import kernels
from inductor_ext.formats import PackedInt4
from inductor_ext.kernels import Mlp, Routing


class Shape(NamedTuple):
    E: int
    k: int
    H: int
    I: int  # noqa: E741
    tokens: tuple[int, ...]


SHAPES = {
    "qwen3": Shape(128, 8, 2048, 768, (1, 4, 16, 64, 256, 1024, 4096)),  # Qwen3-30B-A3B
    "mixtral": Shape(8, 2, 4096, 14336, (1, 16, 256, 4096)),  # Mixtral 8x7B
}
MLP = Mlp()


class Given(NamedTuple):
    """The inputs of a call."""

    x: Tensor
    weights: Tensor
    ids: Tensor


# -- weights and routings ----------------------------------------------------------------------------------------------


def weight(E: int, N: int, K: int, G: int, seed: int) -> PackedInt4:
    """The rows of all experts, one after the other."""
    random = torch.Generator(device=DEVICE).manual_seed(seed)
    codes = torch.randint(-(2**31), 2**31 - 1, (E * N, K // 8), dtype=torch.int32, device=DEVICE, generator=random)
    scales = (torch.rand(E * N, K // G, device=DEVICE, generator=random) + 0.5) / (5 * K**0.5)
    return PackedInt4(codes, scales.bfloat16())


def draws(shape: Shape, T: int) -> list[Given]:
    """A dozen calls with few tokens; with many, each reads all experts anyway."""
    count = 12 if T <= 64 else 3
    torch.manual_seed(T)
    apart = torch.randperm(shape.E, device=DEVICE).split(shape.k)
    drawn = []
    for i in range(min(count, len(apart)) if T == 1 else count):
        ids = apart[i][None] if T == 1 else torch.rand(T, shape.E, device=DEVICE).topk(shape.k).indices
        x = torch.randn(T, shape.H, device=DEVICE).bfloat16()
        drawn.append(Given(x, torch.rand(T, shape.k, device=DEVICE).softmax(-1), ids))
    return drawn


# -- ways: the i-th call with these inputs -----------------------------------------------------------------------------

Way = Callable[[int, Given], Callable[[], Tensor]]


def ours(shape: Shape, G: int, first: tuple[PackedInt4, PackedInt4], kernel: str | None) -> Way:
    experts = kernels.load_moe(kernel or kernel_here("experts"))
    second = weight(shape.E, 2 * shape.I, shape.H, G, 2), weight(shape.E, shape.H, shape.I, G, 3)
    copies = [[experts.pack(w, shape.E) for w in pair] for pair in (first, second)]

    def way(i: int, given: Given) -> Callable[[], Tensor]:
        routing = Routing(given.weights, given.ids, None, shape.E)
        return lambda: experts.run(given.x, routing, *copies[i % 2], None, None, MLP, shape.I, (G, G))

    return way


class Dense(NamedTuple):
    """The dequantised weights, [E, N, K]."""

    w13: Tensor
    w2: Tensor

    def __call__(self, rows: Tensor, ends: Tensor) -> Tensor:
        gate, up = torch._grouped_mm(rows, self.w13.transpose(-2, -1), offs=ends).chunk(2, dim=-1)
        return torch._grouped_mm(F.silu(gate) * up, self.w2.transpose(-2, -1), offs=ends)


def routes(ids: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """Which pairs come first, and where the experts' runs end."""
    ordered, order = torch.sort(ids.reshape(-1))
    return order, torch.searchsorted(ordered, torch.arange(E, device=ids.device), right=True, out_int32=True)


def grouped_mm(shape: Shape, dense: Dense) -> Way:
    def way(i: int, given: Given) -> Callable[[], Tensor]:
        order, ends = routes(given.ids, shape.E)
        rows = given.x[order // shape.k]
        return lambda: dense(rows, ends)

    return way


def whole(shape: Shape, dense: Dense, given: Given) -> Tensor:
    order, ends = routes(given.ids, shape.E)
    y = dense(given.x[order // shape.k], ends) * given.weights.reshape(-1)[order].unsqueeze(-1)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return y[place].view(*given.ids.shape, shape.H).sum(dim=1).bfloat16()


def routed(shape: Shape, dense: Dense) -> Way:
    return lambda i, given: lambda: whole(shape, dense, given)


def inductor(shape: Shape, G: int, first: tuple[PackedInt4, PackedInt4]) -> Way:
    with torch.device("meta"):
        module = Gather(shape.E, shape.H, shape.I, G)
    stored = {"gate_up": first[0], "down": first[1]}
    tensors = {f"{name}_codes": w.codes.unflatten(0, (shape.E, -1)) for name, w in stored.items()}
    tensors |= {f"{name}_scales": w.scales.unflatten(0, (shape.E, -1)) for name, w in stored.items()}
    module.load_state_dict(tensors, assign=True)
    compiled = torch.compile(module, backend="inductor", dynamic=False, fullgraph=True)
    return lambda i, given: lambda: compiled(given.x, given.ids, given.weights)


WAYS = ("ours", "grouped_mm", "routed", "inductor")


# -- time --------------------------------------------------------------------------------------------------------------


def check(name: str, y: Tensor, wanted: Tensor) -> None:
    off = float((y.float() - wanted.float()).norm() / wanted.float().norm())
    if not off <= 0.01:
        raise SystemExit(f"{name} is off by {off:.1e}")


def measure(options: argparse.Namespace, name: str, rate: float) -> Iterator[dict[str, Any]]:
    """A result for each number of tokens."""
    shape, G = SHAPES[name], options.group
    E, _, H, I, own = shape  # noqa: E741
    first = weight(E, 2 * I, H, G, 0), weight(E, H, I, G, 1)
    dense = Dense(*(w.dequantize(torch.bfloat16).unflatten(0, (E, -1)) for w in first))
    make: dict[str, Callable[[], Way]] = {
        "ours": functools.partial(ours, shape, G, first, options.kernel),
        "grouped_mm": functools.partial(grouped_mm, shape, dense),
        "routed": functools.partial(routed, shape, dense),
        "inductor": functools.partial(inductor, shape, G, first),
    }
    ways = {way: make[way]() for way in options.ways}
    per_expert = sum(t.numel() * t.element_size() for w in first for t in (w.codes, w.scales)) // E
    for T in options.tokens or own:
        calls = draws(shape, T)
        graphs = {}
        for way, call in ways.items():
            if way == "inductor" and T > 1:
                continue
            if way != "grouped_mm":  # whose result is not the layer's
                check(way, call(0, calls[0])(), whole(shape, dense, calls[0]))
            graphs[way] = recorded([call(i, given) for i, given in enumerate(calls)], long=T >= 1024)
        chosen = sum(len(given.ids.unique()) for given in calls) / len(calls)
        moved = chosen * per_expert + 2 * T * H * 2
        found = {"floor": moved / rate} | medians(graphs, options.rounds)
        yield {"shape": name, "T": T, "experts": chosen, "bytes": moved} | found
    torch.compiler.reset()


# -- table and plot ----------------------------------------------------------------------------------------------------


def line(options: argparse.Namespace, result: dict[str, Any]) -> str:
    names = ("floor", *options.ways)
    cells = [f"{result[name] * 1e6:11.1f}" if name in result else f"{'-':>11}" for name in names]
    return f"{result['shape']:>8} {result['T']:5} {result['experts']:8.1f} " + "".join(cells)


def plot(document: dict[str, Any], file: Path) -> None:
    """Tokens against time."""
    from matplotlib.figure import Figure

    results = document["results"]
    shapes = list(dict.fromkeys(r["shape"] for r in results))
    figure = Figure(figsize=(5 * len(shapes), 4.5), layout="constrained")
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        mine = [r for r in results if r["shape"] == shape]
        for way in ("floor", *WAYS):
            points = [(r["T"], r[way] * 1e6) for r in mine if way in r]
            if points:
                style = {"linestyle": "--", "color": "black"} if way == "floor" else {"marker": "o"}
                axes.plot(*zip(*points, strict=True), label=way, **style)
        axes.set(xscale="log", yscale="log", title=shape, xlabel="tokens", ylabel="microseconds")
        axes.legend()
    figure.suptitle("{device}, bfloat16, G = {group_size}, torch {torch}".format(**document))
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, help="T, instead of each shape's own")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--kernel", help="of ours, instead of the one that is chosen")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--read", type=Path, help="what --json wrote: measure nothing")
    options = parser.parse_args()
    document = json.loads(options.read.read_text()) if options.read else measured(options)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.plot:
        plot(document, options.plot)


@torch.no_grad()
def measured(options: argparse.Namespace) -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise SystemExit("There is no GPU that torch can use.")
    rate = copy_rate()
    kernel = options.kernel or kernel_here("experts")
    document: dict[str, Any] = about() | {"kernel": kernel, "group_size": options.group}
    print("# " + ", ".join(f"{key} {value}" for key, value in document.items()))
    print(f"# copied {rate / 1e12:.2f} TB/s; microseconds")
    print(f"{'shape':>8} {'T':>5} {'experts':>8} " + "".join(f"{name:>11}" for name in ("floor", *options.ways)))
    results = []
    for shape in options.shapes:
        for result in measure(options, shape, rate):
            results.append(result)
            print(line(options, result), flush=True)
    return document | {"copy_bytes_per_s": rate, "results": results}


if __name__ == "__main__":
    main()
