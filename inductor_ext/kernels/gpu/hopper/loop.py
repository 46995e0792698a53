"""The loop for many rows of x on a Hopper: weights are unpacked beside the matrix unit's work, not before it.

In one program of Triton's all warps unpack, multiply and wait together. Here, in Gluon, one warp does nothing but fetch
(it waits for a stage to be free and has the copy engine fill it with x, codes, scales and zeros), and two or three
groups of four warps take from the stages at their own pace: while one unpacks the matrix unit works for another. A
group has 64 rows of W or twice 64, whose weights go from registers to the unit (see ``mainloop``), each rounded once to
x's dtype. Scales are of the stages too, though a thread needs few: loaded by the groups, a step ahead, they came too
late.

A program computes one tile of the result after the other: the next one's stages fill up while results are stored. A
step is four planes of 32 columns, and the four runs of x that go with them: of int4 codes half the words of a tile of
256 columns (``planes``), of MXFP4 codes ("fp4") a tile of 128, whose planes are groups (``fp4_planes``).
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from inductor_ext.kernels.gpu.codes import apart, four_planes, four_planes_less, low_half, scaled
from inductor_ext.kernels.gpu.fp4 import scaled_planes

REGISTERS: gl.constexpr = gl.constexpr(240)
"""Of a thread that multiplies. One that fetches has 24, and together a processor's are used up."""
REGISTERS_OF_THREE: gl.constexpr = gl.constexpr(160)
"""Of a thread that multiplies, if there are three groups. One that fetches then has 32."""
wait_for_group = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name before Triton 3.7


@triton.constexpr_function
def sums(BM):
    """The layout of a group's sums [64, BM] of one 64 rows of W."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])


@triton.constexpr_function
def operand(BM):
    """The layout of what is multiplied with x to give those."""
    return gl.DotOperandLayout(0, sums(BM), 2)


@triton.constexpr_function
def halves(CODES):
    """Steps of a tile of codes."""
    return 2 if CODES == "int4" else 1


@triton.constexpr_function
def own(TALL):
    """How many times 64 rows a group has, of a tile of TALL times 64: two groups two or one each, three groups one."""
    return 2 if TALL == 4 else 1


@triton.constexpr_function
def stored():
    """The layout in which a group stores results: runs of 16 bytes along N."""
    return gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])


@triton.constexpr_function
def pairs(CODES, G):
    """How many rows of words have the scales of a tile's planes, or their zeros: a word is a pair of groups."""
    return {32: 4, 64: 2}.get(G, 1) if CODES == "int4" else 1


