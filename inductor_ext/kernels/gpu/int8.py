"""out = x @ W^T for int8 weights in groups, in Triton: dense, or of blocks of (token, choice) slots of one expert.

Codes less their zeros are integers within -256..256, which float16 and bfloat16 hold exactly. Scales are applied to the
sums of a group, in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M"])
def int8_kernel(
    x,  # [rows, K]
    codes,  # uint8 [E, N, K]
    scales,  # [E, N, K/G]
    zeros,  # int16 as the scales, or None: 128
    bias,  # [E, N] or None
    slots,  # int32, by blocks of BM, or None: rows of x as they are
    experts,  # int32, of each block, or -1
    weights,  # float32, by slot, or None: what x (ON_INPUT) or the result is multiplied with
    out,  # [slots or rows, N]
    M,  # slots, or rows
    N,
    K,
    TOP_K,  # slots that share a row of x
    G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,  # divides G
    ON_INPUT: tl.constexpr,
):
    block = tl.program_id(1)
    expert = block * 0  # a dense weight is the only one
    slot = block * BM + tl.arange(0, BM)
    if slots is not None:
        expert = tl.load(experts + block)
        slot = tl.load(slots + slot)
    if expert >= 0:
        real = slot < M
        row = tl.where(real, slot, 0) // TOP_K
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        known = n < N
        place = expert.to(tl.int64) * N + n
        groups = K // G
        acc = tl.zeros((BM, BN), tl.float32)
        for group in range(groups):
            scale = tl.load(scales + place * groups + group, mask=known, other=0.0).to(tl.float32)
            zero = tl.full((BN,), 128, tl.int16)
            if zeros is not None:
                zero = tl.load(zeros + place * groups + group, mask=known, other=128)
            part = tl.zeros((BM, BN), tl.float32)
            for first in range(0, G, BK):
                k = group * G + first + tl.arange(0, BK)
                a = tl.load(x + row.to(tl.int64)[:, None] * K + k[None, :], mask=real[:, None], other=0.0)
                q = tl.load(codes + place[:, None] * K + k[None, :], mask=known[:, None], other=128)
                w = (q.to(tl.int16) - zero[:, None]).to(tl.float32).to(x.dtype.element_ty)
                part = tl.dot(a, tl.trans(w), part)
            acc += part * scale[None, :]
        if weights is not None and ON_INPUT:
            acc *= tl.load(weights + slot, mask=real, other=0.0)[:, None]
        if bias is not None:
            acc += tl.load(bias + place, mask=known, other=0.0).to(tl.float32)[None, :]
        if weights is not None and not ON_INPUT:
            acc *= tl.load(weights + slot, mask=real, other=0.0)[:, None]
        where = out + slot.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(where, acc.to(out.dtype.element_ty), mask=real[:, None] & known[None, :])
