"""The canonical form and the table of bit orders and zeros, against loops over single bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inductor_ext.patterns.reading import Codes, Index, Matrix, NotCanonical, Reading, Zeros, matrices
from torch import Tensor

from inductor_ext.formats import (
    BIT_ORDERS,
    CODE_BOOKS,
    EXLLAMA,
    SEQUENTIAL,
    ZERO_CONVENTIONS,
    BitOrder,
    PackedInt4,
    nibbles_per_word,
)

ORDERS = [(dtype, order) for dtype, orders in BIT_ORDERS.items() for order in orders]
few = settings(max_examples=25, deadline=None, derandomize=True)


def named(value: Any) -> str:
    return value.name if isinstance(value, BitOrder) else str(value).removeprefix("torch.")


def axis(order: BitOrder) -> st.SearchStrategy[int]:
    """Lengths that the order can pack: whole blocks."""
    unit = order.block if order.block > 0 else len(order.order)
    return st.integers(1, 3).map(lambda n: n * unit)


def drawn_codes(rows: int, cols: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 16, (rows, cols)))


def bit_by_bit(codes: Tensor, order: BitOrder, dim: int, bits: int) -> list[list[int]]:
    """Words as Python integers, one bit at a time, from what the name of the order says and nothing else."""
    matrix = codes.tolist() if dim == 1 else codes.T.tolist()
    length, per_word = len(matrix[0]), bits // 4
    block = {0: per_word, -1: length}.get(order.block, order.block)
    packed = []
    for row in matrix:
        words = []
        for start in range(0, length, block):
            for j in range(block // per_word):
                word = 0
                for nibble in range(per_word):
                    value = row[start + j + order.order[nibble] * (block // per_word)]
                    for bit in range(4):
                        if value & (1 << bit):
                            word |= 1 << (4 * nibble + bit)
                words.append(word)
        packed.append(words)
    return packed if dim == 1 else [list(column) for column in zip(*packed, strict=True)]


def as_unsigned(words: Tensor) -> list[list[int]]:
    mask = (1 << (8 * words.dtype.itemsize)) - 1
    return [[int(w) & mask for w in row] for row in words.tolist()]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("dtype", "order"), ORDERS, ids=named)
def test_words_are_what_a_loop_over_bits_packs(dtype: torch.dtype, order: BitOrder, dim: int) -> None:
    @few
    @given(length=axis(order), other=st.integers(1, 5), seed=st.integers(0, 1 << 30))
    def check(length: int, other: int, seed: int) -> None:
        rows, cols = (other, length) if dim == 1 else (length, other)
        codes = drawn_codes(rows, cols, seed)
        words = order.pack(codes, dim, dtype)
        assert words.dtype == dtype
        assert as_unsigned(words) == bit_by_bit(codes, order, dim, 8 * dtype.itemsize)

    check()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("dtype", "order"), ORDERS, ids=named)
def test_every_bit_order_round_trips(dtype: torch.dtype, order: BitOrder, dim: int) -> None:
    """pack, unpack and gather; and any words at all are someone's codes."""

    @few
    @given(length=axis(order), other=st.integers(1, 5), seed=st.integers(0, 1 << 30))
    def check(length: int, other: int, seed: int) -> None:
        rows, cols = (other, length) if dim == 1 else (length, other)
        codes = drawn_codes(rows, cols, seed)
        words = order.pack(codes, dim, dtype)
        unpacked = order.unpack(words, dim, rows, cols)
        assert unpacked.dtype == torch.uint8
        assert torch.equal(unpacked.long(), codes)
        assert torch.equal(order.unpack(words.reshape(-1), dim, rows, cols).long(), codes)
        generator = torch.Generator().manual_seed(seed)
        r, c = (torch.randint(size, (40,), generator=generator) for size in (rows, cols))
        assert torch.equal(order.gather(words, dim, rows, cols, r, c), codes[r, c])
        raw = torch.randint(256, (words.numel() * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        stored = raw.view(dtype).reshape(words.shape)
        again = order.pack(order.unpack(stored, dim, rows, cols), dim, dtype)
        assert torch.equal(again.view(torch.uint8), stored.view(torch.uint8))

    check()


def test_words_need_not_be_contiguous() -> None:
    codes = drawn_codes(16, 24, 0)
    words = SEQUENTIAL.pack(codes, 1)
    strided = words.t().contiguous().t()
    assert torch.equal(SEQUENTIAL.unpack(strided, 1, 16, 24).long(), codes)
    r, c = torch.arange(16), torch.arange(16)
    assert torch.equal(SEQUENTIAL.gather(strided, 1, 16, 24, r, c), codes[r, c])


def test_the_words_that_the_formats_are_known_by() -> None:
    """Codes 0..7 in a row: GPTQ and compressed-tensors along K, exllama's shuffle and AWQ."""
    codes = torch.arange(8).view(1, 8)
    assert SEQUENTIAL.pack(codes, 1).item() == 0x76543210
    assert EXLLAMA.pack(codes, 1).item() == 0x75316420
    assert SEQUENTIAL.pack(codes.T, 0).item() == 0x76543210
    assert EXLLAMA.pack(codes.T, 0).item() == 0x75316420


def test_exllama_gives_pairs_by_one_mask() -> None:
    """(word >> 4p) & 0x000F000F is q[2p] in the low half and q[2p+1] in the high: what the shuffle is for."""
    word = EXLLAMA.pack(torch.arange(8).view(1, 8), 1).item()
    assert [(word >> (4 * p)) & 0x000F000F for p in range(4)] == [0x00010000, 0x00030002, 0x00050004, 0x00070006]


def test_byte_pairs_are_sequential_words_seen_as_bytes() -> None:
    codes = drawn_codes(4, 32, 1)
    (pairs,) = (order for order in BIT_ORDERS[torch.uint8] if order.name == "pairs")
    assert torch.equal(pairs.pack(codes, 1, torch.uint8), SEQUENTIAL.pack(codes, 1).view(torch.uint8))


def test_names_of_bit_orders_are_unique() -> None:
    for dtype, orders in BIT_ORDERS.items():
        assert len({order.name for order in orders}) == len(orders)
        for order in orders:
            assert sorted(order.order) == list(range(nibbles_per_word(dtype)))


@pytest.mark.parametrize(
    ("order", "dim", "dtype", "message"),
    [
        (SEQUENTIAL, 1, torch.uint8, "8 nibbles a word, torch.uint8 holds 2"),
        (SEQUENTIAL, 1, torch.int64, "8 nibbles a word, torch.int64 holds 16"),
        (SEQUENTIAL, 0, torch.int32, r"cannot pack a \[12, 16\] matrix along dimension 0"),
        (BitOrder("halves of 32", (0, 1), 32), 1, torch.uint8, r"cannot pack a \[12, 16\] matrix along dimension 1"),
    ],
    ids=str,
)
def test_what_cannot_be_packed_is_named(order: BitOrder, dim: int, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        order.pack(drawn_codes(12, 16, 0), dim, dtype)


# -- zeros and codes ---------------------------------------------------------------------------------------------------

STORED = {
    "stored": lambda n: n,
    "stored + 1": lambda n: n + 1,
    "(stored + 1) & 15": lambda n: (n + 1) & 15,
    "two's complement": lambda n: (n - 16 if n > 7 else n) + 8,
}
BOOKS = {
    "offset binary": lambda n: n,
    "two's complement": lambda n: (n - 16 if n > 7 else n) + 8,
    "descending": lambda n: 15 - n,
}


def test_every_zero_convention() -> None:
    assert {name: [rule(n) for n in range(16)] for name, rule in STORED.items()} == {
        name: list(table) for name, table in ZERO_CONVENTIONS.items()
    }


def test_every_code_book() -> None:
    assert {name: [rule(n) for n in range(16)] for name, rule in BOOKS.items()} == {
        name: list(table) for name, table in CODE_BOOKS.items()
    }


# -- the canonical form ------------------------------------------------------------------------------------------------


def slowly(codes: Tensor, scales: Tensor, zeros: Tensor | None, order: Tensor | None) -> Tensor:
    """W[n, k] = (code[n, p] - zero[n, p // G]) * scale[n, p // G] with p = order[k], one element after the other."""
    N, K = codes.shape
    G = K // scales.shape[1]
    weight = torch.empty(N, K, dtype=torch.float64)
    for n in range(N):
        for k in range(K):
            p = k if order is None else int(order[k])
            zero = 8.0 if zeros is None else float(zeros[n, p // G])
            weight[n, k] = (int(codes[n, p]) - zero) * float(scales[n, p // G])
    return weight


def canonical_of(
    N: int, K: int, G: int, zeros: str, order: bool, dtype: torch.dtype, seed: int = 0
) -> tuple[PackedInt4, Tensor]:
    """The form, and its codes."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (N, K), generator=random)
    scales = torch.randn(N, K // G, generator=random).to(dtype)
    zero: Tensor | None = None
    if zeros == "int":
        zero = torch.randint(17, (N, K // G), generator=random).to(torch.uint8)
    elif zeros == "float":
        zero = (torch.rand(N, K // G, generator=random) * 15).to(dtype)
    permutation = torch.randperm(K, generator=random).int() if order else None
    return PackedInt4(SEQUENTIAL.pack(codes, 1), scales, zero, permutation), codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=named)
@pytest.mark.parametrize("order", [False, True], ids=["", "act-order"])
@pytest.mark.parametrize("zeros", ["none", "int", "float"])
def test_the_canonical_form_is_what_it_says(zeros: str, order: bool, dtype: torch.dtype) -> None:
    form, codes = canonical_of(5, 48, 16, zeros, order, dtype)
    wanted = slowly(codes, form.scales, form.zeros, form.order)
    assert (form.N, form.K, form.group_size) == (5, 48, 16)
    assert torch.equal(form.stored_codes().long(), codes)
    assert torch.equal(form.dequantize(torch.float64), wanted)
    assert torch.allclose(form.dequantize().double(), wanted, rtol=1e-6, atol=0)
    assert form.dequantize(torch.bfloat16).dtype == torch.bfloat16
    parts = list(form.blocks(2 * 48))
    assert torch.equal(torch.cat([part.dequantize(torch.float64) for _, part in parts]), wanted)
    for rows, part in parts:
        assert torch.equal(part.dequantize(torch.float64), wanted[rows])
        assert part.codes.data_ptr() == form.codes[rows].data_ptr()


def test_a_nan_scale_spoils_its_own_group_only() -> None:
    form, _ = canonical_of(4, 32, 16, "int", False, torch.float32)
    form.scales[2, 1] = float("nan")
    assert torch.equal(form.dequantize().isnan().nonzero(), torch.tensor([[2, k] for k in range(16, 32)]))


# -- readings ----------------------------------------------------------------------------------------------------------

PACKINGS = [(dtype, order) for dtype, order in ORDERS if order.name in ("sequential", "exllama", "pairs", "halves")]


@pytest.mark.parametrize("book", CODE_BOOKS)
@pytest.mark.parametrize("transposed", [False, True], ids=["[N, K]", "[K, N]"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("dtype", "order"), PACKINGS, ids=named)
def test_readings_of_packed_codes(dtype: torch.dtype, order: BitOrder, dim: int, transposed: bool, book: str) -> None:
    N, K = 16, 32
    form, codes = canonical_of(N, K, 16, "none", False, torch.float32)
    nibbles = torch.tensor(CODE_BOOKS[book]).argsort()[codes]
    stored = order.pack(nibbles.T if transposed else nibbles, dim, dtype)
    matrix = Matrix(0, transposed, order, dim)
    reading = Reading(N, K, 2, Codes(matrix, book, 0), Matrix(1, False), Zeros(8.0), None)
    found = reading.canonical([stored, form.scales])
    assert found.codes.dtype == torch.int32
    assert torch.equal(found.codes, form.codes)
    assert found.zeros is None
    assert matrix in set(matrices(0, stored, N, K))
    assert (found.codes.data_ptr() == stored.data_ptr()) == (
        (order, dim, transposed, book) == (SEQUENTIAL, 1, False, "offset binary")
    )


@pytest.mark.parametrize("low", [0, -8])
@pytest.mark.parametrize("transposed", [False, True], ids=["[N, K]", "[K, N]"])
def test_readings_of_one_integer_a_code(transposed: bool, low: int) -> None:
    form, codes = canonical_of(8, 32, 16, "none", False, torch.float32)
    stored = (codes + low).to(torch.int8)
    reading = Reading(8, 32, 2, Codes(Matrix(0, transposed), "offset binary", low), Matrix(1, False), Zeros(8.0), None)
    found = reading.canonical([stored.T.contiguous() if transposed else stored, form.scales])
    assert torch.equal(found.codes, form.codes)
    for beyond in (low - 1, low + 16):
        stored = stored.clone()
        stored[3, 5] = beyond
        with pytest.raises(NotCanonical, match=f"{beyond}.*beyond 4 bits"):
            reading.canonical([stored.T.contiguous() if transposed else stored, form.scales])


@pytest.mark.parametrize("convention", ZERO_CONVENTIONS)
@pytest.mark.parametrize("transposed", [False, True], ids=["[N, K/G]", "[K/G, N]"])
def test_readings_of_packed_zeros(transposed: bool, convention: str) -> None:
    form, _ = canonical_of(16, 32, 16, "none", False, torch.float32)
    stored = torch.arange(32).view(16, 2) % 16
    words = SEQUENTIAL.pack(stored.T, 1) if transposed else SEQUENTIAL.pack(stored, 0)
    zeros = Zeros(0.0, Matrix(2, transposed, SEQUENTIAL, 1 if transposed else 0), convention)
    found = plain(16, zeros).canonical([form.codes, form.scales, words])
    assert found.zeros.dtype == torch.uint8
    assert found.zeros.tolist() == [[STORED[convention](n) for n in row] for row in stored.tolist()]


def plain(N: int, zeros: Zeros, index: Index | None = None) -> Reading:
    """Codes and scales canonical, K 32, two groups."""
    codes = Codes(Matrix(0, False, SEQUENTIAL), "offset binary", 0)
    return Reading(N, 32, 2, codes, Matrix(1, False), zeros, index)


@pytest.mark.parametrize(
    ("zeros", "stored", "wanted"),
    [
        (Zeros(3.0), None, 3),
        (Zeros(0.0), None, 0),
        (Zeros(16.0), None, 16),
        (Zeros(8.0, Matrix(2, False, broadcast=True)), torch.tensor(-3), 5),
        (Zeros(8.0, Matrix(2, False)), torch.full((4, 2), 7, dtype=torch.int8), 15),
        (Zeros(0.0, Matrix(2, False)), torch.full((4, 2), 2.5), 2.5),
        (Zeros(8.0, Matrix(2, False), sign=-1), torch.full((4, 2), 2.5), 5.5),
        (Zeros(1.5), None, 1.5),
    ],
    ids=str,
)
def test_readings_of_other_zeros(zeros: Zeros, stored: Tensor | None, wanted: float) -> None:
    form, _ = canonical_of(4, 32, 16, "none", False, torch.float32)
    found = plain(4, zeros).canonical([form.codes, form.scales] + ([] if stored is None else [stored]))
    assert found.zeros.shape == (4, 2)
    assert (found.zeros == wanted).all()
    assert (found.zeros.dtype == torch.uint8) == (wanted == int(wanted))


def test_zeros_that_are_added_shifts() -> None:
    """q * s + m, as HQQ-like libraries write it, is (q - z) * s with z = -m / s."""
    form, codes = canonical_of(4, 32, 16, "none", False, torch.float32)
    shift = torch.randn(4, 2)
    found = plain(4, Zeros(0.0, Matrix(2, False), sign=-1, shift=True)).canonical([form.codes, form.scales, shift])
    groups = torch.arange(32) // 16
    wanted = codes * form.scales.double()[:, groups] + shift.double()[:, groups]
    assert torch.allclose(found.dequantize(torch.float64), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [-1, 17])
def test_a_zero_outside_the_canonical_form_is_named(value: int) -> None:
    form, _ = canonical_of(4, 32, 16, "none", False, torch.float32)
    stored = torch.full((4, 2), 3, dtype=torch.int32)
    stored[2, 1] = value
    with pytest.raises(NotCanonical, match=f"{value}.*0 to 16"):
        plain(4, Zeros(0.0, Matrix(2, False))).canonical([form.codes, form.scales, stored])


@few
@given(seed=st.integers(0, 1 << 30), groups=st.sampled_from([1, 2, 4]))
def test_readings_of_group_indices(seed: int, groups: int) -> None:
    """g_idx gives each k its group; the canonical form stores groups as runs, and its order brings them back."""
    N, K = 4, 32
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (N, K), generator=random)
    g_idx = (torch.arange(K) // (K // groups))[torch.randperm(K, generator=random)].int()
    scales = torch.rand(N, groups, generator=random) + 0.5
    reading = Reading(
        N,
        K,
        groups,
        Codes(Matrix(0, False, SEQUENTIAL), "offset binary", 0),
        Matrix(1, False),
        Zeros(8.0),
        Index(2, "group"),
    )
    found = reading.canonical([SEQUENTIAL.pack(codes, 1), scales, g_idx])
    wanted = (codes - 8) * scales.double()[:, g_idx.long()]
    assert torch.equal(found.dequantize(torch.float64), wanted)
    assert found.order is None or sorted(found.order.tolist()) == list(range(K))


def test_a_group_index_that_sorts_nothing_costs_nothing() -> None:
    form, _ = canonical_of(4, 32, 16, "none", False, torch.float32)
    found = plain(4, Zeros(8.0), Index(2, "group")).canonical([form.codes, form.scales, torch.arange(32) // 16])
    assert found.order is None
    assert found.codes.data_ptr() == form.codes.data_ptr()


def test_readings_of_column_indices() -> None:
    form, codes = canonical_of(4, 32, 16, "none", True, torch.float32)
    found = plain(4, Zeros(8.0), Index(2, "column")).canonical([form.codes, form.scales, form.order.long()])
    assert torch.equal(found.dequantize(torch.float64), slowly(codes, form.scales, None, form.order))


@pytest.mark.parametrize(
    ("gives", "index", "message"),
    [
        ("group", torch.zeros(32, dtype=torch.int32), "unequal size"),
        ("group", torch.cat([torch.zeros(15), torch.ones(17)]).int(), "unequal size"),
        ("group", torch.cat([torch.zeros(16), torch.full((16,), -1)]).int(), "unequal size"),
        ("group", torch.cat([torch.zeros(16), torch.full((16,), 2)]).int(), "unequal size"),
        ("column", torch.zeros(32, dtype=torch.int32), "no permutation"),
        ("column", torch.arange(1, 33), "no permutation"),
    ],
    ids=["one group", "15 and 17", "a negative group", "a group too many", "one column", "columns from 1"],
)
def test_an_index_without_a_canonical_form_is_named(gives: str, index: Tensor, message: str) -> None:
    form, _ = canonical_of(4, 32, 16, "none", False, torch.float32)
    with pytest.raises(NotCanonical, match=message):
        plain(4, Zeros(8.0), Index(2, gives)).canonical([form.codes, form.scales, index])
