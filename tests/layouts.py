"""Random weights of experts, and Marlin's tiles as the lanes of a warp read them."""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_ext.layouts import Experts
from inductor_ext.layouts.marlin import Marlin

KINDS = ("symmetric", "asymmetric", "act-order", "bias")


def weight(
    kind: str,
    E: int,
    N: int,
    K: int,
    G: int,
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
    zeros: tuple[int, int] = (1, 15),
) -> Experts:
    """``zeros``: the least and the greatest that an asymmetric weight has."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2**31), 2**31, (E, N, K // 8), generator=random).int()
    scales = (torch.rand(E, N, K // G, generator=random) + 0.1).to(dtype)
    given = order = bias = None
    if kind == "asymmetric":
        given = torch.randint(zeros[0], zeros[1] + 1, scales.shape, generator=random).to(torch.uint8)
    if kind == "act-order":
        order = torch.stack([torch.randperm(K, generator=random).int() for _ in range(E)])
    if kind == "bias":
        bias = torch.randn(E, N, generator=random).to(dtype)
    return Experts(codes, scales, given, order, bias)


def same(one: Experts, other: Experts) -> None:
    for name in ("codes", "scales", "zeros", "order", "bias"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), name


def values(w: Experts, dtype: torch.dtype = torch.float64) -> Tensor:
    """[E, N, K], columns in the order of k."""
    return torch.stack([w.expert(e).dequantize(dtype) for e in range(w.E)])


# -- Marlin on a warp --------------------------------------------------------------------------------------------------
# B of mma.m16n8k16 is 16 (k) x 8 (n). By PTX's definition lane l has b0..b3 of column l / 4 and of rows 2 (l % 4), the
# next one, and these plus 8; of the result 16 x 8 it has columns 2 (l % 4) and the next one. A lane takes nibbles out
# of a word in pairs, a low one and the one 16 bits above, lower pairs first.


def pairs(word: int) -> list[int]:
    """The 8 nibbles in the order in which a lane's masks and shifts give them."""
    found = []
    for shift in (0, 4, 8, 12):
        both = (word >> shift) & 0x000F000F
        found += [both & 0xFFFF, both >> 16]
    return found


def by_lanes(packed: Marlin, e: int) -> list[list[float]]:
    """W [N, stored k] of one expert from what 32 lanes read: a lane's 16 bytes are four words, one for each 16 columns,
    with two operands B in each."""
    words, scales = packed.qweight[e].tolist(), packed.scales[e].tolist()
    zeros = None if packed.zeros is None else packed.zeros[e].tolist()
    down, N, groups = len(words), len(words[0]) // 2, len(scales)
    K = 16 * down
    W = [[0.0] * K for _ in range(N)]
    for i in range(down):
        g = packed.g_idx[e, 16 * i].item() if packed.g_idx.shape[1] else 16 * i // (K // groups)
        for tile in range(N // 64):
            for lane in range(32):
                read = words[i][128 * tile + 4 * lane :][:4]
                # the scales and the zero word that this lane loads: 8 of 64 columns, by its column in an operand
                first = 64 * tile + 8 * (lane // 4)
                mine = scales[g][first : first + 8] if groups > 1 else None
                z = [8] * 8 if zeros is None else pairs(zeros[g][first // 8])
                for block, word in enumerate(read):
                    for half, b in ((0, pairs(word)[:4]), (1, pairs(word)[4:])):
                        n = 64 * tile + 16 * block + 8 * half + lane // 4
                        for j, code in enumerate(b):
                            k = 16 * i + 2 * (lane % 4) + (j & 1) + 8 * (j >> 1)
                            W[n][k] = (code - z[2 * block + half]) * (mine[2 * block + half] if mine else 1.0)
    if groups == 1:
        scale = of_result(scales[0])
        W = [[scale[n] * value for value in row] for n, row in enumerate(W)]
    return W


def of_result(stored: list[float]) -> list[float]:
    """What is multiplied with, or added to, each column of the result: of 32 columns, which are four results, a lane
    loads 8 values, 2 for each of them."""
    columns = [0.0] * len(stored)
    for first in range(0, len(stored), 32):
        for lane in range(4):
            for i, value in enumerate(stored[first + 8 * lane :][:8]):
                columns[first + 8 * (i // 2) + 2 * lane + i % 2] = value
    return columns
