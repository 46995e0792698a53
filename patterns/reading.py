"""Readings: which stored tensor holds what of a weight, and where. Plain data; ``canonical`` turns stored tensors into
the canonical form."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from inductor_ext.formats import (
    BIT_ORDERS,
    CODE_BOOKS,
    SEQUENTIAL,
    ZERO_CONVENTIONS,
    BitOrder,
    PackedInt4,
    nibbles_per_word,
)


class NotCanonical(Exception):
    """Why stored values have no canonical form, though their layout is known. The message is a sentence."""


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Where an [N, cols] matrix stands in a leaf: cols is K for codes, the number of groups for scales and zeros."""

    leaf: int
    transposed: bool
    """Stored as [cols, N]."""
    order: BitOrder | None = None
    """How words hold 4-bit values; None: a value an element."""
    dim: int = 1
    """The packed dimension of the stored matrix."""
    broadcast: bool = False
    """One value for the whole matrix."""
    experts: int = 1
    """The leaf holds so many matrices, one after the other; their rows together are the N rows."""

    def _stored(self, N: int, cols: int) -> tuple[int, int]:
        """The stored matrix's shape in values. A packed dimension may be padded up to whole words."""
        shape = [cols, N] if self.transposed else [N, cols]
        if self.order is not None and self.order.block == 0:
            shape[self.dim] += -shape[self.dim] % len(self.order.order)
        return shape[0], shape[1]

    def fits(self, leaf: Tensor, N: int, cols: int) -> bool:
        rows, columns = self._stored(N // self.experts, cols)
        values = self.experts * rows * columns
        if self.order is None:
            return leaf.numel() == (1 if self.broadcast else values)
        whole = self.order.fits((rows, columns)[self.dim]) and nibbles_per_word(leaf.dtype) == len(self.order.order)
        return whole and leaf.numel() * len(self.order.order) == values

    def read(self, leaf: Tensor, N: int, cols: int) -> Tensor:
        """[N, cols]: uint8 nibbles if packed, else the leaf's own values, as a view where that is possible."""
        if self.experts > 1:
            each = dataclasses.replace(self, experts=1)
            return torch.cat([each.read(part, N // self.experts, cols) for part in leaf.reshape(self.experts, -1)])
        rows, columns = self._stored(N, cols)
        if self.broadcast:
            return leaf.reshape(1, 1).expand(N, cols)
        order = self.order
        stored = leaf.reshape(rows, columns) if order is None else order.unpack(leaf, self.dim, rows, columns)
        return stored.t()[:N, :cols] if self.transposed else stored[:N, :cols]

    def write(self, values: Tensor, leaf: Tensor) -> Tensor:
        """The inverse of ``read``: a new leaf like this one from [N, cols] nibbles (if packed) or values."""
        if self.experts > 1:
            each, part = dataclasses.replace(self, experts=1), leaf.reshape(self.experts, -1)[0]
            return torch.stack([each.write(v, part) for v in values.chunk(self.experts)]).reshape(leaf.shape)
        stored = values.t() if self.transposed else values
        if self.order is not None:
            return self.order.pack(stored, self.dim, leaf.dtype).reshape(leaf.shape)
        return stored.reshape(leaf.shape).to(leaf.dtype)

    def sample(self, leaf: Tensor, N: int, cols: int, n: Tensor, c: Tensor) -> Tensor:
        """The values at positions (n[i], c[i]) alone."""
        rows, columns = self._stored(N // self.experts, cols)
        if self.broadcast:
            return leaf.reshape(-1).expand(n.numel())
        expert, n = n // (N // self.experts), n % (N // self.experts)
        r, c = (c, n) if self.transposed else (n, c)
        first = expert * (leaf.numel() // self.experts)
        if self.order is None:
            return leaf.reshape(-1)[first + r * columns + c]
        return self.order.gather(leaf, self.dim, rows, columns, r, c, first)


def matrices(leaf: int, value: Tensor, N: int, cols: int, experts: int = 1) -> Iterator[Matrix]:
    """Every layout in which this leaf could hold an [N, cols] matrix, or one for each expert, likelier ones first."""
    packed = BIT_ORDERS.get(value.dtype, ())
    candidates = [
        Matrix(leaf, transposed, order, dim) for order in packed for transposed in (False, True) for dim in (1, 0)
    ]
    candidates += [Matrix(leaf, False), Matrix(leaf, True), Matrix(leaf, False, broadcast=True)]
    for m in candidates:
        # Rows that are stored one after the other are so over all experts: to read them in one go costs no copy.
        apart = m.transposed or (m.order is not None and m.dim == 0)
        m = dataclasses.replace(m, experts=experts if apart else 1)
        if m.fits(value, N, cols):
            yield m


@dataclasses.dataclass(frozen=True)
class Codes:
    matrix: Matrix
    book: str
    """A name in CODE_BOOKS: what a stored nibble means."""
    low: int
    """Of codes stored one an integer: the value that stands for nibble 0."""

    def read(self, leaf: Tensor, N: int, K: int) -> Tensor:
        """uint8 [N, K] in 0..15. Raises NotCanonical if the integers do not fit 4 bits."""
        raw = self.matrix.read(leaf, N, K)
        if self.matrix.order is None:
            lowest, highest = (int(v) for v in raw.aminmax())
            if lowest < self.low or highest > self.low + 15:
                raise NotCanonical(f"its stored integers go from {lowest} to {highest}, which is beyond 4 bits")
            raw = (raw - self.low).to(torch.uint8)
        return raw if self.book == "offset binary" else _look_up(CODE_BOOKS[self.book], raw)

    def write(self, codes: Tensor, leaf: Tensor) -> Tensor:
        """The inverse of ``read``: a new leaf like this one from uint8 [N, K]."""
        book = CODE_BOOKS[self.book]
        raw = codes if self.book == "offset binary" else _look_up(tuple(book.index(code) for code in range(16)), codes)
        return self.matrix.write(raw if self.matrix.order is not None else raw.to(torch.int32) + self.low, leaf)


@dataclasses.dataclass(frozen=True)
class Zeros:
    """The zero of a group: a constant; base + table[nibble]; base + sign * value; or base + sign * value / scale (an
    added shift)."""

    base: float
    matrix: Matrix | None = None
    convention: str = "stored"
    """A name in ZERO_CONVENTIONS, of packed zeros."""
    sign: int = 1
    shift: bool = False

    def read(self, leaves: Sequence[Tensor], scales: Tensor, N: int, groups: int) -> Tensor | None:
        """None (constant 8), uint8 [N, groups] in 0..16, or a float tensor. Raises NotCanonical for an integer outside
        0..16."""
        if self.matrix is None:
            if self.base == 8:
                return None
            zeros = torch.full((N, groups), self.base, device=scales.device)
            if self.base != int(self.base):
                return zeros
        else:
            leaf = leaves[self.matrix.leaf]
            raw = self.matrix.read(leaf, N, groups)
            if leaf.dtype.is_floating_point:
                if self.base == 0 and self.sign == 1 and not self.shift:
                    return raw
                wide = raw.float() / scales.float() if self.shift else raw.float()
                return self.base + self.sign * wide
            zeros = _look_up(ZERO_CONVENTIONS[self.convention], raw) if self.matrix.order is not None else raw
            zeros = zeros.to(torch.int32) + int(self.base)
        lowest, highest = (int(v) for v in zeros.aminmax())
        if lowest < 0 or highest > 16:
            raise NotCanonical(f"its zeros go from {lowest} to {highest}; 0 to 16 is what the canonical form holds")
        return zeros.to(torch.uint8)


def _look_up(table: tuple[int, ...], index: Tensor) -> Tensor:
    return torch.tensor(table, dtype=torch.uint8, device=index.device)[index.int()]


@dataclasses.dataclass(frozen=True)
class Index:
    """An int [K] leaf of act-order checkpoints."""

    leaf: int
    gives: str
    """"group": of each k (GPTQ's and compressed-tensors' g_idx); "column": where each k is stored, groups being runs of
    the stored columns."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a weight [N, K] is stored in a cone's leaves."""

    N: int
    K: int
    groups: int
    codes: Codes
    scales: Matrix
    zeros: Zeros
    index: Index | None

    @property
    def group_size(self) -> int:
        return self.K // self.groups

    def canonical(self, leaves: Sequence[Tensor]) -> PackedInt4:
        """The canonical form of these stored tensors; parts that are canonical already are views of them. Raises
        NotCanonical."""
        N, K = self.N, self.K
        scales = self.scales.read(leaves[self.scales.leaf], N, self.groups).contiguous()
        zeros = self.zeros.read(leaves, scales, N, self.groups)
        zeros = None if zeros is None else zeros.contiguous()
        if self.index is not None and self.index.gives == "column":
            order = _permutation(leaves[self.index.leaf])
            return PackedInt4(
                SEQUENTIAL.pack(self.codes.read(leaves[self.codes.matrix.leaf], N, K), 1), scales, zeros, order
            )
        perm = None if self.index is None else _by_group(leaves[self.index.leaf], self.groups)
        leaf, codes = leaves[self.codes.matrix.leaf], self.codes
        if (
            perm is None
            and codes == Codes(Matrix(codes.matrix.leaf, False, SEQUENTIAL), "offset binary", 0)
            and leaf.is_contiguous()
        ):
            return PackedInt4(leaf.detach().view(torch.int32).view(N, K // 8), scales, zeros)
        nibbles = codes.read(leaf, N, K)
        if perm is None:
            return PackedInt4(SEQUENTIAL.pack(nibbles, 1), scales, zeros)
        order = torch.empty_like(perm).scatter_(0, perm, torch.arange(K, device=perm.device)).int()
        return PackedInt4(SEQUENTIAL.pack(nibbles.index_select(1, perm), 1), scales, zeros, order)


def _by_group(index: Tensor, groups: int) -> Tensor | None:
    """int64 [K]: the logical k at each stored column once groups are contiguous; None if they are already."""
    index = index.reshape(-1).long()
    K = index.numel()
    if bool((index == torch.arange(K, device=index.device) // (K // groups)).all()):
        return None
    if bool((index < 0).any()) or bool((torch.bincount(index, minlength=groups) != K // groups).any()):
        raise NotCanonical(
            f"its group index gives groups of unequal size; each must have {K // groups} of the {K} columns"
        )
    return torch.argsort(index, stable=True)


def _permutation(index: Tensor) -> Tensor:
    index = index.reshape(-1)
    if not torch.equal(index.sort().values.long(), torch.arange(index.numel(), device=index.device)):
        raise NotCanonical("its column index is no permutation")
    return index.int()
