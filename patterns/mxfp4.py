"""MXFP4 weights, recognised by meaning: codes of a fixed code book, each run of 32 along K times a power of two.

One probe: random codes, and scale bytes drawn from a range in which every product is exact down to float16. A reading
is right if the cone then gives what the format says, everywhere. How the cone gets there (a look-up, ldexp, exp2, bits
shifted into an exponent, slices written, a transpose) does not show.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from inductor_ext.patterns.cone import Computes
from inductor_ext.patterns.reading import Codes, Matrix, matrices
from torch import Tensor

from inductor_ext.formats import E2M1, MXFP4_GROUP, PAIRS, SEQUENTIAL, PackedMxfp4

_BIAS = 127
_NEAR = 7
"""Exponents -7..7 are drawn: with a code's exponent and mantissa that fits every float."""


@dataclasses.dataclass(frozen=True)
class Mxfp4Reading:
    """How an MXFP4 weight [N, K] is stored in a cone's leaves."""

    N: int
    K: int
    codes: Codes
    scales: Matrix
    bias: int
    """What a stored scale is above the exponent: 127, or 0 where exponents are stored as they are."""

    group_size = MXFP4_GROUP

    @property
    def groups(self) -> int:
        return -(-self.K // MXFP4_GROUP)

    def canonical(self, leaves: Sequence[Tensor]) -> PackedMxfp4:
        """The canonical form of these stored tensors; parts that are canonical already are views of them. An exponent
        that no byte stands for gives another value, which the proof sees."""
        scales = self.scales.read(_bytes(leaves[self.scales.leaf]), self.N, self.groups)
        scales = (scales if self.bias == _BIAS else scales + (_BIAS - self.bias)).to(torch.uint8).contiguous()
        leaf, matrix = leaves[self.codes.matrix.leaf], self.codes.matrix
        as_it_is = matrix.order in (PAIRS, SEQUENTIAL) and matrix.dim == 1 and not matrix.transposed
        if as_it_is and leaf.is_contiguous() and leaf.numel() * leaf.dtype.itemsize * 2 == self.N * self.K:
            return PackedMxfp4(leaf.detach().view(torch.uint8).view(self.N, self.K // 2), scales)
        return PackedMxfp4(PAIRS.pack(self.codes.read(leaf, self.N, self.K), 1, torch.uint8), scales)


def read_mxfp4(program: Computes, values: Sequence[Tensor], N: int, K: int, experts: int) -> Mxfp4Reading | str | None:
    """The reading of a cone that computes [N, K]; why it has none, though it is stored as MXFP4 would be; or None if
    its stored tensors have other sizes."""
    if K % 2:
        return None
    why = None
    for codes, scales in _roles(values, N, K, experts):
        for bias in (_BIAS,) if _bytes(values[scales]).dtype == torch.uint8 else (0, _BIAS):
            found = _read(program, values, N, K, experts, codes, scales, bias)
            if isinstance(found, Mxfp4Reading):
                return found
            why = why or found
    return why


def _bytes(leaf: Tensor) -> Tensor:
    return leaf.view(torch.uint8) if leaf.dtype == torch.float8_e8m0fnu else leaf


def _roles(values: Sequence[Tensor], N: int, K: int, experts: int) -> Iterator[tuple[int, int]]:
    """Which leaf may hold the codes, and which the scales, by their sizes. Tables keep their stored values."""
    groups = -(-K // MXFP4_GROUP)
    whole = [i for i, v in enumerate(values) if not _bytes(v).dtype.is_floating_point]
    for codes in whole:
        if any(m.order is not None for m in matrices(codes, values[codes], N, K, experts)):
            for scales in whole:
                unpacked = _scale_layouts(scales, values[scales], N, groups, experts)
                if scales != codes and any(unpacked):
                    yield codes, scales


def _scale_layouts(leaf: int, value: Tensor, N: int, groups: int, experts: int) -> Iterator[Matrix]:
    found = matrices(leaf, _bytes(value), N, groups, experts)
    return (m for m in found if m.order is None and (not m.broadcast or N * groups == 1))


def _read(
    program: Computes, values: Sequence[Tensor], N: int, K: int, experts: int, codes: int, scales: int, bias: int
) -> Mxfp4Reading | str:
    random, drawn = torch.Generator().manual_seed(0x6D786634), list(values)
    drawn[codes] = _random_bytes(values[codes], random)
    exponents = torch.randint(-_NEAR, _NEAR + 1, (values[scales].numel(),), generator=random)
    whole = _bytes(values[scales])
    stored = (exponents + bias).to(device=whole.device, dtype=whole.dtype).reshape(whole.shape)
    drawn[scales] = stored.view(values[scales].dtype)
    weight = program.run(drawn).contiguous()
    if tuple(weight.shape) != (N, K):
        return f"it is {list(weight.shape)}, not [{N}, {K}]"
    groups = -(-K // MXFP4_GROUP)
    for scale in _scale_layouts(scales, values[scales], N, groups, experts):
        for matrix in matrices(codes, values[codes], N, K, experts):
            if matrix.order is not None:
                reading = Mxfp4Reading(N, K, Codes(matrix, "offset binary", 0), scale, bias)
                if _agrees(weight, reading, drawn):
                    return reading
    return _why(program, drawn, codes, scales, bias)


def _random_bytes(leaf: Tensor, random: torch.Generator) -> Tensor:
    size = leaf.numel() * leaf.dtype.itemsize
    drawn = torch.randint(256, (size,), generator=random, dtype=torch.uint8)
    return drawn.view(leaf.dtype).reshape(leaf.shape).to(leaf.device)


def _agrees(weight: Tensor, reading: Mxfp4Reading, drawn: Sequence[Tensor]) -> bool:
    """Tried on a few rows first, for most layouts are wrong: those are wrong there."""
    N, K, groups = reading.N, reading.K, reading.groups
    n = torch.arange(min(N, 4), device=weight.device).repeat_interleave(K) * (max(1, N - 1) // max(1, min(N, 4) - 1))
    k = torch.arange(K, device=weight.device).repeat(min(N, 4))
    code = reading.codes.matrix.sample(drawn[reading.codes.matrix.leaf], N, K, n, k).long()
    scale = reading.scales.sample(_bytes(drawn[reading.scales.leaf]), N, groups, n, k // MXFP4_GROUP)
    value = torch.tensor(E2M1, dtype=torch.float64, device=code.device)[code] * 2.0 ** (scale.double() - reading.bias)
    if not torch.equal(weight[n, k].double(), value):
        return False
    canonical = reading.canonical(drawn)
    return all(torch.equal(block.dequantize(), weight[rows].float()) for rows, block in canonical.blocks())


def _why(program: Computes, drawn: list[Tensor], codes: int, scales: int, bias: int) -> str:
    """One code everywhere under the scale 1, for each code: the code book."""
    drawn[scales] = torch.full_like(_bytes(drawn[scales]), bias).view(drawn[scales].dtype)
    book = []
    for code in range(16):
        filled = torch.full((drawn[codes].numel() * drawn[codes].dtype.itemsize,), code * 17, dtype=torch.uint8)
        drawn[codes] = filled.view(drawn[codes].dtype).reshape(drawn[codes].shape).to(drawn[codes].device)
        lowest, highest = (float(v) for v in program.run(drawn).float().aminmax())
        if lowest != highest:
            return f"the value of code {code} depends on where it stands, under equal scales"
        book.append(lowest)
    if tuple(book) != E2M1:
        return f"its code book is not that of MXFP4 (e2m1): the 16 codes give {', '.join(f'{v:g}' for v in book)}"
    return (
        "its codes are MXFP4's, but its scales are not a power of two, by a byte, for each 32 neighbours along K; or"
        " which code lands where follows no bit order that is known (inductor_ext.formats.BIT_ORDERS)"
    )
