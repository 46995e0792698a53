"""What vllm_xpu_kernels' experts (xpu_fused_moe with is_int4) take on Intel GPUs.

    weights  uint8 [E, N, K/2], the lower k of two in the low nibble: the canonical codes seen as bytes, not copied
    scales   [E, N, K/G], float16 or bfloat16
    bias     [E, N] or None

Zeros are 8; the callee turns codes into signed ones itself, at its first call and in place.
Read in the sources of vLLM's preparation and of xpu_fused_moe. Not run: no such GPU was at hand.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from inductor_ext.layouts.experts import Experts, four_bits, none, scale_dtypes


class Xpu(NamedTuple):
    weights: Tensor
    scales: Tensor
    bias: Tensor | None


def pack(weight: Experts) -> Xpu:
    little_endian()
    four_bits(weight)
    none(weight, "zeros", "order")
    scale_dtypes(weight, torch.float16, torch.bfloat16)
    return Xpu(weight.codes.contiguous().view(torch.uint8), weight.scales.contiguous(), weight.bias)


def unpack(packed: Xpu) -> Experts:
    little_endian()
    return Experts(packed.weights.contiguous().view(torch.int32), packed.scales, bias=packed.bias)


def little_endian() -> None:
    """Raises RuntimeError where the bytes of a word stand the other way round: every weight would be wrong."""
    if sys.byteorder != "little":
        raise RuntimeError(
            f"Words are seen as bytes, which needs a little-endian machine; this one is {sys.byteorder}."
        )
