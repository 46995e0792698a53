"""The reference kernel for linear layers with an MXFP4 weight: as ``reference``, over its canonical layout."""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_ext.formats import MXFP4_GROUP, PackedMxfp4
from inductor_ext.kernels import Expected, Layout, Packed, Problem

NAME = "reference"


def usable() -> str | None:
    return None


def reject(problem: Problem) -> str | None:
    return None


def pack(weight: PackedMxfp4) -> Packed:
    return Packed(weight.codes, weight.scales, None, None)


def unpack(packed: Packed, N: int, K: int, group_size: int) -> PackedMxfp4:
    return PackedMxfp4(packed.qweight, packed.scales)


def layout(packed: Packed, N: int, K: int, group_size: int) -> Layout:
    return layout_of_width(N, K, K)


def layout_of_width(N: int, K: int, width: int) -> Layout:
    """Rows of K codes in so many."""
    if K % 2:
        raise ValueError(f"K must be even, it is {K}.")
    absent = Expected((0,), (torch.uint8,))
    codes, scales = (Expected((N, n), (torch.uint8,)) for n in (width // 2, -(-K // MXFP4_GROUP)))
    return Layout(codes, scales, absent, absent)


def run(x: Tensor, packed: Packed, bias: Tensor | None, N: int, group_size: int) -> Tensor:
    out = torch.empty(x.shape[0], N, dtype=x.dtype, device=x.device)
    wide = x.float()
    for rows, block in PackedMxfp4(packed.qweight, packed.scales).blocks():
        out[:, rows] = torch.nn.functional.linear(
            wide, block.dequantize(), None if bias is None else bias[rows].float()
        )
    return out
