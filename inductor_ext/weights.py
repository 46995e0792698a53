"""Packed weights: what a kernel reads, made from stored tensors and kept with them.

An entry hangs on the tensor that holds the codes. So it is shared by every graph, follows its tensor when modules swap
theirs, and dies with it. It is proved and packed when its stored tensors are first met, and refreshed in place (same
addresses, so captured CUDA graphs stay valid) when one of them changes. A change is seen by the tensor's version
counter, and ``p.data = q`` by the address. ``t.data.copy_()``, writes under ``inference_mode`` or to a q that is p's
data already move neither, nor does a q at the address that p's data had: call ``invalidate(module)`` after those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from inductor_ext.formats import Canonical, PackedMxfp4
from inductor_ext.kernels import Packed
from inductor_ext.recipes import ExpertRecipe, Recipe


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a graph is rewritten for: a weight of another kind needs another graph."""

    scale_dtype: torch.dtype
    zeros: str
    """"none" (constant 8), "int" or "float"."""
    permuted: bool
    codes: str = "int4"
    """Or "mxfp4"."""

    @classmethod
    def of(cls, canonical: Canonical) -> Kind:
        if isinstance(canonical, PackedMxfp4):
            return cls(canonical.scales.dtype, "none", False, "mxfp4")
        zeros = "none" if canonical.zeros is None else "int" if canonical.zeros.dtype == torch.uint8 else "float"
        return cls(canonical.scales.dtype, zeros, canonical.order is not None)


class Entry:
    """A proved weight, its packed copies by kernel, and the state of the stored tensors from which they were made."""

    def __init__(self, recipe: Recipe | ExpertRecipe, sources: Sequence[Tensor]) -> None:
        codes = recipe.codes
        self.others = tuple(
            None if i == codes else t for i, t in enumerate(sources)
        )  # not the one that holds this entry
        self._recipe = recipe
        self._packs: dict[str, tuple[Packed, tuple[bool, ...]]] = {}  # and which of its tensors packing allocated
        self.given: dict[str, tuple[Tensor, ...]] = {}
        """Of each kernel that was asked for: the packed tensors, without the absent ones."""
        self._canonical: Canonical | None = None
        self.prove(sources)

    def is_of(self, sources: Sequence[Tensor]) -> bool:
        return all(own is None or own is t for own, t in zip(self.others, sources, strict=True))

    def prove(self, sources: Sequence[Tensor]) -> None:
        """Proves the stored tensors as they are now, and packs again what was packed. Raises prove.NotProved."""
        state, before = _state(sources), getattr(self, "kind", None)
        canonical, self.proof = self._recipe.prove(sources)
        self.kind = Kind.of(canonical)
        if self.kind != before:
            self._packs.clear()
        for kernel, (packed, ours) in self._packs.items():
            self._packs[kernel] = _allocated(_renewed(packed, ours, self._packed(kernel, canonical)), sources)
        self.given.clear()
        self._canonical = None if self._packs else canonical
        self.state = state

    def pack(self, kernel: str, sources: Sequence[Tensor]) -> Packed:
        """The weight in the kernel's layout. Memory that was packed into stays the same; what needed no packing is the
        stored tensor's own."""
        if kernel not in self._packs:
            with _disable_current_modes(), torch.no_grad():
                packed = self._packed(kernel, self._canonical or self._recipe.canonical(sources))
            self._packs[kernel] = _allocated(packed, sources)
        self._canonical = None
        return self._packs[kernel][0]

    def tensors(self, kernel: str, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What ``pack`` gives, without the absent ones."""
        if kernel not in self.given:
            self.given[kernel] = tuple(t for t in self.pack(kernel, sources) if t is not None)
        return self.given[kernel]

    def _packed(self, kernel: str, canonical: Canonical) -> Packed:
        packed = self._recipe.pack(kernel, canonical)
        # A tensor that needed no packing is held as an alias, so that the stored tensor itself can die.
        qweight, scales, zeros, order = (None if t is None else t.detach() for t in packed)
        assert qweight is not None and scales is not None
        return Packed(qweight, scales, zeros, order)


def _allocated(packed: Packed, sources: Sequence[Tensor]) -> tuple[Packed, tuple[bool, ...]]:
    stored = {t.untyped_storage().data_ptr() for t in sources}
    return packed, tuple(t is not None and t.untyped_storage().data_ptr() not in stored for t in packed)


def _renewed(old: Packed, ours: Sequence[bool], new: Packed) -> Packed:
    """The new values, in the old memory where that is ours: a stored tensor is never written to."""

    def renew(before: Tensor | None, now: Tensor | None, own: bool) -> Tensor | None:
        if (
            before is None
            or now is None
            or not own
            or (before.shape, before.dtype, before.device) != (now.shape, now.dtype, now.device)
        ):
            return now
        return before.copy_(now)

    return Packed(*(renew(*each) for each in zip(old, new, ours, strict=True)))  # type: ignore[arg-type]


def _state(sources: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """What tells that a stored tensor has changed: its version, and where and how it lies (``p.data = q`` changes no
    version)."""
    return [(-1 if t.is_inference() else t._version, t.data_ptr(), t.shape, t.stride(), t.dtype) for t in sources]


class _Entries(dict[str, Entry]):
    """The entries of a tensor, by recipe. Copies and pickles of the tensor have none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (dict, ())

    def __deepcopy__(self, memo: Any) -> dict[str, Entry]:
        return {}


_ATTRIBUTE = "_w4a16_entries"


def _entries(codes: Tensor) -> _Entries | None:
    found = codes.__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, _Entries) else None


def entry(recipe: Recipe | ExpertRecipe, sources: Sequence[Tensor]) -> Entry:
    """The entry of these stored tensors, proved as they are now.

    Raises prove.NotProved, when they are new or changed and are not what the reading says.
    """
    codes = sources[recipe.codes]
    entries = _entries(codes)
    found = None if entries is None else entries.get(recipe.token)
    if found is not None and found.is_of(sources):
        if found.state != _state(sources):
            found.state = []  # until the proof stands
            with _disable_current_modes(), torch.no_grad():
                found.prove(sources)
        return found
    with _disable_current_modes(), torch.no_grad():
        found = Entry(recipe, sources)
    if entries is None:
        entries = _Entries()
        setattr(codes, _ATTRIBUTE, entries)
    entries[recipe.token] = found
    return found


def stored_tensors(value: Tensor) -> list[Tensor]:
    """The plain tensors behind a parameter or buffer: itself, or a tensor subclass's parts, depth first."""
    if not is_traceable_wrapper_subclass(value):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [t for name in names for t in stored_tensors(getattr(value, name))]


def part(value: Tensor, path: Sequence[str]) -> Tensor:
    """The part of a tensor subclass at this attribute path."""
    for name in path:
        value = getattr(value, name)
    return value


def invalidate(module: nn.Module) -> int:
    """Has the packed copies of this module's weights proved and made again at their next use; returns how many there
    are.

    Needed only after changes that PyTorch does not count: ``p.data.copy_(...)``, or writes to tensors made under
    ``torch.inference_mode()``.
    """
    stored = [t for value in (*module.parameters(), *module.buffers()) for t in stored_tensors(value)]
    hit = [e for t in stored for e in (_entries(t) or {}).values()]
    for e in hit:
        e.state = []
    return len(hit)