@gluon.jit
def make_stages(x, w, scales, zeros, TALL: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory for so many steps of x and of TALL times 64 rows of codes, and who waits for whom.

    ``x``: descriptor of [M, K] in blocks [BM, 32]; ``w``: of the codes as int16 [.., 32] in blocks [64, 32];
    ``scales`` and ``zeros``: of their pairs as int32 [.., ROWS] in blocks [pairs, 64]. ``zeros`` may be None.
    """
    xs = gl.allocate_shared_memory(x.dtype, [STAGES * 4, x.block_shape[0], 32], x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [STAGES * TALL, 64, 32], w.layout)
    ss = gl.allocate_shared_memory(scales.dtype, [STAGES * TALL, scales.block_shape[0], 64], scales.layout)
    zs = ss
    if zeros is not None:
        zs = gl.allocate_shared_memory(zeros.dtype, [STAGES * TALL, zeros.block_shape[0], 64], zeros.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=TALL // own(TALL))
    return xs, ws, ss, zs, full, free


@gluon.jit
def fetch(
    given, stages, place, begun, CODES: gl.constexpr, G: gl.constexpr, NEXT: gl.constexpr, TALL: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """What the fetching warp does for a tile of the result, with ``given``: the descriptors of `make_stages`.

    ``place``: the first 64 rows of codes, counted from ``base``, where its expert's begin; how many times 64 rows a
    group's second ones are after its first; the first row of x; how many tiles a row of codes has; the first of those,
    and how many steps; and where the expert's scales and zeros begin. A group's rows are NEXT times 64 after those of
    the group before. ``begun``: steps that this program has behind it.
    """
    x, w, scales, zeros = given
    xs, ws, ss, zs, full, free = stages
    base, row0, APART, m0, ACROSS, first, steps, scales0, zeros0 = place
    PARTS: gl.constexpr = halves(CODES)
    size: gl.constexpr = TALL * (w.block_type.nbytes + scales.block_type.nbytes)
    for i in range(steps):
        at, tile, half = begun + i, first + i // PARTS, i % PARTS
        stage = at % STAGES
        mbarrier.wait(free.index(stage), ((at // STAGES) & 1) ^ 1)
        filled = full.index(stage)
        bytes: gl.constexpr = size + 4 * x.block_type.nbytes
        if zeros is None:
            mbarrier.expect(filled, bytes)
        else:
            mbarrier.expect(filled, bytes + TALL * zeros.block_type.nbytes)
        pair = _pair(tile, CODES, G)
        for r in gl.static_range(TALL):
            row = row0 + r // own(TALL) * NEXT + r % own(TALL) * APART
            line = (((base + row) * ACROSS + tile) * PARTS + half) * 64
            tma.async_copy_global_to_shared(w, [line, 0], filled, ws.index(stage * TALL + r))
            tma.async_copy_global_to_shared(scales, [scales0 + pair, row * 64], filled, ss.index(stage * TALL + r))
            if zeros is not None:
                tma.async_copy_global_to_shared(zeros, [zeros0 + pair, row * 64], filled, zs.index(stage * TALL + r))
        for p in gl.static_range(4):
            column = ((tile * 4 + p) * PARTS + half) * 32
            tma.async_copy_global_to_shared(x, [m0, column], filled, xs.index(stage * 4 + p))


@gluon.jit
def _pair(tile, CODES: gl.constexpr, G: gl.constexpr):
    """The first row of words for a tile. No tile is of two pairs of groups larger than 64: an odd group may begin in
    its middle, an even one does not."""
    if CODES == "fp4":
        pair = tile
    elif G == 0:
        pair = 0
    elif G <= 128:
        pair = tile * pairs(CODES, G)
    else:
        pair = tile * 256 // G // 2
    return pair


@gluon.jit
def accumulate(
    me: gl.constexpr,  # which group
    stages, place, begun,  # as for `fetch`
    CODES: gl.constexpr, BM: gl.constexpr, G: gl.constexpr, ZEROS: gl.constexpr, TALL: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """What a multiplying group does for a tile: the sums [64, BM] of its rows, and of its second rows if TALL is 4."""
    full, free = stages[4], stages[5]
    first, steps = place[5], place[6]
    PER: gl.constexpr = own(TALL)
    PARTS: gl.constexpr = halves(CODES)
    acc, acc2 = gl.zeros([64, BM], gl.float32, sums(BM)), gl.zeros([64, BM], gl.float32, sums(BM))
    for i in range(steps):
        stage = (begun + i) % STAGES
        tile, half = first + i // PARTS, i % PARTS
        mbarrier.wait(full.index(stage), ((begun + i) // STAGES) & 1)
        acc = _rows(acc, me * PER, stages, stage, tile, half, CODES, G, ZEROS, TALL, BM)
        if PER == 2:
            acc2 = _rows(acc2, me * PER + 1, stages, stage, tile, half, CODES, G, ZEROS, TALL, BM)
            acc, acc2 = warpgroup_mma_wait(0, deps=(acc, acc2))
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        wait_for_group()  # one thread tells for all
        mbarrier.arrive(free.index(stage), count=1)
    return acc, acc2


@gluon.jit
def _words(values, at, L: gl.constexpr, CODES: gl.constexpr, G: gl.constexpr):
    """For each of a tile's planes, the word that has the scales or zeros of 64 rows."""
    EACH: gl.constexpr = pairs(CODES, G)
    rows = values._reinterpret(gl.int32, [values.shape[0] * EACH, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    a = rows.index(at * EACH).load(L)
    b, c, d = a, a, a
    if EACH == 2:
        c = rows.index(at * 2 + 1).load(L)
        d = c
    elif EACH == 4:
        b, c, d = rows.index(at * 4 + 1).load(L), rows.index(at * 4 + 2).load(L), rows.index(at * 4 + 3).load(L)
    return a, b, c, d


@gluon.jit
def _numbers(words, tile, half, dtype: gl.constexpr, G: gl.constexpr):
    """Four planes' own numbers [64, 1] of those words: of the dtype, or int32 of "int16"."""
    a, b, c, d = words
    if G == 32:
        a, b, c, d = a >> (16 * half), b >> (16 * half), c >> (16 * half), d >> (16 * half)
    elif G == 64:
        b, d = b >> 16, d >> 16
    elif G == 128:
        c, d = c >> 16, d >> 16
    elif G != 0:
        left, right = 16 * (tile * 256 // G % 2), 16 * ((tile * 256 + 128) // G % 2)
        a, b, c, d = a >> left, b >> left, c >> right, d >> right
    return _number(a, dtype), _number(b, dtype), _number(c, dtype), _number(d, dtype)


@gluon.jit
def _number(word, dtype: gl.constexpr):
    number = low_half(word, "int16") if dtype == "int16" else word.to(gl.int16).to(dtype, bitcast=True)
    return gl.expand_dims(number, 1)


@gluon.jit
def _rows(
    acc, r: gl.constexpr, stages, stage, tile, half, CODES: gl.constexpr, G: gl.constexpr, ZEROS: gl.constexpr,
    TALL: gl.constexpr, BM: gl.constexpr,
):  # fmt: skip
    """acc + what 64 rows of a step give; the matrix unit is still at it."""
    xs, ws, ss, zs, _, _ = stages
    at = stage * TALL + r
    words = ws.index(at).load(operand(BM))
    rows: gl.constexpr = gl.SliceLayout(1, operand(BM))
    scales = _words(ss, at, rows, CODES, G)
    dtype: gl.constexpr = xs.dtype
    if CODES == "fp4":
        q = scaled_planes(words, scales[0])
    elif ZEROS == "none" or ZEROS == "int16":
        if ZEROS == "none":
            a, b, c, d = four_planes(words, dtype, True)
        else:
            z = _numbers(_words(zs, at, rows, CODES, G), tile, half, "int16", G)
            a, b, c, d = four_planes_less(words, z[0], z[1], z[2], z[3], dtype, True)
        s = _numbers(scales, tile, half, dtype, G)
        q = a * s[0], b * s[1], c * s[2], d * s[3]
    else:
        q = _less_float_zeros(words, scales, _words(zs, at, rows, CODES, G), tile, half, dtype, G)
    for p in gl.static_range(4):
        x = xs.index(stage * 4 + p).permute((1, 0))
        acc = warpgroup_mma(q[p], x, acc, is_async=True)
    return acc


@gluon.jit
def _less_float_zeros(words, scales, zeros, tile, half, dtype: gl.constexpr, G: gl.constexpr):
    """Four planes' weights in dtype, which is the zeros', too. What is left of a zero is rounded, and the weight."""
    a, rest_a = apart(zeros[0], scales[0], dtype)
    b, rest_b = apart(zeros[1], scales[1], dtype)
    c, rest_c = apart(zeros[2], scales[2], dtype)
    d, rest_d = apart(zeros[3], scales[3], dtype)
    z = _numbers((a, b, c, d), tile, half, "int16", G)
    r = _numbers((rest_a, rest_b, rest_c, rest_d), tile, half, dtype, G)
    s = _numbers(scales, tile, half, dtype, G)
    a, b, c, d = four_planes_less(words, z[0], z[1], z[2], z[3], dtype, True)
    return scaled(a, s[0], r[0]), scaled(b, s[1], r[1]), scaled(c, s[2], r[2]), scaled(d, s[3], r[3])


@gluon.jit
def add_bias(acc, bias, n0, N):
    """acc [64, BM] + the bias of rows n0.. of N."""
    n = n0 + gl.arange(0, 64, gl.SliceLayout(1, acc.type.layout))
    return acc + gl.expand_dims(gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32), 1)


@gluon.jit
def store_rows(acc, out, m, known, n0, N):
    """Columns n0.. of the rows m [BM] of out [.., N], where they are known, from acc [64, BM]."""
    n = n0 + gl.arange(0, 64, gl.SliceLayout(1, stored()))
    y = gl.convert_layout(acc.to(out.dtype.element_ty), stored())
    where = gl.expand_dims(m, 0).to(gl.int64) * N + gl.expand_dims(n, 1)
    gl.store(out + where, y, mask=gl.expand_dims(n < N, 1) & gl.expand_dims(known, 0))
