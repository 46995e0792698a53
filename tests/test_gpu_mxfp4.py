"""The Triton kernels behind `w4a16::moe_mxfp4` and `moe_gemm_a8w4` on a GPU: the field's sizes, every number of tokens,
the same bits every time, CUDA graphs. More of their numbers are in test_mxfp4_numbers.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mxfp4_problems import SIZES, Mxfp4Experts, exact

from inductor_ext.kernels.gpu import mxfp4, mxfp4_scaled, runtime

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA or ROCm device, and this machine has none"
)

A8 = (0.02, 0.05)
"""Input scales with which some activations saturate and some are subnormal."""
ACTIVATIONS = pytest.mark.parametrize("scales", [None, A8], ids=["16 bit", "fp8"])


def made(E: int, H: int, I: int, dtype: torch.dtype = torch.bfloat16, **changed: Any) -> Mxfp4Experts:  # noqa: E741
    return Mxfp4Experts(E, H, I, dtype, **changed, kernel="triton", device="cuda")


def poison() -> None:
    """Leaves NaN in the memory that the next tensors get: what a kernel forgets to write shows it."""
    for size in (1 << 26, 1 << 20, 1 << 20, 1 << 17, 1 << 15, 1 << 12, 1 << 9):
        torch.full((size // 4,), float("nan"), device="cuda")


@ACTIVATIONS
@pytest.mark.parametrize("size", [(32, 6144, 3072, 128, 4), *SIZES], ids=str)
def test_the_field_s_sizes(size: tuple[int, ...], scales: tuple[float, float] | None) -> None:
    """Gathered by the router's choices, with biases, SWIGLUOAI between, and scattered with their weights."""
    T, N, H, E, k = size
    experts = made(E, H, N // 2, input_scales=scales)
    x, weights, ids = experts.routed(T, k)
    if N == 6144:
        ids = ids % 8 * (E // 8) + torch.arange(k, device="cuda")  # of a few experts: float64 is slow
    poison()
    exact(experts, x, weights, ids)


@ACTIVATIONS
@pytest.mark.parametrize("T", [1, 2, 7, 33, 64, 257, 1025])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_tokens(dtype: torch.dtype, T: int, scales: tuple[float, float] | None) -> None:
    for E, k, H, I in ((32, 4, 360, 200), (4, 2, 256, 128), (64, 8, 130, 66)):  # noqa: E741
        experts = made(E, H, I, dtype, input_scales=scales)
        routed = experts.routed(T, k)
        poison()
        exact(experts, *routed)


@ACTIVATIONS
@pytest.mark.parametrize("T", [1, 16, 256])
def test_dot_scaled_computes_the_same(T: int, scales: tuple[float, float] | None) -> None:
    """On the weights as they are stored."""
    if mxfp4_scaled.why_not_on(runtime.arch_of(torch.device("cuda", 0))) is not None:
        pytest.skip("dot_scaled does not run on this device")
    ours, scaled = (made(8, 360, 200, input_scales=scales) for _ in range(2))
    scaled.kernel = "dot_scaled"
    for name, (codes, bytes_) in scaled.weights.items():
        scaled.tensors |= {f"{name}_qweight": codes.cuda(), f"{name}_scales": bytes_.cuda()}
    routed = ours.routed(T)
    exact(ours, *routed)
    exact(scaled, *routed)


@ACTIVATIONS
@pytest.mark.parametrize("T", [1, 33, 257])
def test_a_graph_is_right_for_other_tokens_and_routings(T: int, scales: tuple[float, float] | None) -> None:
    experts = made(16, 256, 128, input_scales=scales)
    routings = [experts.routed(T) for _ in range(4)]
    held = [t.clone() for t in routings[0]]
    tensors, settings = experts.arguments()
    op = torch.ops.w4a16.moe_mxfp4 if scales is None else torch.ops.w4a16.moe_gemm_a8w4
    op(*held, *tensors, **settings)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(*held, *tensors, **settings)
    for given in routings:
        for mine, new in zip(held, given, strict=True):
            mine.copy_(new)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, experts(*given))


def test_packing_on_the_device_is_as_on_the_cpu() -> None:
    from inductor_ext.formats import PackedMxfp4

    experts = made(4, 200, 70)
    codes, scales = (t.flatten(0, 1) for t in experts.weights["w13"])
    here = mxfp4.pack(PackedMxfp4(codes, scales), 4)
    there = mxfp4.pack(PackedMxfp4(codes.cuda(), scales.cuda()), 4)
    assert torch.equal(here.qweight, there.qweight.cpu()) and torch.equal(here.scales, there.scales.cpu())
