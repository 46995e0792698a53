"""Recognising by meaning: a cone is run on two sets of made-up stored tensors, and its answers say which of the known
readings it computes.

Probe 1 draws random codes and scales and keeps the zeros neutral: the scale map is the one under which W / scale is
whole everywhere, the code map the one under which that number follows from the nibble. Probe 2 draws everything; it
gives the zeros, and the reading found is then checked on all of it. The values drawn (few mantissa bits, small
integers) make every rounding order exact down to bfloat16, so "equal" means equal. The layouts tried are those of the
table in formats.py; which spelling computes them does not matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from inductor_ext.patterns.cone import Computes
from inductor_ext.patterns.mxfp4 import Mxfp4Reading, read_mxfp4
from inductor_ext.patterns.reading import Codes, Index, Matrix, NotCanonical, Reading, Zeros, matrices
from torch import Tensor

from inductor_ext.formats import CODE_BOOKS, ZERO_CONVENTIONS

_SAMPLES = 8192
_SCALES = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, -0.5, -0.75, -1.0, -1.5, -2.0, -3.0)


class NotRecognised(Exception):
    """Why a cone is no int4 weight that we know. The message is a sentence."""


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which leaf is taken for what; leaves without a role (tables of shifts) keep their stored values."""

    codes: int
    scales: int
    zeros: int | None
    index: Index | None
    groups: int
    experts: int = 1


class Probe:
    """A cone's program and the tensors that it is run on next."""

    def __init__(self, program: Computes, values: Sequence[Tensor], roles: Roles, columns: int) -> None:
        self.columns = columns
        self.program, self.roles, self.values = program, roles, list(values)
        self.random = torch.Generator().manual_seed(0x34613136)
        self._weight: Tensor | None = None
        if roles.index is not None:
            index = values[roles.index.leaf]
            drawn = torch.randperm(index.numel(), generator=self.random)
            self.values[roles.index.leaf] = self._like(
                drawn if roles.index.gives == "column" else drawn % roles.groups, index
            )

    def _like(self, drawn: Tensor, leaf: Tensor) -> Tensor:
        return drawn.reshape(leaf.shape).to(device=leaf.device, dtype=leaf.dtype)

    def integers(self, leaf: Tensor, low: int) -> Tensor:
        """Random words, or, for one value an element, random values low..low+15."""
        if low == PACKED:
            return _random_bits(leaf, self.random)
        return self._like(torch.randint(low, low + 16, (leaf.numel(),), generator=self.random, dtype=torch.int8), leaf)

    def scales(self, leaf: Tensor) -> Tensor:
        return self._like(
            torch.tensor(_SCALES)[torch.randint(len(_SCALES), (leaf.numel(),), generator=self.random)], leaf
        )

    def draw(self, **leaves: Tensor) -> None:
        """Puts these tensors in the place of the leaves with these roles."""
        for role, value in leaves.items():
            self.values[getattr(self.roles, role)] = value
        self._weight = None

    def weight(self) -> Tensor:
        """[N, K] for the leaves drawn; the cone is run once a draw."""
        if self._weight is None:
            self._weight = self.program.run(self.values)
        return self._weight


PACKED = -(1 << 20)
"""As a lowest value: the integers are words of packed nibbles."""


