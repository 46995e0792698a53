"""What the Triton kernels behind `w4a16::moe_mxfp4` and `moe_gemm_a8w4` compute: on a GPU, or with TRITON_INTERPRET=1
on the CPU, as test_gpu_mxfp4_choice.py runs this file."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreter import DEVICE, DTYPES, needs_a_device
from moe_problems import MAP
from mxfp4_problems import GPT_OSS, Mxfp4Experts, exact

from inductor_ext import kernels
from inductor_ext.formats import PackedMxfp4
from inductor_ext.kernels import Mlp
from inductor_ext.kernels.gpu import tuning
from inductor_ext.kernels.gpu.tuning import MoeConfig

pytestmark = needs_a_device

A8 = (0.02, 0.05)
"""Input scales with which some activations saturate and some are subnormal."""
PAIRS = MoeConfig(PAIRWISE=True, BN=64, BM=8, WIDTH=32, STAGES=3, num_warps=2)
BLOCKS = MoeConfig(PAIRWISE=False, BN=128, BM=32, WIDTH=32, STAGES=2, num_warps=8)
VARIANTS = {
    "pair by pair": (PAIRS, dataclasses.replace(PAIRS, BN=32)),
    "blocks": (BLOCKS, dataclasses.replace(BLOCKS, BN=64, num_warps=4)),
    "large blocks": (dataclasses.replace(BLOCKS, BM=128), dataclasses.replace(BLOCKS, BM=128)),
}


@pytest.fixture(autouse=True)
def no_memory_is_zero_by_chance() -> Iterator[None]:
    """Memory that is not written to is NaN, and -1 or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, False)
        yield


def made(E: int, H: int, I: int, dtype: torch.dtype, **changed: Any) -> Mxfp4Experts:  # noqa: E741
    return Mxfp4Experts(E, H, I, dtype, **changed, kernel="triton", device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", [None, A8], ids=["16 bit", "fp8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str, scales: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that are whole tiles, whole groups, and (the loop is the same with fp8) neither."""
    monkeypatch.setattr(tuning, "mxfp4", lambda *given: VARIANTS[variant])
    T = 1 if VARIANTS[variant][0].PAIRWISE else 5
    for H, I in ((256, 64), (96, 160), (70, 34))[: 2 if scales else 3]:  # noqa: E741
        experts = made(2, H, I, dtype, input_scales=scales)
        exact(experts, *experts.routed(T))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "mlp", [Mlp(), dataclasses.replace(GPT_OSS, gate_up="halves", apply_router_weight_on_input=True)], ids=str
)
def test_other_activations(mlp: Mlp, dtype: torch.dtype) -> None:
    for T in (1, 9):
        experts = made(4, 64, 40, dtype, bias=T == 1, mlp=mlp)
        exact(experts, *experts.routed(T))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", [None, A8], ids=["16 bit", "fp8"])
def test_choices_of_nobody_contribute_nothing(scales: Any, dtype: torch.dtype) -> None:
    experts = made(4, 64, 32, dtype, expert_map=MAP, input_scales=scales)
    for T in (2, 9):
        x, weights, ids = experts.routed(T)
        ids[0, 0] = -1
        exact(experts, x, weights, ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bytes_", [(0, 1, 2, 100, 128), (0, 126, 130, 140, 254), (0, 120, 128, 129, 255)], ids=str)
def test_every_scale_means_what_the_format_says(bytes_: tuple[int, ...], dtype: torch.dtype) -> None:
    """From 2**-127, which has no exponent of its own, to 2**127, and NaN."""
    experts = made(2, 64, 32, dtype, bias=False, mlp=Mlp("relu", "none"))
    codes, scales = experts.weights["w2"]
    scales[0, : len(bytes_), 0] = torch.tensor(bytes_, dtype=torch.uint8)
    packed = kernels.load_mxfp4("triton").pack(
        PackedMxfp4(codes.flatten(0, 1).to(DEVICE), scales.flatten(0, 1).to(DEVICE)), 2
    )
    experts.tensors["w2_qweight"], experts.tensors["w2_scales"] = packed.qweight, packed.scales
    x, weights, _ = experts.routed(3)
    weights, ids = torch.ones_like(weights[:, :1]), torch.tensor([[0], [1], [0]], device=DEVICE)
    y = experts(x, weights, ids).cpu().double()
    w13, w2 = experts.dense("w13", 0), experts.dense("w2", 0)
    h = torch.relu(x.cpu().double() @ w13.t()).to(dtype).double()
    for n, byte in enumerate(bytes_):
        wanted = h[[0, 2]] @ w2[n]
        if byte == 255:
            assert y[[0, 2], n].isnan().all()
        elif wanted.abs().max() > torch.finfo(dtype).max:
            assert not y[[0, 2], n].isfinite().all()
        else:
            assert (y[[0, 2], n] - wanted).abs().max() <= 0.01 * wanted.abs().max() + torch.finfo(dtype).tiny / 64
    assert y[1].isfinite().all()
