"""Recipes: how stored tensors become the canonical form of a weight, each with the computation that it is proved
against."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from inductor_ext import kernels, prove
from inductor_ext.formats import Canonical, PackedInt4, PackedMxfp4
from inductor_ext.kernels import Packed
from inductor_ext.patterns.cone import Computes
from inductor_ext.patterns.mxfp4 import Mxfp4Reading
from inductor_ext.patterns.reading import Reading


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Of one cone: the program to prove against, and the reading."""

    program: Computes
    reading: Reading | Mxfp4Reading
    token: str
    """Equal for recipes that read alike: the program's signature and the reading, as one string."""

    @property
    def codes(self) -> int:
        """Which of the stored tensors holds the codes."""
        return self.reading.codes.matrix.leaf

    @property
    def elements(self) -> int:
        return self.reading.N * self.reading.K

    def prove(self, sources: Sequence[Tensor]) -> tuple[Canonical, str]:
        """The canonical form, and in words how it was proved. Raises prove.NotProved."""
        return prove.prove(self.program, sources, self.reading)

    def canonical(self, sources: Sequence[Tensor]) -> Canonical:
        return self.reading.canonical(sources)

    def pack(self, kernel: str, canonical: Canonical) -> Packed:
        if isinstance(canonical, PackedMxfp4):
            packed: Packed = kernels.load_linear_mxfp4(kernel).pack(canonical)
            return packed
        return kernels.load(kernel).pack(canonical)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of one of the parts, or every ``step``-th of them."""

    part: int
    start: int
    stop: int
    step: int = 1


@dataclasses.dataclass(frozen=True)
class ExpertRecipe:
    """Of one projection of all experts: the rows of one or more cones, put one after the other."""

    parts: tuple[Recipe, ...]
    counts: tuple[int, ...]
    """How many of the stored tensors belong to each part."""
    pieces: tuple[Piece, ...]
    experts: int
    w13: bool
    """Gate and up; else w2."""

    @functools.cached_property  # long, and looked up at every call
    def token(self) -> str:
        return f"{[part.token for part in self.parts]} {self.pieces} {self.experts} {self.w13}"

    @property
    def codes(self) -> int:
        return self.parts[0].codes

    @property
    def elements(self) -> int:
        return min(part.elements for part in self.parts)

    @property
    def group_size(self) -> int:
        return self.parts[0].reading.group_size

    def prove(self, sources: Sequence[Tensor]) -> tuple[Canonical, str]:
        """The canonical form of all rows, and in words how it was proved. Raises prove.NotProved."""
        proved = [part.prove(some) for part, some in self._split(sources)]
        times = Counter(how for _, how in proved)
        told = (how if count == 1 else f"{count} times {how}" for how, count in times.items())
        return self._joined([canonical for canonical, _ in proved]), "; ".join(told)

    def canonical(self, sources: Sequence[Tensor]) -> Canonical:
        return self._joined([part.canonical(some) for part, some in self._split(sources)])

    def pack(self, kernel: str, canonical: Canonical) -> Packed:
        mxfp4 = isinstance(canonical, PackedMxfp4)
        module = kernels.load_mxfp4(kernel) if mxfp4 else kernels.load_moe(kernel)
        return kernels.pack_experts(module, canonical, self.experts, self.w13)

    def _split(self, sources: Sequence[Tensor]) -> list[tuple[Recipe, Sequence[Tensor]]]:
        ends = [sum(self.counts[: i + 1]) for i in range(len(self.counts))]
        return [
            (part, sources[end - count : end]) for part, count, end in zip(self.parts, self.counts, ends, strict=True)
        ]

    def _joined(self, parts: Sequence[Canonical]) -> Canonical:
        int4 = [part for part in parts if isinstance(part, PackedInt4)]
        mxfp4 = [part for part in parts if isinstance(part, PackedMxfp4)]
        if int4 and mxfp4:
            raise prove.NotProved("some of its projections are int4 and some MXFP4")
        return self._joined_mxfp4(mxfp4) if mxfp4 else self._joined_int4(int4)

    def _joined_mxfp4(self, parts: Sequence[PackedMxfp4]) -> PackedMxfp4:
        if self.pieces == (Piece(0, 0, parts[0].N),):
            return parts[0]
        return PackedMxfp4(self._rows([part.codes for part in parts]), self._rows([part.scales for part in parts]))

    def _joined_int4(self, parts: Sequence[PackedInt4]) -> PackedInt4:
        if any(part.order is not None for part in parts):
            raise prove.NotProved("its columns are stored permuted (act-order), which is not computed for experts")
        if self.pieces == (Piece(0, 0, parts[0].N),):
            return parts[0]
        if len({(part.K, part.group_size) for part in parts}) > 1:
            raise prove.NotProved("its gate and up projections have groups of different sizes")
        zeros = [part.zeros for part in parts]
        if any(z is not None for z in zeros):
            zeros = [
                torch.full_like(part.scales, 8, dtype=torch.uint8) if z is None else z
                for part, z in zip(parts, zeros, strict=True)
            ]
        return PackedInt4(
            self._rows([part.codes for part in parts]),
            self._rows([part.scales for part in parts]),
            None if zeros[0] is None else self._rows([z for z in zeros if z is not None]),
        )

    def _rows(self, parts: Sequence[Tensor]) -> Tensor:
        """The pieces' rows. torch.cat promotes dtypes without loss."""
        return torch.cat([parts[p.part][p.start : p.stop : p.step] for p in self.pieces])
