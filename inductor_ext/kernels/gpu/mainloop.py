"""The loop that every fused Triton kernel here runs: acc [BN, BM] += W [BN, some columns] @ x^T.

The weight is the first operand, because a matrix unit takes that one from registers: codes go from memory to registers
to the unit, and never through shared memory as floats. Scales are applied to the sums of a group, in float32, so codes
stay exact; less their zeros too, if these are integers. Other zeros are applied with sums of x (a matmul by ones, in
the same registers' layout as the result):

    sum_k (q - z) s x = s (sum_k (q - 8) x - (z - 8) sum_k x)

With very many rows of x the matrix unit is what limits: ROUNDED, each weight is rounded to x's dtype, as a dense
weight would be, zeros of any kind come off it, and the sums of all groups stay in the unit.

A step is a tile of 256 columns, or one half of its words: then each plane is 32 columns wide, and x is read in runs of
32. Groups of 32 need half steps, because a plane's halves have scales of their own; with few rows these are ROUNDED,
and the halves put together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_ext.kernels.gpu.codes import apart, four_planes, four_planes_less, low_half, number, scaled, side_by_side


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
    ROUNDED: tl.constexpr,  # scales act on codes instead of sums
    WIDE: tl.constexpr,  # two planes as one operand, instead of one matmul a plane
    WHOLE: tl.constexpr,  # K is a multiple of 256
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    WHOLE_TILE: tl.constexpr = ROUNDED and G == 32 and acc.shape[1] <= 32
    PARTS: tl.constexpr = 1 if WHOLE_TILE else 64 // WIDTH
    for step in tl.range(first * PARTS, last * PARTS, num_stages=STAGES):  # said here, scales are loaded ahead too
        tile, part = step // PARTS, step % PARTS
        k = tile * 256 + part * 32
        if WHOLE_TILE:
            a, b, c, d = _weights(w, scales, zeros, tile, 0, n, N, G, KIND, ZEROS, dtype, PTX)
            e, f, g, h = _weights(w, scales, zeros, tile, 1, n, N, G, KIND, ZEROS, dtype, PTX)
            a, b, c, d = side_by_side(a, e), side_by_side(b, f), side_by_side(c, g), side_by_side(d, h)
        elif ROUNDED:
            a, b, c, d = _weights(w, scales, zeros, tile, part, n, N, G, KIND, ZEROS, dtype, PTX)
        else:
            a, b, c, d, of_a, of_b, of_c, of_d = _codes(w, scales, zeros, tile, part, n, N, G, KIND, ZEROS, dtype, PTX)
        if ROUNDED and acc.shape[1] <= 64:
            # By themselves: were these the sums of the step before, ptxas would have each of the unit's instructions
            # wait for the one before it.
            p = _two_planes(tl.zeros(acc.shape, tl.float32), a, b, x, is_row, K, k, WIDE, WHOLE)
            acc += _two_planes(p, c, d, x, is_row, K, k + 128, WIDE, WHOLE)
        elif ROUNDED:
            acc = _two_planes(acc, a, b, x, is_row, K, k, WIDE, WHOLE)
            acc = _two_planes(acc, c, d, x, is_row, K, k + 128, WIDE, WHOLE)
        elif G == 32 or G == 64:
            acc = _plane(acc, a, of_a, x, is_row, K, k, ZEROS, WHOLE)
            acc = _plane(acc, b, of_b, x, is_row, K, k + 64, ZEROS, WHOLE)
            acc = _plane(acc, c, of_c, x, is_row, K, k + 128, ZEROS, WHOLE)
            acc = _plane(acc, d, of_d, x, is_row, K, k + 192, ZEROS, WHOLE)
        else:  # the planes of one side of a tile are of one group
            acc = _side(acc, a, b, of_a, x, is_row, K, k, ZEROS, WIDE, WHOLE)
            acc = _side(acc, c, d, of_c, x, is_row, K, k + 128, ZEROS, WIDE, WHOLE)
    return acc


@triton.jit
def _codes(
    w, scales, zeros, tile, part, n, N, G: tl.constexpr, KIND: tl.constexpr, ZEROS: tl.constexpr, dtype: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Four planes of a tile or of half of it, less their zeros if these are integers; and four pairs of scales and
    zeros [BN, 1]."""
    of_a = _group(scales, zeros, tile, part, 0, n, N, G, KIND, ZEROS)
    of_b = _group(scales, zeros, tile, part, 1, n, N, G, KIND, ZEROS)
    of_c = _group(scales, zeros, tile, part, 2, n, N, G, KIND, ZEROS)
    of_d = _group(scales, zeros, tile, part, 3, n, N, G, KIND, ZEROS)
    words = tl.load(w + tile * 4096 + part * 2048)
    if ZEROS == "int16":
        a, b, c, d = four_planes_less(words, of_a[1], of_b[1], of_c[1], of_d[1], dtype, PTX)
    else:
        a, b, c, d = four_planes(words, dtype, PTX)
    return a, b, c, d, of_a, of_b, of_c, of_d


