"""The same by Triton's own ``dot_scaled``, over the canonical layout: acc [BN, BM] += W [BN, K] @ x^T. Where matrix
units take MXFP4 codes and their scales (gfx950, with x in e4m3) nothing is decoded; elsewhere Triton decodes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def accumulate(
    acc,  # float32 [BN, BM]
    w,  # pointers [BN, 1] to rows of codes
    scales,  # and of scales
    x,  # pointers to column 0 of x, [1, BM]: bfloat16, float16, or float8e4nv
    is_row,  # bool [1, BM]: the others are not read, and count as zero
    K,
    PAIRS,  # bytes of a row of codes: K / 2
    GROUPS,  # and of scales
    BK: tl.constexpr,
    WHOLE: tl.constexpr,  # K is a multiple of BK
    STAGES: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    FORMAT: tl.constexpr = "e4m3" if dtype == tl.float8e4nv else "fp16" if dtype == tl.float16 else "bf16"
    pair, group, k = tl.arange(0, BK // 2), tl.arange(0, BK // 32), tl.arange(0, BK)
    w += pair[None, :]
    scales += group[None, :]
    x += k[:, None]
    for step in tl.range(0, (K + BK - 1) // BK, num_stages=STAGES):
        if WHOLE:
            codes = tl.load(w + step * (BK // 2))
            s = tl.load(scales + step * (BK // 32))
            columns = tl.load(x + step * BK, mask=is_row, other=0.0)
        else:
            codes = tl.load(w + step * (BK // 2), mask=(pair < PAIRS - step * (BK // 2))[None, :], other=0)
            s = tl.load(scales + step * (BK // 32), mask=(group < GROUPS - step * (BK // 32))[None, :], other=0)
            columns = tl.load(x + step * BK, mask=is_row & (k < K - step * BK)[:, None], other=0.0)
        acc = tl.dot_scaled(codes, s, "e2m1", columns, None, FORMAT, acc)
    return acc
