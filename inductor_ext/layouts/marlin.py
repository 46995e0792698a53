"""Marlin's layout, as vLLM prepares it for its dense kernel (one expert) and that for experts.

    qweight       int32 [E, K/16, 2 N]: tiles of 16 (k) x 64 (n), in the order MARLIN of the table
    scales        [E, K/G, N], columns changed about in each 64; with one group for all of K, in each 32
    zeros         None (the kernel's type uint4b8: zeros are 8), or int32 [E, K/G, N/8] (its type uint4): columns
                  changed about in each 64, whatever the groups, then packed along N in EXLLAMA's order
    g_idx         int32 [E, K]: the group of each stored column, ascending; [E, 0] without act-order
    sort_indices  int32 [E, K]: which of the activations' columns belongs to each stored column; [E, 0] likewise
    bias          [E, N], changed about like scales of one group

Checkpoints of GPTQ and AWQ come to the same tiles; they differ in whether there are zeros. The kernel takes scales in
the activations' dtype, and tells one group from many by their number. (vLLM's preparation of w13 compares the group
size with the intermediate size instead, and so permutes otherwise where that is no larger.) Besides whole tiles the
kernel asks for N in multiples of 128 and K of 64, or the reverse for dense layers; ``filled`` brings the experts'
intermediate size there.

Read in the sources of gptq_marlin_repack, awq_marlin_repack, marlin_utils, the kernel and vLLM's choice of WNA16
kernels, and checked against the fragments of mma.m16n8k16. Symmetric dense layers were run on Marlin's first kernel
(IST-DASLab's; bench/RESULTS.md), the rest not.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from inductor_ext.bits import from_tiles, to_tiles
from inductor_ext.formats import EXLLAMA, MARLIN
from inductor_ext.layouts import adjust
from inductor_ext.layouts.experts import Experts, four_bits, from_nibbles, need, scale_dtypes, tiles, to_nibbles

GROUPS = (32, 64, 128)


class Marlin(NamedTuple):
    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    g_idx: Tensor
    sort_indices: Tensor
    bias: Tensor | None


def pack(weight: Experts) -> Marlin:
    E, N, K, G = weight.E, weight.N, weight.K, weight.group_size
    four_bits(weight)
    tiles(weight, MARLIN.rows, MARLIN.columns)
    need(G in (*GROUPS, K), "group size", f"{', '.join(map(str, GROUPS))} or K={K}", G)
    scale_dtypes(weight, torch.float16, torch.bfloat16)
    zeros = None if weight.zeros is None else to_nibbles(weight.zeros, "stored").transpose(1, 2)
    g_idx = sort_indices = weight.codes.new_empty(E, 0)
    if weight.order is not None:
        need(G < K, "order", "None where one group is all of K (adjust.in_order makes it so)", list(weight.order.shape))
        g_idx = (torch.arange(K, dtype=torch.int32, device=weight.codes.device) // G).expand(E, K).contiguous()
        sort_indices = weight.order.argsort().int()
    qweight = weight.codes.new_empty(E, K // 16, 2 * N)
    to_tiles(weight.codes.contiguous(), MARLIN, qweight.view(E, K // 16, N // 64, 128))
    return Marlin(
        qweight,
        _by_lane(weight.scales.transpose(1, 2), one_group=G == K),
        None if zeros is None else EXLLAMA.pack(_by_lane(zeros).flatten(0, 1), 1).view(E, K // G, N // 8),
        g_idx,
        sort_indices,
        None if weight.bias is None else by_result(weight.bias),
    )


def unpack(packed: Marlin) -> Experts:
    E, down, N = packed.qweight.shape[0], packed.qweight.shape[1], packed.qweight.shape[2] // 2
    groups = packed.scales.shape[1]
    codes = packed.qweight.new_empty(E, N, 2 * down)
    from_tiles(packed.qweight.contiguous().view(E, down, N // 64, 128), MARLIN, codes)
    zeros = None
    if packed.zeros is not None:
        stored = EXLLAMA.unpack(packed.zeros, 1, E * groups, N).view(E, groups, N)
        zeros = from_nibbles(_from_lanes(stored), "stored").transpose(1, 2).contiguous()
    return Experts(
        codes,
        _from_lanes(packed.scales, one_group=groups == 1).transpose(1, 2).contiguous(),
        zeros,
        packed.sort_indices.argsort().int() if packed.sort_indices.shape[1] > 0 else None,
        None if packed.bias is None else _from_lanes(packed.bias, one_group=True),
    )


def filled(w13: Experts, w2: Experts, parts: int = 2) -> tuple[Experts, Experts]:
    """Both with the intermediate size filled up to what the kernel needs: whole tiles and whole groups of w2.

    ``parts``: the rows of w13 are so many halves (gate and up) one after the other, each filled up by itself.
    """
    size = w2.K
    unit = math.lcm(64, w2.group_size if w2.group_size < w2.K else 1)
    full = -(-size // unit) * unit
    return adjust.filled(w13, full * parts, w13.K, parts), adjust.filled(w2, w2.N, full)


def by_result(values: Tensor) -> Tensor:
    """[..., N] in the order in which the kernel adds values to its results."""
    return _by_lane(values, one_group=True)


def _by_lane(values: Tensor, one_group: bool = False) -> Tensor:
    """[..., N]: what a lane multiplies with comes together.

    In each 64 columns an operand's lane has c, c + 8, ..., c + 56; in each 32 a result's lane has c, c + 8, c + 16 and
    c + 24, each with its neighbour.
    """
    square: Tensor = values.unflatten(-1, (-1, 4, 4, 2) if one_group else (-1, 8, 8, 1))
    return square.transpose(-3, -2).reshape(values.shape)


_from_lanes = _by_lane
"""Both are transpositions of squares, so each is its own inverse."""
