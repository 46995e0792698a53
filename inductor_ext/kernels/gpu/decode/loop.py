"""The loop for one row of x: a program takes 16 rows of W after the other, all of K each, which its warps share.

With one row what counts is how soon and how evenly bytes come in. So nothing is split between programs, which would
have to wait for each other at the end: the warps take tiles of 256 columns in turn, and their sums meet in shared
memory. The next rows' tiles are on their way meanwhile.

Codes go to shared memory and back within a thread, 16 bytes at a time, eight words of a row. To the matrix unit (the
older one, ``mma``, whose operands are registers) these eight are columns 2 c, 2 c + 1, 2 c + 8, 2 c + 9 of two steps of
its own: which columns they are in truth does not matter as long as x's are the same. It has eight columns for x, all of
which are the one row.

Zeros are applied with sums of x (see ``mainloop``), which a program makes once, while its first tiles are on their way.
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


_AT_ONCE: gl.constexpr = gl.constexpr(4)
"""Steps whose columns of x are summed up together."""


@triton.constexpr_function
def chunks(K, WARPS):
    """How often that is."""
    return -(-K // (256 * WARPS * _AT_ONCE.value))


@triton.constexpr_function
def piece(group, i, G):
    """Which half of which plane (two a plane) is the i-th of a tile's group."""
    return group * (8 // groups(G)) + i


@gluon.jit
def make_stages(
    dtype: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr, G: gl.constexpr, ZEROS: gl.constexpr,
    CHUNKS: gl.constexpr,
):  # fmt: skip
    """Shared memory for so many stages: a tile for each warp; and for the sums of x."""
    xs = gl.allocate_shared_memory(dtype, [STAGES, WARPS, 1, 256], plain(3))
    ws = gl.allocate_shared_memory(gl.int16, [STAGES, WARPS, 32, 32], plain(3))
    ss = gl.allocate_shared_memory(gl.int32, [STAGES * words_of(G), WARPS, 16], plain(2))
    zs, totals = ss, ss
    if ZEROS != "none":
        zs = gl.allocate_shared_memory(gl.int32, [STAGES * words_of(G), WARPS, 16], plain(2))
        totals = gl.allocate_shared_memory(gl.float32, [CHUNKS * _AT_ONCE, WARPS, groups(G)], plain(2))
    return xs, ws, ss, zs, totals


@gluon.jit
def sum_up(x, K, stages, WARPS: gl.constexpr, G: gl.constexpr, CHUNKS: gl.constexpr):
    """The sum of x over each group, kept in shared memory."""
    P: gl.constexpr = groups(G)
    L: gl.constexpr = gl.BlockedLayout([1, 1, 1, 8], [1, 1, P, 32 // P], [1, WARPS, 1, 1], [3, 2, 1, 0])
    step = gl.arange(0, _AT_ONCE, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L))))
    step = gl.expand_dims(gl.expand_dims(gl.expand_dims(step, 1), 2), 3)
    warp, group, k = _places(P, 256 // P, gl.SliceLayout(0, L), WARPS)
    k = gl.expand_dims(warp * 256 + group * (256 // P) + k, 0) + step * (WARPS * 256)
    totals = stages[4]._reinterpret(gl.float32, [CHUNKS, _AT_ONCE, WARPS, P], plain(3))
    part = gl.load(x + k, mask=k < K, other=0.0)
    for chunk in gl.static_range(CHUNKS):
        k += _AT_ONCE * WARPS * 256
        after = gl.load(x + k, mask=k < K, other=0.0)  # is on its way while this one is summed up
        totals.index(chunk).store(gl.sum(part.to(gl.float32), 3))
        part = after


@gluon.jit
def fetch(
    x, weight, place, stages, stage, there, WARPS: gl.constexpr, STAGES: gl.constexpr, G: gl.constexpr,
    ZEROS: gl.constexpr,
):  # fmt: skip
    """Sends for a step: what it needs of x, codes, scales and zeros; for nothing unless it is ``there``.

    ``x``: its row and K. ``weight``: codes, scales, zeros, ROWS and ACROSS. ``place``: the first row, and the step.
    """
    xs, ws, ss, zs, _ = stages
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
    # All words of a step at once: between copies to parts of one piece of shared memory all warps would have to wait.
    S: gl.constexpr = gl.BlockedLayout([1, 1, 1], [2, 1, 16], [1, WARPS, 1], [2, 1, 0])
    j = gl.expand_dims(gl.expand_dims(gl.arange(0, PER, gl.SliceLayout(1, gl.SliceLayout(2, S))), 1), 2)
    _, warp, n = _places(WARPS, 16, S, 1)
    if G == 0:
        base, each = row0, j + warp * 0 + n
    elif G <= 128:
        base, each = row0 + first * PER * ROWS, warp * (PER * ROWS) + j * ROWS + n
    else:
        base, each = row0, ((first + warp) * 256 + j * 128) // G // 2 * ROWS + n
    known = (warp + j * 0 + n * 0 < ACROSS - first) & there
    words = ss._reinterpret(gl.int32, [STAGES, PER, WARPS, 16], plain(3))
    async_copy.async_copy_global_to_shared(words.index(stage), scales + base + each, mask=known)
    if ZEROS != "none":
        words = zs._reinterpret(gl.int32, [STAGES, PER, WARPS, 16], plain(3))
        async_copy.async_copy_global_to_shared(words.index(stage), zeros + base + each, mask=known)
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
    xs, ws, ss, zs, totals = stages
    b = _x(xs.index(stage), WARPS)
    words = ws.index(stage)
    q0, q2, q4, q6 = four_planes(words.slice(0, 16, 1).load(runs(WARPS)), xs.dtype, True)
    q1, q3, q5, q7 = four_planes(words.slice(16, 16, 1).load(runs(WARPS)), xs.dtype, True)
    q = (q0, q1, q2, q3, q4, q5, q6, q7)
    for g in gl.static_range(groups(G)):
        p = gl.zeros(acc.shape, gl.float32, sums(WARPS))
        if ZEROS != "none":
            total = totals.index(step).slice(g, 1, 1)
            total = gl.expand_dims(total.load(gl.SliceLayout(2, sums(WARPS))), 2)
            p += (8.0 - _number(zs, stage, g, step, WARPS, G, ZEROS)) * total
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
