"""What ``triton_w4a16_gemm`` takes (``ops/triton_gemm.py``, and vLLM's op of that name), of each expert.

b_q     int32 [E, K, N/8], codes in order along N
scales  [E, K/G, N], float16 or bfloat16
qzeros  None (8), or int32 [E, K/G, N/8], likewise; the zero itself is stored
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from inductor_ext.bits import turned
from inductor_ext.formats import SEQUENTIAL
from inductor_ext.layouts.experts import Experts, four_bits, from_nibbles, need, none, scale_dtypes, to_nibbles


class TritonDense(NamedTuple):
    b_q: Tensor
    scales: Tensor
    qzeros: Tensor | None


def pack(weight: Experts) -> TritonDense:
    four_bits(weight)
    none(weight, "order", "bias")
    scale_dtypes(weight, torch.float16, torch.bfloat16)
    need(weight.N % 8 == 0, "N", "a multiple of 8 (adjust.filled makes it one)", weight.N)
    E, N = weight.E, weight.N
    b_q = turned(weight.codes.contiguous(), SEQUENTIAL, SEQUENTIAL)
    qzeros = None
    if weight.zeros is not None:
        stored = to_nibbles(weight.zeros, "stored").transpose(1, 2).flatten(0, 1)
        qzeros = SEQUENTIAL.pack(stored, 1).view(E, -1, N // 8)
    return TritonDense(b_q, weight.scales.transpose(1, 2).contiguous(), qzeros)


def unpack(packed: TritonDense) -> Experts:
    E, groups, N = packed.scales.shape
    codes = turned(packed.b_q.contiguous(), SEQUENTIAL, SEQUENTIAL)
    zeros = None
    if packed.qzeros is not None:
        stored = SEQUENTIAL.unpack(packed.qzeros, 1, E * groups, N)
        zeros = from_nibbles(stored, "stored").view(E, groups, N).transpose(1, 2).contiguous()
    return Experts(codes, packed.scales.transpose(1, 2).contiguous(), zeros)
