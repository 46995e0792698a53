"""The loop over the tiles of an MXFP4 weight: acc [BN, BM] += W [BN, K] @ x^T, as ``mainloop.py`` says.

Where the matrix unit takes bfloat16 and one instruction multiplies two of them, a weight is scaled before it goes in: a
code times a power of two is a bfloat16, so that is exact, and the sums of all groups stay in the unit. Otherwise
(float16 has not the range; scales in float32 go beyond what one factor can be; AMD multiplies in float32) scales act on
the sums of a group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_ext.kernels.gpu.codes import side_by_side
from inductor_ext.kernels.gpu.fp4 import e8m0, planes, scaled_planes


@triton.jit
def row_pointers(w, n, steps):
    """Pointers [BN, 32] to the first words of the rows n of a weight whose rows have ``steps`` tiles."""
    row = (n // 64).to(tl.int64) * (steps * 2048) + n % 64 * 32
    return w + row[:, None] + tl.arange(0, 32)[None, :]


@triton.jit
def accumulate(
    acc,  # float32 [BN, BM]
    w,  # pointers from `row_pointers`
    scales,
    n,  # [BN] rows within scales
    N,  # their stride
    x,  # pointers to column 0 of x, [1, BM]
    is_row,  # bool [1, BM]: of the others results are not used
    K,
    steps,  # tiles
    KIND: tl.constexpr,  # of scales: "e8m0", up to 128, or "fp32"
    WHOLE: tl.constexpr,  # K is a multiple of 128
    WIDE: tl.constexpr,  # a tile is one operand, not two
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
):
    # With many rows of x masks would take a noticeable part of the loop: rows of nobody are read as if they were
    # somebody's, which changes no other row, and columns beyond K are left to a last step by itself.
    MANY: tl.constexpr = acc.shape[1] >= 64
    whole = K // 128 if MANY else steps
    for step in tl.range(0, whole, num_stages=STAGES):
        acc = _step(acc, w, scales, step, n, N, x, is_row, K, KIND, WHOLE or MANY, WIDE, PTX)
    if MANY and not WHOLE:
        acc = _step(acc, w, scales, whole, n, N, x, is_row, K, KIND, WHOLE, WIDE, PTX)
    return acc


@triton.jit
def _step(
    acc, w, scales, step, n, N, x, is_row, K,
    KIND: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """acc + what a tile gives."""
    dtype: tl.constexpr = x.dtype.element_ty
    words = tl.load(w + step * 2048)
    k = step * 128
    if PTX and KIND == "e8m0" and dtype == tl.bfloat16:
        a, b, c, d = scaled_planes(words, tl.load(scales + step * N + n))
        if WIDE:
            q = side_by_side(side_by_side(a, b), side_by_side(c, d))
            acc = tl.dot(q, _columns(x, is_row, K, k + tl.arange(0, 128), WHOLE), acc)
        else:
            acc = tl.dot(side_by_side(a, b), _columns(x, is_row, K, k + tl.arange(0, 64), WHOLE), acc)
            acc = tl.dot(side_by_side(c, d), _columns(x, is_row, K, k + 64 + tl.arange(0, 64), WHOLE), acc)
    else:
        word = 0 if KIND == "fp32" else tl.load(scales + step * N + n)
        a, b, c, d = planes(words, dtype, PTX)
        acc = _group(acc, a, _scale(scales, word, step, 0, n, N, KIND), x, is_row, K, k, WHOLE)
        acc = _group(acc, b, _scale(scales, word, step, 1, n, N, KIND), x, is_row, K, k + 32, WHOLE)
        acc = _group(acc, c, _scale(scales, word, step, 2, n, N, KIND), x, is_row, K, k + 64, WHOLE)
        acc = _group(acc, d, _scale(scales, word, step, 3, n, N, KIND), x, is_row, K, k + 96, WHOLE)
    return acc


@triton.jit
def _scale(scales, word, step, p: tl.constexpr, n, N, KIND: tl.constexpr):
    """float32 [BN]: the scales of plane p."""
    return tl.load(scales + (4 * step + p) * N + n) if KIND == "fp32" else e8m0((word >> (8 * p)) & 255)


@triton.jit
def _group(acc, q, s, x, is_row, K, k, WHOLE: tl.constexpr):
    """acc + what a plane gives, which is a group, and whose columns are k.. of x."""
    return acc + tl.dot(q, _columns(x, is_row, K, k + tl.arange(0, 32), WHOLE)) * s[:, None]


@triton.jit
def _columns(x, is_row, K, k, WHOLE: tl.constexpr):
    """These columns of x, transposed: [columns, BM]."""
    MANY: tl.constexpr = is_row.shape[1] >= 64
    if MANY and WHOLE:
        columns = tl.load(x + k[:, None])
    elif MANY:
        columns = tl.load(x + k[:, None], mask=(k < K)[:, None], other=0.0)
    elif WHOLE:
        columns = tl.load(x + k[:, None], mask=is_row, other=0.0)
    else:
        columns = tl.load(x + k[:, None], mask=is_row & (k < K)[:, None], other=0.0)
    return columns
