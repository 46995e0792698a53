"""What the field's WNA16 experts in Triton (fused_moe_kernel_gptq_awq) take.

    weights  uint8 [E, N, K/2], the lower k of two in the low nibble: the canonical codes seen as bytes, not copied;
             of 8 bits [E, N, K], without zeros
    scales   [E, N, K/G], float16 or bfloat16
    zeros    None (8), or uint8 [E, N/2, K/G], the lower n of two in the low nibble; the zero itself is stored

The kernel has one group size for both projections: ``adjust.one_group``. vLLM's preparation drops biases.
Read in the sources of vLLM's preparation and of its kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from inductor_ext.formats import PAIRS
from inductor_ext.layouts.experts import Experts, from_nibbles, need, none, scale_dtypes, to_nibbles
from inductor_ext.layouts.xpu import little_endian


class TritonWna16(NamedTuple):
    weights: Tensor
    scales: Tensor
    zeros: Tensor | None


def pack(weight: Experts) -> TritonWna16:
    little_endian()
    none(weight, "order", "bias")
    scale_dtypes(weight, torch.float16, torch.bfloat16)
    zeros = None
    if weight.zeros is not None:
        need(weight.bits == 4, "zeros", "None where codes have 8 bits", "given")
        need(weight.N % 2 == 0, "N", "even where there are zeros", weight.N)
        stored = to_nibbles(weight.zeros, "stored").flatten(0, 1)
        zeros = PAIRS.pack(stored, 0, torch.uint8).view(weight.E, weight.N // 2, -1)
    return TritonWna16(weight.codes.contiguous().view(torch.uint8), weight.scales.contiguous(), zeros)


def unpack(packed: TritonWna16, bits: int = 4) -> Experts:
    little_endian()
    zeros = None
    if packed.zeros is not None:
        E, N, groups = packed.scales.shape
        zeros = from_nibbles(PAIRS.unpack(packed.zeros, 0, E * N, groups), "stored").view(E, N, groups)
    codes = packed.weights.contiguous()
    return Experts(codes if bits == 8 else codes.view(torch.int32), packed.scales, zeros)
