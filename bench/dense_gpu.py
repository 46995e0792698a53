"""Time of one int4 linear on a GPU: ours against other ways to compute it.

    python bench/dense_gpu.py [--dtype float16] [--zeros none] [--group 128] [--shapes 6144x4096 ...] [--rows 1 16 ...]
                              [--ways ours cublas ...] [--rounds 9] [--json FILE] [--plot FILE]
    python bench/dense_gpu.py --read FILE --plot FILE

The ways: "ours" is w4a16::linear with the kernel that is chosen on this device, or with --kernel; "cublas" is F.linear
on a weight that was dequantised before (hipBLASLt on AMD); "inductor" is torch.compile(backend="inductor") of a
function that dequantises and multiplies; "int4pack" is aten's _weight_int4pack_mm (CUDA, bfloat16); "gemlite" is that
package, if it is installed. Before a way is timed its result is compared with float32's, for each number of rows; one
that is off by more than 1 % is left out, with a note.

A time is that of a CUDA graph of calls, so that launching from Python does not count, divided by the calls. They walk
over copies of the weight that together do not fit into the cache, as the layers of a model do; x and the result do stay
there. The ways take turns; a number is the median over the rounds, in microseconds. "floor" is the time to read the
packed weight and x and to write the result, at the rate at which this device copied a large tensor in the same run.
--json keeps seconds. The plot, a roofline, is drawn from what that holds; it needs matplotlib (the extra "bench").
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_time import DEVICE, about, copy_rate, kernel_here, medians, recorded
from torch import Tensor

from inductor_ext import kernels
from inductor_ext.formats import PackedInt4

# More than the L2 of any GPU, with what a graph's other tensors take.
WORKING_SET = 150_000_000

Call = Callable[[Tensor], Tensor]


class Unavailable(Exception):
    """Why a way cannot be timed here."""


# -- weights -----------------------------------------------------------------------------------------------------------


def weight(N: int, K: int, G: int, zeros: str, dtype: torch.dtype, seed: int) -> PackedInt4:
    random = torch.Generator(device=DEVICE).manual_seed(seed)
    codes = torch.randint(-(2**31), 2**31 - 1, (N, K // 8), dtype=torch.int32, device=DEVICE, generator=random)
    scales = (torch.rand(N, K // G, device=DEVICE, generator=random) + 0.5) / K**0.5
    stored = None
    if zeros == "int":
        stored = torch.randint(17, (N, K // G), dtype=torch.uint8, device=DEVICE, generator=random)
    elif zeros == "float":
        stored = (torch.rand(N, K // G, device=DEVICE, generator=random) * 16).to(dtype)
    return PackedInt4(codes, scales.to(dtype), stored)


def bytes_of(weight: PackedInt4) -> int:
    return sum(t.numel() * t.element_size() for t in (weight.codes, weight.scales, weight.zeros) if t is not None)


def zeros_of(weight: PackedInt4) -> Tensor:
    return torch.full_like(weight.scales, 8) if weight.zeros is None else weight.zeros.to(weight.scales.dtype)


# -- ways: a weight -> a function of x ---------------------------------------------------------------------------------


def ours(weight: PackedInt4, kernel: str | None = None) -> Call:
    linear = kernels.load(kernel or kernel_here("dense"))
    packed, N, G = linear.pack(weight), weight.N, weight.group_size
    return lambda x: linear.run(x, packed, None, N, G)


def cublas(weight: PackedInt4) -> Call:
    dense = weight.dequantize(weight.scales.dtype)
    return lambda x: F.linear(x, dense)


@functools.partial(torch.compile, backend="inductor", dynamic=False)  # but for the rows: see measure
def dequantise_and_multiply(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, shifts: Tensor) -> Tensor:
    N, groups = scales.shape
    q = ((codes.unsqueeze(-1) >> shifts) & 15).view(N, groups, -1).to(x.dtype)
    return F.linear(x, ((q - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).view(N, -1))


def inductor(weight: PackedInt4) -> Call:
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=DEVICE)
    given = weight.codes, weight.scales, zeros_of(weight), shifts
    return lambda x: dequantise_and_multiply(x, *given)


def int4pack(weight: PackedInt4) -> Call:
    if weight.scales.dtype != torch.bfloat16 or torch.version.hip is not None:
        raise Unavailable("int4pack is for bfloat16 on CUDA")
    q = weight.stored_codes()
    packed = torch.ops.aten._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).contiguous(), 8)
    shift = (8 - zeros_of(weight)) * weight.scales  # it computes (code - 8) * scale + shift
    pairs, G = torch.stack((weight.scales.t(), shift.t()), -1).contiguous(), weight.group_size
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, G, pairs)


def gemlite(weight: PackedInt4) -> Call:
    if importlib.util.find_spec("gemlite") is None:
        raise Unavailable("gemlite is not installed")
    from gemlite.helper import A16Wn

    made = A16Wn(device=DEVICE, dtype=weight.scales.dtype).from_weights(
        weight.stored_codes(), weight.scales, zeros_of(weight), 4, weight.group_size
    )
    return lambda x: made(x)


WAYS: dict[str, Callable[[PackedInt4], Call]] = {
    "ours": ours, "cublas": cublas, "inductor": inductor, "int4pack": int4pack, "gemlite": gemlite
}  # fmt: skip


# -- time --------------------------------------------------------------------------------------------------------------


def ready(name: str, kernel: str | None, weights: list[PackedInt4]) -> list[Call]:
    """The calls of a way, one a copy of the weight. Raises Unavailable."""
    make = WAYS[name] if name != "ours" else functools.partial(ours, kernel=kernel)
    with others_may_fail(name):
        return [make(weight) for weight in weights]


def require_right(name: str, call: Call, x: Tensor, wanted: Tensor) -> None:
    """Raises Unavailable."""
    with others_may_fail(name):
        off = float((call(x).float() - wanted).norm() / wanted.norm())
    if not off <= 0.01:
        raise Unavailable(f"{name} is off by {off:.1e}")


@contextlib.contextmanager
def others_may_fail(name: str) -> Iterator[None]:
    """An error in another's package or op is a note, and the other ways go on."""
    try:
        yield
    except Unavailable:
        raise
    except Exception as error:
        if name == "ours":
            raise
        raise Unavailable(f"{name}: {type(error).__name__}: {str(error).partition('.')[0]}") from error


