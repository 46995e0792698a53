"""Packed codes rearranged without unpacking them: the bits of a code's place change places.

Where a code lies is a number. Its lowest three bits are the nibble's number in its word, the others tell one word from
another. The orders of the table in ``formats.py`` differ in which bit of n and k each of those is. A bit inside the
word trades places with another inside it, or with one outside, by shifts and masks of whole words. Only then words
move, as words.

So a conversion is two views of the words, before and after, and a list of trades between them, all derived from the
table. C++ carries it out on a CPU (csrc/cpu/rearrange.cpp: in tiles that its cache keeps, on every thread), PyTorch
elsewhere, and where that library was not built.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from inductor_ext.formats import SEQUENTIAL, BitOrder, TileOrder
from inductor_ext.kernels import cpu

Steps = list[tuple[int, int]]
"""Pairs of bits that trade places, the first inside the word: 0..2 are the nibble's number, 3 + i the i-th axis of
size two."""


def reorder_(words: Tensor, source: BitOrder, target: BitOrder) -> Tensor:
    """Contiguous int32 words of one order become words of the other, in place, with the same codes."""
    flat = words.view(1, 1, -1)
    _rearrange(flat, flat, _inside(source, target))
    return words


def copy_reordered(words: Tensor, source: BitOrder, out: Tensor, target: BitOrder) -> None:
    """int32 words [E, R, C] of one order as words of the other, into a tensor of the same shape. Any strides."""
    _rearrange(words, out, _inside(source, target))


def transposed(words: Tensor, source: BitOrder = SEQUENTIAL, target: BitOrder = SEQUENTIAL) -> Tensor:
    """int32 words [E, R, C] of one order as words [E, C, R] of the other, contiguous."""
    out = words.new_empty(words.shape[0], words.shape[2], words.shape[1])
    copy_reordered(words.transpose(1, 2), source, out, target)
    return out


def turned(words: Tensor, source: BitOrder, target: BitOrder) -> Tensor:
    """int32 words [E, R, C/8], contiguous, that pack matrices [R, C] along C in one order, as words [E, C, R/8] that
    pack them along R in the other."""
    E, R, C = words.shape[0], words.shape[1], words.shape[2] * 8
    out = words.new_empty(E, C, R // 8)
    have, want = _bits(source), _bits(target)
    # Bit b of a row is the axis 4 - b. It becomes bit a of a nibble's number, and the column's that was there takes its
    # axis.
    rows = [4 - want[a] for a in range(3)]
    columns = [rows[have.index(bit)] for bit in (2, 1, 0)]
    x, y = words.view(E, R // 8, 2, 2, 2, C // 8), out.view(E, C // 8, 2, 2, 2, R // 8)
    order = [0, 5, *columns, 1]  # y's axes among x's
    _rearrange(x, y.permute([order.index(axis) for axis in range(6)]), [(a, rows[a] + 1) for a in range(3)])
    return out


def to_tiles(words: Tensor, order: TileOrder, tiles: Tensor) -> None:
    """Sequential words [E, N, K/8], contiguous, into int32 [E, K/columns, N/rows, words of a tile], contiguous.

    N and K are whole tiles.
    """
    steps, x, y = _tiling(words, order, tiles)
    _rearrange(x, y, steps)


def from_tiles(tiles: Tensor, order: TileOrder, words: Tensor) -> None:
    """The inverse, into contiguous words."""
    steps, x, y = _tiling(words, order, tiles)
    _rearrange(y, x, steps[::-1])


def _tiling(words: Tensor, order: TileOrder, tiles: Tensor) -> tuple[Steps, Tensor, Tensor]:
    """The trades, and views [E, N/rows, bits of n and k, K/columns] of both."""
    E, down, across, _ = tiles.shape
    n = [f"n{bit}" for bit in reversed(range(order.rows.bit_length() - 1))]
    k = [f"k{bit}" for bit in reversed(range(3, order.columns.bit_length() - 1))]
    x = words.view(E, across, *[2] * len(n), down, *[2] * len(k)).movedim(2 + len(n), -1)

    places, steps = ["k0", "k1", "k2", *n, *k], []
    for a, bit in enumerate(order.nibble):
        if (b := places.index(bit)) != a:
            steps.append((a, b))
            places[a], places[b] = places[b], places[a]
    high_first = order.word[::-1]
    y = tiles.view(E, down, across, *[2] * len(high_first))
    return steps, x, y.permute(0, 2, *(3 + high_first.index(bit) for bit in places[3:]), 1)


def _inside(source: BitOrder, target: BitOrder) -> Steps:
    have, want = list(_bits(source)), _bits(target)
    steps = []
    for a, name in enumerate(want):
        if (b := have.index(name)) != a:
            steps.append((a, b))
            have[a], have[b] = have[b], have[a]
    return steps


def _bits(order: BitOrder) -> tuple[int, ...]:
    """Which bit of a code's number in its run each bit of its nibble's number is."""
    bits = [order.order[1 << bit].bit_length() - 1 for bit in range(len(order.order).bit_length() - 1)]
    linear = tuple(sum(1 << bits[b] for b in range(len(bits)) if i >> b & 1) for i in range(len(order.order)))
    if order.block != 0 or linear != order.order or len(linear) != 8:
        raise ValueError(f"Bit order {order.name!r} is not a change of places of bits within words of 32.")
    return tuple(bits)


# -- how it is done ----------------------------------------------------------------------------------------------------


def _rearrange(source: Tensor, out: Tensor, steps: Steps) -> None:
    """Words [E, P, 2, ..., 2, Q] in any strides into others of the same shape, which may be the same ones."""
    if source.device.type == "cpu" and out.device.type == "cpu" and cpu.usable() is None:
        torch.ops.w4a16_cpu.rearrange(source, out, [bit for step in steps for bit in step])
        return
    for some, to in _pieces(source, out) if source.numel() > 0 else ():
        x = some.clone(memory_format=torch.contiguous_format)
        for a, b in steps:
            if b < 3:
                _exchange(x, a, b)
            else:
                first, second = x.unbind(b - 2)
                _exchange_outside(first, second, a)
        to.copy_(x)


def _pieces(source: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """[P, 2, ..., 2, Q]: an expert at a time. On a CPU less, so that its cache keeps it and PyTorch gives it to one
    thread: threads that share an operation wait for each other at its end, on a busy machine for milliseconds."""
    for x, y in zip(source, out, strict=True):
        step = _most(x) * x.shape[0] // x.numel()
        if step > 0:
            yield from zip(x.split(step), y.split(step), strict=True)
            continue
        step = max(1, _most(x) * x.shape[-1] // x[0].numel())
        for one, to in zip(x.split(1), y.split(1), strict=True):
            yield from zip(one.split(step, -1), to.split(step, -1), strict=True)


def _most(words: Tensor) -> int:
    """Words for one operation. On a CPU it stays in one thread with less than 32768."""
    return (1 << 15) - 1 if words.device.type == "cpu" else max(1, words.numel())


def _exchange(x: Tensor, a: int, b: int) -> None:
    """Bits a and b of the numbers of the nibbles in each word trade places."""
    low, high = 1 << min(a, b), 1 << max(a, b)
    shift = 4 * (high - low)
    differ = (x >> shift).bitwise_xor_(x).bitwise_and_(_mask(low, high))
    x.bitwise_xor_(differ).bitwise_xor_(differ << shift)


def _exchange_outside(first: Tensor, second: Tensor, a: int) -> None:
    """Bit a of the nibbles' numbers trades places with the bit that tells the first tensor from the second."""
    shift = 4 << a
    differ = (first >> shift).bitwise_xor_(second).bitwise_and_(_mask(0, 1 << a))
    second.bitwise_xor_(differ)
    first.bitwise_xor_(differ << shift)


def _mask(one: int, none: int) -> int:
    """Of the nibbles of a word whose numbers have the bits ``one`` and none of ``none``: never the highest, into which
    a shift brings copies of the sign."""
    return sum(15 << 4 * i for i in range(8) if i & one == one and not i & none)
