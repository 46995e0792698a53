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
    dense: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    order: Tensor | None = None,
    bias: Tensor | None = None,
    bits: int = 4,
) -> Experts:
    """The weight that was dequantised. Raises ValueError if these values are not codes of such scales and zeros.

    bfloat16 tells codes of 8 bits apart up to 128 steps from their zero, which symmetric ones are.
    """
    E, N, K = dense.shape
    most = (1 << bits) - 1
    codes = torch.empty(E, N, K, dtype=torch.uint8, device=dense.device)
    for e in range(E):
        stored = dense[e] if order is None else dense[e].index_select(1, order[e].argsort())
        steps = stored.float().unflatten(1, (scales.shape[2], -1)) / scales[e].float().unsqueeze(-1)
        constant = 1 << bits - 1
        found = (steps + (constant if zeros is None else zeros[e].float().unsqueeze(-1))).round().flatten(1)
        known = bool(((found >= 0) & (found <= most)).all())
        need(known, "dense", f"codes 0..{most} times scales other than 0", "something else")
        codes[e] = found
    if bits == 8:
        return Experts(codes, scales, zeros, order, bias)
    words = SEQUENTIAL.pack(codes.flatten(0, 1), 1).view(E, N, -1)
    return Experts(words, scales, zeros, order, bias)
