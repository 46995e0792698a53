"""Feeding a compiled graph: the packed weights of whatever stored tensors a call brings.

A call must not run on what was packed from other values. So each looks at every stored tensor: whether it is the same
object, at the same address, in the same version. With hundreds of layers that has to be quick.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inductor_ext import prove, weights
from inductor_ext.capture import DynamoSite, Slot
from inductor_ext.proved import Weight
from inductor_ext.recipes import ExpertRecipe, Recipe


@dataclasses.dataclass(frozen=True)
class Feed:
    """What one weight of an op needs at every call: its stored tensors among the arguments, and how they were read when
    the graph was rewritten."""

    slots: tuple[Slot, ...]
    recipe: Recipe | ExpertRecipe
    kernel: str
    kind: weights.Kind
    frozen: tuple[bool, ...]
    """Which stored tensors required no gradient then."""

    def tensors(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """The packed tensors. Raises prove.NotProved if the stored ones are new or changed, and not what the graph was
        compiled for."""
        sources = self.sources(args)
        if torch.is_grad_enabled() and any(t.requires_grad and f for t, f in zip(sources, self.frozen, strict=True)):
            raise prove.NotProved(
                "a stored tensor of it requires a gradient, as it did not when the graph was compiled"
            )
        entry = self.entry(sources)
        if entry.kind != self.kind:
            raise prove.NotProved(f"it is of kind {entry.kind}, and the graph was compiled for {self.kind}")
        return entry.tensors(self.kernel, sources)

    def sources(self, args: Sequence[Any]) -> list[Tensor]:
        """The stored tensors."""
        return [slot.find(args) for slot in self.slots]

    def entry(self, sources: Sequence[Tensor]) -> weights.Entry:
        return weights.entry(self.recipe, sources)


def feed(site: DynamoSite, weight: Weight, kernel: str) -> Feed:
    if weight.parts:
        whole = site.slot(weight.leaves[0])
        slots = tuple(dataclasses.replace(whole, parts=path) for path in weight.parts)
    else:
        slots = tuple(site.slot(leaf) for leaf in weight.leaves)
    return Feed(slots, weight.recipe, kernel, weight.entry.kind, tuple(not t.requires_grad for t in weight.sources))


class Feeds:
    """All weights of a graph."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds = feeds
        self._first = feeds[0].slots[0]
        self._seen: dict[int, _Seen] = {}
        """By the first stored tensor: one graph may serve many layers in turn."""

    def tensors(self, args: Sequence[Any]) -> list[Tensor]:
        """The packed tensors. Raises prove.NotProved as ``Feed.tensors`` does."""
        first = self._first.find(args)
        seen = self._seen.get(id(first))
        if seen is not None and (found := seen.tensors(args)) is not None:
            return found
        found = [t for feed in self._feeds for t in feed.tensors(args)]
        self._seen = {key: each for key, each in self._seen.items() if each.alive()}
        self._seen[id(first)] = _Seen(self._feeds, args)
        return found


class _Seen:
    """What a call brought that was found to be as proved. Holds no tensor: memory goes when the model goes.

    Nor a weak reference to one, for PyTorch swaps no tensor that has those. While an entry lives so do its stored
    tensors, and their ids are no one else's.
    """

    def __init__(self, feeds: Sequence[Feed], args: Sequence[Any]) -> None:
        self._sources = []
        self._entries = []
        for feed in feeds:
            sources = feed.sources(args)
            for slot, t in zip(feed.slots, sources, strict=True):
                version = None if t.is_inference() else t._version
                self._sources.append((slot, slot.plain, id(t), version, t.data_ptr()))
            entry = feed.entry(sources)
            self._entries.append((weakref.ref(entry), entry.state, feed.kernel))

    def alive(self) -> bool:
        return all(entry() is not None for entry, _, _ in self._entries)

    def tensors(self, args: Sequence[Any]) -> list[Tensor] | None:
        """The packed tensors, if this call brings the same; else None."""
        found: list[Tensor] = []
        for reference, state, kernel in self._entries:
            entry = reference()
            if entry is None or entry.state is not state:
                return None
            found += entry.given[kernel]
        trains = torch.is_grad_enabled()
        for slot, plain, identity, version, address in self._sources:
            t: Tensor = args[slot.argument] if plain else slot.find(args)
            if (
                id(t) != identity
                or t.data_ptr() != address
                or (version is not None and t._version != version)
                or (trains and t.requires_grad)
            ):
                return None
        return found
