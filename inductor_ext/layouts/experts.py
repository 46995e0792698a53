"""The canonical form of a layer's experts, and what layouts may refuse about it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from inductor_ext.formats import ZERO_CONVENTIONS, PackedInt, packed_int


@dataclasses.dataclass(frozen=True)
class Experts:
    """Weights [N, K] of E experts in the canonical form: ``PackedInt4`` or ``PackedInt8``, with E in front of each
    tensor. A dense layer is one expert.

    codes: int32 [E, N, K/8], or uint8 [E, N, K] of 8 bits. scales: [E, N, K/G], float. zeros: None (every zero is 8, or
    128), uint8 [E, N, K/G] holding 0..16 (of 8 bits: int16 holding 0..256), or float. order: None, or int32 [E, K]:
    expert e's logical k is stored at column order[e, k]. bias: None, or float [E, N].
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    order: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        allowed = "int32 [E, N, K/8] or uint8 [E, N, K]"
        need(self.codes.dim() == 3, "codes", allowed, shape(self.codes))
        need(self.codes.dtype in (torch.int32, torch.uint8), "codes", allowed, self.codes.dtype)
        E, N, K = self.E, self.N, self.K
        groups = self.scales.shape[-1]
        need(
            self.scales.dim() == 3 and self.scales.shape[:2] == (E, N), "scales", f"[{E}, {N}, K/G]", shape(self.scales)
        )
        need(self.scales.is_floating_point(), "scales", "floats", self.scales.dtype)
        need(groups > 0 and K % groups == 0, "scales", f"for groups that divide K={K}", f"for {groups} groups")
        if self.zeros is not None:
            need(self.zeros.shape == self.scales.shape, "zeros", shape(self.scales), shape(self.zeros))
            whole = torch.uint8 if self.bits == 4 else torch.int16
            known = self.zeros.dtype == whole or self.zeros.is_floating_point()
            need(known, "zeros", f"{str(whole).removeprefix('torch.')} or floats", self.zeros.dtype)
        if self.order is not None:
            need(self.order.shape == (E, K), "order", f"int32 [{E}, {K}]", shape(self.order))
            need(self.order.dtype == torch.int32, "order", f"int32 [{E}, {K}]", self.order.dtype)
        if self.bias is not None:
            need(self.bias.shape == (E, N), "bias", f"[{E}, {N}]", shape(self.bias))

    @property
    def E(self) -> int:
        return self.codes.shape[0]

    @property
    def N(self) -> int:
        return self.codes.shape[1]

    @property
    def K(self) -> int:
        return self.codes.shape[2] * self.per_element

    @property
    def bits(self) -> int:
        return 4 if self.codes.dtype == torch.int32 else 8

    @property
    def per_element(self) -> int:
        """How many codes an element of ``codes`` has."""
        return 8 if self.bits == 4 else 1

    @property
    def group_size(self) -> int:
        return self.K // self.scales.shape[2]

    def expert(self, e: int) -> PackedInt:
        zeros, order = (None if t is None else t[e] for t in (self.zeros, self.order))
        return packed_int(self.codes[e], self.scales[e], zeros, order)

    def joined(self) -> PackedInt:
        """The rows of all experts, one expert after the other: what a kernel's ``pack`` takes. There is no order."""
        none(self, "order")
        zeros = None if self.zeros is None else self.zeros.flatten(0, 1)
        return packed_int(self.codes.flatten(0, 1), self.scales.flatten(0, 1), zeros)


def parted(weight: PackedInt, experts: int) -> Experts:
    """The rows of all experts as experts: the inverse of ``joined``."""

    def part(t: Tensor) -> Tensor:
        parts: Tensor = t.unflatten(0, (experts, -1))
        return parts

    zeros = None if weight.zeros is None else part(weight.zeros)
    return Experts(part(weight.codes), part(weight.scales), zeros)


# -- what layouts may refuse -------------------------------------------------------------------------------------------


def need(ok: bool, name: str, needed: object, found: object) -> None:
    if not ok:
        raise ValueError(f"{name} must be {needed}, not {found}.")


def shape(t: Tensor) -> list[int]:
    return list(t.shape)


def none(weight: Experts, *names: str) -> None:
    """Refuses what a layout has no place for."""
    for name in names:
        value = getattr(weight, name)
        if value is not None:
            raise ValueError(f"{name} must be None, for which alone the layout has a place; got {shape(value)}.")


def four_bits(weight: Experts) -> None:
    need(weight.bits == 4, "codes", "of 4 bits", "of 8")


def scale_dtypes(weight: Experts, *dtypes: torch.dtype) -> None:
    need(weight.scales.dtype in dtypes, "scales", " or ".join(str(d) for d in dtypes), weight.scales.dtype)


def tiles(weight: Experts, N: int, K: int) -> None:
    """Refuses weights that are not whole tiles."""
    for name, size, unit in (("N", weight.N, N), ("K", weight.K, K)):
        need(size % unit == 0, name, f"a multiple of {unit} (adjust.filled makes it one)", size)


def to_nibbles(zeros: Tensor, convention: str) -> Tensor:
    """uint8: what is stored for each zero. Refuses zeros that the convention has no nibble for."""
    need(zeros.dtype == torch.uint8, "zeros", "integers (uint8)", zeros.dtype)
    allowed = ZERO_CONVENTIONS[convention]
    low, high = min(allowed), max(allowed)
    least, most = (int(t) for t in zeros.aminmax())
    need(low <= least and most <= high, "zeros", f"within {low}..{high}", f"within {least}..{most}")
    stored = [allowed.index(zero) if zero in allowed else 0 for zero in range(high + 1)]
    return torch.tensor(stored, dtype=torch.uint8, device=zeros.device)[zeros.int()]


def from_nibbles(stored: Tensor, convention: str) -> Tensor:
    """uint8: the zeros, of which the convention stored these."""
    table = torch.tensor(ZERO_CONVENTIONS[convention], dtype=torch.uint8, device=stored.device)
    return table[stored.int()]
