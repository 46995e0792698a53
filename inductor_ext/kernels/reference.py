"""The reference kernel: dequantise a block of rows in float32, multiply. Runs everywhere, reads the canonical layout,
is last in every list."""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_ext.formats import PackedInt4
from inductor_ext.kernels import Packed, Problem

NAME = "reference"


def usable() -> str | None:
    return None


def reject(problem: Problem) -> str | None:
    return None


def pack(canonical: PackedInt4) -> Packed:
    return Packed(canonical.codes, canonical.scales, canonical.zeros, canonical.order)


def unpack(packed: Packed) -> PackedInt4:
    return PackedInt4(packed.qweight, packed.scales, packed.zeros, packed.order)


def run(x: Tensor, packed: Packed, bias: Tensor | None, group_size: int) -> Tensor:
    weight = unpack(packed)
    out = torch.empty(x.shape[0], weight.N, dtype=x.dtype, device=x.device)
    wide = x.float()
    for rows, block in weight.blocks():  # the dequantised weight never exists as a whole
        out[:, rows] = torch.nn.functional.linear(
            wide, block.dequantize(), None if bias is None else bias[rows].float()
        )
    return out
