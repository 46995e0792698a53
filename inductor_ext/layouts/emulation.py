"""Dequantised weights, for kernels of the activations' dtype: [E, N, K], columns in the order of k.

Each value is exact, then rounded once. Codes can be told again from it, given scales and zeros: an error of a rounding
is a small part of a step of 1 scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_ext.formats import SEQUENTIAL
from inductor_ext.layouts.experts import Experts, need


def pack(weight: Experts, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    need(dtype.is_floating_point and dtype.itemsize >= 2, "dtype", "float16, bfloat16 or float32", dtype)
    out = torch.empty(weight.E, weight.N, weight.K, dtype=dtype, device=weight.codes.device)
    for e in range(weight.E):
        for rows, block in weight.expert(e).blocks():
            out[e, rows] = block.dequantize(dtype)
    return out


def unpack(
    dense: Tensor, scales: Tensor, zeros: Tensor | None = None, order: Tensor | None = None, bias: Tensor | None = None
) -> Experts:
    """The weight that was dequantised. Raises ValueError if these values are not codes of such scales and zeros."""
    E, N, K = dense.shape
    words = torch.empty(E, N, K // 8, dtype=torch.int32, device=dense.device)
    for e in range(E):
        stored = dense[e] if order is None else dense[e].index_select(1, order[e].argsort())
        steps = stored.float().unflatten(1, (scales.shape[2], -1)) / scales[e].float().unsqueeze(-1)
        codes = (steps + (8 if zeros is None else zeros[e].float().unsqueeze(-1))).round().flatten(1)
        need(
            bool(((codes >= 0) & (codes <= 15)).all()),
            "dense",
            "codes 0..15 times scales other than 0",
            "something else",
        )
        words[e] = SEQUENTIAL.pack(codes, 1)
    return Experts(words, scales, zeros, order, bias)
