"""What the C++ CPU kernel of `w4a16::moe` refuses: at the op's door, each mistake named, and before it is chosen."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import inductor_ext.ops  # noqa: F401  registers torch.ops.w4a16_cpu
from inductor_ext.kernels import Mlp, MoeProblem, WeightKind, cpu_moe


def arguments() -> dict[str, Any]:
    return {
        "x": torch.zeros(3, 64),
        "topk_weights": torch.ones(3, 2),
        "topk_ids": torch.zeros(3, 2, dtype=torch.int32),
        "w13_codes": torch.zeros(4, 80, 8, dtype=torch.int32),
        "w13_scales": torch.ones(4, 80, 2),
        "w13_zeros": None,
        "w13_bias": None,
        "w2_codes": torch.zeros(4, 64, 5, dtype=torch.int32),
        "w2_scales": torch.ones(4, 64, 5),
        "w2_zeros": None,
        "w2_bias": None,
        "w13_group_size": 32,
        "w2_group_size": 8,
        "activation": "silu",
        "gate_up": "halves",
        "alpha": 1.702,
        "limit": None,
        "apply_router_weight_on_input": False,
        "routed_scaling": 1.0,
    }


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "x dtype": ({"x": torch.zeros(3, 64).int()}, "x must be bfloat16, float16 or float32; it is Int"),
    "x columns": (
        {"x": torch.zeros(3, 60)},
        r"x must have a positive multiple of 8 columns \(H\); its shape is \[3, 60\]",
    ),
    "other H": (
        {"x": torch.zeros(3, 96)},
        r"w13_codes must be \[E, N, K/8\] = \[4, 80, 12\]; its shape is \[4, 80, 8\]",
    ),
    "ids dtype": ({"topk_ids": torch.zeros(3, 2)}, "topk_ids must be int32 or int64; it is Float"),
    "no choices": (
        {"topk_ids": torch.zeros(3, 0).int(), "topk_weights": torch.zeros(3, 0)},
        r"topk_ids must have at least one choice a token, \[T, k\]; its shape is \[3, 0\]",
    ),
    "ids shape": (
        {"topk_ids": torch.zeros(2, 2).int()},
        r"topk_ids must be \[T, k\] = \[3, 2\]; its shape is \[2, 2\]",
    ),
    "id too high": (
        {"topk_ids": torch.tensor([[0, 1], [4, 0], [0, 0]]).int()},
        r"topk_ids must be -1 or 0\.\.3, there is 4 in it",
    ),
    "id too low": (
        {"topk_ids": torch.tensor([[0, 1], [-2, 0], [0, 0]])},
        r"topk_ids must be -1 or 0\.\.3, there is -2 in it",
    ),
    "id beyond 32 bits": (
        {"topk_ids": torch.full((3, 2), 2**32)},
        r"topk_ids must be -1 or 0\.\.3, there is 4294967296 in it",
    ),
    "weights dtype": ({"topk_weights": torch.ones(3, 2).half()}, "topk_weights must be float32; it is Half"),
    "weights shape": (
        {"topk_weights": torch.ones(3, 1)},
        r"topk_weights must be \[T, k\] = \[3, 2\]; its shape is \[3, 1\]",
    ),
    "activation": ({"activation": "tanh"}, r'activation must be one of "silu", .*; it is "tanh"'),
    "gate_up": ({"gate_up": "up"}, r'gate_up must be one of "halves", "interleaved", "none"; it is "up"'),
    "no gate": ({"activation": "swigluoai", "gate_up": "none"}, "swigluoai needs a gate"),
    "rows of w13": ({"gate_up": "none"}, r"w13_codes must be \[E, N, K/8\] = \[4, 40, 8\]; its shape is \[4, 80, 8\]"),
    "codes dims": (
        {"w13_codes": torch.zeros(80, 8).int()},
        r"w13_codes must have 3 dimensions; its shape is \[80, 8\]",
    ),
    "codes dtype": ({"w2_codes": torch.zeros(4, 64, 5)}, "w2_codes must be int32; it is Float"),
    "experts": ({"w2_codes": torch.zeros(3, 64, 5).int()}, r"w2_codes must be \[E, N, K/8\] = \[4, 64, 5\]"),
    "no I": ({"w2_codes": torch.zeros(4, 64, 0).int()}, r"w2_codes must have at least one word a row"),
    "strides": ({"w2_codes": torch.zeros(4, 5, 64).int().mT}, "w2_codes must be contiguous"),
    "scales": (
        {"w13_scales": torch.ones(4, 80, 1)},
        r"w13_scales must be \[E, N, K/group_size\] = \[4, 80, 2\]; its shape is \[4, 80, 1\]",
    ),
    "scales dtype": ({"w2_scales": torch.ones(4, 64, 5).double()}, "w2_scales must be bfloat16, float16 or float32"),
    "zeros": ({"w2_zeros": torch.zeros(4, 64, 4).byte()}, r"w2_zeros must be \[E, N, K/group_size\] = \[4, 64, 5\]"),
    "zeros value": ({"w2_zeros": torch.full((4, 64, 5), 17).byte()}, r"w2_zeros of uint8 must be in 0\.\.16; .* is 17"),
    "group of w13": (
        {"w13_group_size": 24},
        "w13_group_size must be a positive multiple of 8 that divides H = 64; it is 24",
    ),
    "group of w2": (
        {"w2_group_size": 16},
        "w2_group_size must be a positive multiple of 8 that divides I = 40; it is 16",
    ),
    "bias dtype": ({"w13_bias": torch.zeros(4, 80).half()}, "w13_bias must be of x's dtype or float32; it is Half"),
    "bias shape": ({"w2_bias": torch.zeros(4, 80)}, r"w2_bias must be \[E, H\] = \[4, 64\]; its shape is \[4, 80\]"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str) -> None:
    change, message = MISTAKES[name]
    torch.ops.w4a16_cpu.moe(**arguments())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.w4a16_cpu.moe(**(arguments() | change))


def test_what_is_rejected() -> None:
    kind = WeightKind(torch.float16, 32, "int")
    good = MoeProblem("cpu", "x86_64", torch.bfloat16, 8, 2, 64, 96, kind, kind, Mlp(), True, True)
    assert cpu_moe.reject(good) is None

    def reason(**change: Any) -> str:
        return str(cpu_moe.reject(dataclasses.replace(good, **change)))

    assert "linear" in reason(op="linear")
    assert "cuda" in reason(device="cuda")
    assert "float64" in reason(dtype=torch.float64)
    assert "scales" in reason(w2=dataclasses.replace(kind, scale_dtype=torch.float64))
    assert "12" in reason(w13=dataclasses.replace(kind, group_size=12))
    assert "K=96" in reason(w2=dataclasses.replace(kind, group_size=64))
    assert "tanh" in reason(mlp=Mlp("tanh"))
    assert "up" in reason(mlp=Mlp(gate_up="up"))
    assert "gate" in reason(mlp=Mlp("swigluoai", "none"))