def measure(options: argparse.Namespace, N: int, K: int, rate: float) -> Iterator[dict[str, Any]]:
    """A result for each number of rows."""
    dtype = getattr(torch, options.dtype)
    one = weight(N, K, options.group, options.zeros, dtype, 0)
    size = bytes_of(one)
    copies = max(2, -(-WORKING_SET // size))
    weights = [one, *(weight(N, K, options.group, options.zeros, dtype, seed) for seed in range(1, copies))]
    dense, calls = one.dequantize(), {}
    for name in options.ways:
        # Four times the bytes, so a quarter of the copies.
        some = weights[: max(2, -(-copies // 4))] if name == "cublas" else weights
        try:
            calls[name] = ready(name, options.kernel, some)
        except Unavailable as why:
            print(f"# {N}x{K}: left out: {why}")
    for M in options.rows:
        x = torch.randn(M, K, dtype=dtype, device=DEVICE)
        if M > 1:
            torch._dynamo.mark_dynamic(x, 0)  # Inductor compiles for 1 and for more, not for each
        wanted, graphs = x.float() @ dense.t(), {}
        for name, some in calls.items():
            try:
                require_right(name, some[0], x, wanted)
            except Unavailable as why:
                print(f"# {N}x{K}, {M} rows: left out: {why}")
                continue
            graphs[name] = recorded([functools.partial(call, x) for call in some], long=M >= 1024)
        moved = size + (M * K + M * N) * x.element_size()
        yield {"N": N, "K": K, "M": M, "bytes": moved, "floor": moved / rate} | medians(graphs, options.rounds)
    torch.compiler.reset()


# -- table and plot ----------------------------------------------------------------------------------------------------


def line(options: argparse.Namespace, result: dict[str, Any]) -> str:
    names = ("floor", *options.ways)
    cells = [f"{result[name] * 1e6:10.1f}" if name in result else f"{'-':>10}" for name in names]
    return f"{result['N']:6} {result['K']:6} {result['M']:5} " + "".join(cells)


def plot(document: dict[str, Any], file: Path) -> None:
    """Arithmetic intensity against throughput; the roofs are the copy rate and the fastest dense matmul of the run."""
    from matplotlib.figure import Figure

    results = document["results"]
    shapes = list(dict.fromkeys((r["N"], r["K"]) for r in results))
    ways = [name for name in WAYS if any(name in r for r in results)]

    def rate(r: dict[str, Any], way: str) -> float:
        return float(2 * r["M"] * r["N"] * r["K"] / r[way] / 1e12)

    top = max((rate(r, "cublas") for r in results if "cublas" in r), default=None)
    figure = Figure(figsize=(5 * len(shapes), 4.5), layout="constrained")
    for axes, (N, K) in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        mine = [r for r in results if (r["N"], r["K"]) == (N, K)]
        intensity = [2 * r["M"] * N * K / r["bytes"] for r in mine]
        roof = [i * document["copy_bytes_per_s"] / 1e12 for i in intensity]
        axes.plot(intensity, roof if top is None else [min(r, top) for r in roof], "k--", label="roof")
        for way in ways:
            points = [(i, rate(r, way)) for i, r in zip(intensity, mine, strict=True) if way in r]
            axes.plot(*zip(*points, strict=True), marker="o", label=way)
        axes.set(xscale="log", yscale="log", title=f"{N} x {K}", xlabel="FLOP / byte, weight packed", ylabel="TFLOP/s")
        axes.legend()
    about = "{device}, {dtype}, zeros: {zeros}, G = {group_size}, torch {torch}".format(**document)
    figure.suptitle(about)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--zeros", choices=["none", "int", "float"], default="none")
    parser.add_argument("--group", type=int, default=128)
    shapes = ["6144x4096", "28672x4096", "4096x14336", "8192x8192"]
    parser.add_argument("--shapes", nargs="+", default=shapes, help="NxK")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64, 256, 512, 1024, 4096], help="M")
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
    document = (
        about()
        | {"kernel": options.kernel or kernel_here("dense")}
        | {"dtype": options.dtype, "zeros": options.zeros, "group_size": options.group}
    )
    print("# " + ", ".join(f"{key} {value}" for key, value in document.items()))
    print(f"# copied {rate / 1e12:.2f} TB/s; microseconds")
    print(f"{'N':>6} {'K':>6} {'M':>5} " + "".join(f"{name:>10}" for name in ("floor", *options.ways)))
    results = []
    for shape in options.shapes:
        N, K = (int(n) for n in shape.split("x"))
        for result in measure(options, N, K, rate):
            results.append(result)
            print(line(options, result), flush=True)
    return document | {"copy_bytes_per_s": rate, "results": results}


if __name__ == "__main__":
    main()
