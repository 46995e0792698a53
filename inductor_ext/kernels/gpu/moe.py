"""Routed experts in Triton: ``up`` computes act(W13 x) for blocks of (token, choice) pairs of one expert, ``down`` the
second projection times the router's weight, ``add_up`` each token's sum over its choices, always in the same order.

With few tokens every pair is a block (PAIRWISE): nothing is sorted, and the last of a token's programs to arrive adds
up. Otherwise ``routing.py`` has made the blocks. A program finds what it has to do in memory, so that a CUDA graph may
be replayed with other routing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_ext.kernels.gpu import fp4_mainloop, fp4_scaled, mainloop
from inductor_ext.kernels.gpu.early import begin
from inductor_ext.kernels.gpu.fp4 import round_to_e4m3
from inductor_ext.kernels.gpu.routing import expert_of


@triton.jit
def _block(ids, expert_map, slots, block_expert, total, NUMBER, E, BM: tl.constexpr, PAIRWISE: tl.constexpr):
    """The expert of this program's block (-1: nothing to do), and its pairs [BM] (-1: none)."""
    block = tl.program_id(1)
    if PAIRWISE:
        expert = expert_of(ids, block, True, expert_map, NUMBER, E)
        pair = tl.where(tl.arange(0, BM) == 0, block, -1)
    else:
        expert, pair = -1, tl.full((BM,), -1, tl.int32)
        if block < tl.load(total):
            expert = tl.load(block_expert + block)
            pair = tl.load(slots + block * BM + tl.arange(0, BM))
    return expert, pair