def _random_bits(leaf: Tensor, random: torch.Generator) -> Tensor:
    size = leaf.numel() * leaf.dtype.itemsize
    drawn = torch.randint(-(1 << 63), (1 << 63) - 1, (size // 8 + 1,), generator=random).view(torch.uint8)[:size]
    return drawn.view(leaf.dtype).reshape(leaf.shape).to(leaf.device)


def recognise(program: Computes, values: Sequence[Tensor], N: int, K: int, experts: int = 1) -> Reading | Mxfp4Reading:
    """The reading of a cone that computes [N, K], the rows of all experts if there are several. ``values`` are the
    leaves' stored tensors, of which only shapes, dtypes, tables and integer ranges are used.

    Raises NotRecognised.
    """
    if N == 0 or K == 0:
        raise NotRecognised(f"it is empty: [{N}, {K}]")
    attempts = list(roles(values, N, K, experts)) if K % 8 == 0 else []
    for attempt in attempts:
        reading = _read(Probe(program, values, attempt, K), N, K)
        if reading is not None:
            return reading
    mxfp4 = read_mxfp4(program, values, N, K, experts)
    if isinstance(mxfp4, Mxfp4Reading):
        return mxfp4
    if K % 8:
        raise NotRecognised(mxfp4 or f"its K={K} is no multiple of 8")
    if mxfp4 is not None and not attempts:
        raise NotRecognised(mxfp4)
    from inductor_ext.patterns.diagnose import diagnose  # only refusals need it

    raise NotRecognised(diagnose(program, values, attempts, N, K))


def roles(values: Sequence[Tensor], N: int, K: int, experts: int = 1) -> Iterator[Roles]:
    """The assignments of roles to leaves that sizes and value ranges allow."""
    if any(v.dtype == torch.float8_e8m0fnu for v in values):
        return  # which no int4 weight has
    integers = [i for i, v in enumerate(values) if not v.dtype.is_floating_point]
    floats = [i for i, v in enumerate(values) if v.dtype.is_floating_point]
    for codes in (
        i for i in integers if any(matrices(i, values[i], N, K, experts)) and code_range(values[i], N * K) is not None
    ):
        for scales in floats:
            groups = max(1, values[scales].numel() // N)
            if K % groups or not any(matrices(scales, values[scales], N, groups, experts)):
                continue
            rest = [i for i in (*integers, *floats) if i not in (codes, scales)]
            index = next((found for i in rest if (found := _index(i, values[i], K, groups)) is not None), None)
            taken = None if index is None else index.leaf
            zeros = [i for i in rest if i != taken and any(matrices(i, values[i], N, groups, experts))]
            if set(floats) - {scales} <= set(zeros):
                for zero in sorted(zeros, key=lambda i: -values[i].numel()):
                    if set(floats) <= {scales, zero}:
                        yield Roles(codes, scales, zero, index, groups, experts)
                if set(floats) == {scales}:
                    yield Roles(codes, scales, None, index, groups, experts)


def _index(leaf: int, value: Tensor, K: int, groups: int) -> Index | None:
    if value.dtype.is_floating_point or value.numel() != K or value.dim() != 1:
        return None
    lowest, highest = (int(v) for v in value.aminmax())
    if lowest >= 0 and highest < groups:
        return Index(leaf, "group")
    return Index(leaf, "column") if lowest == 0 and highest == K - 1 else None


def code_range(value: Tensor, elements: int) -> int | None:
    """The value of the lowest code: PACKED for words, 0 or -8 for a code an element, None if its integers are beyond 4
    bits."""
    if value.numel() != elements:
        return PACKED
    lowest, highest = (int(v) for v in value.aminmax())
    return 0 if lowest >= 0 and highest <= 15 else -8 if lowest >= -8 and highest <= 7 else None


def neutral_zeros(leaf: Tensor, elements: int) -> Tensor:
    """Zeros that are the same for every group: nibbles of 8 in words, else 1 (integers) or 0 (floats)."""
    if leaf.dtype.is_floating_point:
        return torch.zeros_like(leaf)
    if leaf.numel() in (1, elements):
        return torch.ones_like(leaf)
    words = torch.full((leaf.numel() * leaf.dtype.itemsize,), 0x88, dtype=torch.uint8)
    return words.view(leaf.dtype).reshape(leaf.shape).to(leaf.device)


class _Samples:
    """Random positions of an [N, K] weight, or all of them if it is small."""

    def __init__(self, probe: Probe, N: int, K: int, device: torch.device) -> None:
        flat = torch.arange(N * K) if N * K <= _SAMPLES else torch.randint(N * K, (_SAMPLES,), generator=probe.random)
        self.n, self.k = (flat // K).to(device), (flat % K).to(device)

    def columns(self, probe: Probe, index: Index | None, groups: int) -> tuple[Tensor, Tensor]:
        """For each position: the stored column and the group, under this index."""
        size = probe.columns // groups
        if index is None:
            return self.k, self.k // size
        given = probe.values[index.leaf].reshape(-1).long()[self.k]
        return (self.k, given) if index.gives == "group" else (given, given // size)


def _read(probe: Probe, N: int, K: int) -> Reading | None:
    """The reading under this assignment of roles, or None."""
    r, values = probe.roles, probe.values
    low = code_range(values[r.codes], N * K)
    assert low is not None
    probe.draw(codes=probe.integers(values[r.codes], low), scales=probe.scales(values[r.scales]))
    if r.zeros is not None:
        probe.draw(zeros=neutral_zeros(values[r.zeros], N * r.groups))
    weight = probe.weight()
    at = _Samples(probe, N, K, weight.device)
    w = weight[at.n, at.k].float()
    for scales, index in _scale_maps(probe, at, w, N, K):
        column, group = at.columns(probe, index, r.groups)
        v = w / scales.sample(values[r.scales], N, r.groups, at.n, group)
        for codes, base in _code_maps(probe, at, column, v, N, K, low):
            for zeros in _zero_maps(probe, at, Reading(N, K, r.groups, codes, scales, Zeros(base), index)):
                reading = Reading(N, K, r.groups, codes, scales, zeros, index)
                if _agrees(probe, reading):
                    return reading
    return None


def _scale_maps(probe: Probe, at: _Samples, w: Tensor, N: int, K: int) -> Iterator[tuple[Matrix, Index | None]]:
    """Where the scales are and how k finds its group, such that W / scale is a whole number (or a half) in reach of
    codes minus zeros."""
    r, leaf = probe.roles, probe.values[probe.roles.scales]
    for index in dict.fromkeys((r.index, None)):
        _, group = at.columns(probe, index, r.groups)
        for scales in matrices(r.scales, leaf, N, r.groups, r.experts):
            v = w / scales.sample(leaf, N, r.groups, at.n, group)
            if bool((2 * v == (2 * v).round()).all()) and bool((v.abs() <= 40).all()):
                yield scales, index


def _code_maps(
    probe: Probe, at: _Samples, column: Tensor, v: Tensor, N: int, K: int, low: int
) -> Iterator[tuple[Codes, float]]:
    """Where the codes are, such that v = code - base; base is the constant zero, or what neutral zeros amount to."""
    leaf = probe.values[probe.roles.codes]
    for matrix in matrices(probe.roles.codes, leaf, N, K, probe.roles.experts):
        raw = matrix.sample(leaf, N, K, at.n, column).long() - (0 if matrix.order is not None else low)
        for book, table in CODE_BOOKS.items():
            base = torch.tensor(table, device=raw.device)[raw] - v
            if bool((base == base[0]).all()):
                yield Codes(matrix, book, 0 if matrix.order is not None else low), float(base[0])


def _zero_maps(probe: Probe, at: _Samples, known: Reading) -> Iterator[Zeros]:
    """Where the zeros are, by a second probe in which every stored tensor is random."""
    r, values = probe.roles, probe.values
    if r.zeros is None:
        yield known.zeros
        return
    N, K, groups = known.N, known.K, known.groups
    old = values[r.zeros]
    if old.dtype.is_floating_point:
        drawn = probe.integers(old, 0)
    else:
        drawn = probe.integers(old, known.codes.low if old.numel() in (1, N * groups) else PACKED)
    probe.draw(zeros=drawn)
    w = probe.weight()[at.n, at.k].float()
    column, group = at.columns(probe, known.index, groups)
    s = known.scales.sample(values[r.scales], N, groups, at.n, group).float()
    matrix, low = known.codes.matrix, known.codes.low
    raw = matrix.sample(values[r.codes], N, K, at.n, column).long() - low
    code = torch.tensor(CODE_BOOKS[known.codes.book], device=raw.device)[raw]
    for m in matrices(r.zeros, drawn, N, groups, r.experts):
        base: float | Tensor
        z = m.sample(drawn, N, groups, at.n, group)
        if drawn.dtype.is_floating_point:
            base, z = known.zeros.base, z.float()
            for sign in (1, -1):
                if torch.equal((code - base - sign * z) * s, w):
                    yield Zeros(base, m, sign=sign)
                if torch.equal((code - base) * s - sign * z, w):
                    yield Zeros(base, m, sign=sign, shift=True)
            continue
        for convention, table in ZERO_CONVENTIONS.items():
            stored = torch.tensor(table, device=z.device)[z.long()] if m.order is not None else z.long()
            base = code - w / s - stored
            if bool((base == base[0]).all()):
                yield Zeros(float(base[0]), m, convention)


def _agrees(probe: Probe, reading: Reading) -> bool:
    """Whether the reading gives what the cone gives, everywhere, on the random tensors last drawn."""
    try:
        canonical = reading.canonical(probe.values)
    except NotCanonical:
        return False
    weight = probe.weight().contiguous()
    return all(bool(block.dequantize().sub_(weight[rows]).abs_().max() < 1e-3) for rows, block in canonical.blocks())
