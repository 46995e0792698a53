"""The loop for one row of x: a program takes 16 rows of W after the other, all of K each, which its warps share.

With one row what counts is how soon and how evenly bytes come in. So nothing is split between programs, which would
have to wait for each other at the end: the warps take tiles of 256 columns in turn, and their sums meet in shared
memory. The next rows' tiles are on their way meanwhile.

Codes go to shared memory and back within a thread, 16 bytes at a time, eight words of a row. To the matrix unit (the
older one, ``mma``, whose operands are registers) these eight are columns 2 c, 2 c + 1, 2 c + 8, 2 c + 9 of two steps of
its own: which columns they are in truth does not matter as long as x's are the same. It has eight columns for x, all of
which are the one row.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from inductor_ext.kernels.gpu.codes import four_planes, low_half


@triton.constexpr_function
def sums(WARPS):
    """The layout of sums [WARPS, 16, 8]."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])


@triton.constexpr_function
def runs(WARPS):
    """The layout of [WARPS, rows, 32]: runs of eight."""
    return gl.BlockedLayout([1, 1, 8], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])


@triton.constexpr_function
def plain(rank):
    """The layout of shared memory."""
    return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank - 1, -1, -1)))


@triton.constexpr_function
def words_of(G):
    """How many words a tile's scales are."""
    return {32: 4, 64: 2, 128: 1, 0: 1}.get(G, 2)


@triton.constexpr_function
def groups(G):
    """Of a tile: its sides count as two, also if they are of one group."""
    return {32: 8, 64: 4}.get(G, 2)


@triton.constexpr_function
def piece(group, i, G):
    """Which half of which plane (two a plane) is the i-th of a tile's group."""
    return group * (8 // groups(G)) + i


@gluon.jit
def make_stages(
    dtype: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr, G: gl.constexpr, ZEROS: gl.constexpr
):  # fmt: skip
    """Shared memory for so many steps: a tile for each warp."""
    xs = gl.allocate_shared_memory(dtype, [STAGES, WARPS, 1, 256], plain(3))
    ws = gl.allocate_shared_memory(gl.int16, [STAGES, WARPS, 32, 32], plain(3))
    ss = gl.allocate_shared_memory(gl.int32, [STAGES * words_of(G), WARPS, 16], plain(2))
    zs = ss
    if ZEROS != "none":
        zs = gl.allocate_shared_memory(gl.int32, [STAGES * words_of(G), WARPS, 16], plain(2))
    return xs, ws, ss, zs


@gluon.jit
def fetch(
    x, weight, place, stages, stage, there, WARPS: gl.constexpr, G: gl.constexpr, ZEROS: gl.constexpr
):  # fmt: skip
    """Sends for a step: what it needs of x, codes, scales and zeros; for nothing unless it is ``there``.

    ``x``: its row and K. ``weight``: codes, scales, zeros, ROWS and ACROSS. ``place``: the first row, and the step.
    """
    xs, ws, ss, zs = stages
    row, K = x
    w, scales, zeros, ROWS, ACROSS = weight
    row0, step = place
    PER: gl.constexpr = words_of(G)
    first = step * WARPS
    warp, _, k = _places(1, 256, gl.BlockedLayout([1, 1, 8], [1, 1, 32], [WARPS, 1, 1], [2, 1, 0]), WARPS)
    k += warp * 256
    async_copy.async_copy_global_to_shared(xs.index(stage), row + first * 256 + k, mask=(k < K - first * 256) & there)
    warp, r, word = _places(32, 32, runs(WARPS), WARPS)  # 16 rows' first halves, and their second ones
    tiles = w + (row0 // 64).to(gl.int64) * (ACROSS * 4096) + (row0 % 64 * 32 + first * 4096)
    each = warp * 4096 + r % 16 * 32 + r // 16 * 2048 + word
    known = (warp < ACROSS - first) & there
    async_copy.async_copy_global_to_shared(ws.index(stage), tiles + each, mask=known)
    S: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [WARPS, 1], [1, 0])
    warp = gl.expand_dims(gl.arange(0, WARPS, gl.SliceLayout(1, S)), 1)
    n = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, S)), 0)
    known = (warp < ACROSS - first) & there
    for j in gl.static_range(PER):
        if G == 0:
            base, each = row0, warp * 0 + n
        elif G <= 128:
            base, each = row0 + (first * PER + j) * ROWS, warp * (PER * ROWS) + n
        else:
            base, each = row0, ((first + warp) * 256 + j * 128) // G // 2 * ROWS + n
        async_copy.async_copy_global_to_shared(ss.index(stage * PER + j), scales + base + each, mask=known)
        if ZEROS != "none":
            async_copy.async_copy_global_to_shared(zs.index(stage * PER + j), zeros + base + each, mask=known)
    async_copy.commit_group()


