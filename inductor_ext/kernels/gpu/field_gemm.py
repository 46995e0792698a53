"""The field's dense W4A16 matmul in Triton: codes [K, N/8], eight neighbours along N in a word. One source for NVIDIA,
CDNA and RDNA.

Two facts of the layout shape the kernel. A thread that loads 128 bits gets 32 neighbours along N of one k, so the codes
go through shared memory on their way to the matrix instruction. And a group's scale is a row of N values, so a block of
K that lies within one group needs one row, which is why a block never spans two.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from inductor_ext import devices

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether ``triton.jit`` below made a function for the interpreter: TRITON_INTERPRET=1 was set when triton was
imported. It alone takes CPU tensors, and it takes bfloat16's bits for integers."""


class Tile(NamedTuple):
    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """What one program computes, by the number of rows."""

    upto_32: Tile
    upto_64: Tile
    more: Tile


# By how an architecture's name starts; not measured, on AMD nor on NVIDIA. The field's tiles, changed where a thread's
# share of the weight (BK * BN / 8 words over warps * 32 threads, on gfx9 * 64) was less than the 4 words of a 128-bit
# load. On gfx1x 128 rows with such a share do not fit into the registers.
TILES = {
    "sm_": Tiles(Tile(32, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 128, 32, 4, 3)),
    "gfx9": Tiles(Tile(32, 64, 64, 2, 2), Tile(64, 64, 64, 2, 2), Tile(128, 128, 64, 4, 2)),
    "gfx1": Tiles(Tile(32, 32, 64, 2, 2), Tile(64, 64, 64, 4, 2), Tile(64, 128, 32, 4, 2)),
}


@triton.jit
def unpacked(words):
    """[..., n] int32 -> [..., n, 8] int32: nibble i of a word at [..., i]."""
    return (tl.expand_dims(words, -1) >> (tl.arange(0, 8) * 4)) & 15


# M differs from call to call and must not compile anew; zp_bias is used once.
@triton.jit(do_not_specialize=["M", "zp_bias"])
def field_gemm(
    a,  # [M, K] float16 | bfloat16
    b_q,  # [K, words] int32
    scales,  # [K / group_size, 8 * words] of a's dtype
    qzeros,  # [K / group_size, words] int32, or None, which compiles a kernel of its own
    out,  # [M, 8 * words] of a's dtype
    M,
    words,  # N / 8, not N: compiled for N / 8 a multiple of 16, whose rows are aligned for 128-bit loads
    K,
    group_size,
    zp_bias,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,  # divides group_size, or there is one group only
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    w = tl.program_id(1) * (BN // 8) + tl.arange(0, BN // 8)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    N = words * 8

    # M * K may be more than 2^31, a tile's offsets are not.
    first = (tl.program_id(0) * BM).to(tl.int64)
    a += first * K
    out += first * N
    row = tl.arange(0, BM)[:, None]

    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        inside = start + k < K
        x = tl.load(a + row * K + k[None, :], mask=(m < M)[:, None] & inside[None, :], other=0.0)
        packed = tl.load(b_q + k[:, None] * words + w[None, :], mask=inside[:, None] & (w < words)[None, :], other=0)
        group = start // group_size
        scale = tl.load(scales + group * N + n, mask=n < N, other=0.0)
        if qzeros is None:
            zero = zp_bias
        else:
            zero = tl.reshape(unpacked(tl.load(qzeros + group * words + w, mask=w < words, other=0)), (1, BN))
        code = tl.reshape(unpacked(packed), (BK, BN))
        weight = (code - zero).to(x.dtype) * scale[None, :]
        acc = tl.dot(x, weight, acc)
        a += BK
        b_q += BK * words
    tl.store(out + row * N + n[None, :], acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def tile(arch: str, M: int, K: int, group_size: int) -> Tile:
    """The tile for M rows on this architecture; its BK never spans two groups."""
    tiles = next((tiles for start, tiles in TILES.items() if arch.startswith(start)), TILES["sm_"])
    chosen = tiles.upto_32 if M <= 32 else tiles.upto_64 if M <= 64 else tiles.more
    return chosen if group_size == K else chosen._replace(BK=min(chosen.BK, group_size))


def run(a: Tensor, b_q: Tensor, scales: Tensor, qzeros: Tensor | None, group_size: int, zp_bias: int) -> Tensor:
    """a [M, K] times the weight [K, N], as ``torch.ops.w4a16.triton_w4a16_gemm`` describes and checks its arguments."""
    (M, K), N = a.shape, scales.shape[1]
    out = a.new_empty(M, N)
    if out.numel() == 0:
        return out
    BM, BN, BK, warps, stages = tile(_arch(a.device), M, K, group_size)
    # Triton launches on the current device, whatever the tensors'.
    with torch.cuda.device(a.device) if a.is_cuda else contextlib.nullcontext():
        field_gemm[triton.cdiv(M, BM), triton.cdiv(N, BN)](
            a,
            b_q,
            scales,
            qzeros,
            out,
            M,
            b_q.shape[1],
            K,
            group_size,
            zp_bias,
            BM=BM,
            BN=BN,
            BK=BK,
            num_warps=warps,
            num_stages=stages,
        )
    return out


@functools.cache
def _arch(device: torch.device) -> str:
    return devices.of(device).arch
