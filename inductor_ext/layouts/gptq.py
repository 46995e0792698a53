"""What checkpoints of GPTQ and compressed-tensors hold, with the experts stacked as loaders give them.

qweight  int32 [E, K/8, N] (8 bits: [E, K/4, N]): codes in order along K
scales   [E, K/G, N]
qzeros   None (the constant zero), or int32 [E, K/G, N/8] (8 bits: N/4): in order along N. GPTQ's first format
         stores zero - 1, its second and compressed-tensors the zero
g_idx    None, or int32 [E, K]: the group of each k (act-order)
bias     None, or [E, N]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from inductor_ext.bits import transposed
from inductor_ext.formats import SEQUENTIAL, ZERO_CONVENTIONS
from inductor_ext.layouts.experts import Experts, from_nibbles, need, shape, to_nibbles

STORED, LESS_ONE = "stored", "stored + 1"
"""Conventions of zeros, as in ``formats.ZERO_CONVENTIONS``."""


class Gptq(NamedTuple):
    qweight: Tensor
    scales: Tensor
    qzeros: Tensor | None = None
    g_idx: Tensor | None = None
    bias: Tensor | None = None


def pack(weight: Experts, convention: str = LESS_ONE) -> Gptq:
    g_idx = None if weight.order is None else (weight.order // weight.group_size).int()
    words = transposed(_logical(weight) if weight.bits == 4 else _logical(weight).view(torch.int32))
    scales = weight.scales.transpose(1, 2).contiguous()
    if weight.zeros is None:
        return Gptq(words, scales, None, g_idx, weight.bias)
    per_word = 32 // weight.bits
    need(weight.N % per_word == 0, "N", f"a multiple of {per_word} where there are zeros", weight.N)
    zeros = weight.zeros.transpose(1, 2)
    if weight.bits == 4:
        qzeros = SEQUENTIAL.pack(to_nibbles(zeros, convention).flatten(0, 1), 1).view(*zeros.shape[:2], -1)
    else:
        less = _less(convention)
        stored = zeros - less
        held = bool(((stored >= 0) & (stored <= 255)).all())
        need(held, "zeros", f"within {less}..{255 + less}", "others")
        # A clone: with a single group, contiguous() would leave strides that words cannot be seen in.
        qzeros = stored.to(torch.uint8).clone(memory_format=torch.contiguous_format).view(torch.int32)
    return Gptq(words, scales, qzeros, g_idx, weight.bias)


def unpack(stored: Gptq, bits: int = 4, convention: str = LESS_ONE) -> Experts:
    """Zeros that are all the constant one come back as None, which means the same.

    Columns in act-order are sorted by their groups, those of a group by k.
    """
    _check(stored, bits)
    words = transposed(stored.qweight)
    codes = words if bits == 4 else words.view(torch.uint8)
    weight = Experts(
        codes, stored.scales.transpose(1, 2).contiguous(), _zeros(stored, bits, convention), bias=stored.bias
    )
    return weight if stored.g_idx is None else _sorted(weight, stored.g_idx)


def _check(stored: Gptq, bits: int) -> None:
    need(bits in (4, 8), "bits", "4 or 8", bits)
    qweight, scales = stored.qweight, stored.scales
    need(qweight.dim() == 3, "qweight", f"int32 [E, K/{32 // bits}, N]", shape(qweight))
    need(qweight.dtype == torch.int32, "qweight", f"int32 [E, K/{32 // bits}, N]", qweight.dtype)
    E, down, N = qweight.shape
    need(scales.dim() == 3 and scales.shape[::2] == (E, N), "scales", f"[{E}, K/G, {N}]", shape(scales))
    if stored.qzeros is not None:
        wanted = (E, scales.shape[1], N * bits // 32)
        need(stored.qzeros.shape == wanted, "qzeros", f"int32 {list(wanted)}", shape(stored.qzeros))
        need(stored.qzeros.dtype == torch.int32, "qzeros", f"int32 {list(wanted)}", stored.qzeros.dtype)
    if stored.g_idx is not None:
        K = down * 32 // bits
        need(stored.g_idx.shape == (E, K), "g_idx", f"[{E}, {K}]", shape(stored.g_idx))


def _zeros(stored: Gptq, bits: int, convention: str) -> Tensor | None:
    if stored.qzeros is None:
        return None
    E, groups, N = stored.scales.shape
    if bits == 4:
        found = from_nibbles(SEQUENTIAL.unpack(stored.qzeros, 1, E * groups, N), convention).view(E, groups, N)
    else:
        found = stored.qzeros.contiguous().view(torch.uint8).to(torch.int16) + _less(convention)
    if bool((found == 1 << bits - 1).all()):
        return None
    return found.transpose(1, 2).contiguous()


def _less(convention: str) -> int:
    """What zeros of 8 bits are stored less by."""
    return ZERO_CONVENTIONS[convention][0]


def _sorted(weight: Experts, g_idx: Tensor) -> Experts:
    K, G = weight.K, weight.group_size
    in_order = torch.arange(K, device=g_idx.device) // G
    if bool((g_idx == in_order).all()):
        return weight
    columns = g_idx.long().argsort(dim=1, stable=True)
    whole = bool((g_idx.gather(1, columns) == in_order).all())
    need(whole, "g_idx", f"every group 0..{K // G - 1}, {G} times", "others")
    codes = torch.empty_like(weight.codes)
    for e in range(weight.E):
        moved = weight.expert(e).stored_codes().index_select(1, columns[e])
        codes[e] = moved if weight.bits == 8 else SEQUENTIAL.pack(moved, 1)
    return Experts(codes, weight.scales, weight.zeros, columns.argsort(1).int(), weight.bias)


def _logical(weight: Experts) -> Tensor:
    """Codes as ``weight.codes``, columns in the order of k."""
    if weight.order is None:
        return weight.codes
    codes = torch.empty_like(weight.codes)
    for e in range(weight.E):
        one = weight.expert(e)
        moved = one.logical(one.stored_codes())
        codes[e] = moved if weight.bits == 8 else SEQUENTIAL.pack(moved, 1)
    return codes