@gluon.jit
def _places(HIGH: gl.constexpr, WIDE: gl.constexpr, L: gl.constexpr, WARPS: gl.constexpr):
    """Indices [WARPS, 1, 1], [1, HIGH, 1], [1, 1, WIDE]."""
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    row = gl.arange(0, HIGH, gl.SliceLayout(1, gl.SliceLayout(0, L)))
    column = gl.arange(0, WIDE, gl.SliceLayout(0, gl.SliceLayout(0, L)))
    warp, row = gl.expand_dims(gl.expand_dims(warp, 1), 2), gl.expand_dims(gl.expand_dims(row, 1), 0)
    return warp, row, gl.expand_dims(gl.expand_dims(column, 0), 0)


@gluon.jit
def add_step(
    acc, stages, stage, step, WARPS: gl.constexpr, G: gl.constexpr, KIND: gl.constexpr, ZEROS: gl.constexpr
):  # fmt: skip
    """acc [WARPS, 16, 8] + what a step gives."""
    xs, ws, ss, zs = stages
    b = _x(xs.index(stage), WARPS)
    words = ws.index(stage)
    q0, q2, q4, q6 = four_planes(words.slice(0, 16, 1).load(runs(WARPS)), xs.dtype, True)
    q1, q3, q5, q7 = four_planes(words.slice(16, 16, 1).load(runs(WARPS)), xs.dtype, True)
    q = (q0, q1, q2, q3, q4, q5, q6, q7)
    if ZEROS != "none":
        ones = gl.full([WARPS, 16, 32], 1.0, xs.dtype, gl.DotOperandLayout(0, sums(WARPS), 2))
    for g in gl.static_range(groups(G)):
        p = gl.zeros(acc.shape, gl.float32, sums(WARPS))
        if ZEROS != "none":
            for i in gl.static_range(8 // groups(G)):
                p = mma_v2(ones, b[piece(g, i, G)], p)
            p *= 8.0 - _number(zs, stage, g, step, WARPS, G, ZEROS)
        for i in gl.static_range(8 // groups(G)):
            p = mma_v2(_first(q[piece(g, i, G)], WARPS), b[piece(g, i, G)], p)
        acc += p * _number(ss, stage, g, step, WARPS, G, KIND)
    return acc


@gluon.jit
def _x(x, WARPS: gl.constexpr):
    """A step's columns of x as second operands, one for each half of a plane, in their order."""
    b = ()
    for p in gl.static_range(8):
        part = x.slice(p * 32, 32, 2).load(runs(WARPS))
        part = gl.broadcast(part, gl.full([WARPS, 8, 32], 0.0, part.dtype, runs(WARPS)))[0]
        part = gl.permute(_permuted(part, WARPS), (0, 2, 1))
        part = gl.convert_layout(part, gl.DotOperandLayout(1, sums(WARPS), 2), assert_trivial=True)
        b = b + (part,)  # type: ignore[assignment]  # noqa: RUF005  Gluon has no other spelling
    return b


@gluon.jit
def _first(t, WARPS: gl.constexpr):
    return gl.convert_layout(_permuted(t, WARPS), gl.DotOperandLayout(0, sums(WARPS), 2), assert_trivial=True)


@gluon.jit
def _permuted(t, WARPS: gl.constexpr):
    """[WARPS, rows, 32] with columns in the matrix unit's order. No data moves."""
    R: gl.constexpr = t.shape[1]
    t = gl.permute(gl.reshape(t, [WARPS, R, 4, 2, 2, 2]), (0, 1, 3, 4, 2, 5))
    return gl.reshape(t, [WARPS, R, 32])


@gluon.jit
def _number(
    words, stage, g: gl.constexpr, step, WARPS: gl.constexpr, G: gl.constexpr, KIND: gl.constexpr
):  # fmt: skip
    """float32 [WARPS, 16, 1]: the scales or zeros of a tile's group."""
    R: gl.constexpr = gl.SliceLayout(2, sums(WARPS))
    PER: gl.constexpr = words_of(G)
    word = words.index(stage * PER + g * PER // groups(G)).load(R)
    if G == 32 or G == 64 or G == 128:
        word = word >> (16 * (g % 2))
    elif G != 0:
        tile = step * WARPS + gl.expand_dims(gl.arange(0, WARPS, gl.SliceLayout(1, R)), 1)
        word = word >> ((tile * 256 + g * 128) // G % 2 * 16)
    return gl.expand_dims(low_half(word, KIND), 2)
