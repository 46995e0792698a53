"""Weights changed in shape, not in value, so that a layout can hold them: finer groups, filling up with zeros, shares
for tensor parallelism, a rank's own experts, columns put in order."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from inductor_ext.formats import SEQUENTIAL
from inductor_ext.layouts.experts import Experts, need, none, shape


def finer(weight: Experts, group_size: int) -> Experts:
    """The same weight in groups of this size, which divides its own: scales and zeros are repeated."""
    fits = group_size > 0 and weight.group_size % group_size == 0
    need(fits, "group_size", f"a divisor of the weight's, {weight.group_size}", group_size)
    times = weight.group_size // group_size
    if times == 1:
        return weight
    zeros = None if weight.zeros is None else weight.zeros.repeat_interleave(times, 2)
    return dataclasses.replace(weight, scales=weight.scales.repeat_interleave(times, 2), zeros=zeros)


def one_group(first: Experts, second: Experts) -> tuple[Experts, Experts]:
    """Both in the largest groups of the same size: what kernels need that know one size for two projections."""
    size = math.gcd(first.group_size, second.group_size)
    return finer(first, size), finer(second, size)


def rows(weight: Experts, rank: int, of: int, parts: int = 1) -> Experts:
    """The share of N of one of ``of`` ranks. ``parts``: the rows are so many halves (gate and up), each shared out."""
    _check_rank(rank, of)
    need(weight.N % (of * parts) == 0, "N", f"a multiple of {of * parts} for {of} ranks", weight.N)

    def share(t: Tensor) -> Tensor:
        mine: Tensor = t.unflatten(1, (parts, of, -1))[:, :, rank].flatten(1, 2)
        return mine

    zeros, bias = (None if t is None else share(t) for t in (weight.zeros, weight.bias))
    return Experts(share(weight.codes), share(weight.scales), zeros, weight.order, bias)


def columns(weight: Experts, rank: int, of: int) -> Experts:
    """The share of K of one of ``of`` ranks, in finer groups where a group would be cut.

    The products of all ranks are added up, so that the bias is rank 0's alone.
    """
    _check_rank(rank, of)
    none(weight, "order")  # a rank's part of x would be spread over the stored columns of all
    per = weight.per_element
    need(weight.K % (of * per) == 0, "K", f"a multiple of {of * per} for {of} ranks", weight.K)
    share = weight.K // of
    weight = finer(weight, math.gcd(weight.group_size, share))
    groups = slice(rank * share // weight.group_size, (rank + 1) * share // weight.group_size)
    return Experts(
        weight.codes[:, :, rank * share // per : (rank + 1) * share // per].contiguous(),
        weight.scales[:, :, groups].contiguous(),
        None if weight.zeros is None else weight.zeros[:, :, groups].contiguous(),
        bias=weight.bias if rank == 0 else None,
    )


def _check_rank(rank: int, of: int) -> None:
    need(of > 0, "of", "at least 1", of)
    need(0 <= rank < of, "rank", f"within 0..{of - 1}", rank)


def local(weight: Experts, expert_map: Tensor) -> Experts:
    """The experts that are here: expert_map, integers [E], says which row each becomes, or -1."""
    need(expert_map.shape == (weight.E,), "expert_map", f"[{weight.E}]", shape(expert_map))
    here = (expert_map >= 0).nonzero().flatten()
    rows = expert_map[here].long()
    each = torch.equal(rows.sort().values, torch.arange(here.numel(), device=rows.device))
    need(here.numel() > 0 and each, "expert_map", "each of 0..(number here - 1) once, and -1", "others")
    chosen = here[rows.argsort()].to(weight.codes.device)

    def pick(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.index_select(0, chosen)

    codes, scales = weight.codes.index_select(0, chosen), weight.scales.index_select(0, chosen)
    return Experts(codes, scales, pick(weight.zeros), pick(weight.order), pick(weight.bias))


def filled(weight: Experts, N: int, K: int, parts: int = 1) -> Experts:
    """The weight with rows and columns added that are exactly 0, up to these sizes.

    New rows and new groups have code and zero 8 (of 8 bits, 128) and scale 0. ``parts``: the rows are so many halves
    (gate and up), each filled up by itself. A single group for all of K takes new columns in; groups are whole
    otherwise.
    """
    G, more = weight.group_size, K - weight.K
    need(N >= weight.N and N % parts == 0 == weight.N % parts, "N", f"at least {weight.N}, in {parts} equal parts", N)
    per, constant = weight.per_element, 8 if weight.bits == 4 else 128
    need(more >= 0 and K % per == 0, "K", f"a multiple of {per}, at least {weight.K}", K)
    whole = weight.scales.shape[2] == 1 or more % G == 0
    need(whole, "K", f"{weight.K} and a multiple of the group size {G}", K)
    codes, scales, zeros, order = weight.codes, weight.scales, weight.zeros, weight.order
    if more > 0:
        added = _constant(codes, more // per) if weight.scales.shape[2] > 1 else _zero_codes(weight, more)
        codes = torch.cat((codes, added), 2)
        if order is not None:
            last = torch.arange(weight.K, K, dtype=torch.int32, device=order.device)
            order = torch.cat((order, last.expand(weight.E, more)), 1)
        if weight.scales.shape[2] > 1:
            scales = pad(scales, (0, more // G))
            zeros = None if zeros is None else pad(zeros, (0, more // G), value=constant)
    each = (N - weight.N) // parts

    def fill(t: Tensor, value: int) -> Tensor:
        if each == 0:
            return t
        below = (0, 0) * (t.dim() - 2) + (0, each)
        return pad(t.unflatten(1, (parts, -1)), below, value=value).flatten(1, 2)

    return Experts(
        fill(codes, _CONSTANT[codes.dtype]),
        fill(scales, 0),
        None if zeros is None else fill(zeros, constant),
        order,
        None if weight.bias is None else fill(weight.bias, 0),
    )


_CONSTANT = {torch.int32: int(SEQUENTIAL.pack(torch.full((1, 8), 8), 1)), torch.uint8: 128}
"""Codes that are the constant zero: eight of 4 bits, one of 8."""


def _constant(codes: Tensor, more: int) -> Tensor:
    return codes.new_full((*codes.shape[:2], more), _CONSTANT[codes.dtype])


def _zero_codes(weight: Experts, more: int) -> Tensor:
    """Codes that are their row's zero, as ``codes`` has them, for columns of the one group."""
    if weight.zeros is None:
        return _constant(weight.codes, more // weight.per_element)
    most = (1 << weight.bits) - 1
    zeros = weight.zeros.expand(weight.E, weight.N, more)
    codes = zeros.to(torch.uint8)
    held = bool(((codes == zeros) & (zeros <= most)).all())
    need(held, "zeros", f"codes (integers within 0..{most}) where columns are added to their group", "others")
    if weight.bits == 8:
        return codes
    return SEQUENTIAL.pack(codes.reshape(-1, more), 1).view(weight.E, weight.N, -1)


def in_order(weight: Experts) -> Experts:
    """A weight in act-order whose one group is all of K, with its columns stored in the order of k."""
    if weight.order is None:
        return weight
    need(weight.scales.shape[2] == 1, "scales", "of one group: others must stay with their columns", "more")
    codes = torch.empty_like(weight.codes)
    for e in range(weight.E):
        one = weight.expert(e)
        logical = one.logical(one.stored_codes())
        codes[e] = logical if weight.bits == 8 else SEQUENTIAL.pack(logical, 1)
    return dataclasses.replace(weight, codes=codes, order=None)
