"""Packed codes rearranged without unpacking them: the bits of a code's place change places.

Where a code lies is a number, and its lowest bits are the nibble's number in its word. The orders of the table in
``formats.py`` differ in which bit of n and k each of those is. A bit inside the word trades places with another inside
it, or with one outside, by shifts and masks of whole words. Only then words move, as words.

On a CPU the work is done in pieces that its cache keeps, each small enough that PyTorch gives it to one thread: threads
that share an operation wait for each other at its end, which on a busy machine takes milliseconds every time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from inductor_ext.formats import BitOrder, TileOrder


def reorder_(words: Tensor, source: BitOrder, target: BitOrder) -> Tensor:
    """Contiguous int32 words of one order become words of the other, in place, with the same codes."""
    have, want = list(_bits(source)), _bits(target)
    steps = []
    for a, name in enumerate(want):
        b = have.index(name)
        if b != a:
            steps.append((a, b))
            have[a], have[b] = have[b], have[a]
    flat = words.view(-1)
    if flat.numel() % 2 == 0:
        flat = flat.view(torch.int64)
    piece = _most(flat)
    spare = torch.empty_like(flat[:piece])
    for x in flat.split(piece):
        for a, b in steps:
            _exchange(x, a, b, spare[: x.numel()])
    return words


def turned(words: Tensor, source: BitOrder, target: BitOrder) -> Tensor:
    """int32 words [R, C/8] that pack a matrix [R, C] along C in one order, as words [C, R/8] that pack it along R in
    the other."""
    R, C = words.shape[0], words.shape[1] * 8
    out = words.new_empty(C, R // 8)
    have, want = _bits(source), _bits(target)
    # The bit of a row that becomes bit a of a nibble's number leaves its axis to the column's that was there.
    axes = [3 - want[have.index(column)] for column in (2, 1, 0)]
    rows, across = _side(words, R), _side(words, C) // 8
    for r in range(0, R, rows):
        for c in range(0, C // 8, across):
            tile = words[r : r + rows, c : c + across].clone(memory_format=torch.contiguous_format)
            x = tile.view(-1, 2, 2, 2, tile.shape[1])
            spare = torch.empty_like(x.select(1, 0))
            for a in range(3):
                first, second = x.unbind(3 - want[a])
                _exchange_outside(first, second, a, spare)
            to = out[8 * c : 8 * (c + tile.shape[1]), r // 8 : (r + tile.shape[0]) // 8]
            to.unflatten(0, (-1, 2, 2, 2)).copy_(x.permute(4, *axes, 0))
    return out


def _side(words: Tensor, length: int) -> int:
    """Of a piece that a CPU's cache keeps, in codes: a multiple of 8."""
    return 512 if words.device.type == "cpu" else length


def to_tiles(words: Tensor, order: TileOrder, tiles: Tensor) -> None:
    """Sequential words [N, K/8], contiguous, into int32 [K/columns, N/rows, words of a tile], contiguous.

    N and K are whole tiles.
    """
    plan, (down, across, _) = _plan(order), tiles.shape
    source = plan.open(words, down)
    to = tiles.view(torch.complex128).view(down, across, *[2] * len(plan.order))
    for part in _parts(words, order):
        x = torch.stack([fourth[:, part] for fourth in source], -1)
        _take(x, plan.steps)
        _copy(to[:, part], plan.close(x))


def from_tiles(tiles: Tensor, order: TileOrder, words: Tensor) -> None:
    """The inverse, into contiguous words."""
    plan, (down, across, _) = _plan(order), tiles.shape
    to = plan.open(words, down)
    source = tiles.contiguous().view(torch.complex128).view(down, across, *[2] * len(plan.order))
    for part in _parts(words, order):
        x = words.new_empty(*to[0][:, part].shape, 4)
        _copy(plan.close(x), source[:, part])
        _take(x, plan.steps[::-1])
        for i, fourth in enumerate(to):
            fourth[:, part] = x[..., i]


def _copy(to: Tensor, source: Tensor) -> None:
    """By halves of the lowest bit: twice as fast as at once, since PyTorch would take short runs innermost."""
    for mine, yours in zip(to.unbind(-1), source.unbind(-1), strict=True):
        mine.copy_(yours)


