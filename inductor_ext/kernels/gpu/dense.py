"""y = x @ W^T + bias for an int4 weight, in one Triton kernel: a tile [BN, BM] of y^T a program, or a part of its K.

Where few tiles would leave the device idle, SPLITS programs share a tile. Each writes its part in float32; the last to
arrive adds the parts up in their order, so the same inputs give the same bits whoever is last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_ext.kernels.gpu.mainloop import accumulate, row_pointers

_BAND: tl.constexpr = tl.constexpr(16)
"""Tiles along N that are taken together when there are several along M: their weights stay in the cache."""


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x,
    w,
    scales,
    zeros,
    bias,
    out,
    parts,  # float32 [tiles, SPLITS, BN, BM], or None without splits
    arrived,  # int32 [tiles], zero before and after
    M,
    N,
    K,
    ROWS,  # N filled up: a multiple of BN
    STEPS,  # 256-column tiles of a row
    SPLITS: tl.constexpr,
    ONE: tl.constexpr,  # M is no more than BM
    BN: tl.constexpr,
    BM: tl.constexpr,
    WIDTH: tl.constexpr,
    G: tl.constexpr,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    ROUNDED: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
):
    tile, part = tl.program_id(0), tl.program_id(1)
    along_m, along_n = tl.cdiv(M, BM), ROWS // BN
    if ONE:
        n0, m0 = tile * BN, 0
    else:
        band = tile // (_BAND * along_m)
        height = tl.minimum(along_n - band * _BAND, _BAND)
        within = tile - band * _BAND * along_m
        n0, m0 = (band * _BAND + within % height) * BN, within // height * BM
    n, m = n0 + tl.arange(0, BN), m0 + tl.arange(0, BM)
    share = tl.cdiv(STEPS, SPLITS)
    first = part * share
    acc = accumulate(
        tl.zeros((BN, BM), tl.float32),
        row_pointers(w, n, STEPS, WIDTH),
        scales,
        zeros,
        n,
        ROWS,
        x + m.to(tl.int64)[None, :] * K,
        m[None, :] < M,
        K,
        first,
        tl.minimum(first + share, STEPS),
        WIDTH,
        G,
        KIND,
        ZEROS,
        ROUNDED,
        WIDE,
        WHOLE,
        STAGES,
        PTX,
    )
    if SPLITS > 1:
        place = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        mine = parts + tile.to(tl.int64) * (SPLITS * BN * BM) + place
        tl.store(mine + part * (BN * BM), acc)
        tl.debug_barrier()  # all of this program's part is written before it is announced
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1:
            acc = tl.zeros((BN, BM), tl.float32)
            for i in range(SPLITS):
                acc += tl.load(mine + i * (BN * BM), cache_modifier=".cg")
            tl.store(arrived + tile, 0)
            _finish(acc, bias, out, n, m, M, N)
    else:
        _finish(acc, bias, out, n, m, M, N)


@triton.jit
def _finish(acc, bias, out, n, m, M, N):
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    where = m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=(n[:, None] < N) & (m[None, :] < M))
