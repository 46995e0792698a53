"""What checkpoints of AWQ hold, with the experts stacked as loaders give them.

qweight  int32 [E, K, N/8]: codes along N, even ones in the low half of a word, odd ones in the high
scales   [E, K/G, N]
qzeros   int32 [E, K/G, N/8], likewise; the zero itself
bias     None, or [E, N]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from inductor_ext.bits import turned
from inductor_ext.formats import EXLLAMA, SEQUENTIAL
from inductor_ext.layouts.experts import Experts, four_bits, from_nibbles, need, none, shape, to_nibbles

_CONVENTION = "stored"


class Awq(NamedTuple):
    qweight: Tensor
    scales: Tensor
    qzeros: Tensor
    bias: Tensor | None = None


def pack(weight: Experts) -> Awq:
    four_bits(weight)
    none(weight, "order")
    need(weight.N % 8 == 0, "N", "a multiple of 8", weight.N)
    E, N = weight.E, weight.N
    words = turned(weight.codes.contiguous(), SEQUENTIAL, EXLLAMA)
    zeros = torch.full_like(weight.scales, 8, dtype=torch.uint8) if weight.zeros is None else weight.zeros
    stored = to_nibbles(zeros, _CONVENTION).transpose(1, 2).flatten(0, 1)
    return Awq(
        words, weight.scales.transpose(1, 2).contiguous(), EXLLAMA.pack(stored, 1).view(E, -1, N // 8), weight.bias
    )


def unpack(stored: Awq) -> Experts:
    """Zeros that are all 8 come back as None, which means the same."""
    qweight, scales = stored.qweight, stored.scales
    need(qweight.dim() == 3, "qweight", "int32 [E, K, N/8]", shape(qweight))
    need(qweight.dtype == torch.int32, "qweight", "int32 [E, K, N/8]", qweight.dtype)
    E, K, N = qweight.shape[0], qweight.shape[1], qweight.shape[2] * 8
    need(K % 8 == 0, "qweight", "int32 [E, K, N/8] with K a multiple of 8", shape(qweight))
    need(scales.dim() == 3 and scales.shape[::2] == (E, N), "scales", f"[{E}, K/G, {N}]", shape(scales))
    groups = scales.shape[1]
    wanted = (E, groups, N // 8)
    need(stored.qzeros.shape == wanted, "qzeros", f"int32 {list(wanted)}", shape(stored.qzeros))
    need(stored.qzeros.dtype == torch.int32, "qzeros", f"int32 {list(wanted)}", stored.qzeros.dtype)
    codes = turned(qweight.contiguous(), EXLLAMA, SEQUENTIAL)
    nibbles = EXLLAMA.unpack(stored.qzeros, 1, E * groups, N)
    zeros = from_nibbles(nibbles, _CONVENTION).view(E, groups, N).transpose(1, 2).contiguous()
    return Experts(
        codes, scales.transpose(1, 2).contiguous(), None if bool((zeros == 8).all()) else zeros, bias=stored.bias
    )