def _parts(words: Tensor, order: TileOrder) -> Iterator[slice]:
    """Rows of tiles to take at once, which is half of them in one operation on twice as wide words."""
    rows = words.shape[0] // order.rows
    step = max(1, 4 * _most(words) // (order.rows * words.shape[1]))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


class _Plan(NamedTuple):
    """The way to a tile of 16 columns whose neighbouring words, by fours, differ in two bits of n: words of 8
    neighbours along k with axes [k3, tiles, bits of n but these two, K/16, 4] around them."""

    lead: tuple[int, int]
    """Which of all bits of n, highest first, are those two."""
    rest: int
    """How many the others are."""
    steps: tuple[tuple[int, int], ...]
    """A bit inside the word and the axis it trades places with."""
    order: tuple[int, ...]
    """The axes in the order in which the tile has them, highest first."""

    def open(self, words: Tensor, down: int) -> tuple[Tensor, ...]:
        """Of sequential words each fourth as a tensor [k3, tiles, n..., K/16]."""
        x = words.view(-1, *[2] * (self.rest + 2), down, 2).movedim(-1, 0)
        x = x.movedim([axis + 2 for axis in self.lead], [0, 1])
        return tuple(x[i, j] for i in (0, 1) for j in (0, 1))

    def close(self, x: Tensor) -> Tensor:
        """A view [K/16, tiles, ...] of these words, with four as one element, so that they move at once."""
        return x.view(torch.complex128).squeeze(-1).permute(self.rest + 2, 1, *self.order)


@functools.cache
def _plan(order: TileOrder) -> _Plan:
    inner = order.word[:2]
    if order.columns != 16 or not all(bit.startswith("n") for bit in inner):
        raise ValueError(f"There is no way to tiles in the order {order.name!r}.")
    bits = [f"n{bit}" for bit in reversed(range(order.rows.bit_length() - 1))]
    outer = [bit for bit in bits if bit not in inner]
    axes = {"k3": 0} | {bit: axis + 2 for axis, bit in enumerate(outer)}
    have = ["k0", "k1", "k2"]
    steps = []
    for a, bit in enumerate(order.nibble):
        if have[a] != bit:
            axis = axes.pop(bit)
            steps.append((a, axis))
            axes[have[a]], have[a] = axis, bit
    moved = tuple(axes[bit] for bit in reversed(order.word[2:]))
    return _Plan((bits.index(inner[1]), bits.index(inner[0])), len(outer), tuple(steps), moved)


def _take(x: Tensor, steps: tuple[tuple[int, int], ...]) -> None:
    wide = x.view(torch.int64)
    spare = wide.new_empty(wide.numel() // 2)
    for a, axis in steps:
        first, second = wide.unbind(axis)
        _exchange_outside(first, second, a, spare.view(first.shape))


def _exchange(x: Tensor, a: int, b: int, spare: Tensor) -> None:
    """Bits a < b of the numbers of the nibbles in each word trade places."""
    shift = 4 * ((1 << b) - (1 << a))
    torch.bitwise_right_shift(x, shift, out=spare)
    spare.bitwise_xor_(x).bitwise_and_(_mask(x.dtype, one=1 << a, none=1 << b))
    x.bitwise_xor_(spare)
    x.bitwise_xor_(spare.bitwise_left_shift_(shift))


def _exchange_outside(first: Tensor, second: Tensor, a: int, spare: Tensor) -> None:
    """Bit a of the nibbles' numbers trades places with the bit that tells the first tensor from the second."""
    shift = 4 << a
    torch.bitwise_right_shift(first, shift, out=spare)
    spare.bitwise_xor_(second).bitwise_and_(_mask(first.dtype, one=0, none=1 << a))
    second.bitwise_xor_(spare)
    first.bitwise_xor_(spare.bitwise_left_shift_(shift))


def _mask(dtype: torch.dtype, one: int, none: int) -> int:
    """Of the nibbles of int32 words, or of pairs of them, whose numbers have the bits ``one`` and none of ``none``.

    Never the highest of a word, into which a shift brings what is not the word's.
    """
    word = sum(15 << 4 * i for i in range(8) if i & one == one and not i & none)
    return word if dtype == torch.int32 else word << 32 | word


def _most(words: Tensor) -> int:
    """Words for one operation. On a CPU it stays in one thread with less than 32768."""
    return (1 << 15) - 1 if words.device.type == "cpu" else max(1, words.numel())


def _bits(order: BitOrder) -> tuple[int, ...]:
    """Which bit of a code's number in its run each bit of its nibble's number is."""
    bits = [order.order[1 << bit].bit_length() - 1 for bit in range(len(order.order).bit_length() - 1)]
    linear = tuple(sum(1 << bits[b] for b in range(len(bits)) if i >> b & 1) for i in range(len(order.order)))
    if order.block != 0 or linear != order.order:
        raise ValueError(f"Bit order {order.name!r} is not a change of places of bits within words.")
    return tuple(bits)
