"""Packed weights: one process-wide weak cache from stored tensors to a kernel's layout.

An entry is proved and packed when its stored tensors are first met, shared by every graph, refreshed in place (same addresses, so captured
CUDA graphs stay valid) when one of them changes, and dropped when one of them dies. A change is seen by the tensor's version counter;
``t.data.copy_()`` and writes under ``inference_mode`` do not move it: call ``invalidate(module)`` after those.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from inductor_ext import kernels, prove
from inductor_ext.formats import PackedInt4
from inductor_ext.kernels import Packed
from inductor_ext.patterns.cone import Program
from inductor_ext.patterns.reading import Reading


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a graph is rewritten for: a weight of another kind needs another graph."""

    scale_dtype: torch.dtype
    zeros: str
    """"none" (constant 8), "int" or "float"."""
    permuted: bool


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How stored tensors are read: the program to prove against, its signature, and the reading."""

    program: Program
    reading: Reading
    token: str
    """Equal for recipes that read alike: the program's signature and the reading, as one string."""


class Entry:
    """A proved weight, its packed copies by kernel, and the state of the stored tensors from which they were made."""

    def __init__(self, recipe: Recipe, sources: Sequence[Tensor]) -> None:
        self._recipe = recipe
        self.sources = tuple(weakref.ref(t) for t in sources)
        self._packs: dict[str, Packed] = {}
        self._canonical: PackedInt4 | None = None
        self.prove(sources)

    def prove(self, sources: Sequence[Tensor]) -> None:
        """Proves the stored tensors as they are now, and packs again, into the same memory, what was packed."""
        versions = _versions(sources)
        canonical, self.proof = prove.prove(self._recipe.program, sources, self._recipe.reading)
        zeros = "none" if canonical.zeros is None else "int" if canonical.zeros.dtype == torch.uint8 else "float"
        self.kind = Kind(canonical.scales.dtype, zeros, canonical.order is not None)
        for kernel, packed in self._packs.items():
            for old, new in zip(packed, _pack(kernel, canonical), strict=True):
                if old is not None and new is not None and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        self._canonical = None if self._packs else canonical
        self.versions = versions

    def pack(self, kernel: str, sources: Sequence[Tensor]) -> Packed:
        """The weight in the kernel's layout: always the same tensors."""
        if kernel not in self._packs:
            with _disable_current_modes(), torch.no_grad():
                self._packs[kernel] = _pack(kernel, self._canonical or self._recipe.reading.canonical(sources))
        self._canonical = None
        return self._packs[kernel]

    def tensors(self, kernel: str, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What ``pack`` gives, without the absent ones."""
        return tuple(t for t in self.pack(kernel, sources) if t is not None)


def _pack(kernel: str, canonical: PackedInt4) -> Packed:
    packed = kernels.load(kernel).pack(canonical)
    # A tensor that needed no packing is the source's own memory. It is held as an alias, so that the source can still die.
    qweight, scales, zeros, order = (None if t is None else t.detach() for t in packed)
    assert qweight is not None and scales is not None
    return Packed(qweight, scales, zeros, order)


def _versions(sources: Sequence[Tensor]) -> list[int]:
    return [-1 if t.is_inference() else t._version for t in sources]


_CACHE: dict[tuple[object, ...], Entry] = {}


def entry(recipe: Recipe, sources: Sequence[Tensor]) -> Entry:
    """The entry of these stored tensors, proved as they are now.

    Raises prove.NotProved, when they are new or changed and are not what the reading says.
    """
    key = (recipe.token, *map(id, sources))
    found = _CACHE.get(key)
    if found is not None and all(ref() is t for ref, t in zip(found.sources, sources, strict=True)):
        if found.versions != _versions(sources):
            found.versions = []  # until the proof stands
            with _disable_current_modes(), torch.no_grad():
                found.prove(sources)
        return found
    with _disable_current_modes(), torch.no_grad():
        found = _CACHE[key] = Entry(recipe, sources)
    for t in sources:
        weakref.finalize(t, _CACHE.pop, key, None).atexit = False
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
    """Has the packed copies of this module's weights proved and made again at their next use; returns how many there are.

    Needed only after changes that PyTorch does not count: ``p.data.copy_(...)``, or writes to tensors made under ``torch.inference_mode()``.
    """
    own = {id(t) for value in (*module.parameters(), *module.buffers()) for t in stored_tensors(value)}
    hit = [e for key, e in _CACHE.items() if own.intersection(key[1:])]
    for e in hit:
        e.versions = []
    return len(hit)
