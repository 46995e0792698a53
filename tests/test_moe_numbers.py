"""What the Triton kernels behind `w4a16::moe` compute: on a GPU, or with TRITON_INTERPRET=1 on the CPU, as
test_gpu_experts.py runs this file."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreter import DEVICE, DTYPES, needs_a_device, thinned
from moe_problems import MAP, MLPS, OWED, ZEROS, Experts, right
from torch import Tensor

from inductor_ext.kernels.gpu import tuning
from inductor_ext.kernels.gpu.routing import route_kernel
from inductor_ext.kernels.gpu.tuning import MoeConfig

pytestmark = needs_a_device

PAIRS = MoeConfig(PAIRWISE=True, BN=64, BM=8, WIDTH=64, STAGES=3, num_warps=2)
AMD = MoeConfig(PAIRWISE=True, BN=64, BM=16, WIDTH=32, STAGES=2, num_warps=4)
WIDE = MoeConfig(PAIRWISE=False, BN=128, BM=32, WIDTH=64, STAGES=2, num_warps=8)
HALF = dataclasses.replace(WIDE, BN=64, WIDTH=32, num_warps=4)
VARIANTS = {
    "pair by pair": (PAIRS, dataclasses.replace(PAIRS, BN=32)),
    "pair by pair on AMD": (AMD, AMD),
    "blocks": (WIDE, HALF),
    "half steps": (HALF, WIDE),
}
SIZES = ((256, 32, (32, 32)), (64, 320, (64, 64)), (384, 88, (128, 88)), (72, 512, (72, 256)))
"""H, I, and the groups of each projection."""
NAN = float("nan")


@pytest.fixture(autouse=True)
def no_memory_is_zero_by_chance() -> Iterator[None]:
    """Memory that is not written to is NaN, and -1 or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, False)
        yield


def made(**changed: Any) -> Experts:
    sizes = {"E": 4, "H": 64, "I": 32, "G": (64, 32), "dtype": torch.float16}
    return Experts(**{**sizes, **changed}, kernel="triton", device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mlp", MLPS)
def test_every_activation(mlp: str, dtype: torch.dtype) -> None:
    """Pair by pair, and sorted."""
    for T, bias in ((1, False), (9, True)):
        experts = made(dtype=dtype, bias=bias, mlp=MLPS[mlp])
        right(experts, *experts.routed(T))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zeros", ["none", "int"])
def test_any_number_of_tokens(zeros: str, dtype: torch.dtype) -> None:
    """One pair a block, and blocks of three sizes."""
    for T in (4, 12, 30, 200):
        experts = made(dtype=dtype, zeros=zeros)
        right(experts, *experts.routed(T))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("zeros", "variant", "size"), thinned(ZEROS, VARIANTS, SIZES), ids=str)
def test_every_group_size_in_every_variant(
    zeros: str, variant: str, size: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "moe", lambda *given: VARIANTS[variant])
    T = 1 if VARIANTS[variant][0].PAIRWISE else 5
    H, I, G = size  # noqa: E741
    experts = made(E=2, H=H, I=I, G=G, zeros=zeros, dtype=dtype)
    right(experts, *experts.routed(T))


@pytest.mark.parametrize("T", [2, 7])
@pytest.mark.parametrize("gate_up", ["silu", "silu interleaved", "silu without a gate"])
def test_sizes_that_fill_no_tile(gate_up: str, T: int) -> None:
    for E, H, I in ((1, 8, 8), (3, 40, 24), (5, 200, 72)):  # noqa: E741
        experts = made(E=E, H=H, I=I, G=(H, I), zeros="int", bias=True, mlp=MLPS[gate_up])
        right(experts, *experts.routed(T, min(E, 2)))


