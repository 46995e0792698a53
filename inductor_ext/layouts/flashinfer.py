"""What FlashInfer's TensorRT-LLM experts (trtllm_mxint4_block_scale_moe, sm_100) read: MXINT4, groups of 32, scales in
bfloat16, codes as signed nibbles.

    weights  uint8 [E, K/256, N, 128]: 256 neighbours along k of a row, the lower of two in the low nibble, then the
             next row
    scales   bfloat16 [E, N, K/32], of which the memory is tiles [N/128, K/128, 32, 4, 4]: row 32 i + j of 128 rows and
             column c of 4 at [j, i, c]

The rows change places, weights and scales alike. Of w13, gate and up as halves, ups come first and alternate with the
gates: up 0, gate 0, up 1, ... Then in every 32 rows, row 4 a + b goes to 8 b + a: the order in which the epilogue of a
128-row tile holds them.
Read in the sources of FlashInfer's and vLLM's preparation for this kernel (shuffle of A's rows for epilogue tiles of
128, reordering for gated activations, block layout of 128 bytes, 128x4 layout of scales). Not run: no such GPU was at
hand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from inductor_ext.formats import CODE_BOOKS
from inductor_ext.layouts.experts import Experts, four_bits, need, none, scale_dtypes, tiles

GROUP = 32
ROWS, COLUMNS = 128, 256
"""Of a tile."""
_SIGN = CODE_BOOKS["two's complement"][0]
"""A code differs from its signed nibble in this bit."""


class MxInt4(NamedTuple):
    weights: Tensor
    scales: Tensor


def pack(weight: Experts, gated: bool) -> MxInt4:
    """``gated``: the weight is w13 with gate and up as halves."""
    E, N, K = weight.E, weight.N, weight.K
    four_bits(weight)
    none(weight, "zeros", "order", "bias")
    need(weight.group_size == GROUP, "group size", f"{GROUP} (adjust.finer makes it so)", weight.group_size)
    scale_dtypes(weight, torch.bfloat16)
    tiles(weight, ROWS, COLUMNS)
    # 16 int64 are 256 codes of a row.
    words = weight.codes.contiguous().view(torch.int64).view(E, N, K // 256, 16)
    weights = words.new_empty(E, K // 256, N, 16)
    _copy(_rows(weights.movedim(1, 2), gated), _source(words, gated))
    weights.bitwise_xor_(_signs())
    scales = torch.empty_like(weight.scales, memory_format=torch.contiguous_format)
    _copy(_rows(scales, gated), _source(weight.scales, gated))
    tiled = scales.view(E, N // 128, 4, 32, K // 128, 4).permute(0, 1, 4, 3, 2, 5)
    return MxInt4(weights.view(torch.uint8), tiled.reshape(scales.shape))


def unpack(packed: MxInt4, gated: bool) -> Experts:
    E, across, N, _ = packed.weights.shape
    K = across * 256
    stored = packed.weights.contiguous().view(torch.int64)
    words = stored.new_empty(E, N, across, 16)
    _copy(_source(words, gated), _rows(stored.movedim(1, 2), gated))
    words.bitwise_xor_(_signs())
    rows = packed.scales.view(E, N // 128, K // 128, 32, 4, 4).permute(0, 1, 4, 3, 2, 5).reshape(E, N, K // 32)
    scales = torch.empty_like(rows)
    _copy(_source(scales, gated), _rows(rows, gated))
    return Experts(words.view(torch.int32).view(E, N, K // 8), scales)


def _source(values: Tensor, gated: bool) -> tuple[Tensor, ...]:
    """Views of rows [E, N, ...] in the canonical order as [E, N/32, a, b, ...]; of ups and gates each."""
    if not gated:
        return (values.unflatten(1, (-1, 8, 4)),)
    gates, ups = values.unflatten(1, (2, -1, 8, 2)).unbind(1)
    return ups, gates


def _rows(values: Tensor, gated: bool) -> tuple[Tensor, ...]:
    """Views of the kernel's rows [E, N, ...], as ``_source``. The lowest bit of b tells gates from ups."""
    if not gated:
        return (values.unflatten(1, (-1, 4, 8)).transpose(2, 3),)
    ups, gates = values.unflatten(1, (-1, 2, 2, 8)).unbind(3)
    return ups.transpose(2, 3), gates.transpose(2, 3)


def _copy(to: tuple[Tensor, ...], source: tuple[Tensor, ...]) -> None:
    for mine, yours in zip(to, source, strict=True):
        mine.copy_(yours)


def _signs() -> int:
    return int.from_bytes(bytes([_SIGN << 4 | _SIGN]) * 8, "little", signed=True)
