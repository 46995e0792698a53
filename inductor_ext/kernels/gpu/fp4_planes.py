"""The layout of MXFP4 weights that the Triton kernels read: codes in planes of 32 columns, so that a plane is a group,
in tiles that lie in one piece.

    qweight  int16 [E, Np/64, Kp/128, 2048]: the tiles of 64 rows and 128 columns. A row of a tile is 32 words; word j
             holds the codes of columns j, 32 + j, 64 + j and 96 + j, each plane's at BITS: so that signs and magnitudes
             come where a 16-bit float has them by few shifts and masks (see ``fp4.py``).
    scales   uint8 [E, Kp/128, Np, 4] in e8m0: the four groups of a tile's row are one 32-bit load. If one is above 128
             (or 255, NaN): float32 [E, Kp/32, Np], for 2**126 times a larger one is no bfloat16.

Np, Kp: N and K filled up to a multiple of 64 and 128. What fills up is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_ext.formats import PAIRS, PackedMxfp4
from inductor_ext.kernels import Expected, Layout, Packed
from inductor_ext.kernels.gpu.planes import filled

ROWS, COLUMNS = 64, 128
BITS = ((6, 15), (3, 10), (0, 9), (12, 11))
"""Of each plane in a word: the lowest bit of a code's magnitude, and that of its sign. Two of the planes need one shift
or none."""
_LARGEST = 128
"""Of a scale's byte, plus 126, is 254, the largest exponent of a number."""


def pack(weight: PackedMxfp4, experts: int) -> Packed:
    """The rows of all experts, one after the other, in this layout."""
    N, K = weight.N // experts, weight.K
    tall, steps = filled(N, ROWS), filled(K, COLUMNS) // COLUMNS
    codes, scales = (t.unflatten(0, (experts, N)) for t in (weight.codes, weight.scales))
    words = torch.zeros(experts, tall, steps, 32, dtype=torch.int16, device=codes.device)
    for e in range(experts):
        nibbles = PAIRS.unpack(codes[e], 1, N, K)
        nibbles = torch.nn.functional.pad(nibbles, (0, steps * COLUMNS - K)).view(N, steps, 4, 32)
        for p, (bits, sign) in enumerate(BITS):
            code = nibbles[:, :, p].to(torch.int16)
            words[e, :N] |= ((code & 7) << bits) | ((code >> 3) << sign)
    tiles = words.view(experts, tall // ROWS, ROWS, steps, 32).transpose(2, 3)
    bytes_ = torch.zeros(experts, tall, steps * 4, dtype=torch.uint8, device=codes.device)
    bytes_[:, :N, : scales.shape[2]] = scales
    return Packed(tiles.reshape(experts, tall // ROWS, steps, ROWS * 32), _stored(bytes_), None, None)


def _stored(scales: Tensor) -> Tensor:
    """[E, Np, groups] as a kernel loads it."""
    if (scales > _LARGEST).any():
        return scales.view(torch.float8_e8m0fnu).float().transpose(1, 2).contiguous()
    E, tall, groups = scales.shape
    return scales.view(E, tall, groups // 4, 4).transpose(1, 2).contiguous()


def unpack(packed: Packed, N: int, K: int, group_size: int) -> PackedMxfp4:
    """The inverse, without loss."""
    experts, down, steps, _ = packed.qweight.shape
    words = packed.qweight.view(experts, down, steps, ROWS, 32).transpose(2, 3).reshape(experts, down * ROWS, steps, 32)
    words = words[:, :N].flatten(0, 1)
    planes = [((words >> bits) & 7) | ((words >> sign) & 1) << 3 for bits, sign in BITS]
    codes = torch.stack(planes, dim=2).view(experts * N, -1)[:, :K]
    scales = packed.scales
    if scales.dtype == torch.float32:
        by_group = scales.transpose(1, 2).contiguous().to(torch.float8_e8m0fnu).view(torch.uint8)
    else:
        by_group = scales.transpose(1, 2).flatten(2)
    return PackedMxfp4(PAIRS.pack(codes, 1, torch.uint8), by_group[:, :N, : -(-K // 32)].flatten(0, 1).contiguous())


def layout(packed: Packed, E: int, N: int, K: int, group_size: int) -> Layout:
    """What the tensors of weights [E, N, K] must be. Raises ValueError for an odd K."""
    if K % 2:
        raise ValueError(f"K must be even, it is {K}.")
    tall, steps = filled(N, ROWS), filled(K, COLUMNS) // COLUMNS
    wide = packed.scales.dtype == torch.float32
    absent = Expected((0,), (torch.uint8,))
    return Layout(
        Expected((E, tall // ROWS, steps, ROWS * 32), (torch.int16,)),
        Expected((E, 4 * steps, tall) if wide else (E, steps, tall, 4), (torch.uint8, torch.float32)),
        absent,
        absent,
    )
