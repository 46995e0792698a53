"""Routing on the device: (token, choice) pairs sorted by expert into blocks of one size, without waiting for the host.

A pair is t * k + j. ``slots`` holds the pairs of an expert in their order, filled up to whole blocks with -1; blocks
stand in the order of the experts, and ``total`` says how many there are. What lies beyond is not written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_ext.kernels.gpu.early import begin


@triton.jit
def expert_of(ids, pair, known, expert_map, NUMBER, E):
    """The row of the weights that a pair's id stands for; -1 for nobody, for an id that there is not, and where not
    ``known``."""
    e = tl.load(ids + pair, mask=known, other=-1)
    e = tl.where((e >= 0) & (e < NUMBER), e, -1).to(tl.int32)  # not before: an id beyond 32 bits would come out as one
    if expert_map is not None:
        e = tl.load(expert_map + e, mask=e >= 0, other=-1)
        e = tl.where((e >= 0) & (e < E), e, -1)
    return e


@triton.jit(do_not_specialize=["pairs"])
def route_kernel(
    ids,
    expert_map,
    slots,
    block_expert,
    total,
    pairs,
    NUMBER,  # of ids
    E,
    BINS: tl.constexpr,  # a power of two above E
    BM: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program an expert: each counts all, and writes its own blocks."""
    begin(EARLY)
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        e = expert_of(ids, pair, pair < pairs, expert_map, NUMBER, E)
        counts += tl.histogram(tl.where(e < 0, E, e), BINS)
    counts = tl.where(bins < E, counts, 0)
    blocks = (counts + BM - 1) // BM
    before = tl.sum(tl.where(bins < expert, blocks, 0), 0)
    own = tl.sum(tl.where(bins == expert, counts, 0), 0)
    if expert == 0:
        tl.store(total, tl.sum(blocks, 0))
    first = slots + before * BM
    placed = 0
    for start in range(0, pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        mine = expert_of(ids, pair, pair < pairs, expert_map, NUMBER, E) == expert
        rank = tl.cumsum(mine.to(tl.int32), 0)
        tl.store(first + placed + rank - 1, pair, mask=mine)
        placed += tl.sum(mine.to(tl.int32), 0)
    rest = own + tl.arange(0, BM)
    tl.store(first + rest, -1, mask=rest < (own + BM - 1) // BM * BM)
    for block in range((own + BM - 1) // BM):
        tl.store(block_expert + before + block, expert)
