"""What ``moe_gemm_w4a16`` takes (``ops/rdna3_wmma.py``, and the op of that name of ROCm's vLLM).

    words   int32 [E, N, K/8], shuffled; on gfx1151 some rows lie further apart than K/8
    scales  [E, N, K/G], float16 or bfloat16

``kernels/hip/wmma.py`` packs it; here are the inverse and the checks of what it can hold.
"""

from __future__ import annotations

import torch

from inductor_ext.bits import copy_reordered
from inductor_ext.formats import EXLLAMA, SEQUENTIAL
from inductor_ext.kernels.hip import linear, wmma
from inductor_ext.layouts.experts import Experts, four_bits, none, scale_dtypes, tiles

ROWS, COLUMNS = 64, 32
"""What N and K are multiples of."""


def pack(weight: Experts, arch: str) -> wmma.Weight:
    four_bits(weight)
    none(weight, "zeros", "order", "bias")
    scale_dtypes(weight, torch.float16, torch.bfloat16)
    tiles(weight, ROWS, COLUMNS)
    if (reason := linear.why_not(weight.N, weight.K, weight.group_size)) is not None:
        raise ValueError(reason)
    return wmma.by_row(weight.joined(), weight.E, arch)


def unpack(packed: wmma.Weight) -> Experts:
    codes = packed.words.new_empty(packed.words.shape)
    copy_reordered(packed.words, EXLLAMA, codes, SEQUENTIAL)
    return Experts(codes, packed.scales)
