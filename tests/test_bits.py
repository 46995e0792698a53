"""Words rearranged without unpacking them hold the codes that unpacking and packing them anew gives: in C++ and in
PyTorch, every order of the table that is a change of places."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layouts import weight
from torch import Tensor

from inductor_ext import bits
from inductor_ext.formats import BIT_ORDERS, MARLIN, PLANES, SEQUENTIAL, BitOrder, TileOrder
from inductor_ext.kernels import cpu
from inductor_ext.layouts import awq, gptq, marlin, rdna3, triton_dense, wmma


def is_a_change_of_places(order: BitOrder) -> bool:
    try:
        bits._bits(order)
    except ValueError:
        return False
    return True


ORDERS = [order for order in BIT_ORDERS[torch.int32] if is_a_change_of_places(order)]
SPREAD = TileOrder("spread", ("n1", "k2", "k0"), ("k1", "n0", "k3", "n2", "k4"))
"""None of the table: trades inside a word and outside it, four words of columns."""


@pytest.fixture(params=["C++", "PyTorch", "PyTorch, all words at once as on a GPU"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "C++":
        assert cpu.usable() is None
    else:
        monkeypatch.setattr(cpu, "usable", lambda: "this test does without")
        monkeypatch.setattr(torch.ops.w4a16_cpu, "rearrange", None, raising=False)
    if "at once" in request.param:
        monkeypatch.setattr(bits, "_most", lambda words: words.numel())


def codes_of(*shape: int) -> Tensor:
    return torch.randint(16, shape, generator=torch.Generator().manual_seed(math.prod(shape)), dtype=torch.uint8)


def packed(codes: Tensor, order: BitOrder) -> Tensor:
    """[E, R, C/8] from [E, R, C]."""
    return torch.stack([order.pack(one, 1) for one in codes])


def test_the_table_has_orders_that_are_changes_of_places() -> None:
    assert {order.name for order in ORDERS} >= {"sequential", "exllama"}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("source", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize("target", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize(("E", "R", "C"), [(1, 1, 8), (2, 8, 8), (3, 64, 24), (1, 1032, 1160), (2, 8, 16392)])
def test_words_become_words_of_another_order(E: int, R: int, C: int, source: BitOrder, target: BitOrder) -> None:
    codes = codes_of(E, R, C)
    words, wanted = packed(codes, source), packed(codes, target)
    given = words.clone()
    assert torch.equal(bits.reorder_(given, source, target), wanted) and torch.equal(given, wanted)
    assert torch.equal(bits.transposed(words, source, target), wanted.transpose(1, 2))
    apart = torch.full((E, R, C // 8 + 3), 7, dtype=torch.int32)
    bits.copy_reordered(words, source, apart[..., : C // 8], target)
    assert torch.equal(apart[..., : C // 8], wanted)
    assert (apart[..., C // 8 :] == 7).all()
    assert torch.equal(words, packed(codes, source))  # is not written to
    if R % 8 == 0:
        assert torch.equal(bits.turned(words, source, target), packed(codes.transpose(1, 2), target))


def tiled(codes: Tensor, order: TileOrder) -> Tensor:
    """[E, K/columns, N/rows, words] from [E, N, K], code by code."""
    E, N, K = codes.shape
    n, k = torch.arange(N)[:, None], torch.arange(K)[None]
    bit: Callable[[str], Tensor] = lambda name: (n if name[0] == "n" else k) >> int(name[1:]) & 1  # noqa: E731
    nibble = sum(bit(name) << i for i, name in enumerate(order.nibble))
    word = sum(bit(name) << i for i, name in enumerate(order.word))
    words = 1 << len(order.word)
    place = (k // order.columns * (N // order.rows) + n // order.rows) * words + word
    nibbles = torch.empty(E, N * K, dtype=torch.uint8)
    nibbles[:, (place * 8 + nibble).flatten()] = codes.flatten(1)
    return SEQUENTIAL.pack(nibbles, 1).view(E, K // order.columns, N // order.rows, words)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("order", [MARLIN, SPREAD], ids=lambda order: order.name)
@pytest.mark.parametrize(("E", "N", "K"), [(1, 64, 32), (3, 192, 96), (1, 320, 4096), (2, 128, 2080)])
def test_words_become_tiles_and_tiles_words(E: int, N: int, K: int, order: TileOrder) -> None:
    codes = codes_of(E, N, K)
    words, wanted = packed(codes, SEQUENTIAL), tiled(codes, order)
    tiles = torch.empty_like(wanted)
    bits.to_tiles(words, order, tiles)
    assert torch.equal(tiles, wanted)
    back = torch.empty_like(words)
    bits.from_tiles(tiles, order, back)
    assert torch.equal(back, words)


def test_layouts_are_the_same_without_the_compiled_library(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight("symmetric", 2, 192, 2048, 128, 0)
    packs = (marlin.pack, rdna3.pack, awq.pack, gptq.pack, triton_dense.pack, lambda w: wmma.pack(w, "gfx1151"))

    def stored(result: Any) -> Tensor:
        tensor: Tensor = result[0] if isinstance(result, tuple) else result.words
        return tensor

    compiled = [stored(pack(w)) for pack in packs]
    monkeypatch.setattr(cpu, "usable", lambda: "this test does without")
    for pack, wanted in zip(packs, compiled, strict=True):
        assert torch.equal(stored(pack(w)), wanted)


@pytest.mark.usefixtures("way")
def test_no_words_are_rearranged_to_none() -> None:
    for shape in ((0, 8, 4), (2, 0, 4), (2, 8, 0)):
        assert bits.turned(torch.empty(shape, dtype=torch.int32), *ORDERS[:2]).numel() == 0


def test_the_op_reads_words_that_are_expanded() -> None:
    assert cpu.usable() is None
    few = torch.arange(24, dtype=torch.int32).view(1, 2, 2, 1, 6)[..., :3]
    source = few.expand(1, 2, 2, 2, 3)
    out = torch.empty_like(source, memory_format=torch.contiguous_format)
    torch.ops.w4a16_cpu.rearrange(source, out, [])
    assert torch.equal(out, source)


def test_orders_without_a_way_are_refused() -> None:
    words = torch.zeros(64, 2, dtype=torch.int32)
    for order in (PLANES, BitOrder("reversed", tuple(range(7, -1, -1))), BitOrder("pairs", (0, 1))):
        with pytest.raises(ValueError, match=order.name):
            bits.reorder_(words, SEQUENTIAL, order)


def i32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("source", "out", "steps", "message"),
    [
        (i32(1, 2, 3).long(), i32(1, 2, 3), [], "source must be int32; it is Long"),
        (i32(1, 2, 3), i32(1, 2, 3).float(), [], "out must be int32; it is Float"),
        (i32(2, 3), i32(2, 3), [], r"source must be \[E, P, 2, ..., 2, Q\].* shape is \[2, 3\]"),
        (i32(1, 2, 3, 4), i32(1, 2, 3, 4), [], r"source must be \[E, P, 2, ..., 2, Q\].* shape is \[1, 2, 3, 4\]"),
        (i32(1, 2, *[2] * 11, 1), i32(1, 2, *[2] * 11, 1), [], "with up to 10 twos"),
        (i32(1, 2, 3), i32(1, 2, 2, 3), [], "out must have source's shape"),
        (i32(1, 2, 3), i32(1, 2, 4), [], "out must be source's shape"),
        (i32(1, 2, 3), i32(1, 2, 3), [0], "steps must be pairs"),
        (i32(1, 2, 3), i32(1, 2, 3), [0, 3], r"the second in 0..2"),
        (i32(1, 2, 2, 3), i32(1, 2, 2, 3), [0, 4], r"the second in 0..3"),
        (i32(1, 2, 2, 3), i32(1, 2, 2, 3), [3, 0], "the first in 0..2"),
        (i32(1, 2, 3), i32(1, 2, 3), [1, 1], "different bits"),
        (i32(1, 2, 3), i32(1, 2, 1).expand(1, 2, 3), [], "out must have a place for each word"),
    ],
)
def test_what_the_op_refuses(source: Tensor, out: Tensor, steps: list[int], message: str) -> None:
    assert cpu.usable() is None
    with pytest.raises(RuntimeError, match=message):
        torch.ops.w4a16_cpu.rearrange(source, out, steps)


def test_the_op_refuses_a_result_that_overlaps_what_it_reads() -> None:
    assert cpu.usable() is None
    memory = i32(1, 4, 8)
    square = memory[:, :4, :4]
    for source, out in ((memory[:, :3], memory[:, 1:]), (square, square.transpose(1, 2))):
        with pytest.raises(RuntimeError, match="they overlap"):
            torch.ops.w4a16_cpu.rearrange(source, out, [])