@pytest.mark.parametrize(("E", "top_k"), [(9, 3), (10, 8), (12, 10), (20, 17)])
@pytest.mark.parametrize("T", [1, 5])
def test_any_number_of_choices_is_added_up(T: int, E: int, top_k: int) -> None:
    """Eight at a time; some of nobody."""
    experts = made(E=E, H=64, I=32, G=(64, 32))
    x, weights, ids = experts.routed(T, top_k)
    ids[0, top_k // 2], ids[-1, -1] = -1, E
    right(experts, x, weights, ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_weights_ids_and_biases_may_have_a_dtype_of_their_own(
    scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """Zeros too: integers lie in pairs of groups, whatever the scales do."""
    for zeros, T in itertools.product(("float", "float32", "int"), (3, 12)):
        experts = made(H=256, G=(64, 32), dtype=dtype, scale_dtype=scale_dtype, zeros=zeros, bias=True)
        experts.tensors["w2_bias"] = experts.tensors["w2_bias"].float()
        x, weights, ids = experts.routed(T)
        right(experts, x, weights.to(scale_dtype), ids.int())


# -- routing -----------------------------------------------------------------------------------------------------------

ROUTINGS = {
    "all tokens to one expert": torch.full((33, 1), 5),
    "one token an expert": torch.arange(8)[:, None],
    "most experts empty": torch.tensor([[1, 6]]).expand(20, 2),
    "an expert repeated in a row": torch.tensor([[3, 3, 3], [0, 7, 0], [1, 1, 2]]),
    "an expert repeated in one row": torch.tensor([[3, 3, 3]]),
    "some chosen by nobody": torch.tensor([[-1, 2], [4, -1], [-1, -1], [0, 1]]),
    "some chosen by nobody, sorted": torch.tensor([[-1, 2], [4, -1], [-1, -1], [0, 1]]).repeat(5, 1),
    "nothing chosen": torch.full((30, 2), -1),
    "no tokens": torch.empty(0, 2, dtype=torch.long),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing_extremes(routing: str, dtype: torch.dtype) -> None:
    ids = ROUTINGS[routing].to(DEVICE)
    experts = made(E=8, dtype=dtype, bias=True)
    x, weights, _ = experts.routed(*ids.shape)
    right(experts, x, weights, ids)


@pytest.mark.parametrize("mlp", ["silu", "weight on the input", "swigluoai interleaved", "scaled"])
@pytest.mark.parametrize("copies", [1, 9], ids=["pair by pair", "sorted"])
def test_what_is_not_here_contributes_nothing_whatever_its_weight(copies: int, mlp: str) -> None:
    """-1, experts that are elsewhere and ids that there are not; a token of nothing else is exactly zero."""
    experts = made(E=4, mlp=MLPS[mlp], bias=True, expert_map=torch.tensor([3, -1, 0, 1, -1, 2]).int())
    ids = torch.tensor([[-1, 2], [4, 1], [0, 3], [6, 2**40 + 1]]).repeat(copies, 1).to(DEVICE)
    x, weights, _ = experts.routed(*ids.shape)
    weights[(ids == -1) | (ids == 1) | (ids == 4) | (ids > 5)] = NAN
    right(experts, x, weights, ids)
    assert experts(x, weights, ids)[[1, 3]].count_nonzero() == 0


@pytest.mark.parametrize("T", [2, 30])
def test_tokens_need_not_be_contiguous(T: int) -> None:
    experts = made()
    x, weights, ids = experts.routed(2 * T)
    spread = x.t().contiguous().t()[::2], weights.t().contiguous().t()[::2], ids.t().contiguous().t()[::2]
    assert torch.equal(experts(*spread), experts(*(t[::2].clone() for t in (x, weights, ids))))


@pytest.mark.parametrize("T", [4, 40])
def test_what_is_bad_spoils_its_own_tokens_only(T: int) -> None:
    experts = made()
    x, weights, ids = experts.routed(T)
    good = experts(x, weights, ids)
    x[1, 7], weights[3, 1] = NAN, float("inf")
    finite = torch.isfinite(experts(x, weights, ids))
    spoilt = torch.zeros(T, dtype=torch.bool, device=DEVICE)
    spoilt[[1, 3]] = True
    assert torch.equal(~finite.all(1), spoilt)
    assert torch.equal(experts(x, weights, ids)[~spoilt], good[~spoilt])


def blocks(ids: list[int], E: int, BM: int) -> tuple[list[int], list[int]]:
    """The slots and the blocks' experts that route_kernel owes for these rows of the weights, -1 for nobody."""
    slots, block_expert = [], []
    for expert in range(E):
        mine = [pair for pair, chosen in enumerate(ids) if chosen == expert]
        count = -(-len(mine) // BM)
        slots += mine + [-1] * (count * BM - len(mine))
        block_expert += [expert] * count
    return slots, block_expert


@pytest.mark.parametrize("chunk", [16, 256])
@pytest.mark.parametrize("mapped", [False, True], ids=["ids", "expert_map"])
def test_pairs_are_sorted_by_expert_in_their_order(mapped: bool, chunk: int) -> None:
    """In blocks filled up with -1, none of them empty; what lies beyond is not written."""
    E, BM, pairs = 5, 8, 100
    number = 8 if mapped else E
    expert_map = torch.tensor([4, -1, 0, 9, 2, 1, 3, -1]).int().to(DEVICE) if mapped else None
    ids = torch.randint(-1, number + 2, (pairs,), generator=torch.Generator().manual_seed(0))
    rows = [int(i) if 0 <= i < number else -1 for i in ids]
    if expert_map is not None:
        rows = [int(expert_map[i]) if i >= 0 else -1 for i in rows]
    wanted_slots, wanted_experts = blocks(rows, E, BM)
    room = 77
    slots = torch.full((len(wanted_slots) + room,), -7, dtype=torch.int32, device=DEVICE)
    block_expert = torch.full((len(wanted_experts) + room,), -7, dtype=torch.int32, device=DEVICE)
    total = torch.full((2,), -7, dtype=torch.int32, device=DEVICE)
    route_kernel[(E,)](
        ids.to(DEVICE),
        expert_map,
        slots,
        block_expert,
        total,
        pairs,
        number,
        E,
        BINS=8,
        BM=BM,
        CHUNK=chunk,
        EARLY=False,
    )
    assert slots.tolist() == wanted_slots + [-7] * room
    assert block_expert.tolist() == wanted_experts + [-7] * room
    assert total.tolist() == [len(wanted_experts), -7]


@pytest.mark.parametrize("E", [1, 3, 17])
def test_there_is_room_for_every_block(E: int) -> None:
    """However the pairs fall on the experts: as many blocks as can be, and nothing beyond is needed."""
    T, experts = 40, made(E=E)
    x, weights, _ = experts.routed(T, 1)
    for ids in (torch.arange(T) % E, torch.arange(T).clamp(max=E - 1), torch.full((T,), E - 1)):
        right(experts, x, weights, ids[:, None].to(DEVICE))


def test_experts_of_all_ranks_add_up_to_the_whole() -> None:
    """Expert parallelism: every rank has some of the experts and sees all ids."""
    whole = made(E=6)
    routed: tuple[Tensor, ...] = whole.routed(30, 3)
    total = torch.zeros(30, 64, dtype=torch.float64, device=DEVICE)
    for mine in ([0, 5], [4, 1, 2], [3]):
        places = torch.full((6,), -1).int()
        places[mine] = torch.arange(len(mine)).int()
        rank = made(E=len(mine), expert_map=places)
        packed = {name: None if t is None else t[mine].contiguous() for name, t in whole.tensors.items()}
        rank.tensors = {**packed, "expert_map": places.to(DEVICE)}
        total += rank(*routed).double()
    wanted = whole.expected(*routed)
    assert (total - wanted).norm() <= OWED[torch.float16] * wanted.norm()


def test_an_expert_map_of_many_ids() -> None:
    for T in (2, 30):
        experts = made(E=4, expert_map=MAP)
        right(experts, *experts.routed(T, 3))
