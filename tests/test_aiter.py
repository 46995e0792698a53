"""AITER's kernel for MXFP4 experts: when it is chosen, what it is given, and what comes of it, with a stand-in for the
package, in both of the places where its modules have been."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from aiter_standin import PATHS, Standin
from hypothesis import given, settings
from hypothesis import strategies as st
from mxfp4_problems import GPT_OSS, Mxfp4Experts, exact

from inductor_ext import kernels, oracle
from inductor_ext.formats import PackedMxfp4
from inductor_ext.kernels import MoeProblem, WeightKind
from inductor_ext.kernels.external import aiter_moe as aiter

KIND = WeightKind(torch.uint8, 32, "none", "mxfp4")
PROBLEM = MoeProblem(
    "cuda", "gfx950", torch.bfloat16, E=32, top_k=4, H=2880, I=2880, w13=KIND, w2=KIND, mlp=GPT_OSS, bias=True,
    expert_map=False, op="moe_mxfp4", fp8=True,
)  # fmt: skip
A8 = (0.02, 0.05)
"""Input scales with which some activations saturate and some are subnormal."""


@dataclasses.dataclass
class OnGfx950(Mxfp4Experts):
    dtype: torch.dtype = torch.bfloat16
    input_scales: tuple[float, float] | None = A8
    kernel: str = "aiter"

    def problem(self) -> MoeProblem:
        return replace(super().problem(), arch="gfx950")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    aiter.bound.cache_clear()
    yield
    aiter.bound.cache_clear()


@pytest.fixture(params=PATHS)
def standin(request: Any, monkeypatch: pytest.MonkeyPatch) -> Standin:
    return Standin(request.param, monkeypatch)


# -- what is computed --------------------------------------------------------------------------------------------------


def test_a_layer_is_right(standin: Standin) -> None:
    """One block of few rows, several blocks of one expert, and experts without any."""
    for E, H, I, T, k in ((4, 96, 64, 1, 2), (32, 64, 40, 3, 4), (3, 500, 250, 70, 2), (2, 64, 32, 200, 1)):  # noqa: E741
        experts = OnGfx950(E, H, I, bias=T != 3)
        exact(experts, *experts.routed(T, k))
    first, second = standin.calls[:2]
    assert (first["apply_swiglu"], second["apply_swiglu"]) == (True, False)
    assert (first["out_dtype"], second["out_dtype"]) == (torch.float8_e4m3fn, torch.float32)
    assert (first["alpha"], first["limit"]) == (GPT_OSS.alpha, GPT_OSS.limit)


def test_weights_of_the_router_are_taken_as_they_are(standin: Standin) -> None:
    """Not normalised again, zero, negative."""
    experts = OnGfx950(8, 64, 32)
    x, weights, ids = experts.routed(9, 2)
    weights = weights * torch.linspace(-1, 3, 9)[:, None]
    weights[4, 1] = 0
    exact(experts, x, weights, ids)


def test_choices_of_nobody_and_the_same_expert_twice(standin: Standin) -> None:
    experts = OnGfx950(4, 64, 32)
    x, weights, ids = experts.routed(6, 2)
    ids[1] = ids[1, 0]
    exact(experts, x, weights, ids)
    ids[0, 0], ids[2] = -1, -1
    weights[0, 0], weights[2], x[2] = torch.nan, torch.nan, 0.0
    y = experts(x, weights, ids)
    assert y.isfinite().all() and not y[2].any()
    clean = weights.nan_to_num(0.0)
    exact(experts, x, clean, ids)
    assert torch.equal(experts(x, clean, ids), y)


def test_many_tokens_are_added_up_in_bfloat16(standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aiter, "_PAIRS_IN_FLOAT32", 16)
    experts = OnGfx950(2, 32, 16)
    for T, dtype in ((8, torch.float32), (9, torch.bfloat16)):
        experts(*experts.routed(T, 2))
        assert standin.calls[-1]["out_dtype"] == dtype


def test_no_tokens(standin: Standin) -> None:
    experts = OnGfx950(2, 32, 16)
    assert experts(*experts.routed(0, 2)).shape == (0, 32)


# -- the layout --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 300), st.integers(0, 99))
def test_experts_come_back_as_they_were(E: int, N: int, half: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    codes, scales = (
        torch.randint(256, (E * N, columns), dtype=torch.uint8, generator=random)
        for columns in (half, -(-2 * half // 32))
    )
    packed = aiter.pack(PackedMxfp4(codes, scales), E)
    back = aiter.unpack(packed, N, 2 * half, 32)
    assert torch.equal(back.codes, codes) and torch.equal(back.scales, scales)
    wanted = aiter.layout(packed, E, N, 2 * half, 32)
    for t, expected in zip(packed[:2], wanted[:2], strict=True):
        assert tuple(t.shape) == expected.shape and t.dtype in expected.dtypes and t.is_contiguous()


def test_sizes_of_gpt_oss_are_filled_up() -> None:
    packed = aiter.pack(PackedMxfp4(torch.ones(5760, 1440, dtype=torch.uint8), torch.ones(5760, 90).byte()), 1)
    assert [tuple(t.shape) for t in packed[:2]] == [(1, 6144, 1536), (1, 192, 3072)]
    assert packed.qweight.sum() == 5760 * 1440


# -- the choice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"fp8": False}, "AITER's kernel is for MXFP4 weights with fp8 activations (W4A8)."),
        ({"arch": "gfx942"}, "The scales are swizzled for gfx950; this is gfx942."),
        ({"device": "cpu", "arch": ""}, "The scales are swizzled for gfx950; this is cpu."),
        ({"dtype": torch.float16}, "AITER takes and gives bfloat16, not torch.float16."),
        (
            {"mlp": replace(GPT_OSS, activation="silu")},
            "AITER computes swigluoai of interleaved gates and ups, not silu (interleaved).",
        ),
        (
            {"mlp": replace(GPT_OSS, gate_up="halves")},
            "AITER computes swigluoai of interleaved gates and ups, not swigluoai (halves).",
        ),
        ({"mlp": replace(GPT_OSS, limit=None)}, "AITER's swigluoai always clamps; there is no limit."),
        (
            {"mlp": replace(GPT_OSS, apply_router_weight_on_input=True)},
            "AITER would multiply by the router's weight after the activation, not before W13.",
        ),
        (
            {"expert_map": True},
            "AITER ignores expert_map: it would compute what is other devices' to compute.",
        ),
        ({"E": 1 << 16}, "AITER's map of blocks has 16 bits for an expert; there are 65536."),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_it_cannot_do_is_a_sentence(changed: dict[str, Any], reason: str) -> None:
    assert aiter.reject(PROBLEM) is None
    assert aiter.reject(replace(PROBLEM, **changed)) == reason


def test_it_comes_first_on_gfx950(monkeypatch: pytest.MonkeyPatch, standin: Standin) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert oracle.choose(PROBLEM).kernel == "aiter"
    passed_over = oracle.choose(replace(PROBLEM, expert_map=True), elsewhere=True)
    assert passed_over.kernel == "dot_scaled"
    assert "expert_map" in passed_over.passed_over["aiter"]


def _nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


def _broken(monkeypatch: pytest.MonkeyPatch) -> None:
    Standin("aiter.ops.triton", monkeypatch)
    import sys

    monkeypatch.delitem(sys.modules, "aiter.ops.triton.moe_op_gemm_a8w4")


def _without_gammas(monkeypatch: pytest.MonkeyPatch) -> None:
    Standin("aiter.ops.triton.moe", monkeypatch, without="gammas")


@pytest.mark.parametrize(
    ("install", "reason"),
    [
        (_nothing, "The package aiter is not installed."),
        (_broken, "The installed aiter's moe_gemm_a8w4 does not load: aiter.ops.triton.moe.moe_op_gemm_a8w4: "),
        (_without_gammas, "The installed aiter's moe_gemm_a8w4 has no gammas."),
    ],
)
def test_an_aiter_that_does_not_do_is_passed_over(
    install: Callable[[pytest.MonkeyPatch], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    assert "not built for them" in str(aiter.usable())
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert str(aiter.usable()).startswith(reason)
    with pytest.raises(RuntimeError, match="aiter"):
        kernels.load_mxfp4("aiter").run(*[None] * 9)  # type: ignore[arg-type]
