"""Launches of csrc/hip/wmma.hip: x W^T for 16 rows or more, dense and of routed experts."""

from __future__ import annotations

import ctypes
import dataclasses
import enum

import torch
from torch import Tensor

from inductor_ext.bits import copy_reordered
from inductor_ext.formats import EXLLAMA, SEQUENTIAL, PackedInt
from inductor_ext.kernels.gpu.workspace import counters
from inductor_ext.kernels.hip import dot, runtime

HEIGHTS = (16, 32, 64)
"""Of a block: rows."""
_WIDTHS = {16: 128, 32: 256, 64: 256}
_STAGES = (128, 64, 32)
_BLOCKS = 192
"""Splits of k make at least about so many. Not tuned: nobody has run it."""


class WmmaArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scales", "zeros", "bias", "slots", "experts", "weights")),
        *((name, ctypes.c_void_p) for name in ("out", "partials", "counters")),
        *((name, ctypes.c_int32) for name in ("K", "N", "G", "stride", "E", "rows", "columns", "per_row")),
        *((name, ctypes.c_int32) for name in ("blocks", "splits", "stages", "kind", "weigh", "gate_up", "activation")),
        *((name, ctypes.c_int32) for name in ("wide_bias", "wide_out")),
        *((name, ctypes.c_float) for name in ("alpha", "limit")),
    )


class Weigh(enum.IntEnum):
    """What a slot's weight multiplies."""

    NOTHING = 0
    INPUT = 1
    RESULT = 2


GATE_UP = {"none": 0, "halves": 1, "interleaved": 2}
ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "swigluoai": 5}
"""As csrc/hip/tile.h and activation.h number them."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """Tensors as csrc/hip/dot.h has them, with E in front; or, by row, as the field's WMMA kernel has them: words
    [E, N, K/8], whose rows may be apart, scales [E, N, K/G], no zeros."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    kind: dot.Zeros = dot.Zeros.EIGHT
    bias: Tensor | None = None
    by_row: bool = False


@dataclasses.dataclass(frozen=True)
class Slots:
    """Choices of an expert: row ``slot // per_row`` of x makes row ``slot`` of the result."""

    sorted: Tensor
    """int32, by blocks of one expert as moe_align_block_size gives them."""
    experts: Tensor
    """int32, of each block, or -1."""
    height: int
    """Of a block."""
    per_row: int
    weigh: Weigh = Weigh.NOTHING
    weights: Tensor | None = None
    """float32, by slot."""


@dataclasses.dataclass(frozen=True)
class Act:
    """What is done to a product, if it is not to be left as it is."""

    activation: str | None = None
    gate_up: str = "none"
    alpha: float = 1.0
    limit: float = float("inf")


def by_row(weight: PackedInt, experts: int, arch: str) -> Weight:
    """The rows of all experts, one expert after the other, in the field's layout for its WMMA kernel, which knows no
    zeros but 8.

    On gfx1151 rows of a multiple of 1024 bytes lie 128 bytes further apart: its caches put such rows in the same place.
    """
    if weight.zeros is not None or weight.order is not None:
        raise ValueError("The layout by row has neither zeros nor an order.")
    N, across = weight.N // experts, weight.K // 8
    apart = across + (32 if arch == "gfx1151" and across % 256 == 0 else 0)
    every = weight.codes.new_empty(experts, N, apart)
    every[..., across:] = 0
    words = every[..., :across]
    copy_reordered(weight.codes.unflatten(0, (experts, N)), SEQUENTIAL, words, EXLLAMA)
    return Weight(words, weight.scales.view(experts, N, -1), by_row=True)


def gemm(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, kind: dot.Zeros, bias: Tensor | None, out: Tensor
) -> None:
    """As dense.gemm."""
    M = x.shape[0]
    height = next((h for h in HEIGHTS if h >= M), HEIGHTS[-1])
    _launch(x, Weight(words[None], scales[None], zeros, kind, bias), None, Act(), out, height, -(-M // height), 1)


def routed(x: Tensor, weight: Weight, slots: Slots, out: Tensor, act: Act = Act()) -> None:
    """Writes the rows of out [slots, columns] that blocks of an expert name; others stay as they are.

    out is float32 or has x's dtype.
    """
    blocks = min(slots.experts.numel(), slots.sorted.numel() // slots.height)
    _launch(x, weight, slots, act, out, slots.height, blocks, slots.per_row)


def _launch(
    x: Tensor, weight: Weight, slots: Slots | None, act: Act, out: Tensor, height: int, blocks: int, per_row: int
) -> None:
    x, K = dot.on_line(x), x.shape[1]
    N, groups = weight.words.shape[-1], weight.scales.shape[-2]
    if weight.by_row:
        N, groups = weight.scales.shape[-2:]
    stage = next(s for s in _STAGES if K // groups % s == 0)
    across = -(-N // _WIDTHS[height])
    if blocks * across == 0:
        return
    splits, stages, partials, arrived = 1, K // stage, None, None
    if slots is None:
        splits, stages = _split(blocks * across, K // stage)
    if splits > 1:
        partials = torch.empty(splits, out.shape[0], N, dtype=torch.float32, device=x.device)
        arrived = counters(blocks * across * (height // 8), x.device)
    given = (x, weight.words, weight.scales, weight.zeros, weight.bias)
    routing = (None, None, None) if slots is None else (slots.sorted, slots.experts, slots.weights)
    weigh = Weigh.NOTHING if slots is None else slots.weigh
    args = WmmaArgs(
        *map(dot.pointer, (*given, *routing, out, partials, arrived)),
        K, N, K // groups, weight.words.stride(-2), weight.words.shape[0], *out.shape, per_row,
        blocks, splits, stages, weight.kind, weigh, GATE_UP[act.gate_up], ACTIVATIONS[act.activation],
        weight.bias is not None and weight.bias.dtype == torch.float32, out.dtype == torch.float32,
        act.alpha, act.limit,
    )  # fmt: skip
    dtype = dot.NAMES[x.dtype]
    name = f"by_row_{dtype}_{stage}" if weight.by_row else f"{dtype}_{height}_{stage}"
    runtime.launch(x.device, f"wmma_{name}", args, (blocks, across, splits), height * 4)


def _split(tiles: int, stages: int) -> tuple[int, int]:
    """How many blocks share the k of a tile, and the stages of one."""
    wanted = max(1, min(-(-_BLOCKS // tiles), stages // 2))
    each = -(-stages // wanted)
    return -(-stages // each), each
