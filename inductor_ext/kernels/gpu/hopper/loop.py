"""The loop for many rows of x on a Hopper: weights are unpacked beside the matrix unit's work, not before it.

In one program of Triton's all warps unpack, multiply and wait together. Here, in Gluon, one warp does nothing but fetch
(it waits for a stage to be free and has the copy engine fill it with x and codes), and two groups of four warps take
from the stages at their own pace: while one unpacks the matrix unit works for the other. A group has 64 rows of W or
twice 64, whose weights go from registers to the unit (see ``mainloop``), each rounded once to x's dtype.

A program computes one tile of the result after the other: the next one's stages fill up while results are stored. A
step is four planes of 32 columns, and the four runs of x that go with them: of int4 codes half the words of a tile of
256 columns (``planes``), of MXFP4 codes ("fp4") a tile of 128, whose planes are groups (``fp4_planes``).
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from inductor_ext.kernels.gpu.codes import four_planes, four_planes_less, low_half
from inductor_ext.kernels.gpu.fp4 import scaled_planes

REGISTERS: gl.constexpr = gl.constexpr(240)
"""Of a thread that multiplies. One that fetches has 24, and together a processor's are used up."""
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
def stored():
    """The layout in which a group stores results: runs of 16 bytes along N."""
    return gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])


