"""The reference kernel: dequantise a block of rows in float32, multiply. Runs everywhere, reads the canonical layout,
is last in every list."""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_ext.kernels import Packed, Problem, canonical

NAME = "reference"


def usable() -> str | None:
    return None


def reject(problem: Problem) -> str | None:
    return None


pack, unpack, layout = canonical.pack, canonical.unpack, canonical.layout_of_either


def run(x: Tensor, packed: Packed, bias: Tensor | None, N: int, group_size: int) -> Tensor:
    weight = unpack(packed, N, x.shape[1], group_size)
    out = torch.empty(x.shape[0], N, dtype=x.dtype, device=x.device)
    wide = x.float()
    for rows, block in weight.blocks():  # the dequantised weight never exists as a whole
        out[:, rows] = torch.nn.functional.linear(
            wide, block.dequantize(), None if bias is None else bias[rows].float()
        )
    return out
