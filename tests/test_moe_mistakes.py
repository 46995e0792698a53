"""What is told about wrong arguments of `torch.ops.w4a16.moe`, eagerly, when compiling, and for its gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_problems import Experts
from torch import Tensor

EXPERTS = Experts(zeros="int", bias=True, expert_map=torch.tensor([1, -1, 0, 3, 2]).int())
X, WEIGHTS, IDS = EXPERTS.routed(3)
FIELDS = [f"{w}_{field}" for w in ("w13", "w2") for field in ("qweight", "scales", "zeros", "bias")]
ARGS: dict[str, Any] = {
    "x": X,
    "topk_weights": WEIGHTS,
    "topk_ids": IDS,
    **dict(zip((*FIELDS, "expert_map"), EXPERTS.in_order(), strict=True)),
    **EXPERTS.settings(),
}
FLOATS = "float16 or bfloat16 or float32"


def strided(t: Tensor) -> Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "x of float64": ({"x": X.double()}, f"x must be {FLOATS}, it is torch.float64"),
    "x a vector": ({"x": X[0]}, r"x must have two dimensions, it is float32 \[64\]"),
    "x of another H": (
        {"x": X[:, :56]},
        r"w13_group_size 32 does not divide 56, the columns of w13; x is float32 \[3, 56\]",
    ),
    "x on another device": ({"x": X.to("meta")}, "w13_qweight is on cpu, x is on meta"),
    "integer router weights": ({"topk_weights": WEIGHTS.int()}, f"topk_weights must be {FLOATS}, it is torch.int32"),
    "fewer router weights": ({"topk_weights": WEIGHTS[:2]}, r"topk_weights must have a row for each of x .*\[2, 2\]"),
    "router weights of another k": (
        {"topk_weights": WEIGHTS[:, :1]},
        r"topk_weights must be \[T, 2\] as topk_ids, it is float32 \[3, 1\]",
    ),
    "router weights elsewhere": ({"topk_weights": WEIGHTS.to("meta")}, "topk_weights is on meta, x is on cpu"),
    "floating-point ids": ({"topk_ids": IDS.float()}, "topk_ids must be int32 or int64, it is torch.float32"),
    "ids of 8 bits": ({"topk_ids": IDS.to(torch.uint8)}, "topk_ids must be int32 or int64, it is torch.uint8"),
    "flat ids": ({"topk_ids": IDS[:, 0]}, r"topk_ids must have two dimensions, it is int64 \[3\]"),
    "more ids": ({"topk_ids": IDS.repeat(2, 1)}, r"topk_ids must have a row for each of x .*\[6, 2\]"),
    "no ids": ({"topk_ids": IDS[:, :0]}, r"topk_ids must name at least one expert for a token, it is int64 \[3, 0\]"),
    "ids elsewhere": ({"topk_ids": IDS.to("meta")}, "topk_ids is on meta, x is on cpu"),
    "codes of one expert": ({"w13_qweight": ARGS["w13_qweight"][0]}, r"w13_qweight must be \[64, 64, 8\].*\[64, 8\]"),
    "no expert": (
        {"w13_qweight": ARGS["w13_qweight"][:0]},
        r"w13_qweight must begin with E >= 1 experts.*\[0, 64, 8\]",
    ),
    "floating-point codes": ({"w13_qweight": ARGS["w13_qweight"].float()}, "w13_qweight must be int32"),
    "bytes for codes": (
        {"w2_qweight": ARGS["w2_qweight"].view(torch.uint8)},
        r"w2_qweight must be (int32, it is |\[4, 64, 32\], it is uint8)",  # bytes are codes of 8 bits
    ),
    "codes with strides": ({"w13_qweight": strided(ARGS["w13_qweight"])}, "w13_qweight must be contiguous"),
    "w2 of fewer experts": (
        {"w2_qweight": ARGS["w2_qweight"][:3]},
        r"w2_qweight must be \[4, 64, 4\], it is int32 \[3, 64, 4\]",
    ),
    "w2 of another I": ({"w2_qweight": ARGS["w2_qweight"][:, :, :2].contiguous()}, r"w2_qweight must be \[4, 64, 4\]"),
    "w2 with strides": ({"w2_qweight": strided(ARGS["w2_qweight"])}, "w2_qweight must be contiguous"),
    "w2 elsewhere": ({"w2_qweight": ARGS["w2_qweight"].to("meta")}, "w2_qweight is on meta, x is on cpu"),
    "integer scales": ({"w13_scales": ARGS["w13_scales"].int()}, f"w13_scales must be {FLOATS}, it is torch.int32"),
    "scales of another group size": ({"w2_scales": ARGS["w2_scales"][..., :1].contiguous()}, r"w2_scales must be \["),
    "scales with strides": ({"w2_scales": strided(ARGS["w2_scales"])}, "w2_scales must be contiguous"),
    "zeros of int32": ({"w13_zeros": ARGS["w13_zeros"].int()}, "w13_zeros must be uint8 or float16"),
    "zeros of another shape": ({"w2_zeros": ARGS["w2_zeros"][:, :5].contiguous()}, r"w2_zeros must be \[4, 64, 2\]"),
    "zeros elsewhere": ({"w2_zeros": ARGS["w2_zeros"].to("meta")}, "w2_zeros is on meta, x is on cpu"),
    "a bias of another dtype": ({"w13_bias": ARGS["w13_bias"].half()}, "w13_bias must be float32, it is torch.float16"),
    "a bias for another dtype": (
        {"x": X.half(), "w2_bias": ARGS["w2_bias"].bfloat16()},
        "w2_bias must be float16 or float32, it is torch.bfloat16",
    ),
    "a bias of another length": ({"w2_bias": ARGS["w2_bias"][:, :63].contiguous()}, r"w2_bias must be \[4, 64\]"),
    "one bias for all": ({"w13_bias": ARGS["w13_bias"][0]}, r"w13_bias must be \[4, 64\], it is float32 \[64\]"),
    "a bias elsewhere": ({"w2_bias": ARGS["w2_bias"].to("meta")}, "w2_bias is on meta, x is on cpu"),
    "a map of int64": ({"expert_map": ARGS["expert_map"].long()}, "expert_map must be int32, it is torch.int64"),
    "a shorter map": ({"expert_map": ARGS["expert_map"][:4]}, r"expert_map must be \[5\], it is int32 \[4\]"),
    "a map elsewhere": ({"expert_map": ARGS["expert_map"].to("meta")}, "expert_map is on meta, x is on cpu"),
    "a map of more than E": ({"global_num_experts": -1}, r"expert_map must be \[4\], it is int32 \[5\]"),
    "no map of more than E": (
        {"expert_map": None},
        "global_num_experts must be -1 or 4 without .*, it is 5",
    ),
    "no experts at all": ({"global_num_experts": 0}, "global_num_experts must be -1 or positive, it is 0"),
    "another intermediate_size": ({"intermediate_size": 24}, r"w13_qweight must be \[4, 48, 8\], it is int32 \[4, 64"),
    "intermediate_size 0": ({"intermediate_size": 0}, "intermediate_size must be a positive multiple of 8, it is 0"),
    "intermediate_size 28": ({"intermediate_size": 28}, "intermediate_size must be a positive multiple of 8, it is 28"),
    "groups that do not divide H": ({"w13_group_size": 24}, "w13_group_size 24 does not divide 64"),
    "groups that do not divide I": ({"w2_group_size": 64}, "w2_group_size 64 does not divide 32"),
    "groups of 0": ({"w13_group_size": 0}, "w13_group_size 0 does not divide 64"),
    "negative groups": ({"w2_group_size": -16}, "w2_group_size -16 does not divide 32"),
    "an activation that is none": ({"activation": "swish"}, "activation must be one of silu, .*; it is 'swish'"),
    "an order that is none": ({"gate_up": "up first"}, "gate_up must be one of halves, .*; it is 'up first'"),
    "no gate, but rows for one": ({"gate_up": "none"}, r"w13_qweight must be \[4, 32, 8\], it is int32 \[4, 64, 8\]"),
    "swigluoai without a gate": ({"activation": "swigluoai", "gate_up": "none"}, "swigluoai' needs a gate"),
    "a limit for silu": ({"limit": 7.0}, "limit must be None, or positive with activation 'swigluoai'; it is 7.0"),
    "a negative limit": ({"activation": "swigluoai", "limit": -7.0}, "limit must be None, or positive.*it is -7.0"),
    "alpha of nan": ({"alpha": float("nan")}, "alpha must be finite, it is nan"),
    "a scaling of inf": ({"routed_scaling": float("inf")}, "routed_scaling must be finite, it is inf"),
    "a kernel that is none": ({"kernel": "magic"}, "There is no kernel 'magic'; the kernels are .*cpu.*reference"),
    "an id too high": ({"topk_ids": IDS.clone().fill_(5)}, r"topk_ids must be -1 or 0\.\.4, there is 5 in it"),
    "an id too low": (
        {"topk_ids": torch.tensor([[0, 1], [2, -2], [0, 1]])},
        r"must be -1 or 0\.\.4, there is -2",
    ),
    "an id beyond 32 bits": ({"topk_ids": IDS + 2**32}, r"topk_ids must be -1 or 0\.\.4, there is 4294967\d+ in it"),
    "a map to no row": (
        {"expert_map": torch.full((5,), 4).int()},
        r"expert_map must be -1 or 0\.\.3, there is 4 in it",
    ),
    "a map to a negative row": ({"expert_map": torch.full((5,), -3).int()}, r"expert_map must be .*there is -3 in it"),
}
UNSEEN = {
    "an id too high",
    "an id too low",
    "an id beyond 32 bits",
    "a map to no row",
    "a map to a negative row",
    "a kernel that is none",
}
"""The fake implementation has no values, and runs no kernel."""


def arguments(change: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    assert set(change) <= set(ARGS)
    given = {**ARGS, **change}
    return [given[name] for name in list(ARGS)[:12]], {name: given[name] for name in list(ARGS)[12:]}


def test_without_a_mistake_it_runs() -> None:
    args, settings = arguments({})
    assert torch.equal(torch.ops.w4a16.moe(*args, **settings), EXPERTS(X, WEIGHTS, IDS))


@pytest.mark.parametrize("kernel", ["cpu", "reference"])  # whose layout this is
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str, kernel: str) -> None:
    change, message = MISTAKES[mistake]
    args, settings = arguments({"kernel": kernel, **change})
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.w4a16.moe(*args, **settings)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_for_the_gradient(mistake: str) -> None:
    change, message = MISTAKES[mistake]
    args, settings = arguments(change)
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.w4a16.moe_grad(X, *args, **settings)


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m not in UNSEEN])
def test_a_mistake_is_named_when_compiling(mistake: str) -> None:
    """The fake implementation has the same door."""
    change, message = MISTAKES[mistake]
    args, settings = arguments(change)
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    for op, given in ((torch.ops.w4a16.moe, args), (torch.ops.w4a16.moe_grad, [X, *args])):
        with mode, pytest.raises((RuntimeError, ValueError), match=message):
            op(*given, **settings)


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (X.double(), f"grad must be {FLOATS}, it is torch.float64"),
        (X[:2], r"grad must have a row for each of x .*\[2, 64\]"),
        (X[:, :8], r"grad must be as x float32 \[3, 64\], it is float32 \[3, 8\]"),
        (X.to("meta"), "grad is on meta, x is on cpu"),
    ],
    ids=["float64", "fewer tokens", "another H", "elsewhere"],
)
def test_a_wrong_gradient_is_named(grad: Tensor, message: str) -> None:
    args, settings = arguments({})
    with pytest.raises(RuntimeError, match=message):
        torch.ops.w4a16.moe_grad(grad, *args, **settings)