@triton.jit
def _weights(
    w, scales, zeros, tile, part, n, N, G: tl.constexpr, KIND: tl.constexpr, ZEROS: tl.constexpr, dtype: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """The same as weights in dtype. Each is rounded once; with zeros apart, what is left of these is, too."""
    if PTX and ZEROS == KIND:
        of_a = _group_apart(scales, zeros, tile, part, 0, n, N, G, KIND, dtype)
        of_b = _group_apart(scales, zeros, tile, part, 1, n, N, G, KIND, dtype)
        of_c = _group_apart(scales, zeros, tile, part, 2, n, N, G, KIND, dtype)
        of_d = _group_apart(scales, zeros, tile, part, 3, n, N, G, KIND, dtype)
        words = tl.load(w + tile * 4096 + part * 2048)
        a, b, c, d = four_planes_less(words, of_a[1], of_b[1], of_c[1], of_d[1], dtype, PTX)
        a, b = scaled(a, of_a[0], of_a[2]), scaled(b, of_b[0], of_b[2])
        c, d = scaled(c, of_c[0], of_c[2]), scaled(d, of_d[0], of_d[2])
    else:
        a, b, c, d, of_a, of_b, of_c, of_d = _codes(w, scales, zeros, tile, part, n, N, G, KIND, ZEROS, dtype, PTX)
        a, b = _scaled(a, of_a, ZEROS, dtype), _scaled(b, of_b, ZEROS, dtype)
        c, d = _scaled(c, of_c, ZEROS, dtype), _scaled(d, of_d, ZEROS, dtype)
    return a, b, c, d


@triton.jit
def _scaled(q, of_q, ZEROS: tl.constexpr, dtype: tl.constexpr):
    s, z = of_q
    if _by_sums(ZEROS):
        less_zeros = q.to(tl.float32) - (z - 8.0)
        weights = (less_zeros * s).to(dtype)
    else:
        weights = q * s.to(dtype)
    return weights


@triton.jit
def _group(
    scales, zeros, tile, part, plane: tl.constexpr, n, N, G: tl.constexpr, KIND: tl.constexpr, ZEROS: tl.constexpr
):  # fmt: skip
    """The scales and zeros [BN, 1] of a plane of a tile, or of half of it."""
    pair, which = _place(tile, part, plane, G)
    s = number(scales, pair, which, n, N, KIND)[:, None]
    z = s  # not used
    if ZEROS != "none":
        z = number(zeros, pair, which, n, N, ZEROS)[:, None]
    return s, z


@triton.jit
def _group_apart(
    scales, zeros, tile, part, plane: tl.constexpr, n, N, G: tl.constexpr, KIND: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """As `_group`, of scales and zeros in dtype: scales, whole zeros, and what the rest of these adds to a weight."""
    pair, which = _place(tile, part, plane, G)
    s = tl.load(scales + pair * N + n)
    whole, rest = apart(tl.load(zeros + pair * N + n), s, dtype)
    z = low_half(whole >> (16 * which), "int16")[:, None]
    s, rest = low_half(s >> (16 * which), KIND)[:, None], low_half(rest >> (16 * which), KIND)[:, None]
    return s.to(dtype), z, rest.to(dtype)


@triton.jit
def _place(tile, part, plane: tl.constexpr, G: tl.constexpr):
    """In which pair the group of a plane is, and which of the two it is."""
    if G == 0:
        pair, which = 0, 0
    elif G == 32:
        pair, which = tile * 4 + plane, part
    elif G == 64:
        pair, which = tile * 2 + plane // 2, plane % 2
    elif G == 128:  # both sides are one pair, which is then loaded once
        pair, which = tile, plane // 2
    else:
        group = (tile * 256 + plane // 2 * 128) // G  # of a side, as both its planes are of one
        pair, which = group // 2, group % 2
    return pair, which


@triton.jit
def _side(
    acc, a, b, of_both, x, is_row, K, k, ZEROS: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """acc + what two planes of one group give. Columns k.. and k + 64.. of x go with them."""
    s, z = of_both
    p = _two_planes(tl.zeros(acc.shape, tl.float32), a, b, x, is_row, K, k, WIDE, WHOLE)
    if _by_sums(ZEROS):
        ones = tl.full(a.shape, 1.0, a.dtype)
        sums = _two_planes(tl.zeros(acc.shape, tl.float32), ones, ones, x, is_row, K, k, WIDE, WHOLE)
        p -= (z - 8.0) * sums
    return acc + p * s


@triton.jit
def _plane(acc, q, of_q, x, is_row, K, k, ZEROS: tl.constexpr, WHOLE: tl.constexpr):
    """acc + what one plane gives, whose columns are k.. of x."""
    s, z = of_q
    columns = _columns(x, is_row, K, k + tl.arange(0, q.shape[1]), WHOLE)
    p = tl.dot(q, columns)
    if _by_sums(ZEROS):
        p -= (z - 8.0) * tl.dot(tl.full(q.shape, 1.0, q.dtype), columns)
    return acc + p * s


@triton.constexpr_function
def _by_sums(ZEROS):
    """Whether zeros are applied with sums of x: those that are no integers."""
    return ZEROS not in ("none", "int16")


@triton.jit
def _two_planes(acc, a, b, x, is_row, K, k, WIDE: tl.constexpr, WHOLE: tl.constexpr):
    """acc + a and b times columns k.. and k + 64.. of x."""
    WIDTH: tl.constexpr = a.shape[1]
    if WIDE:
        both = tl.arange(0, 2 * WIDTH)
        columns = _columns(x, is_row, K, k + both // WIDTH * 64 + both % WIDTH, WHOLE)
        acc = tl.dot(side_by_side(a, b), columns, acc)
    else:
        j = tl.arange(0, WIDTH)
        acc = tl.dot(a, _columns(x, is_row, K, k + j, WHOLE), acc)
        acc = tl.dot(b, _columns(x, is_row, K, k + 64 + j, WHOLE), acc)
    return acc


@triton.jit
def _columns(x, is_row, K, k, WHOLE: tl.constexpr):
    """These columns of x, transposed: [columns, BM]."""
    if WHOLE:
        columns = tl.load(x + k[:, None], mask=is_row, other=0.0)
    else:
        columns = tl.load(x + k[:, None], mask=is_row & (k < K)[:, None], other=0.0)
    return columns
