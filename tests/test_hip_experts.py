"""The kernel "hip" for `w4a16::moe`: when it is chosen, its layout, what it computes on lanes, what a profiler sees."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import hip_lanes
import pytest
import torch
from moe_problems import MAP, MLPS, Experts, exact, right

from inductor_ext import oracle
from inductor_ext.formats import PackedInt4
from inductor_ext.kernels import Mlp, MoeProblem, Routing, WeightKind, table
from inductor_ext.kernels.gpu import experts as triton
from inductor_ext.kernels.hip import experts, routing

KIND = WeightKind(torch.bfloat16, 128, "int")
PROBLEM = MoeProblem(
    "cuda", "gfx1151", torch.bfloat16, E=8, top_k=2, H=512, I=256, w13=KIND, w2=KIND, mlp=Mlp(), bias=True,
    expert_map=True,
)  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture
def lanes() -> Iterator[hip_lanes.Lanes]:
    with hip_lanes.on("gfx1100") as lanes:
        yield lanes


# -- chosen ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"op": "linear"}, "The kernel computes moe, not linear."),
        ({"arch": "sm_90"}, "The kernel runs on AMD GPUs, not on cuda (sm_90)."),
        ({"device": "cpu", "arch": "x86_64"}, "The kernel runs on AMD GPUs, not on cpu (x86_64)."),
        ({"arch": "gfx1200"}, "The kernel needs the WMMA of RDNA 3 (gfx11); this is gfx1200."),
        ({"arch": "gfx942"}, "The kernel needs the WMMA of RDNA 3 (gfx11); this is gfx942."),
        ({"dtype": torch.float32}, "The activations must be float16 or bfloat16, not torch.float32."),
        ({"E": 4097}, "There may be 4096 experts at most, not 4097."),
        (
            {"w2": replace(KIND, scale_dtype=torch.float16)},
            "The scales must have the activations' dtype, torch.bfloat16, not torch.float16.",
        ),
        ({"w13": replace(KIND, zeros="float")}, "The zeros must be integers, not floats."),
        (
            {"w13": replace(KIND, group_size=16)},
            "The group size must be a multiple of 32 that divides K=512; it is 16.",
        ),
        ({"w2": replace(KIND, group_size=96)}, "The group size must be a multiple of 32 that divides K=256; it is 96."),
        ({"mlp": Mlp("tanh")}, "The activation must be one of silu, gelu, gelu_tanh, relu, swigluoai, not tanh."),
        (
            {"mlp": Mlp(gate_up="thirds")},
            "The layout of gate and up must be one of halves, interleaved, none, not thirds.",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_it_cannot_do_is_a_sentence(changed: dict[str, Any], reason: str, built: None) -> None:
    assert experts.reject(replace(PROBLEM, **changed)) == reason


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU to run the kernels."""
    for module in (experts, triton):
        monkeypatch.setattr(module, "usable", lambda: None)


@pytest.mark.parametrize("arch", ["gfx1100", "gfx1101", "gfx1102", "gfx1103", "gfx1150", "gfx1151"])
def test_it_comes_first_on_rdna_3(arch: str, built: None) -> None:
    assert oracle.choose(replace(PROBLEM, arch=arch)) == oracle.Choice("hip", {})


@pytest.mark.parametrize("changed", [{"arch": "gfx1200"}, {"w13": replace(KIND, zeros="float")}], ids=str)
def test_what_it_cannot_do_falls_to_triton(changed: dict[str, Any], built: None) -> None:
    choice = oracle.choose(replace(PROBLEM, **changed))
    assert (choice.kernel, list(choice.passed_over)) == ("triton", ["hip"])


def test_switched_off_it_is_passed_over(monkeypatch: pytest.MonkeyPatch, built: None) -> None:
    monkeypatch.setenv("INDUCTOR_EXT_MOE_HIP", "0")
    told = {"hip": "It is switched off: INDUCTOR_EXT_MOE_HIP is 0."}
    assert oracle.choose(PROBLEM) == oracle.Choice("triton", told)


def test_required_it_is_never_replaced(monkeypatch: pytest.MonkeyPatch, built: None) -> None:
    monkeypatch.setenv("INDUCTOR_EXT_MOE_HIP", "1")
    assert oracle.choose(PROBLEM) == oracle.Choice("hip", {})
    with pytest.raises(oracle.Required, match=r"hip: The kernel needs the WMMA of RDNA 3 \(gfx11\); this is gfx1200"):
        oracle.choose(replace(PROBLEM, arch="gfx1200"))
    assert oracle.choose(replace(PROBLEM, device="cpu"), "reference").kernel == "reference"
    assert oracle.choose(replace(PROBLEM, device="cpu")).kernel in table.priority("moe", "cpu")


