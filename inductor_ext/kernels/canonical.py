"""The canonical form as a kernel's layout: what kernels that read checkpoints as they are share."""

from __future__ import annotations

import torch

from inductor_ext.formats import PackedInt4
from inductor_ext.kernels import Expected, Layout, Packed

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def pack(weight: PackedInt4) -> Packed:
    return Packed(weight.codes, weight.scales, weight.zeros, weight.order)


def unpack(packed: Packed, N: int, K: int, group_size: int) -> PackedInt4:
    return PackedInt4(packed.qweight, packed.scales, packed.zeros, packed.order)


def layout(packed: Packed, N: int, K: int, group_size: int) -> Layout:
    if K % 8 != 0:
        raise ValueError(f"K must be a multiple of 8, it is {K}.")
    groups = (N, K // group_size)
    return Layout(
        Expected((N, K // 8), (torch.int32,)),
        Expected(groups, _FLOATS),
        Expected(groups, (torch.uint8, *_FLOATS)),
        Expected((K,), (torch.int32,)),
    )
