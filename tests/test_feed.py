"""What a compiled graph does at every call to find its packed weights. That it never takes those of other values is in
test_weights.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import CompressedTensors, chain, recompiles, rel_l2
from zoo.base import fresh

from inductor_ext import feed

X = torch.randn(3, 64)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with fresh(), torch.no_grad():
        yield


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[feed.Feed]:
    """The weights whose entries are looked up from now on."""
    looked_up: list[feed.Feed] = []
    tensors = feed.Feed.tensors

    def looking(self: feed.Feed, args: Any) -> Any:
        looked_up.append(self)
        return tensors(self, args)

    monkeypatch.setattr(feed.Feed, "tensors", looking)
    return looked_up


def test_the_same_weights_are_looked_up_once(read: list[feed.Feed]) -> None:
    model = chain(*(CompressedTensors(64, 64, seed=i) for i in range(3)))
    run = torch.compile(model, backend="w4a16")
    for _ in range(4):
        run(X)
    assert len(read) == 3
    model[1].weight_scale.mul_(2)  # all of the graph's weights, when one has changed
    for _ in range(4):
        run(X)
    assert len(read) == 6


def test_layers_that_take_turns_in_one_graph_are_looked_up_once_each(read: list[feed.Feed]) -> None:
    layers = [CompressedTensors(32, 64, seed=i) for i in range(3)]
    run = torch.compile(lambda layer, x: layer(x), backend="w4a16")
    for layer in layers * 3:
        assert rel_l2(run(layer, X), layer.expected(X)) <= 2e-6
    assert recompiles() == 1
    assert len(read) == 3


def test_what_is_remembered_of_dead_layers_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[feed.Feeds] = []
    start = feed.Feeds.__init__

    def keeping(self: feed.Feeds, feeds: Any) -> None:
        start(self, feeds)
        made.append(self)

    monkeypatch.setattr(feed.Feeds, "__init__", keeping)
    run = torch.compile(lambda layer, x: layer(x), backend="w4a16")
    for seed in range(5):
        layer = CompressedTensors(32, 64, seed=seed)
        assert rel_l2(run(layer, X), layer.expected(X)) <= 2e-6
    (feeds,) = made
    assert len(feeds._seen) == 1