@gluon.jit
def make_stages(x, w, TALL: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory for so many steps of x and of TALL times 64 rows of codes, and who waits for whom.

    ``x``: descriptor of [M, K] in blocks [BM, 32]; ``w``: of the codes as int16 [.., 32] in blocks [64, 32].
    """
    xs = gl.allocate_shared_memory(x.dtype, [STAGES * 4, x.block_shape[0], 32], x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [STAGES * TALL, 64, 32], w.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    return xs, ws, full, free


@gluon.jit
def fetch(
    x, w, stages, place, begun, CODES: gl.constexpr, NEXT: gl.constexpr, TALL: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """What the fetching warp does for a tile of the result.

    ``place``: the first 64 rows of codes; how many times 64 rows a group's second ones are after its first; the first
    row of x; how many tiles a row of codes has; the first of those, and how many steps. The second group's rows are
    NEXT times 64 after the first's. ``begun``: steps that this program has behind it.
    """
    xs, ws, full, free = stages
    row0, APART, m0, ACROSS, first, steps = place
    PARTS: gl.constexpr = halves(CODES)
    for i in range(steps):
        at, tile, half = begun + i, first + i // PARTS, i % PARTS
        stage = at % STAGES
        mbarrier.wait(free.index(stage), ((at // STAGES) & 1) ^ 1)
        filled = full.index(stage)
        mbarrier.expect(filled, 4 * x.block_type.nbytes + TALL * w.block_type.nbytes)
        for r in gl.static_range(TALL):
            row = row0 + r // (TALL // 2) * NEXT + r % (TALL // 2) * APART
            line = ((row * ACROSS + tile) * PARTS + half) * 64
            tma.async_copy_global_to_shared(w, [line, 0], filled, ws.index(stage * TALL + r))
        for p in gl.static_range(4):
            column = ((tile * 4 + p) * PARTS + half) * 32
            tma.async_copy_global_to_shared(x, [m0, column], filled, xs.index(stage * 4 + p))


@gluon.jit
def accumulate(
    me: gl.constexpr,  # which group
    stages, place, begun,  # as for `fetch`
    scales, zeros,  # of all rows of codes, or from an expert's on; zeros may be None
    row,  # [64] this group's rows within scales and zeros
    ROWS,  # their stride
    CODES: gl.constexpr, BM: gl.constexpr, G: gl.constexpr, ZEROS: gl.constexpr, TALL: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """What a multiplying group does for a tile: the sums [64, BM] of its rows, and of its second rows if TALL is 4."""
    xs, ws, full, free = stages
    _, APART, _, _, first, steps = place
    PER: gl.constexpr = TALL // 2
    PARTS: gl.constexpr = halves(CODES)
    # The last tile may be filled up with rows that there are not.
    n, n2 = gl.minimum(row, ROWS - 1), gl.minimum(row + 64 * APART, ROWS - 1)
    acc, acc2 = gl.zeros([64, BM], gl.float32, sums(BM)), gl.zeros([64, BM], gl.float32, sums(BM))
    s, z = (
        _words(scales, first, 0, n, ROWS, CODES, G, True),
        _words(zeros, first, 0, n, ROWS, CODES, G, ZEROS != "none"),
    )
    s2, z2 = (
        _words(scales, first, 0, n2, ROWS, CODES, G, True),
        _words(zeros, first, 0, n2, ROWS, CODES, G, ZEROS != "none"),
    )
    for i in range(steps):
        stage = (begun + i) % STAGES
        mbarrier.wait(full.index(stage), ((begun + i) // STAGES) & 1)
        acc = _rows(acc, me * PER, xs, ws, stage, s, z, CODES, ZEROS, TALL, BM)
        if PER == 2:
            acc2 = _rows(acc2, me * PER + 1, xs, ws, stage, s2, z2, CODES, ZEROS, TALL, BM)
        after = gl.minimum(i + 1, steps - 1)  # whose scales are on their way while the unit multiplies
        s = _words(scales, first + after // PARTS, after % PARTS, n, ROWS, CODES, G, True)
        z = _words(zeros, first + after // PARTS, after % PARTS, n, ROWS, CODES, G, ZEROS != "none")
        if PER == 2:
            s2 = _words(scales, first + after // PARTS, after % PARTS, n2, ROWS, CODES, G, True)
            z2 = _words(zeros, first + after // PARTS, after % PARTS, n2, ROWS, CODES, G, ZEROS != "none")
            acc, acc2 = warpgroup_mma_wait(0, deps=(acc, acc2))
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        wait_for_group()  # one thread tells for all
        mbarrier.arrive(free.index(stage), count=1)
    return acc, acc2


@gluon.jit
def _words(values, tile, half, n, ROWS, CODES: gl.constexpr, G: gl.constexpr, THERE: gl.constexpr):
    """For each of a step's planes, the scales or zeros of rows n in the low 16 bits of a word; of MXFP4 all four scales
    in one word."""
    if not THERE:
        a, b, c, d = n, n, n, n  # not used
    elif CODES == "fp4":
        a = gl.load(values + tile * ROWS + n)
        b, c, d = a, a, a
    elif G == 0:
        a = gl.load(values + n)
        b, c, d = a, a, a
    elif G == 32:
        first = values + tile * 4 * ROWS + n
        a, b = gl.load(first) >> (16 * half), gl.load(first + ROWS) >> (16 * half)
        c, d = gl.load(first + 2 * ROWS) >> (16 * half), gl.load(first + 3 * ROWS) >> (16 * half)
    elif G == 64:
        a, c = gl.load(values + tile * 2 * ROWS + n), gl.load(values + (tile * 2 + 1) * ROWS + n)
        b, d = a >> 16, c >> 16
    elif G == 128:
        a = gl.load(values + tile * ROWS + n)
        b, c, d = a, a >> 16, a >> 16
    else:
        left, right = tile * 256 // G, (tile * 256 + 128) // G
        a = gl.load(values + left // 2 * ROWS + n) >> (16 * (left % 2))
        c = gl.load(values + right // 2 * ROWS + n) >> (16 * (right % 2))
        b, d = a, c
    return a, b, c, d


@gluon.jit
def _rows(
    acc, r: gl.constexpr, xs, ws, stage, s, z, CODES: gl.constexpr, ZEROS: gl.constexpr, TALL: gl.constexpr,
    BM: gl.constexpr,
):  # fmt: skip
    """acc + what 64 rows of a step give; the matrix unit is still at it."""
    words = ws.index(stage * TALL + r).load(operand(BM))
    dtype: gl.constexpr = xs.dtype
    if CODES == "fp4":
        q = scaled_planes(words, s[0])
    elif ZEROS == "int16":
        q = four_planes_less(words, _zeros(z[0]), _zeros(z[1]), _zeros(z[2]), _zeros(z[3]), dtype, True)
    else:
        q = four_planes(words, dtype, True)
    for p in gl.static_range(4):
        x = xs.index(stage * 4 + p).permute((1, 0))
        weights = q[p] if CODES == "fp4" else _weights(q[p], s[p], z[p], ZEROS)
        acc = warpgroup_mma(weights, x, acc, is_async=True)
    return acc


@gluon.jit
def _zeros(z):
    """int32 [64, 1]: the integers in the low 16 bits."""
    return gl.expand_dims(low_half(z, "int16"), 1)


@gluon.jit
def _weights(q, s, z, ZEROS: gl.constexpr):
    """A plane's weights, rounded once: codes less their zeros, times their scales; zeros that are no integers come off
    here, in float32."""
    s = gl.expand_dims(s.to(gl.int16).to(q.dtype, bitcast=True), 1)
    if ZEROS == "none" or ZEROS == "int16":
        w = q * s
    else:
        s = s.to(gl.float32)
        off = (gl.expand_dims(low_half(z, ZEROS), 1) - 8.0) * s
        w = (q.to(gl.float32) * s - off).to(q.dtype)
    return w


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