def test_the_switch_has_three_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDUCTOR_EXT_MOE_HIP", "yes")
    with pytest.raises(ValueError, match=r"must be 0 \(never\), 1 \(required\) or unset; it is 'yes'"):
        oracle.choose(PROBLEM)


# -- layout ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [False, True])
def test_packing_loses_nothing(zeros: bool) -> None:
    random = torch.Generator().manual_seed(3)
    codes = torch.randint(-(2**31), 2**31, (3 * 24, 64 // 8), generator=random, dtype=torch.int32)
    zero = torch.randint(17, (3 * 24, 2), generator=random).to(torch.uint8) if zeros else None
    weight = PackedInt4(codes, torch.randn(3 * 24, 2, generator=random).half(), zero)
    packed = experts.pack(weight, 3)
    expected = experts.layout(packed, 3, 24, 64, 32)
    for tensor, told in zip(packed, expected, strict=True):
        assert tensor is None or (tuple(tensor.shape) == told.shape and tensor.dtype in told.dtypes)
    back = experts.unpack(packed, 24, 64, 32)
    assert torch.equal(back.codes, weight.codes) and torch.equal(back.scales, weight.scales)
    assert back.zeros is None if zero is None else torch.equal(back.zeros, zero)


# -- routing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("height", [1, 2, 8, 16, 64])
def test_slots_stand_in_order_in_blocks_of_an_expert(
    lanes: hip_lanes.Lanes, height: int, mapped: bool, dtype: torch.dtype
) -> None:
    """As w4a16::moe_align_block_size has them when it ignores invalid experts."""
    ids = torch.randint(-1, 6, (77, 3), generator=torch.Generator().manual_seed(height), dtype=dtype)
    known, E, there = (5, 4, MAP) if mapped else (5, 5, None)
    found = routing.route(Routing(torch.empty(0), ids, there, known), E, height)
    sorted_ids, of, end = torch.ops.w4a16.moe_align_block_size(ids, height, known, there, True)
    used = int(end) // height
    assert torch.equal(found.end, end)
    assert (found.experts[used:] == -1).all()
    blocks = dict(zip(of[:used].tolist(), sorted_ids[: used * height].tolist(), strict=False))
    assert set(found.experts[:used].tolist()) == set(blocks)
    mine, theirs = ({} for _ in range(2))
    for experts_, slots, into in ((found.experts, found.sorted, mine), (of, sorted_ids, theirs)):
        for e, block in zip(experts_[:used].tolist(), slots[: used * height].view(used, height).tolist(), strict=True):
            into.setdefault(e, []).append(block)
    assert mine == theirs


# -- numbers -----------------------------------------------------------------------------------------------------------


def hip(**kinds: Any) -> Experts:
    return Experts(**{"E": 4, "H": 256, "I": 128, "G": (64, 32), "dtype": torch.bfloat16, "kernel": "hip"} | kinds)


@pytest.mark.parametrize("T", [3, 40])
@pytest.mark.parametrize("mlp", MLPS.values(), ids=MLPS)
def test_what_experts_compute(lanes: hip_lanes.Lanes, mlp: Mlp, T: int) -> None:
    dtype = DTYPES[T % 2]
    for zeros, bias, there in itertools.product(("none", "int"), (False, True), (None, MAP)):
        problem = hip(mlp=mlp, zeros=zeros, bias=bias, expert_map=there, dtype=dtype)
        right(problem, *problem.routed(T))


@pytest.mark.parametrize(
    ("T", "E", "names"),
    [
        (1, 4, ["route", "moe_gptq_gemm_rdna3_bf16_1", "activate_bf16", "moe_gptq_gemm_rdna3_bf16_1"]),
        (4, 4, ["route", "moe_gptq_gemm_rdna3_bf16_2", "activate_bf16", "moe_gptq_gemm_rdna3_bf16_2"]),
        (16, 4, ["route", "moe_gptq_gemm_rdna3_bf16_8", "activate_bf16", "moe_gptq_gemm_rdna3_bf16_8"]),
        (17, 4, ["route", "wmma_bf16_16_64", "wmma_bf16_16_32", "combine_bf16"]),
        (48, 4, ["route", "wmma_bf16_32_64", "wmma_bf16_32_32", "combine_bf16"]),
        (192, 2, ["route", "wmma_bf16_64_64", "wmma_bf16_64_32", "combine_bf16"]),
    ],
)
def test_the_kernels_follow_the_number_of_tokens(lanes: hip_lanes.Lanes, T: int, E: int, names: list[str]) -> None:
    problem = hip(E=E)
    right(problem, *problem.routed(T))
    assert [launch.name for launch in lanes.launches()] == names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ids_of_nobody_add_nothing(lanes: hip_lanes.Lanes, dtype: torch.dtype) -> None:
    """-1, one that there is not, and one that would be another in 32 bits."""
    for T, bias in itertools.product((2, 30), (False, True)):
        problem = hip(dtype=dtype, bias=bias)
        x, weights, ids = problem.routed(T)
        ids[0, 0], ids[1, 1], ids[1, 0] = -1, 7, 2**32 + 1
        y = problem(x, weights, ids)
        assert not y[1].any()
        right(problem, x, weights, ids.where((ids >= 0) & (ids < 4), -1))
        assert torch.equal(y, problem(x, weights, ids.where((ids >= 0) & (ids < 4), -1)))


@pytest.mark.parametrize("T", [3, 40])
def test_the_order_of_lanes_and_blocks_changes_no_bit(lanes: hip_lanes.Lanes, T: int) -> None:
    problem = hip(zeros="int", dtype=torch.float16)
    tokens = problem.routed(T)
    lanes.seed(1)
    first = problem(*tokens)
    for seed in range(2, 5):
        lanes.seed(10 * seed)
        assert torch.equal(problem(*tokens), first)


def test_no_tokens_are_no_launch(lanes: hip_lanes.Lanes) -> None:
    problem = hip()
    assert problem(*problem.routed(0)).shape == (0, 256)
    assert lanes.launches() == []


def test_strided_tokens_and_wide_weights(lanes: hip_lanes.Lanes) -> None:
    problem = hip()
    for T in (3, 40):
        x, weights, ids = problem.routed(T)
        apart = [t.t().contiguous().t() for t in (x, weights.float(), ids.int())]
        exact(problem, *apart)


def test_scales_of_another_dtype_are_refused(lanes: hip_lanes.Lanes) -> None:
    problem = hip()
    x, weights, ids = problem.routed(3)
    with pytest.raises(
        RuntimeError, match=r"x in the scales' dtype; x is torch.float16, the scales are torch.bfloat16"
    ):
        problem(x.half(), weights, ids)


@torch.no_grad()
def test_one_compiled_graph_for_any_number_of_tokens(lanes: hip_lanes.Lanes) -> None:
    problem = hip()
    torch.compiler.reset()
    compiled = torch.compile(lambda x, weights, ids: problem(2 * x, weights, ids) + x, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T in (5, 2, 40):
            x, weights, ids = problem.routed(T)
            assert torch.equal(compiled(x, weights, ids), problem(2 * x, weights, ids) + x)
    names = {launch.name for launch in lanes.launches()}
    assert any(name.startswith("moe_gptq") for name in names) and any(name.startswith("wmma") for name in names)


# -- profile -----------------------------------------------------------------------------------------------------------


def scopes(problem: Experts, *tokens: torch.Tensor) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        problem(*tokens)
    return [event.name for event in profile.events() if event.name.startswith("w4a16::moe {")]


def test_a_profiler_sees_how_the_blocks_are_filled(lanes: hip_lanes.Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = hip(expert_map=torch.tensor([1, -1, 0, 3, 2]).int())
    x, weights, _ = problem.routed(20)
    ids = torch.tensor([[0, 1], [0, 2], [4, -1]]).repeat(7, 1)[:20]
    monkeypatch.delenv("INDUCTOR_EXT_PROFILE", raising=False)
    assert scopes(problem, x, weights, ids) == []
    monkeypatch.setenv("INDUCTOR_EXT_PROFILE", "1")
    (told,) = scopes(problem, x, weights, ids)
    assert json.loads(told.removeprefix("w4a16::moe ")) == {
        "M": 20, "N": [256, 256], "K": [256, 128], "E": 4, "top_k": 2, "g": [64, 32], "block_m": 8,
        "valid_blocks": 1 + 2 + 1, "n_routed": 27, "slots": [7, 14, 6, 0],
    }  # fmt: skip
