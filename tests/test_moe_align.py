"""`torch.ops.w4a16.moe_align_block_size`: what a loop in Python gives, in every entry, the tail too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import recompiles
from torch import Tensor

import inductor_ext.ops  # registers torch.ops.w4a16

align = torch.ops.w4a16.moe_align_block_size


def expected(
    ids: list[list[int]], block_size: int, num_experts: int, expert_map: list[int] | None, ignore: bool
) -> tuple[list[int], list[int], list[int]]:
    flat = [e for row in ids for e in row]
    slots, owners = [], []
    for expert in range(num_experts):
        row = expert if expert_map is None else expert_map[expert]
        own = [slot for slot, e in enumerate(flat) if e == expert]
        if row < 0 and ignore:
            continue
        while len(own) % block_size:
            own.append(len(flat))
        slots += own
        owners += [row] * (len(own) // block_size)
    room = len(flat) + min(len(flat), num_experts) * (block_size - 1)
    end = len(slots)
    slots += [len(flat)] * (room - len(slots))
    owners += [-1] * (-(-room // block_size) - len(owners))
    return slots, owners, [end]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[int]], int, int, list[int] | None, bool]:
    num_experts = draw(st.integers(1, 9))
    k = draw(st.integers(1, 4))
    ids = draw(st.lists(st.lists(st.integers(-2, num_experts + 1), min_size=k, max_size=k), min_size=1, max_size=12))
    some = st.none() | st.lists(st.integers(-1, 6), min_size=num_experts, max_size=num_experts)
    return ids, draw(st.integers(1, 17)), num_experts, draw(some), draw(st.booleans())


def check(ids: list[list[int]], block_size: int, num_experts: int, expert_map: list[int] | None, ignore: bool) -> None:
    mapped = None if expert_map is None else torch.tensor(expert_map, dtype=torch.int32)
    for dtype in (torch.int32, torch.int64):
        found = align(torch.tensor(ids, dtype=dtype), block_size, num_experts, mapped, ignore)
        assert all(t.dtype == torch.int32 for t in found)
        assert tuple(t.tolist() for t in found) == expected(ids, block_size, num_experts, expert_map, ignore)


@given(problems())
@settings(max_examples=400, deadline=None)
def test_it_gives_what_a_loop_gives(problem: Any) -> None:
    check(*problem)


@pytest.mark.parametrize("block_size", [1, 4, 16, 64])
@pytest.mark.parametrize("ignore", [False, True])
def test_many_tokens(block_size: int, ignore: bool) -> None:
    ids = torch.randint(-1, 70, (513, 8), generator=torch.Generator().manual_seed(block_size)).tolist()
    here = [e // 2 if e % 2 else -1 for e in range(64)]
    check(ids, block_size, 64, None, ignore)
    check(ids, block_size, 64, here, ignore)


def test_the_sorted_ids_by_hand() -> None:
    """The slots of an expert stay in their order; slot 3 chose nobody."""
    ids = torch.tensor([[0, 2], [2, -1], [1, 2], [5, 0]])
    slots, experts, end = align(ids, 2, 4)
    assert slots.tolist() == [0, 7, 4, 8, 1, 2, 5, 8, 8, 8, 8, 8]
    assert experts.tolist() == [0, 1, 2, 2, -1, -1]
    assert end.tolist() == [8]


def test_foreign_experts_stay_as_blocks_of_nobody_or_are_left_out() -> None:
    ids, here = torch.tensor([[0, 1], [1, 2]]), torch.tensor([1, -1, 0]).int()
    slots, experts, end = align(ids, 2, 3, here)
    assert (slots.tolist(), experts.tolist(), end.tolist()) == ([0, 4, 1, 2, 3, 4, 4], [1, -1, 0, -1], [6])
    slots, experts, end = align(ids, 2, 3, here, True)
    assert (slots.tolist(), experts.tolist(), end.tolist()) == ([0, 4, 3, 4, 4, 4, 4], [1, 0, -1, -1], [4])


@pytest.mark.parametrize("mapped", [None, torch.tensor([0, -1, 2, 1]).int()], ids=["all here", "some here"])
@pytest.mark.parametrize("shape", [(0, 2), (3, 0)], ids=str)
def test_nothing_to_sort(shape: tuple[int, int], mapped: Tensor | None) -> None:
    slots, experts, end = align(torch.zeros(shape, dtype=torch.int32), 16, 4, mapped, True)
    assert (slots.tolist(), experts.tolist(), end.tolist()) == ([], [], [0])


def test_ids_need_not_be_contiguous_and_are_not_written_to() -> None:
    ids = torch.randint(8, (6, 20), generator=torch.Generator().manual_seed(1)).t()
    before = ids.clone()
    for found, wanted in zip(align(ids, 4, 8), align(before.contiguous(), 4, 8), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(ids, before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    ids = torch.tensor([[0, 2], [2, -1], [1, 2]], dtype=dtype)
    for args in ((4, 3), (1, 9), (4, 3, torch.tensor([1, -1, 0]).int()), (2, 3, torch.tensor([1, -1, 0]).int(), True)):
        torch.library.opcheck(align.default, (ids, *args))


def test_one_graph_for_all_token_counts() -> None:
    """Above and below the number of experts: the lengths are one expression."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda ids: align(ids + 0, 4, 8), fullgraph=True, dynamic=True)
    for T in (7, 2, 3, 64, 513):
        ids = torch.randint(8, (T, 2), generator=torch.Generator().manual_seed(T))
        found, wanted = compiled(ids), align(ids, 4, 8)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert recompiles() == 1
    torch.compiler.reset()


IDS = torch.zeros(3, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((IDS.float(), 4, 8), "topk_ids must be int32 or int64, it is torch.float32"),
        ((IDS[0], 4, 8), r"topk_ids must be \[T, k\], it has 1 dimensions"),
        ((IDS, 0, 8), "block_size must be at least 1, it is 0"),
        ((IDS, 4, 0), "num_experts must be at least 1, it is 0"),
        ((IDS, 4, 8, torch.zeros(7).int()), r"expert_map must be int32 \[8\] on cpu, it is torch.int32 \[7\] on cpu"),
        ((IDS, 4, 8, torch.zeros(8).long()), r"expert_map must be int32 \[8\] on cpu, it is torch.int64 \[8\] on cpu"),
        ((IDS, 4, 8, torch.zeros(8, device="meta").int()), r"expert_map must be .* on meta"),
    ],
    ids=["float ids", "flat ids", "block 0", "no experts", "a short map", "a long map", "a map elsewhere"],
)
def test_a_mistake_is_named(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        align(*args)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=message):
        align(*args)


def test_name_and_signature() -> None:
    assert inductor_ext.ops.moe_align_block_size is align.default
    assert str(align.default._schema) == (
        "w4a16::moe_align_block_size(Tensor topk_ids, int block_size, int num_experts, Tensor? expert_map=None, "
        "bool ignore_invalid_experts=False) -> (Tensor, Tensor, Tensor)"
    )
