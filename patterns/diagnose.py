"""Why a cone was not recognised: a few more probes, read for a sentence that tells the user what is unusual about the
weight."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from inductor_ext.patterns.cone import Computes
from inductor_ext.patterns.recognise import PACKED, Probe, Roles, code_range, neutral_zeros
from torch import Tensor


def diagnose(program: Computes, values: Sequence[Tensor], attempts: Sequence[Roles], N: int, K: int) -> str:
    if not attempts:
        return _no_roles(values, N, K)
    for attempt in attempts:
        probe = Probe(program, values, attempt, K)
        if attempt.zeros is not None:
            probe.draw(zeros=neutral_zeros(values[attempt.zeros], N * attempt.groups))
        book = _code_book(probe, N, K)
        if len(set(book)) > 1:  # else these are other roles than the leaves have: the codes do not show
            break
    return _uneven(book) or _not_affine(book) or _zeros(probe, N, K) or _groups(probe, N, K) or (
        "which code lands where follows no bit order that is known (inductor_ext.formats.BIT_ORDERS)"
    )  # fmt: skip


def _no_roles(values: Sequence[Tensor], N: int, K: int) -> str:
    def shapes(leaves: list[Tensor]) -> str:
        return ", ".join(f"{str(v.dtype).removeprefix('torch.')} {list(v.shape)}" for v in leaves)

    integers = [v for v in values if not v.dtype.is_floating_point]
    floats = [v for v in values if v.dtype.is_floating_point]
    for v in integers:
        if v.numel() == N * K and code_range(v, N * K) is None:
            lowest, highest = (int(b) for b in v.aminmax())
            return f"its stored integers go from {lowest} to {highest}, which is beyond 4 bits"
    if not any(v.numel() * v.dtype.itemsize * 2 == N * K or v.numel() == N * K for v in integers):
        return (
            f"no stored integer tensor has the size of {N} x {K} codes of 4 bits: there is {shapes(integers)}"
            " (another bit width, or scales embedded in the bytes)"
        )
    if not floats:
        return "no scale takes part before the matmul; a scale applied to the result is not looked for"
    return (
        f"its computation from {shapes(integers)} and {shapes(floats)} is not codes with one scale and one zero"
        " a group: another tensor takes part, or the scales have no layout that is known"
    )


def _constant_codes(probe: Probe, code: int, N: int, K: int) -> Tensor:
    leaf = probe.values[probe.roles.codes]
    low = code_range(leaf, N * K)
    if low in (0, -8):
        return torch.full_like(leaf, low + code)
    words = torch.full((leaf.numel() * leaf.dtype.itemsize,), code * 17, dtype=torch.uint8)
    return words.view(leaf.dtype).reshape(leaf.shape).to(leaf.device)


def _code_book(probe: Probe, N: int, K: int) -> list[tuple[float, float]]:
    """All codes equal, all scales 1: the lowest and highest element of the weight, for each of the 16 codes."""
    probe.draw(scales=torch.ones_like(probe.values[probe.roles.scales]))
    book = []
    for code in range(16):
        probe.draw(codes=_constant_codes(probe, code, N, K))
        lowest, highest = (float(v) for v in probe.weight().float().aminmax())
        book.append((lowest, highest))
    return book


def _uneven(book: list[tuple[float, float]]) -> str | None:
    for code, (lowest, highest) in enumerate(book):
        if lowest != highest:
            where = f"{lowest:g} here, {highest:g} there, under equal scales and zeros"
            return f"the value of code {code} depends on where it stands: {where}"
    return None


def _not_affine(book: list[tuple[float, float]]) -> str | None:
    values = sorted({lowest for lowest, _ in book})
    steps = {b - a for a, b in itertools.pairwise(values)}
    listed = ", ".join(f"{v:g}" for v, _ in book)
    if len(values) < 16 and steps <= {1.0}:
        return f"its codes are masked or clamped: the 16 codes give {len(values)} values ({listed})"
    if steps != {1.0}:
        return f"its code book is not affine: the 16 codes give {listed}"
    return None


def _zeros(probe: Probe, N: int, K: int) -> str | None:
    """A zero shifts the codes: the difference of two code values must not depend on it."""
    if probe.roles.zeros is None:
        return None
    leaf = probe.values[probe.roles.zeros]
    seen = []
    for zero in (leaf, leaf + 1):
        pair = []
        for code in (3, 4):
            probe.draw(zeros=zero, codes=_constant_codes(probe, code, N, K))
            pair.append(probe.weight())
        seen.append(pair[1] - pair[0])
    probe.draw(zeros=leaf)
    if not torch.equal(*seen):
        kind = f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
        return (
            f"the stored tensor {kind} scales the codes instead of shifting them:"
            " scales that are quantised themselves are not rewritten"
        )
    return None


def _groups(probe: Probe, N: int, K: int) -> str | None:
    """One code everywhere, random scales, then random zeros: each must be constant along a group of K."""
    size = K // probe.roles.groups
    index = None
    if probe.roles.index is not None and probe.roles.index.gives == "group":
        index = probe.values[probe.roles.index.leaf].reshape(-1).long()
    base = probe.values[probe.roles.codes]
    probe.draw(codes=_constant_codes(probe, 15, N, K))
    for role, what in (("scales", "scale"), ("zeros", "zero")):
        if getattr(probe.roles, role) is None:
            continue
        leaf = probe.values[getattr(probe.roles, role)]
        elements = N * probe.roles.groups
        if role == "zeros" and not leaf.dtype.is_floating_point and leaf.numel() not in (1, elements):
            drawn = probe.integers(leaf, PACKED)
        else:
            drawn = probe.scales(leaf) if role == "scales" else probe.integers(leaf, 0)
        probe.draw(**{role: drawn})
        weight = probe.weight() if index is None else probe.weight()[:, torch.argsort(index, stable=True)]
        grouped = weight.reshape(N, probe.roles.groups, size)
        varies = not torch.equal(grouped, grouped[:, :, :1].expand_as(grouped))
        probe.draw(**{role: leaf})
        if varies:
            probe.draw(codes=base)
            return (
                f"the {what} changes inside a run of {size} values along K:"
                " its groups do not lie along K, or are of another size"
            )
    return None
