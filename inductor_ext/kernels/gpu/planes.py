"""The layout that the Triton kernels read: codes in planes of 64 columns, in tiles that lie in one piece; scales and
zeros in pairs of groups.

    qweight  int16 [Np/64, Kp/256, 4096]: the tiles of 64 rows and 256 columns. A row of a tile is 64 words; nibble p of
             word j is column 64 p + j, so that one mask and shift gives neighbours ("a plane"), and two words side by
             side in a register give two 16-bit numbers with no shuffle. Words 0..31 of all rows come first, then words
             32..63: a kernel takes a tile at once or in two halves, and reads one or two runs of memory.
    scales   [Gp/2, Np, 2] in 16-bit floats: two groups are one 32-bit load; or float32 [Gp, Np]
    zeros    the same: int16 for 0..16, else in the float dtype they came in
    order    int32 [K]: stored column p holds the weight's column order[p] (the inverse of the canonical form's)

Np, Kp: N and K filled up to a multiple of 64 and 256. Gp is the number of groups that Kp columns have, made even for
16-bit dtypes. What fills up is zero: code, scale and zero. Of experts all but the order have E in front.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_ext.formats import PLANES, SEQUENTIAL, PackedInt4
from inductor_ext.kernels import Expected, Layout, Packed

ROWS, COLUMNS = 64, PLANES.block
SCALES = (torch.float16, torch.bfloat16, torch.float32)
_WORDS = COLUMNS // 4
"""Of a row of a tile."""


def why_not(K: int, group_size: int) -> str | None:
    """Why the layout cannot hold groups of this size, as a sentence; None if it can."""
    if group_size == K or (K % group_size == 0 and (group_size in (32, 64) or group_size % 128 == 0)):
        return None
    return f"The group size must be K={K}, or divide it and be 32, 64 or a multiple of 128; it is {group_size}."


def filled(size: int, unit: int) -> int:
    """The next multiple of unit."""
    return -(-size // unit) * unit


def pack(weight: PackedInt4) -> Packed:
    """A weight [N, K] in this layout."""
    N, K, G = weight.N, weight.K, weight.group_size
    tall, wide = filled(N, ROWS), filled(K, COLUMNS)
    words = torch.zeros(tall, wide // 4, dtype=torch.int16, device=weight.codes.device)
    for rows, block in weight.blocks():
        codes = torch.nn.functional.pad(block.stored_codes(), (0, wide - K))
        words[:N][rows] = PLANES.pack(codes, 1, torch.int16)
    tiles = words.view(tall // ROWS, ROWS, wide // COLUMNS, 2, _WORDS // 2).permute(0, 2, 3, 1, 4)
    zeros = weight.zeros
    if zeros is not None and not zeros.dtype.is_floating_point:
        zeros = zeros.to(torch.int16)
    return Packed(
        tiles.reshape(tall // ROWS, wide // COLUMNS, ROWS * _WORDS),
        _paired(weight.scales, K, G),
        None if zeros is None else _paired(zeros, K, G),
        None if weight.order is None else weight.order.argsort().int(),
    )


def unpack(packed: Packed, N: int, K: int, group_size: int) -> PackedInt4:
    """The inverse, without loss."""
    down, across, _ = packed.qweight.shape
    words = packed.qweight.view(down, across, 2, ROWS, _WORDS // 2).permute(0, 3, 1, 2, 4).reshape(down * ROWS, -1)
    codes = PLANES.unpack(words[:N], 1, N, across * COLUMNS)[:, :K]
    zeros = None if packed.zeros is None else _unpaired(packed.zeros, N, K // group_size)
    if zeros is not None and zeros.dtype == torch.int16:
        zeros = zeros.to(torch.uint8)
    order = None if packed.order is None else packed.order.argsort().int()
    return PackedInt4(SEQUENTIAL.pack(codes, 1), _unpaired(packed.scales, N, K // group_size), zeros, order)


def layout(packed: Packed, N: int, K: int, group_size: int) -> Layout:
    """What the tensors of a weight [N, K] must be. Raises ValueError if the layout cannot hold such a weight."""
    if (reason := why_not(K, group_size)) is not None:
        raise ValueError(reason)
    zeros = torch.int16 if packed.zeros is None else packed.zeros.dtype
    tiles = (filled(N, ROWS) // ROWS, filled(K, COLUMNS) // COLUMNS, ROWS * _WORDS)
    return Layout(
        Expected(tiles, (torch.int16,)),
        Expected(_shape(packed.scales.dtype, N, K, group_size), SCALES),
        Expected(_shape(zeros, N, K, group_size), (torch.int16, *SCALES)),
        Expected((K,), (torch.int32,)),
    )


def _shape(dtype: torch.dtype, N: int, K: int, group_size: int) -> tuple[int, ...]:
    """Of scales or zeros in this dtype."""
    count = 1 if group_size == K else -(-filled(K, COLUMNS) // group_size)
    tall = filled(N, ROWS)
    return (count, tall) if dtype == torch.float32 else (-(-count // 2), tall, 2)


def _paired(values: Tensor, K: int, group_size: int) -> Tensor:
    """[N, groups] as a kernel loads it."""
    N, count = values.shape
    shape = _shape(values.dtype, N, K, group_size)
    whole = values.new_zeros(shape[1], shape[0] * (1 if len(shape) == 2 else 2))
    whole[:N, :count] = values
    if len(shape) == 2:
        return whole.t().contiguous()
    return whole.view(shape[1], shape[0], 2).transpose(0, 1).contiguous()


def _unpaired(values: Tensor, N: int, count: int) -> Tensor:
    by_group = values if values.dim() == 2 else values.transpose(1, 2).flatten(0, 1)
    return by_group[:count, :N].t().contiguous()