@triton.jit
def up_kernel(
    x, w, scales, zeros, bias, topk_weights, ids, expert_map, slots, block_expert, total, h,
    NUMBER, E, TOP_K, HIDDEN, INNER, ROWS, STEPS, SCALE_ROWS, ZERO_ROWS, alpha, limit, x_scale, h_scale,
    EARLY: tl.constexpr,
    GATE_UP: tl.constexpr, ACTIVATION: tl.constexpr, LIMITED: tl.constexpr, ON_INPUT: tl.constexpr,
    CODES: tl.constexpr,
    PAIRWISE: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr, G: tl.constexpr,
    KIND: tl.constexpr, ZEROS: tl.constexpr, ROUNDED: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """h [pairs, INNER] = act(W13 x + b13), rounded to h's dtype. A tile has gates and ups of the same outputs."""
    begin(EARLY)
    expert, pair = _block(ids, expert_map, slots, block_expert, total, NUMBER, E, BM, PAIRWISE)
    if expert >= 0:
        OUT: tl.constexpr = BN if GATE_UP == "none" else BN // 2
        n0 = tl.program_id(0) * OUT
        i = tl.arange(0, BN)
        if GATE_UP == "halves":
            row = tl.minimum(n0 + i % OUT, INNER - 1) + i // OUT * INNER
        else:
            row = tl.minimum(n0 * (BN // OUT) + i, ROWS - 1)
        e = expert.to(tl.int64)
        is_row = pair >= 0
        acc = _projected(
            w, scales, zeros, e, row, ROWS, STEPS, SCALE_ROWS, ZERO_ROWS,
            x + (tl.maximum(pair, 0) // TOP_K).to(tl.int64)[None, :] * HIDDEN, is_row[None, :], HIDDEN, x_scale,
            CODES, BN, BM, WIDTH, G, KIND, ZEROS, ROUNDED, WIDE, WHOLE, STAGES, PTX,
        )  # fmt: skip
        if ON_INPUT:
            acc *= tl.load(topk_weights + pair, mask=is_row, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            rows = INNER if GATE_UP == "none" else 2 * INNER
            acc += tl.load(bias + e * rows + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        if GATE_UP == "none":
            y = _activated(acc, ACTIVATION)
        else:
            if GATE_UP == "halves":
                gate, up = tl.split(tl.permute(tl.reshape(acc, (2, OUT, BM)), (1, 2, 0)))
            else:
                gate, up = tl.split(tl.permute(tl.reshape(acc, (OUT, 2, BM)), (0, 2, 1)))
            if ACTIVATION == "swigluoai":
                if LIMITED:
                    gate = tl.minimum(gate, limit)
                    up = tl.minimum(tl.maximum(up, -limit), limit)
                y = (up + 1.0) * gate * tl.sigmoid(alpha * gate)
            else:
                y = _activated(gate, ACTIVATION) * up
        if h_scale is not None:
            y = round_to_e4m3(tl.div_rn(y, tl.load(h_scale)))
        n = n0 + tl.arange(0, OUT)
        where = pair.to(tl.int64)[None, :] * INNER + n[:, None]
        tl.store(h + where, y.to(h.dtype.element_ty), mask=is_row[None, :] & (n < INNER)[:, None])


@triton.jit
def _projected(
    w, scales, zeros, e, row, ROWS, STEPS, SCALE_ROWS, ZERO_ROWS,
    x, is_row, K, x_scale,
    CODES: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr, G: tl.constexpr,
    KIND: tl.constexpr, ZEROS: tl.constexpr, ROUNDED: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """float32 [BN, BM]: these rows of expert e's weight times x, and its scale if it has one. ``CODES`` says which of
    the layouts the weight is in."""
    acc = tl.zeros((BN, BM), tl.float32)
    if CODES == "int4":
        acc = mainloop.accumulate(
            acc,
            mainloop.row_pointers(w + e * ROWS * STEPS * 64, row, STEPS, WIDTH),
            scales + e * SCALE_ROWS * ROWS,
            None if ZEROS == "none" else zeros + e * ZERO_ROWS * ROWS,
            row, ROWS, x, is_row, K, 0, STEPS,
            WIDTH, G, KIND, ZEROS, ROUNDED, WIDE, WHOLE, STAGES, PTX,
        )  # fmt: skip
    elif CODES == "e2m1 planes":
        acc = fp4_mainloop.accumulate(
            acc,
            fp4_mainloop.row_pointers(w + e * ROWS * STEPS * 32, row, STEPS),
            scales + e * SCALE_ROWS * ROWS,
            row, ROWS, x, is_row, K, STEPS,
            KIND, WHOLE, WIDE, STAGES, PTX,
        )  # fmt: skip
    else:
        acc = fp4_scaled.accumulate(
            acc,
            w + e * ROWS * STEPS + row.to(tl.int64)[:, None] * STEPS,
            scales + e * ROWS * SCALE_ROWS + row.to(tl.int64)[:, None] * SCALE_ROWS,
            x, is_row, K, STEPS, SCALE_ROWS, WIDTH, WHOLE, STAGES,
        )  # fmt: skip
    if x_scale is not None:
        acc *= tl.load(x_scale)
    return acc


@triton.jit
def _activated(g, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        g *= tl.sigmoid(g)
    elif ACTIVATION == "gelu":
        g *= 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
    elif ACTIVATION == "gelu_tanh":  # 1 + tanh(u) is 2 sigmoid(2 u)
        g *= tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    else:
        g = tl.maximum(g, 0.0)
    return g


@triton.jit
def down_kernel(
    h, w, scales, zeros, bias, topk_weights, ids, expert_map, slots, block_expert, total, y, out, arrived,
    NUMBER, E, TOP_K: tl.constexpr, INNER, HIDDEN, ROWS, STEPS, SCALE_ROWS, ZERO_ROWS, scaling, h_scale,
    EARLY: tl.constexpr, ON_INPUT: tl.constexpr,
    CODES: tl.constexpr,
    PAIRWISE: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr, G: tl.constexpr,
    KIND: tl.constexpr, ZEROS: tl.constexpr, ROUNDED: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """y [pairs, HIDDEN] = weight * (W2 h + b2). PAIRWISE, also out [T, HIDDEN]: a token's sum, times scaling."""
    begin(EARLY)
    expert, pair = _block(ids, expert_map, slots, block_expert, total, NUMBER, E, BM, PAIRWISE)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    if expert >= 0:
        e = expert.to(tl.int64)
        is_row = pair >= 0
        acc = _projected(
            w, scales, zeros, e, tl.minimum(n, ROWS - 1), ROWS, STEPS, SCALE_ROWS, ZERO_ROWS,
            h + tl.maximum(pair, 0).to(tl.int64)[None, :] * INNER, is_row[None, :], INNER, h_scale,
            CODES, BN, BM, WIDTH, G, KIND, ZEROS, ROUNDED, WIDE, WHOLE, STAGES, PTX,
        )  # fmt: skip
        if bias is not None:
            acc += tl.load(bias + e * HIDDEN + n, mask=n < HIDDEN, other=0.0).to(tl.float32)[:, None]
        if not ON_INPUT:
            acc *= tl.load(topk_weights + pair, mask=is_row, other=0.0).to(tl.float32)[None, :]
        where = pair.to(tl.int64)[None, :] * HIDDEN + n[:, None]
        tl.store(y + where, acc.to(y.dtype.element_ty), mask=is_row[None, :] & (n < HIDDEN)[:, None])
    if PAIRWISE:
        token = tl.program_id(1) // TOP_K
        tl.debug_barrier()  # all of this program's part is written before it is announced
        mine = arrived + token * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(mine, 1, sem="acq_rel") == TOP_K - 1:
            tl.store(mine, 0)
            _add_up(y, out, ids, expert_map, token, n, TOP_K, HIDDEN, NUMBER, E, scaling)


@triton.jit
def quantise_kernel(x, x_scale, quantised, COUNT, BLOCK: tl.constexpr):
    """quantised = e4m3(x / scale), in a dtype that holds these numbers."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.div_rn(tl.load(x + i, mask=i < COUNT, other=0.0).to(tl.float32), tl.load(x_scale))
    tl.store(quantised + i, round_to_e4m3(v).to(quantised.dtype.element_ty), mask=i < COUNT)


@triton.jit
def add_up_kernel(
    y, out, ids, expert_map, TOP_K: tl.constexpr, HIDDEN, NUMBER, E, scaling, EARLY: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """out [T, HIDDEN]: each token's sum over its pairs, times scaling."""
    begin(EARLY)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    _add_up(y, out, ids, expert_map, tl.program_id(0), n, TOP_K, HIDDEN, NUMBER, E, scaling)


@triton.jit
def _add_up(y, out, ids, expert_map, token, n, TOP_K: tl.constexpr, HIDDEN, NUMBER, E, scaling):
    first = token.to(tl.int64) * TOP_K
    acc = tl.zeros(n.shape, tl.float32)
    for start in range(0, TOP_K, 8):  # eight at once, so that no load waits for another
        j = start + tl.arange(0, min(8, triton.next_power_of_2(TOP_K)))
        # What no expert computed is not there to be read.
        there = expert_of(ids, first + j, j < TOP_K, expert_map, NUMBER, E) >= 0
        known = there[:, None] & (n < HIDDEN)[None, :]
        where = (first + j)[:, None] * HIDDEN + n[None, :]
        acc += tl.sum(tl.load(y + where, mask=known, other=0.0, cache_modifier=".cg").to(tl.float32), 0)
    tl.store(out + token.to(tl.int64) * HIDDEN + n, (acc * scaling).to(out.dtype.element_ty), mask=n < HIDDEN)
