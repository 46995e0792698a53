"""When the kernel "hip" of w4a16::linear is chosen, and why not. What it computes is in test_rdna3_dense.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import dense
import hip_lanes
import pytest
import torch

import inductor_ext.ops
from inductor_ext import oracle
from inductor_ext.kernels import Problem
from inductor_ext.kernels.hip import linear

PROBLEM = Problem("linear", "cuda", "gfx1100", torch.float16, torch.float16, 4096, 4096, 128, "int", True, True)


@pytest.mark.parametrize(
    "changed", [{}, {"zeros": "none"}, {"group_size": 4096}, {"N": 37}, {"K": 96, "group_size": 96}]
)
@pytest.mark.parametrize("arch", hip_lanes.toolchain.ARCHS)
def test_it_is_chosen_before_all_others(arch: str, changed: dict[str, Any]) -> None:
    with hip_lanes.on(arch):
        assert oracle.choose(replace(PROBLEM, arch=arch, **changed)) == oracle.Choice("hip", {})


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"op": "moe"}, "The kernel computes linear, not moe."),
        ({"device": "cpu", "arch": "x86_64"}, "The kernel runs on AMD GPUs, not on cpu (x86_64)."),
        ({"arch": "sm_90"}, "The kernel runs on AMD GPUs, not on cuda (sm_90)."),
        ({"dtype": torch.float32}, "The activations must be float16 or bfloat16, not torch.float32."),
        (
            {"scale_dtype": torch.bfloat16},
            "The scales must have the activations' dtype, torch.float16, not torch.bfloat16.",
        ),
        ({"zeros": "float"}, "The zeros must be integers, not floats."),
        ({"N": 2**26}, "N must be less than 67108864, it is 67108864."),
        ({"group_size": 48, "K": 480}, "The group size must be a multiple of 32 that divides K=480; it is 48."),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_it_cannot_do_is_a_sentence(changed: dict[str, Any], reason: str) -> None:
    assert linear.reject(replace(PROBLEM, **changed)) == reason


def test_an_arch_without_kernels_is_told() -> None:
    reason = linear.reject(replace(PROBLEM, arch="gfx942"))
    assert reason is not None
    assert "gfx942" in reason


def test_activations_of_another_dtype_are_refused() -> None:
    weight = dense.weight(64, 128, 32, device="cpu")
    with pytest.raises(RuntimeError, match=r"takes x in the scales' dtype, torch.float16, not torch.bfloat16"):
        inductor_ext.ops.linear(torch.zeros(1, 128).bfloat16(), *linear.pack(weight), None, 64, 32, "hip")


def test_activations_beyond_the_reach_of_an_offset_are_refused() -> None:
    """WMMA's offsets into x are 32 bits wide."""
    packed = linear.pack(dense.weight(64, 128, 32, device="cpu"))
    x = torch.zeros(1, 1).half().expand(2**24, 128)
    with hip_lanes.on("gfx1100"), pytest.raises(RuntimeError, match=r"\[16777216, 128\] must have less than 4 GiB"):
        linear.run(x, packed, None, 64, 32)


@torch.no_grad()
def test_one_compiled_graph_for_any_number_of_rows() -> None:
    """What surrounds the op is Inductor's code; the op itself turns from dot2 to WMMA within the graph."""
    weight = dense.weight(64, 128, 32, "int", device="cpu")
    packed = linear.pack(weight)

    def layer(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = inductor_ext.ops.linear(2 * x, *packed, None, 64, 32, "hip")
        return y + x[:, :64]

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with hip_lanes.on("gfx1100") as lanes, torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 2, 40):
            x = torch.randn(rows, 128).half()
            assert torch.equal(compiled(x), layer(x))
        names = {call.name for call in lanes.launches()}
    assert any(name.startswith("gptq") for name in names) and any(name.startswith("wmma") for name in names)
