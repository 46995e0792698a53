"""The canonical forms of int4, int8 and MXFP4 weights, and the one table of bit orders and zero conventions from which
every conversion is derived.

Vocabulary: a *code* is a stored value of 4 bits (0..15) or 8, a *word* the integer that holds several codes, a *group*
a run of K that shares one scale and one zero. Codes are numbered within a word from the low bits up, as in
compressed-tensors, GPTQ and AWQ checkpoints.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import ClassVar, Self

import torch
from torch import Tensor

if sys.byteorder != "little":
    raise ImportError("inductor_ext reads packed words as little-endian bytes; this machine is big-endian.")


@dataclasses.dataclass(frozen=True)
class PackedInt:
    """A weight [N, K] of integer codes in groups: ``W[n, k] = (code[n, p] - zero[n, p // G]) * scale[n, p // G]`` with
    ``p = order[k]``. ``PackedInt4`` and ``PackedInt8`` say what the tensors are."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    order: Tensor | None = None

    ZERO: ClassVar[int]
    """Where there are no zeros."""

    @property
    def N(self) -> int:
        return self.codes.shape[0]

    @property
    def K(self) -> int:
        raise NotImplementedError

    @property
    def group_size(self) -> int:
        return self.K // self.scales.shape[1]

    def blocks(self, elements: int = 1 << 22) -> Iterator[tuple[slice, Self]]:
        """The weight cut by rows, as views; about so many elements each.

        By default large enough that the threads of an operation seldom have to wait for each other (on a busy machine
        each wait costs milliseconds), small enough that temporaries stay at a few MB.
        """
        step = max(1, elements // self.K)
        for start in range(0, self.N, step):
            rows = slice(start, start + step)
            zeros = None if self.zeros is None else self.zeros[rows]
            yield rows, type(self)(self.codes[rows], self.scales[rows], zeros, self.order)

    def stored_codes(self) -> Tensor:
        """uint8 [N, K]: the codes in storage order."""
        raise NotImplementedError

    def logical(self, stored: Tensor) -> Tensor:
        """A [N, K] tensor in storage order, brought into logical order."""
        return stored if self.order is None else stored.index_select(1, self.order.long())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] in ``dtype``: the exact value in float32 (float64 if asked for), rounded once."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if self.scales.dtype == dtype and (self.zeros is None or not self.zeros.is_floating_point()):
            wide = dtype  # which holds integers up to 256 and rounds their product with a scale once
        q = self.stored_codes().view(self.N, -1, self.group_size).to(wide)
        q.sub_(self.ZERO if self.zeros is None else self.zeros.to(wide).unsqueeze(-1))
        q.mul_(self.scales.to(wide).unsqueeze(-1))
        return self.logical(q.view(self.N, self.K)).to(dtype)


@dataclasses.dataclass(frozen=True)
class PackedInt4(PackedInt):
    """The canonical form of int4 weights.

    codes: int32 [N, K/8], nibble i (bits 4i..4i+3) of word j is the code at p = 8j + i: the compressed-tensors
    checkpoint as it is.
    scales: [N, K/G], in the checkpoint's own float dtype.
    zeros: None (every zero is 8), uint8 [N, K/G] holding 0..16 (16 exists: GPTQ's stored + 1), or a float tensor [N,
    K/G] (HQQ).
    order: None, or int32 [K], a permutation: logical k is stored at column order[k] (act-order checkpoints, groups made
    contiguous).
    """

    ZERO = 8

    @property
    def K(self) -> int:
        return self.codes.shape[1] * 8

    def stored_codes(self) -> Tensor:
        return SEQUENTIAL.unpack(self.codes, 1, self.N, self.K)


@dataclasses.dataclass(frozen=True)
class PackedInt8(PackedInt):
    """The canonical form of int8 weights.

    codes: uint8 [N, K], the code at p: the bytes of the compressed-tensors checkpoint's words [N, K/4], as they are.
    scales and order: as ``PackedInt4``.
    zeros: None (every zero is 128), int16 [N, K/G] holding 0..256 (GPTQ's stored + 1), or a float tensor [N, K/G].
    """

    ZERO = 128

    @property
    def K(self) -> int:
        return self.codes.shape[1]

    def stored_codes(self) -> Tensor:
        return self.codes


def packed_int(codes: Tensor, scales: Tensor, zeros: Tensor | None = None, order: Tensor | None = None) -> PackedInt:
    """The canonical form that these tensors are: codes of 8 bits are bytes, of 4 bits words."""
    return (PackedInt8 if codes.dtype == torch.uint8 else PackedInt4)(codes, scales, zeros, order)


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""MXFP4's code -> value (OCP Microscaling Formats 1.0): a sign, two bits of exponent, one of mantissa."""
MXFP4_GROUP = 32
"""Neighbours along K that share a scale, in MXFP4."""


@dataclasses.dataclass(frozen=True)
class PackedMxfp4:
    """MXFP4 weights [*, N, K] in the canonical form: ``W[n, k] = E2M1[code[n, k]] * 2 ** (scale[n, k // 32] - 127)``.

    codes: uint8 [*, N, K/2], the low nibble is the even k.
    scales: uint8 [*, N, ceil(K / 32)], exponents in e8m0: 255 is NaN. The last group may be short.
    """

    codes: Tensor
    scales: Tensor

    @property
    def N(self) -> int:
        return self.codes.shape[-2]

    @property
    def K(self) -> int:
        return self.codes.shape[-1] * 2

    @property
    def group_size(self) -> int:
        return MXFP4_GROUP

    def blocks(self, elements: int = 1 << 22) -> Iterator[tuple[slice, PackedMxfp4]]:
        """A weight [N, K] cut by rows, as ``PackedInt4.blocks``."""
        step = max(1, elements // self.K)
        for start in range(0, self.N, step):
            rows = slice(start, start + step)
            yield rows, PackedMxfp4(self.codes[rows], self.scales[rows])

    def stored_codes(self) -> Tensor:
        """uint8 [*, N, K]"""
        return torch.stack((self.codes & 15, self.codes >> 4), dim=-1).flatten(-2)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[*, N, K] in ``dtype``: the exact value, rounded once (a code is exact in float32, and so is its product with
        a power of two unless that overflows)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        values = torch.tensor(E2M1, dtype=wide, device=self.codes.device)[self.stored_codes().int()]
        scales = self.scales.view(torch.float8_e8m0fnu).to(torch.float32).to(wide).repeat_interleave(MXFP4_GROUP, -1)
        return values.mul_(scales[..., : self.K]).to(dtype)


Canonical = PackedInt4 | PackedMxfp4


@dataclasses.dataclass(frozen=True)
class BitOrder:
    """How a word of ``len(order)`` nibbles holds its codes: nibble i holds value ``order[i]`` of the word's run along
    the packed axis.

    ``block`` says which values form a word. The packed axis is cut into blocks; with p nibbles a word and a block of L
    values, the word j of a block holds values j, j + L/p, j + 2L/p, ... So block = 0 (meaning p) is the usual run of p
    neighbours, and block = -1 (the whole axis) is "halves": for bytes, one nibble from the first half of the axis and
    one from the second.
    """

    name: str
    order: tuple[int, ...]
    block: int = 0

    def _block(self, length: int) -> int:
        return {0: len(self.order), -1: length}.get(self.block, self.block)

    def fits(self, length: int) -> bool:
        """Whether an axis of this many values can be packed so."""
        block = self._block(length)
        return length % block == 0 and block % len(self.order) == 0

    def unpack(self, words: Tensor, dim: int, rows: int, cols: int) -> Tensor:
        """uint8 [rows, cols] from integer words packed along ``dim`` of that matrix; the words' own shape is not looked
        at."""
        p = len(self.order)
        pairs = words.contiguous().view(-1).view(torch.uint8)
        nibbles = torch.stack((pairs & 15, pairs >> 4), dim=-1).view(-1, p)
        if self.order != tuple(range(p)):
            # Not an index by a list, which would be a tensor on the CPU in a graph for another device.
            nibbles = torch.stack([nibbles[:, i] for i in _inverse(self.order)], dim=-1)
        if dim == 1:
            block = self._block(cols)
            return nibbles.view(rows, cols // block, block // p, p).transpose(2, 3).reshape(rows, cols)
        block = self._block(rows)
        return nibbles.view(rows // block, block // p, cols, p).permute(0, 3, 1, 2).reshape(rows, cols)

    def pack(self, codes: Tensor, dim: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """The inverse: words [rows, cols/p] (dim 1) or [rows/p, cols] (dim 0) from integer codes [rows, cols] in 0..15.

        Raises ValueError if the dtype holds another number of nibbles, or the packed dimension is no whole number of
        blocks.
        """
        p, (rows, cols) = len(self.order), codes.shape
        if p != nibbles_per_word(dtype):
            raise ValueError(
                f"Bit order {self.name!r} has {p} nibbles a word, {dtype} holds {nibbles_per_word(dtype)}."
            )
        if not self.fits(codes.shape[dim]):
            raise ValueError(f"Bit order {self.name!r} cannot pack a [{rows}, {cols}] matrix along dimension {dim}.")
        codes = codes.to(torch.uint8).contiguous()  # transposed at once: a strided reshape is four times slower
        block = self._block(codes.shape[dim])
        if dim == 1:
            nibbles = codes.reshape(rows, cols // block, p, block // p).transpose(2, 3)
        else:
            nibbles = codes.reshape(rows // block, p, block // p, cols).permute(0, 2, 3, 1)
        nibbles = nibbles.reshape(-1, p)
        if self.order != tuple(range(p)):
            nibbles = torch.stack([nibbles[:, i] for i in self.order], dim=-1)
        pairs = nibbles.reshape(-1, 2)
        words = (pairs[:, 0] | (pairs[:, 1] << 4)).view(dtype)
        return words.view(rows, -1) if dim == 1 else words.view(-1, cols)

    def gather(
        self, words: Tensor, dim: int, rows: int, cols: int, r: Tensor, c: Tensor, first: Tensor | int = 0
    ) -> Tensor:
        """int64: the codes at positions (r[i], c[i]) alone, for reading a few of them without unpacking all. ``first``
        is the word at which the matrix begins."""
        p, block = len(self.order), self._block(cols if dim == 1 else rows)
        i = c if dim == 1 else r
        within = i % block
        word = i // block * (block // p) + within % (block // p)
        nibble = torch.tensor(_inverse(self.order), device=i.device)[within // (block // p)]
        flat = r * (cols // p) + word if dim == 1 else word * cols + c
        return words.reshape(-1)[first + flat].long().bitwise_right_shift(4 * nibble) & 15


def _inverse(order: tuple[int, ...]) -> list[int]:
    return [order.index(i) for i in range(len(order))]


def nibbles_per_word(dtype: torch.dtype) -> int:
    """How many 4-bit codes an integer of this dtype holds."""
    return dtype.itemsize * 2


@dataclasses.dataclass(frozen=True)
class TileOrder:
    """How int32 words hold the codes of a weight [N, K] in tiles of neighbouring rows and columns.

    "n3" is bit 3 of a code's row in its tile, "k0" the lowest bit of its column. ``nibble`` says which of them the bits
    of the nibble's number in its word are, from the lowest up, ``word`` the same of the word's number in the tile. The
    tiles of the first columns come first.
    """

    name: str
    nibble: tuple[str, str, str]
    word: tuple[str, ...]

    @property
    def rows(self) -> int:
        return 1 << sum(bit.startswith("n") for bit in (*self.nibble, *self.word))

    @property
    def columns(self) -> int:
        return 1 << sum(bit.startswith("k") for bit in (*self.nibble, *self.word))


SEQUENTIAL = BitOrder("sequential", tuple(range(8)))
"""compressed-tensors and GPTQ (along K), the MI300 Triton GEMM (along N)."""
EXLLAMA = BitOrder("exllama", (0, 2, 4, 6, 1, 3, 5, 7))
"""Even values in the low half-word, odd ones in the high: GPTQ kernels after their shuffle. AWQ packs so along N, on
disk."""
PAIRS = BitOrder("pairs", (0, 1))
"""Bytes; along K the same as sequential words."""
PLANES = BitOrder("planes of 64", (0, 1, 2, 3), 256)
"""The Triton kernels' words of 16 bits: a mask and a shift give 64 neighbours (``kernels/gpu/planes.py``)."""
MARLIN = TileOrder("marlin", ("k3", "n3", "k0"), ("n4", "n5", "k1", "k2", "n0", "n1", "n2"))
"""Lane (n0..n2, k1, k2) of a warp reads four words that lie together; each is its part of two 16 x 8 operands of
mma.m16n8k16, in EXLLAMA's order."""

BIT_ORDERS: dict[torch.dtype, tuple[BitOrder, ...]] = {
    torch.int32: (
        SEQUENTIAL,
        EXLLAMA,
        BitOrder("reversed", tuple(range(7, -1, -1))),
        BitOrder("eighths", tuple(range(8)), -1),
    ),
    torch.uint8: (
        PAIRS,
        BitOrder("pairs, high nibble first", (1, 0)),
        BitOrder("halves", (0, 1), -1),
        BitOrder("halves, high nibble first", (1, 0), -1),
        *(BitOrder(f"halves of {n}", (0, 1), n) for n in (32, 64, 128, 256)),
        *(BitOrder(f"halves of {n}, high nibble first", (1, 0), n) for n in (32, 64, 128, 256)),
    ),
    torch.int16: (
        BitOrder("sequential, 16 bit", (0, 1, 2, 3)),
        BitOrder("reversed, 16 bit", (3, 2, 1, 0)),
        PLANES,
    ),
    torch.int64: (
        BitOrder("sequential, 64 bit", tuple(range(16))),
        BitOrder("reversed, 64 bit", tuple(range(15, -1, -1))),
    ),
}
BIT_ORDERS[torch.int8] = BIT_ORDERS[torch.uint8]
BIT_ORDERS[torch.uint16] = BIT_ORDERS[torch.int16]
BIT_ORDERS[torch.uint32] = BIT_ORDERS[torch.int32]

ZERO_CONVENTIONS: dict[str, tuple[int, ...]] = {
    "stored": tuple(range(16)),
    "stored + 1": tuple(range(1, 17)),
    "(stored + 1) & 15": (*range(1, 16), 0),
    "two's complement": tuple((n + 8) % 16 for n in range(16)),
}
"""Stored nibble -> zero. GPTQ's first format stores zero - 1; one of its readers wraps 16 to 0 and the other does not.
A constant zero is ``None`` in the canonical form if it is 8, and a float zero is kept as it is."""

CODE_BOOKS: dict[str, tuple[int, ...]] = {
    "offset binary": tuple(range(16)),
    "two's complement": tuple((n + 8) % 16 for n in range(16)),
    "descending": tuple(range(15, -1, -1)),
}
"""Stored nibble -> code. In two's complement the nibble is a signed -8..7; its code is that value + 8, and the constant
zero is 8. Descending codes come from ``(zero - q) * scale``."""
