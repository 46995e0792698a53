"""Weights changed in shape: the values stay, and what is added is exactly 0."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import KINDS, same, values, weight

from inductor_ext.layouts import adjust

few = settings(max_examples=8, deadline=None, derandomize=True)
seeds = st.integers(0, 1 << 30)


@pytest.mark.parametrize("kind", KINDS)
def test_finer_groups_have_the_same_values(kind: str) -> None:
    @few
    @given(E=st.integers(1, 3), size=st.sampled_from([8, 32, 64, 128]), seed=seeds)
    def check(E: int, size: int, seed: int) -> None:
        w = weight(kind, E, 8, 256, 128, seed)
        fine = adjust.finer(w, size)
        assert fine.group_size == size
        assert torch.equal(values(fine), values(w))

    check()


def test_two_projections_get_one_group_size() -> None:
    w13, w2 = weight("asymmetric", 2, 16, 256, 128, 0), weight("symmetric", 2, 16, 192, 96, 1)
    one, two = adjust.one_group(w13, w2)
    assert one.group_size == two.group_size == 32
    assert torch.equal(values(one), values(w13)) and torch.equal(values(two), values(w2))


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "bias"])
def test_ranks_share_columns_that_cut_groups(kind: str) -> None:
    """768 in groups of 128 among 8 ranks: 96 each, in groups of 32."""
    w = weight(kind, 2, 16, 768, 128, 0)
    shares = [adjust.columns(w, rank, 8) for rank in range(8)]
    assert {(share.K, share.group_size) for share in shares} == {(96, 32)}
    assert torch.equal(torch.cat([values(share) for share in shares], 2), values(w))
    x = torch.randn(2, 3, 768, dtype=torch.float64)
    bias = torch.zeros(2, 16) if w.bias is None else w.bias
    partial = [
        x[:, :, 96 * r : 96 * r + 96] @ values(s).mT + (0 if s.bias is None else s.bias.double().unsqueeze(1))
        for r, s in enumerate(shares)
    ]
    torch.testing.assert_close(sum(partial), x @ values(w).mT + bias.double().unsqueeze(1))


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_share_gates_and_ups(kind: str) -> None:
    w = weight(kind, 2, 32, 64, 32, 0)
    shares = [adjust.rows(w, rank, 4, parts=2) for rank in range(4)]
    gates, ups = values(w).chunk(2, 1)
    assert torch.equal(torch.cat([values(s).chunk(2, 1)[0] for s in shares], 1), gates)
    assert torch.equal(torch.cat([values(s).chunk(2, 1)[1] for s in shares], 1), ups)
    if w.bias is not None:
        assert torch.equal(torch.cat([s.bias.view(2, 2, 4) for s in shares], 2).flatten(1), w.bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("G", [32, "channel"])
def test_what_is_filled_up_is_exactly_zero(kind: str, G: int | str) -> None:
    @few
    @given(rows=st.integers(0, 9), groups=st.integers(0, 3), parts=st.sampled_from([1, 2]), seed=seeds)
    def check(rows: int, groups: int, parts: int, seed: int) -> None:
        w = weight(kind, 2, 8, 96, 96 if G == "channel" else G, seed)
        N, K = 8 + rows * parts, 96 + 32 * groups
        full = adjust.filled(w, N, K, parts)
        assert (full.N, full.K) == (N, K)
        whole = values(full).view(2, parts, N // parts, K)
        assert torch.equal(whole[:, :, : 8 // parts, :96].reshape(2, 8, 96), values(w))
        added = torch.ones_like(whole, dtype=torch.bool)
        added[:, :, : 8 // parts, :96] = False
        # Where a scale is 0, and without its help.
        alone = dataclasses.replace(full, scales=torch.ones_like(full.scales))
        for zero in (whole[added], values(alone).view(whole.shape)[added]):
            assert torch.count_nonzero(zero) == 0 and not zero.signbit().any()
        assert torch.count_nonzero(full.scales) == torch.count_nonzero(w.scales)
        if full.bias is not None:
            assert torch.equal(full.bias.view(2, parts, -1)[:, :, : 8 // parts].reshape(2, 8), w.bias)
            assert torch.count_nonzero(full.bias) == torch.count_nonzero(w.bias)

    check()


def test_columns_in_order_of_k() -> None:
    w = weight("act-order", 3, 16, 64, 64, 0)
    plain = adjust.in_order(w)
    assert plain.order is None
    assert torch.equal(values(plain), values(w))
    same(adjust.in_order(plain), plain)


def test_what_cannot_be_adjusted() -> None:
    w = weight("asymmetric", 1, 8, 96, 32, 0)
    ordered, channel = weight("act-order", 1, 8, 96, 32, 0), weight("asymmetric", 1, 8, 96, 96, 0)
    sixteen = dataclasses.replace(channel, zeros=torch.full_like(channel.zeros, 16))
    between = dataclasses.replace(channel, zeros=torch.full_like(channel.scales, 7.5))
    for call, message in (
        (lambda: adjust.finer(w, 24), "group_size must be a divisor of the weight's, 32, not 24"),
        (lambda: adjust.finer(w, 0), "group_size must be a divisor of the weight's, 32, not 0"),
        (lambda: adjust.rows(w, 2, 2), "rank must be within 0..1, not 2"),
        (lambda: adjust.rows(w, 0, 3), "N must be a multiple of 3 for 3 ranks, not 8"),
        (lambda: adjust.columns(w, 0, 8), "K must be a multiple of 64 for 8 ranks, not 96"),
        (lambda: adjust.columns(ordered, 0, 2), "order must be None"),
        (lambda: adjust.filled(w, 4, 96), "N must be at least 8"),
        (lambda: adjust.filled(w, 9, 96, parts=2), "N must be at least 8, in 2 equal parts, not 9"),
        (lambda: adjust.filled(w, 8, 64), "K must be a multiple of 8, at least 96, not 64"),
        (lambda: adjust.filled(w, 8, 104), "K must be 96 and a multiple of the group size 32, not 104"),
        (lambda: adjust.filled(sixteen, 8, 128), "zeros must be codes"),
        (lambda: adjust.filled(between, 8, 128), "zeros must be codes"),
        (lambda: adjust.in_order(ordered), "scales must be of one group"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
