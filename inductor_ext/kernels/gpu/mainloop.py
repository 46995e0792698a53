"""The loop that every fused Triton kernel here runs: acc [BN, BM] += W [BN, some columns] @ x^T.

The weight is the first operand, because a matrix unit takes that one from registers: codes go from memory to registers
to the unit, and never through shared memory as floats. Scales are applied to the sums of a group, in float32, so codes
stay exact. Zeros too: with sums of x (a matmul by ones, in the same registers' layout as the result)

    sum_k (q - z) s x = s (sum_k (q - 8) x - (z - 8) sum_k x)

or, where the matrix unit is what limits (many rows of x), integers taken off the codes, which is exact as well. With
very many rows that holds for scales too: ROUNDED, each weight is rounded once to x's dtype, as a dense weight would be,
and the sums of all groups stay in the matrix unit.

A step is a tile of 256 columns, or one half of its words: then each plane is 32 columns wide, and x is read in runs of
32. Groups of 32 need half steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_ext.kernels.gpu.codes import four_planes, number, side_by_side


@triton.jit
def row_pointers(w, n, steps, WIDTH: tl.constexpr):
    """Pointers [BN, WIDTH] to the first words of the rows n of a weight whose rows have ``steps`` tiles."""
    j = tl.arange(0, WIDTH)
    row = (n // 64).to(tl.int64) * (steps * 4096) + n % 64 * 32
    return w + row[:, None] + (j // 32 * 2048 + j % 32)[None, :]


@triton.jit
def accumulate(
    acc,  # float32 [BN, BM]
    w,  # pointers from `row_pointers`
    scales,
    zeros,  # or None: what `number` reads
    n,  # [BN] rows within scales and zeros
    N,  # their stride
    x,  # pointers to column 0 of x, [1, BM]
    is_row,  # bool [1, BM]: the others are not read, and count as zero
    K,
    first,
    last,  # tiles
    WIDTH: tl.constexpr,  # words of a row in a step: 64, or 32 for half steps
    G: tl.constexpr,  # group size: 32, 64, a multiple of 128, or 0 for all of K
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,  # as KIND, or "none"
    BY_SUMS: tl.constexpr,  # how zeros are applied
    ROUNDED: tl.constexpr,  # scales act on codes instead of sums
    WIDE: tl.constexpr,  # two planes as one operand, instead of one matmul a plane
    WHOLE: tl.constexpr,  # K is a multiple of 256
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    PARTS: tl.constexpr = 64 // WIDTH
    for step in tl.range(first * PARTS, last * PARTS, num_stages=STAGES):  # said here, scales are loaded ahead too
        tile, part = step // PARTS, step % PARTS
        a, b, c, d = four_planes(tl.load(w + tile * 4096 + part * 2048), dtype, PTX)
        k = tile * 256 + part * 32
        if G == 0 or G >= 128:
            # The planes of one side of a tile are of one group.
            s, z = _group(scales, zeros, tile * 256, 0, n, N, G, KIND, ZEROS)
            acc = _side(acc, a, b, s, z, x, is_row, K, k, ZEROS, BY_SUMS, ROUNDED, WIDE, WHOLE, dtype)
            s, z = _group(scales, zeros, tile * 256, 1, n, N, G, KIND, ZEROS)
            acc = _side(acc, c, d, s, z, x, is_row, K, k + 128, ZEROS, BY_SUMS, ROUNDED, WIDE, WHOLE, dtype)
        else:
            for p in tl.static_range(4):
                if G == 64:
                    pair, which = tile * 2 + p // 2, p % 2
                else:
                    pair, which = tile * 4 + p, part
                s, z = _numbers(scales, zeros, pair, which, n, N, KIND, ZEROS)
                if p == 0:
                    acc = _plane(acc, a, s, z, x, is_row, K, k, ZEROS, BY_SUMS, ROUNDED, WHOLE, dtype)
                elif p == 1:
                    acc = _plane(acc, b, s, z, x, is_row, K, k + 64, ZEROS, BY_SUMS, ROUNDED, WHOLE, dtype)
                elif p == 2:
                    acc = _plane(acc, c, s, z, x, is_row, K, k + 128, ZEROS, BY_SUMS, ROUNDED, WHOLE, dtype)
                else:
                    acc = _plane(acc, d, s, z, x, is_row, K, k + 192, ZEROS, BY_SUMS, ROUNDED, WHOLE, dtype)
    return acc


@triton.jit
def _group(
    scales, zeros, k, side: tl.constexpr, n, N, G: tl.constexpr, KIND: tl.constexpr, ZEROS: tl.constexpr
):  # fmt: skip
    """The scale and zero of one side of the tile at column k."""
    if G == 0:
        s, z = _numbers(scales, zeros, 0, 0, n, N, KIND, ZEROS)
    elif G == 128:  # both sides are one pair, which is then loaded once
        s, z = _numbers(scales, zeros, k // 256, side, n, N, KIND, ZEROS)
    else:
        group = (k + side * 128) // G
        s, z = _numbers(scales, zeros, group // 2, group % 2, n, N, KIND, ZEROS)
    return s, z


@triton.jit
def _numbers(scales, zeros, pair, which, n, N, KIND: tl.constexpr, ZEROS: tl.constexpr):
    s = number(scales, pair, which, n, N, KIND)
    z = s  # not used
    if ZEROS != "none":
        z = number(zeros, pair, which, n, N, ZEROS) - 8.0
    return s, z


@triton.jit
def _side(
    acc, a, b, s, z, x, is_row, K, k,
    ZEROS: tl.constexpr, BY_SUMS: tl.constexpr, ROUNDED: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """acc + what two planes of one group give. Columns k.. and k + 64.. of x go with them."""
    WIDTH: tl.constexpr = a.shape[1]
    a, b = _weights(a, s, z, ZEROS, BY_SUMS, ROUNDED), _weights(b, s, z, ZEROS, BY_SUMS, ROUNDED)
    p = _start(acc, ROUNDED)
    sums = tl.zeros(acc.shape, tl.float32)
    j = tl.arange(0, WIDTH)
    if WIDE:
        both = tl.arange(0, 2 * WIDTH)
        columns = _columns(x, is_row, K, k + both // WIDTH * 64 + both % WIDTH, WHOLE)
        p, sums = _product(side_by_side(a, b), columns, p, sums, ZEROS, BY_SUMS, dtype)
    else:
        p, sums = _product(a, _columns(x, is_row, K, k + j, WHOLE), p, sums, ZEROS, BY_SUMS, dtype)
        p, sums = _product(b, _columns(x, is_row, K, k + 64 + j, WHOLE), p, sums, ZEROS, BY_SUMS, dtype)
    return _scaled(acc, p, sums, s, z, ZEROS, BY_SUMS, ROUNDED)


@triton.jit
def _plane(
    acc, q, s, z, x, is_row, K, k,
    ZEROS: tl.constexpr, BY_SUMS: tl.constexpr, ROUNDED: tl.constexpr, WHOLE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """acc + what one plane gives, whose columns are k.. of x."""
    p = _start(acc, ROUNDED)
    sums = tl.zeros(acc.shape, tl.float32)
    columns = _columns(x, is_row, K, k + tl.arange(0, q.shape[1]), WHOLE)
    p, sums = _product(_weights(q, s, z, ZEROS, BY_SUMS, ROUNDED), columns, p, sums, ZEROS, BY_SUMS, dtype)
    return _scaled(acc, p, sums, s, z, ZEROS, BY_SUMS, ROUNDED)


@triton.jit
def _columns(x, is_row, K, k, WHOLE: tl.constexpr):
    """These columns of x, transposed: [columns, BM]."""
    if WHOLE:
        columns = tl.load(x + k[:, None], mask=is_row, other=0.0)
    else:
        columns = tl.load(x + k[:, None], mask=is_row & (k < K)[:, None], other=0.0)
    return columns


@triton.jit
def _weights(q, s, z, ZEROS: tl.constexpr, BY_SUMS: tl.constexpr, ROUNDED: tl.constexpr):
    """The matmul's operand: codes, less their zeros unless these are applied by sums, scaled if that is not left to the
    sums."""
    if ZEROS != "none" and not BY_SUMS:
        q -= z.to(q.dtype)[:, None]
    if ROUNDED:
        q *= s.to(q.dtype)[:, None]
    return q


@triton.jit
def _start(acc, ROUNDED: tl.constexpr):
    """What a group's products are added to."""
    return acc if ROUNDED else tl.zeros(acc.shape, tl.float32)


@triton.jit
def _product(q, x, p, sums, ZEROS: tl.constexpr, BY_SUMS: tl.constexpr, dtype: tl.constexpr):
    """p + q @ x, and sums + the sums of x in the same layout, if they are needed."""
    p = tl.dot(q, x, p)
    if ZEROS != "none" and BY_SUMS:
        sums = tl.dot(tl.full(q.shape, 1.0, dtype), x, sums)
    return p, sums


@triton.jit
def _scaled(acc, p, sums, s, z, ZEROS: tl.constexpr, BY_SUMS: tl.constexpr, ROUNDED: tl.constexpr):
    if ROUNDED:
        acc = p
    else:
        if ZEROS != "none" and BY_SUMS:
            p -= z[:, None] * sums
        acc += p * s[:, None]
    return acc
