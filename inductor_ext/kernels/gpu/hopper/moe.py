"""Routed experts with many tokens on a Hopper: as in ``gpu/moe.py``, by the loop of ``loop.py``.

The copy engine reads rows that lie one after the other. So the tokens of each block's pairs are gathered first, and
act(W13 x) stays in the order of the slots.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from inductor_ext.kernels.gpu.early import begin
from inductor_ext.kernels.gpu.fp4 import round_to_e4m3
from inductor_ext.kernels.gpu.hopper.loop import (
    REGISTERS,
    accumulate,
    add_bias,
    fetch,
    halves,
    make_stages,
    store_rows,
    stored,
    sums,
)


@triton.jit
def gather_kernel(
    x, slots, total, gathered, TOP_K, HIDDEN, BM: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """gathered [slots, HIDDEN]: each slot's token. Nobody's slots, and those beyond the last block, are not written."""
    begin(EARLY)
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.load(slots + slot, mask=slot < tl.load(total) * BM, other=-1)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    known = (pair >= 0)[:, None] & (n < HIDDEN)[None, :]
    row = tl.load(x + (tl.maximum(pair, 0) // TOP_K).to(tl.int64)[:, None] * HIDDEN + n[None, :], mask=known, other=0.0)
    tl.store(gathered + slot.to(tl.int64)[:, None] * HIDDEN + n[None, :], row, mask=known)


@gluon.jit
def up_kernel(
    x, w, scales, zeros, bias, topk_weights, slots, block_expert, total, h,
    INNER, ROWS, ACROSS, SCALE_ROWS, ZERO_ROWS, alpha, limit, x_scale, h_scale,
    CODES: gl.constexpr, HALVES: gl.constexpr, ACTIVATION: gl.constexpr, LIMITED: gl.constexpr, ON_INPUT: gl.constexpr,
    BM: gl.constexpr, G: gl.constexpr, ZEROS: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """h [slots, INNER] = act(W13 x + b13), in tiles of 128 of INNER and a block of slots. ``x``: the gathered tokens.

    A group has 128 rows of codes. HALVES: 64 gates and, INNER rows on, the ups of the same results, so INNER is a
    multiple of 64. Otherwise gates and ups take turns, and the rows are neighbours.
    """
    begin(EARLY)
    EACH: gl.constexpr = 2 if HALVES else 4
    stages = make_stages(x, w, scales, zeros, 4, STAGES)
    work = (
        gl.cdiv(INNER, 128),
        gl.load(total),
        block_expert,
        ROWS // 64,
        INNER // 64 if HALVES else 1,
        ACROSS,
        SCALE_ROWS,
        ZERO_ROWS,
    )
    result = (bias, topk_weights, slots, h, INNER, alpha, limit, x_scale, h_scale)
    gl.warp_specialize(
        [
            (
                _up,
                (0, stages, work, result, CODES, HALVES, ACTIVATION, LIMITED, ON_INPUT, BM, G, ZEROS, STAGES),
            ),
            (
                _up,
                (1, stages, work, result, CODES, HALVES, ACTIVATION, LIMITED, ON_INPUT, BM, G, ZEROS, STAGES),
            ),
            (_fetch, ((x, w, scales, zeros), stages, work, CODES, EACH, EACH // 2, 4, BM, G, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


@gluon.jit
def _place(t, work, CODES: gl.constexpr, EACH: gl.constexpr, BM: gl.constexpr):
    """The t-th tile: its block and that one's expert, which tile of the block, and where it is (see ``fetch``).

    EACH: times 64 rows of codes from one tile to the next."""
    across, _, block_expert, TALL_EXPERT, APART, ACROSS, SCALE_ROWS, ZERO_ROWS = work
    block, tile = t // across, t % across
    expert = gl.load(block_expert + block)
    return (
        block,
        expert,
        tile,
        (
            expert * TALL_EXPERT,
            tile * EACH,
            APART,
            block * BM,
            ACROSS,
            0,
            halves(CODES) * ACROSS,
            expert * SCALE_ROWS,
            expert * ZERO_ROWS,
        ),
    )


@gluon.jit
def _fetch(
    given, stages, work, CODES: gl.constexpr, EACH: gl.constexpr, NEXT: gl.constexpr, TALL: gl.constexpr,
    BM: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    across, blocks = work[0], work[1]
    begun = 0
    for t in range(gl.program_id(0), across * blocks, gl.num_programs(0)):
        _, _, _, place = _place(t, work, CODES, EACH, BM)
        fetch(given, stages, place, begun, CODES, G, NEXT, TALL, STAGES)
        begun += place[6]


@gluon.jit
def _up(
    me: gl.constexpr, stages, work, result, CODES: gl.constexpr, HALVES: gl.constexpr,
    ACTIVATION: gl.constexpr, LIMITED: gl.constexpr, ON_INPUT: gl.constexpr, BM: gl.constexpr, G: gl.constexpr,
    ZEROS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    bias, topk_weights, slots, h, INNER, alpha, limit, x_scale, h_scale = result
    across, blocks = work[0], work[1]
    EACH: gl.constexpr = 2 if HALVES else 4
    begun = 0
    for t in range(gl.program_id(0), across * blocks, gl.num_programs(0)):
        block, expert, tile, place = _place(t, work, CODES, EACH, BM)
        n0 = (EACH * tile + EACH // 2 * me) * 64
        first, second = accumulate(me, stages, place, begun, CODES, BM, G, ZEROS, 4, STAGES)
        if x_scale is not None:
            first, second = first * gl.load(x_scale), second * gl.load(x_scale)
        if ON_INPUT:
            factor = _factors(topk_weights, slots + block * BM, BM)
            first, second = first * factor, second * factor
        apart = INNER if HALVES else 64
        if bias is not None:
            own = bias + expert.to(gl.int64) * 2 * INNER
            bound = INNER if HALVES else 2 * INNER
            first = add_bias(first, own, n0, bound)
            second = add_bias(second, own + apart, n0, bound - (0 if HALVES else 64))
        m = block * BM + gl.arange(0, BM, gl.SliceLayout(0, stored()))
        if HALVES:
            y = _gated(first, second, alpha, limit, h_scale, ACTIVATION, LIMITED)
            store_rows(y, h, m, m >= 0, n0, INNER)
        else:
            _store_pairs(first, h, block * BM, n0 // 2, INNER, alpha, limit, h_scale, ACTIVATION, LIMITED)
            _store_pairs(second, h, block * BM, n0 // 2 + 32, INNER, alpha, limit, h_scale, ACTIVATION, LIMITED)
        begun += place[6]


@gluon.jit
def _store_pairs(
    acc, h, m0, n0, INNER, alpha, limit, h_scale, ACTIVATION: gl.constexpr, LIMITED: gl.constexpr
):  # fmt: skip
    """32 of INNER from [64, BM], in which gates and ups take turns. They are brought together through shared memory, of
    which stages leave little: so for 32 of BM at a time."""
    BM: gl.constexpr = acc.shape[1]
    if BM > 32:
        first, second = gl.split(acc.reshape((64, 2, BM // 2)).permute((0, 2, 1)))
        _store_pairs(first, h, m0, n0, INNER, alpha, limit, h_scale, ACTIVATION, LIMITED)
        _store_pairs(second, h, m0 + BM // 2, n0, INNER, alpha, limit, h_scale, ACTIVATION, LIMITED)
    else:
        pairs = gl.convert_layout(acc, stored()).reshape((32, 2, BM)).permute((0, 2, 1))
        gate, up = gl.split(pairs)
        y = _gated(gate, up, alpha, limit, h_scale, ACTIVATION, LIMITED).to(h.dtype.element_ty)
        L: gl.constexpr = y.type.layout
        n = n0 + gl.arange(0, 32, gl.SliceLayout(1, L))
        m = m0 + gl.arange(0, BM, gl.SliceLayout(0, L))
        where = gl.expand_dims(m, 0).to(gl.int64) * INNER + gl.expand_dims(n, 1)
        gl.store(h + where, y, mask=gl.expand_dims(n < INNER, 1))


@gluon.jit
def down_kernel(
    h, w, scales, zeros, bias, topk_weights, slots, block_expert, total, y,
    HIDDEN, ROWS, ACROSS, SCALE_ROWS, ZERO_ROWS, h_scale,
    CODES: gl.constexpr, ON_INPUT: gl.constexpr, BM: gl.constexpr, G: gl.constexpr,
    ZEROS: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """y [pairs, HIDDEN] = weight * (W2 h + b2), in tiles of 256 of HIDDEN and a block of slots."""
    begin(EARLY)
    stages = make_stages(h, w, scales, zeros, 4, STAGES)
    work = (gl.cdiv(HIDDEN, 256), gl.load(total), block_expert, ROWS // 64, 1, ACROSS, SCALE_ROWS, ZERO_ROWS)
    result = (bias, topk_weights, slots, y, HIDDEN, h_scale)
    gl.warp_specialize(
        [
            (_down, (0, stages, work, result, CODES, ON_INPUT, BM, G, ZEROS, STAGES)),
            (_down, (1, stages, work, result, CODES, ON_INPUT, BM, G, ZEROS, STAGES)),
            (_fetch, ((h, w, scales, zeros), stages, work, CODES, 4, 2, 4, BM, G, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


@gluon.jit
def _down(
    me: gl.constexpr, stages, work, result, CODES: gl.constexpr, ON_INPUT: gl.constexpr, BM: gl.constexpr,
    G: gl.constexpr, ZEROS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    across, blocks = work[0], work[1]
    begun = 0
    for t in range(gl.program_id(0), across * blocks, gl.num_programs(0)):
        block, expert, tile, place = _place(t, work, CODES, 4, BM)
        n0 = (tile * 4 + me * 2) * 64
        acc, acc2 = accumulate(me, stages, place, begun, CODES, BM, G, ZEROS, 4, STAGES)
        _weighted(acc, n0, block, expert, result, ON_INPUT, BM)
        _weighted(acc2, n0 + 64, block, expert, result, ON_INPUT, BM)
        begun += place[6]


@gluon.jit
def _weighted(acc, n0, block, expert, result, ON_INPUT: gl.constexpr, BM: gl.constexpr):
    bias, topk_weights, slots, y, HIDDEN, h_scale = result
    if h_scale is not None:
        acc *= gl.load(h_scale)
    if bias is not None:
        acc = add_bias(acc, bias + expert.to(gl.int64) * HIDDEN, n0, HIDDEN)
    if not ON_INPUT:
        acc *= _factors(topk_weights, slots + block * BM, BM)
    _store_slots(acc, y, slots + block * BM, n0, HIDDEN)


@gluon.jit
def _store_slots(acc, y, slots, n0, HIDDEN):
    """What each slot's pair gets; float32 goes through shared memory for 32 slots at a time, as in `_store_pairs`."""
    BM: gl.constexpr = acc.shape[1]
    if BM > 32 and y.dtype.element_ty == gl.float32:
        first, second = gl.split(acc.reshape((64, 2, BM // 2)).permute((0, 2, 1)))
        _store_slots(first, y, slots, n0, HIDDEN)
        _store_slots(second, y, slots + BM // 2, n0, HIDDEN)
    else:
        pair = gl.load(slots + gl.arange(0, BM, gl.SliceLayout(0, stored())))
        store_rows(acc, y, pair, pair >= 0, n0, HIDDEN)


@gluon.jit
def _factors(topk_weights, slots, BM: gl.constexpr):
    """float32 [1, BM]: the router's weights of a block's pairs."""
    pair = gl.load(slots + gl.arange(0, BM, gl.SliceLayout(0, sums(BM))))
    return gl.expand_dims(gl.load(topk_weights + pair, mask=pair >= 0, other=0.0).to(gl.float32), 0)


@gluon.jit
def _gated(gate, up, alpha, limit, h_scale, ACTIVATION: gl.constexpr, LIMITED: gl.constexpr):
    """act(gate) * up, as ``gpu/moe.py`` has it; rounded to e4m3 if there is a scale for that."""
    if ACTIVATION == "swigluoai":
        if LIMITED:
            gate = gl.minimum(gate, limit)
            up = gl.minimum(gl.maximum(up, -limit), limit)
        y = (up + 1.0) * gate / (1.0 + gl.exp(-alpha * gate))
    elif ACTIVATION == "silu":
        y = gate / (1.0 + gl.exp(-gate)) * up
    elif ACTIVATION == "gelu":
        y = gate * (0.5 + 0.5 * gl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "gelu_tanh":
        y = gate / (1.0 + gl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))) * up
    else:
        y = gl.maximum(gate, 0.0) * up
    if h_scale is not None:
        y = round_to_e4m3(gl.div_rn(y, gl.load(h_scale)))
    return y
