"""y = x @ W^T + bias for many rows of x on a Hopper: in tiles [BN, BM] of y^T, or parts of their K.

Where few tiles would leave the device idle, SPLITS programs share a tile, as in the kernel for other GPUs (``dense``).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from inductor_ext.kernels.gpu.hopper.loop import (
    REGISTERS,
    REGISTERS_OF_THREE,
    accumulate,
    add_bias,
    fetch,
    halves,
    make_stages,
    own,
    store_rows,
    stored,
    wait_for_group,
)

_BAND: gl.constexpr = gl.constexpr(16)
"""Tiles along N that are taken together when there are several along M: their weights stay in the cache."""


@gluon.jit(do_not_specialize=["M"])
def linear_kernel(
    x,  # descriptors: see `make_stages`
    w,
    scales,
    zeros,  # or None
    bias,
    out,
    parts,  # float32 [tiles, BN / 64, SPLITS, 64, BM], or None without splits
    arrived,  # int32 [tiles, BN / 64], zero before and after
    M,
    N,
    ACROSS,  # tiles of a row
    SPLITS: gl.constexpr,
    BN: gl.constexpr,  # 128, 192 or 256
    BM: gl.constexpr,
    G: gl.constexpr,
    ZEROS: gl.constexpr,
    STAGES: gl.constexpr,
):
    TALL: gl.constexpr = BN // 64
    stages = make_stages(x, w, scales, zeros, TALL, STAGES)
    work = (gl.cdiv(N, BN), gl.cdiv(M, BM), ACROSS)
    result = (bias, out, parts, arrived, M, N)
    if TALL == 3:
        gl.warp_specialize(
            [
                (_multiply, (0, stages, work, result, SPLITS, TALL, BM, G, ZEROS, STAGES)),
                (_multiply, (1, stages, work, result, SPLITS, TALL, BM, G, ZEROS, STAGES)),
                (_multiply, (2, stages, work, result, SPLITS, TALL, BM, G, ZEROS, STAGES)),
                (_fetch, ((x, w, scales, zeros), stages, work, SPLITS, TALL, BM, G, STAGES)),
            ],
            [4, 4, 1],
            [REGISTERS_OF_THREE, REGISTERS_OF_THREE, 32],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (0, stages, work, result, SPLITS, TALL, BM, G, ZEROS, STAGES)),
                (_multiply, (1, stages, work, result, SPLITS, TALL, BM, G, ZEROS, STAGES)),
                (_fetch, ((x, w, scales, zeros), stages, work, SPLITS, TALL, BM, G, STAGES)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )


@gluon.jit
def _place(t, work, SPLITS: gl.constexpr, TALL: gl.constexpr, BM: gl.constexpr):
    """The t-th tile or part of one: its number, which part, and where it is (see ``fetch``)."""
    along_n, along_m, ACROSS = work
    tile, part = t % (along_n * along_m), t // (along_n * along_m)
    band = tile // (_BAND * along_m)
    height = gl.minimum(along_n - band * _BAND, _BAND)
    within = tile - band * _BAND * along_m
    row0, m0 = (band * _BAND + within % height) * TALL, within // height * BM
    share = gl.cdiv(ACROSS, SPLITS)
    first = part * share
    steps = halves("int4") * (gl.minimum(first + share, ACROSS) - first)
    return tile, part, (0, row0, 1, m0, ACROSS, first, steps, 0, 0)


@gluon.jit
def _fetch(
    given, stages, work, SPLITS: gl.constexpr, TALL: gl.constexpr, BM: gl.constexpr, G: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    along_n, along_m, _ = work
    begun = 0
    for t in range(gl.program_id(0), along_n * along_m * SPLITS, gl.num_programs(0)):
        _, _, place = _place(t, work, SPLITS, TALL, BM)
        fetch(given, stages, place, begun, "int4", G, own(TALL), TALL, STAGES)
        begun += place[6]


@gluon.jit
def _multiply(
    me: gl.constexpr, stages, work, result, SPLITS: gl.constexpr, TALL: gl.constexpr, BM: gl.constexpr,
    G: gl.constexpr, ZEROS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    along_n, along_m, _ = work
    PER: gl.constexpr = own(TALL)
    begun = 0
    for t in range(gl.program_id(0), along_n * along_m * SPLITS, gl.num_programs(0)):
        tile, part, place = _place(t, work, SPLITS, TALL, BM)
        n0, m0 = (place[1] + me * PER) * 64, place[3]
        acc, acc2 = accumulate(me, stages, place, begun, "int4", BM, G, ZEROS, TALL, STAGES)
        _store(acc, tile * TALL + me * PER, part, n0, m0, result, SPLITS, BM)
        if PER == 2:
            _store(acc2, tile * TALL + me * PER + 1, part, n0 + 64, m0, result, SPLITS, BM)
        begun += place[6]


@gluon.jit
def _store(acc, tile, part, n0, m0, result, SPLITS: gl.constexpr, BM: gl.constexpr):
    """64 rows' results; with splits, by the last of them to arrive, who adds up their parts in order."""
    bias, out, parts, arrived, M, N = result
    if SPLITS > 1:
        C: gl.constexpr = acc.type.layout
        i, j = gl.arange(0, 64, gl.SliceLayout(1, C)), gl.arange(0, BM, gl.SliceLayout(0, C))
        # In blocks of 8 x 8, of which a warp has one at a time.
        place = gl.expand_dims(i // 8 * (8 * BM) + i % 8 * 8, 1) + gl.expand_dims(j // 8 * 64 + j % 8, 0)
        mine = parts + tile.to(gl.int64) * (SPLITS * 64 * BM) + place
        gl.store(mine + part * (64 * BM), acc)
        wait_for_group()  # all of this group's part is written before it is announced
        if gl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1:
            acc = gl.zeros([64, BM], gl.float32, C)
            for k in range(SPLITS):
                acc += gl.load(mine + k * (64 * BM), cache_modifier=".cg")
            gl.store(arrived + tile, 0)
            _finish(acc, n0, m0, bias, out, M, N, BM)
    else:
        _finish(acc, n0, m0, bias, out, M, N, BM)


@gluon.jit
def _finish(acc, n0, m0, bias, out, M, N, BM: gl.constexpr):
    if bias is not None:
        acc = add_bias(acc, bias, n0, N)
    m = m0 + gl.arange(0, BM, gl.SliceLayout(0, stored()))
    store_rows(acc, out, m, m < M, n0, N)
