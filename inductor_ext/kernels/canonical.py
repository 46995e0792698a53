"""The canonical forms as a kernel's layout: what kernels that read checkpoints as they are share."""

from __future__ import annotations

import torch

from inductor_ext.formats import PackedInt, packed_int
from inductor_ext.kernels import Expected, Layout, Packed

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def pack(weight: PackedInt) -> Packed:
    return Packed(weight.codes, weight.scales, weight.zeros, weight.order)


def unpack(packed: Packed, N: int, K: int, group_size: int) -> PackedInt:
    return packed_int(packed.qweight, packed.scales, packed.zeros, packed.order)


def layout(packed: Packed, N: int, K: int, group_size: int) -> Layout:
    """Of 4 bits."""
    if K % 8 != 0:
        raise ValueError(f"K must be a multiple of 8, it is {K}.")
    return _layout(Expected((N, K // 8), (torch.int32,)), torch.uint8, N, K, group_size)


def layout_int8(packed: Packed, N: int, K: int, group_size: int) -> Layout:
    return _layout(Expected((N, K), (torch.uint8,)), torch.int16, N, K, group_size)


def layout_of_either(packed: Packed, N: int, K: int, group_size: int) -> Layout:
    """Bytes are codes of 8 bits."""
    of = layout_int8 if packed.qweight.dtype == torch.uint8 else layout
    return of(packed, N, K, group_size)


def _layout(codes: Expected, zeros: torch.dtype, N: int, K: int, group_size: int) -> Layout:
    groups = (N, K // group_size)
    return Layout(codes, Expected(groups, _FLOATS), Expected(groups, (zeros, *_FLOATS)), Expected((K,), (torch.int32,)))


def pack_experts(weight: PackedInt, experts: int) -> Packed:
    def split(t: torch.Tensor) -> torch.Tensor:
        return t.view(experts, t.shape[0] // experts, t.shape[1])

    return Packed(
        split(weight.codes), split(weight.scales), None if weight.zeros is None else split(weight.zeros), None
    )


def unpack_experts(packed: Packed, N: int, K: int, group_size: int) -> PackedInt:
    zeros = None if packed.zeros is None else packed.zeros.flatten(0, 1)
    return packed_int(packed.qweight.flatten(0, 1), packed.scales.flatten(0, 1), zeros)


def layout_experts(packed: Packed, E: int, N: int, K: int, group_size: int) -> Layout:
    return of_experts(E, layout(packed, N, K, group_size))


def of_experts(E: int, one: Layout) -> Layout:
    """The layout of E weights of one layout: E in front, but of the order, which experts do not have."""
    qweight, scales, zeros = (Expected((E, *expected.shape), expected.dtypes) for expected in one[:3])
    return Layout(qweight, scales, zeros, one.order)
