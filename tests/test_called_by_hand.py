"""An op may be called with a kernel's name by hand, where no one asks whether the kernel can: what it cannot is an
error, and no other result."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from aiter_standin import PATHS, Standin
from mxfp4_problems import GPT_OSS, Mxfp4Experts

from inductor_ext.kernels import Mlp, Routing
from inductor_ext.kernels.external import aiter_moe
from inductor_ext.kernels.gpu import mxfp4, mxfp4_scaled, runtime
from inductor_ext.kernels.hip import experts as hip

A8 = (0.02, 0.05)


def called(experts: Mxfp4Experts, kernel: str, mlp: Mlp) -> torch.Tensor:
    """With the kernel's weights, made for what it can do."""
    experts.kernel, experts.mlp = kernel, mlp
    return experts(*experts.routed(3))


@pytest.mark.parametrize(
    ("mlp", "reason"),
    [
        (Mlp("silu"), "AITER computes swigluoai of interleaved gates and ups, not silu"),
        (dataclasses.replace(GPT_OSS, gate_up="halves"), r"swigluoai of interleaved .*, not swigluoai \(halves\)"),
        (dataclasses.replace(GPT_OSS, limit=None), "swigluoai always clamps"),
        (
            dataclasses.replace(GPT_OSS, apply_router_weight_on_input=True),
            "by the router's weight after the activation",
        ),
    ],
    ids=["silu", "halves", "no limit", "on input"],
)
def test_aiter_with_another_activation(monkeypatch: pytest.MonkeyPatch, mlp: Mlp, reason: str) -> None:
    aiter_moe.bound.cache_clear()
    Standin(next(iter(PATHS)), monkeypatch)
    monkeypatch.setattr(aiter_moe, "reject", lambda problem: None)
    experts = Mxfp4Experts(dtype=torch.bfloat16, input_scales=A8, kernel="aiter")
    with pytest.raises(RuntimeError, match=reason):
        called(experts, "aiter", mlp)
    aiter_moe.bound.cache_clear()


@pytest.mark.parametrize("kernel", [mxfp4, mxfp4_scaled], ids=["triton", "dot_scaled"])
def test_triton_with_fp8_and_the_router_s_weight_on_the_input(monkeypatch: pytest.MonkeyPatch, kernel: object) -> None:
    monkeypatch.setattr(runtime, "require", lambda x: None)
    monkeypatch.setattr(runtime, "arch_of", lambda device: "gfx950")
    monkeypatch.setattr(kernel, "reject", lambda problem: None)
    experts = Mxfp4Experts(dtype=torch.float16, input_scales=A8, kernel=kernel.NAME)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="rounds x to fp8 once, not once for each weight"):
        called(experts, experts.kernel, dataclasses.replace(GPT_OSS, apply_router_weight_on_input=True))


def test_hip_with_more_experts_than_it_counts() -> None:
    x, ids = torch.zeros(1, 32, dtype=torch.float16), torch.zeros(1, 1, dtype=torch.int32)
    routing = Routing(torch.ones(1, 1), ids, None, 4097)
    codes, scales = torch.empty(4097, 4, 64, dtype=torch.int32, device="meta"), torch.empty(4097, 1, 64).half()
    weight = hip.Packed(codes, scales, None, None)
    with pytest.raises(RuntimeError, match="There may be 4096 experts at most, not 4097"):
        hip.require(x, routing, weight, weight, 32)


@pytest.mark.parametrize("columns", [64, 50])
def test_cpu_with_x_of_another_width(columns: int) -> None:
    """Both are filled up to as many columns as the weights have."""
    experts = Mxfp4Experts(H=96 if columns == 64 else 64, kernel="cpu", dtype=torch.float32)
    x, weights, ids = experts.routed(3)
    with pytest.raises(RuntimeError, match=r"w(13|2)_qweight must be"):
        experts(x[:, :columns].contiguous(), weights, ids)
