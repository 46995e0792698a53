"""What ``moe_gptq_gemm_rdna3`` takes (``ops/rdna3.py``, and vLLM's op of that name).

qweight  int32 [E, K/8, N], scales [E, K/G, N]: as our own kernel has them (``kernels/hip/experts.py``)
qzeros   int32 [E, K/G, N/8], nibbles in order along N, holding zero - 1; 0x77777777 everywhere without zeros
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from inductor_ext.formats import SEQUENTIAL
from inductor_ext.kernels import Packed
from inductor_ext.kernels.hip import experts, linear
from inductor_ext.layouts.experts import Experts, four_bits, from_nibbles, need, none, parted, scale_dtypes, to_nibbles

_CONVENTION = "stored + 1"


class Rdna3(NamedTuple):
    qweight: Tensor
    scales: Tensor
    qzeros: Tensor


def pack(weight: Experts) -> Rdna3:
    four_bits(weight)
    none(weight, "order", "bias")
    scale_dtypes(weight, torch.float16, torch.bfloat16)
    need(weight.N % 8 == 0, "N", "a multiple of 8 (adjust.filled makes it one)", weight.N)
    if (reason := linear.why_not(weight.N, weight.K, weight.group_size)) is not None:
        raise ValueError(reason)
    packed = experts.pack(weight.joined(), weight.E)
    zeros = torch.full_like(packed.scales, 8, dtype=torch.uint8) if packed.zeros is None else packed.zeros
    words = SEQUENTIAL.pack(to_nibbles(zeros, _CONVENTION).flatten(0, 1), 1)
    return Rdna3(packed.qweight, packed.scales, words.view(weight.E, -1, weight.N // 8))


def unpack(packed: Rdna3) -> Experts:
    """Zeros that are all 8 come back as None, which means the same."""
    E, groups, N = packed.scales.shape
    K = packed.qweight.shape[1] * 8
    zeros = from_nibbles(SEQUENTIAL.unpack(packed.qzeros, 1, E * groups, N), _CONVENTION).view(E, groups, N)
    given = Packed(packed.qweight, packed.scales, None if bool((zeros == 8).all()) else zeros, None)
    return parted(experts.unpack(given, N, K, K // groups), E)
