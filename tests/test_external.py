"""Bindings to other people's kernels: stand-ins with their signatures check every argument and compute what they would,
and the result is compared with the reference kernel's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import standins
import torch
from layouts import same, weight
from models import OWED, rel_l2
from test_oracle import MOE
from torch import Tensor

import inductor_ext.ops  # noqa: F401  registers torch.ops.w4a16
from inductor_ext import kernels
from inductor_ext.kernels import Mlp, Routing, reference, reference_moe
from inductor_ext.kernels.external import batched_marlin, flashinfer_moe, marlin, marlin_moe, marlin_ops, xpu_moe
from inductor_ext.layouts import Experts
from inductor_ext.layouts.experts import parted
from inductor_ext.oracle import convert

H100 = {"device": "cuda", "arch": "sm_90"}
B200 = {"device": "cuda", "arch": "sm_100"}
SIZED = replace(MOE, E=4, H=256, I=256, **H100)


@pytest.fixture(autouse=True)
def nothing_is_looked_up_before() -> Iterator[None]:
    cached = (marlin_ops.found, flashinfer_moe.usable, xpu_moe.usable)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


# -- Marlin, dense -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", standins.DENSE)
@pytest.mark.parametrize(
    ("kind", "G", "bias", "M"),
    [("symmetric", 32, False, 1), ("asymmetric", 64, True, 3), ("act-order", 32, True, 3), ("symmetric", 128, True, 3)],
)
def test_marlin_dense(name: str, kind: str, G: int, bias: bool, M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    N, K = 64, 128
    one = weight(kind, 1, N, K, G, 3, torch.float16, (0, 15)).expert(0)
    x, b = torch.randn(M, K).half(), torch.randn(N).half() if bias else None
    source = next(s for s in marlin_ops.DENSE if name in s.op.replace("*", "fp16"))
    monkeypatch.setattr(marlin_ops, "DENSE", (source,))
    with standins.op(name, standins.DENSE[name], standins.marlin_gemm):
        y = torch.ops.w4a16.linear(x, *marlin.pack(one), b, N, G, "marlin")
    wanted = reference.run(x.float(), reference.pack(one), b, N, G)
    assert rel_l2(y, wanted) <= OWED[torch.float16]


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "act-order"])
def test_marlin_dense_there_and_back(kind: str) -> None:
    one = weight(kind, 1, 64, 128, 64, 3, torch.float16).expert(0)
    back = marlin.unpack(marlin.pack(one), 64, 128, 64)
    for a, b in zip(
        (back.codes, back.scales, back.zeros, back.order), (one.codes, one.scales, one.zeros, one.order), strict=True
    ):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_the_first_package_that_has_the_op_is_taken() -> None:
    seen = []

    def of(name: str) -> Any:
        def compute(**given: Any) -> Tensor:
            seen.append(name)
            return standins.marlin_gemm(**given)

        return compute

    vllm, gptqmodel = standins.DENSE
    one = weight("symmetric", 1, 64, 128, 32, 3, torch.float16).expert(0)
    call = lambda: marlin.run(torch.randn(1, 128).half(), marlin.pack(one), None, 64, 32)  # noqa: E731
    with standins.op(gptqmodel, standins.DENSE[gptqmodel], of("gptqmodel")):
        call()
        marlin_ops.found.cache_clear()
        with standins.op(vllm, standins.DENSE[vllm], of("vllm")):
            call()
    assert seen == ["gptqmodel", "vllm"]


# -- experts -----------------------------------------------------------------------------------------------------------


def layer(E: int, H: int, I: int, G: int, kind: str, dtype: torch.dtype) -> tuple[Experts, Experts]:  # noqa: E741
    w13, w2 = (weight(kind, E, n, k, G, n + k, dtype, (0, 15)) for n, k in ((2 * I, H), (H, I)))
    small = lambda w: replace(w, scales=w.scales / 16)  # noqa: E731  so that sums do not overflow
    return small(w13), small(w2)


def check(
    kernel: Any, w13: Experts, w2: Experts, mlp: Mlp, T: int, bias: bool, mapped: bool, dtype: torch.dtype, owed: float
) -> None:
    """Through the op; some choices are of nobody, with weights that are NaN."""
    E, H, I, G = w13.E, w13.K, w2.K, w13.group_size  # noqa: E741
    random = torch.Generator().manual_seed(T)
    number = E + 1 if mapped else E
    expert_map = torch.tensor([1, -1, 0, *range(2, E)]).int() if mapped else None
    ids = torch.rand(T, number, generator=random).argsort(1)[:, :2]
    weights = torch.rand(T, 2, generator=random)
    ids[0, 0], weights[0, 0], weights[0, 1] = -1, float("nan"), -0.5
    x = torch.randn(T, H, generator=random).to(dtype)
    biases = [torch.randn(E, n, generator=random).to(dtype).float() if bias else None for n in (2 * I, H)]
    settings = (I, G, G, mlp.activation, mlp.gate_up, mlp.alpha, mlp.limit, False, mlp.routed_scaling, number)

    def call(x: Tensor, name: str) -> Tensor:
        module = kernels.load_moe(name)
        a, b = (convert.packed_for(module, replace(w, bias=None), w is w13)[:3] for w in (w13, w2))
        y: Tensor = torch.ops.w4a16.moe(x, weights, ids, *a, biases[0], *b, biases[1], expert_map, *settings, name)
        return y

    y = call(x, kernel.NAME)
    assert y.dtype == dtype
    assert rel_l2(y, call(x.float(), "reference")) <= owed
    # The gradient reads the layout back.
    mine, theirs = x.clone().detach().requires_grad_(), x.float().detach().requires_grad_()
    call(mine, kernel.NAME).sum().backward()
    call(theirs, "reference").sum().backward()
    assert rel_l2(mine.grad, theirs.grad) <= OWED[dtype]


@pytest.mark.parametrize("name", standins.EXPERTS)
@pytest.mark.parametrize(
    ("kind", "mlp", "T", "bias", "mapped"),
    [
        ("symmetric", Mlp(), 2, False, False),
        ("asymmetric", Mlp("swigluoai", "interleaved", limit=7.0, routed_scaling=2.5), 3, True, True),
        ("symmetric", Mlp("gelu"), 24, False, True),
    ],
)
def test_marlin_experts(
    name: str, kind: str, mlp: Mlp, T: int, bias: bool, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = next(s for s in marlin_ops.EXPERTS if s.op == name)
    monkeypatch.setattr(marlin_ops, "EXPERTS", (source,))
    with standins.op(name, standins.EXPERTS[name], standins.moe_wna16_marlin_gemm):
        w13, w2 = layer(3, 128, 64, 32, kind, torch.float16)
        check(marlin_moe, w13, w2, mlp, T, bias, mapped, torch.float16, 2 * OWED[torch.float16])


def test_marlin_on_batched_tokens() -> None:
    name = next(iter(standins.EXPERTS))
    w13, w2 = layer(3, 128, 64, 32, "symmetric", torch.float16)
    x, counts = torch.randn(3, 4, 128).half(), torch.tensor([4, 0, 2])
    x[2, 2:] = float("nan")
    packed = [marlin_moe.pack(w.joined(), 3) for w in (w13, w2)]
    rest = (None, None, Mlp(), 64, (32, 32))
    with standins.op(name, standins.EXPERTS[name], standins.moe_wna16_marlin_gemm):
        y = batched_marlin.run_batched(x, counts, *packed, *rest)
    assert y.shape == x.shape and not y[1].any() and not y[2, 2:].any()
    own = [reference_moe.pack(w.joined(), 3) for w in (w13, w2)]
    for e, count in enumerate(counts.tolist()):
        rows = x[e, :count].float()
        routing = Routing(torch.ones(count, 1), torch.full((count, 1), e), None, 3)
        if count:
            assert rel_l2(y[e, :count], reference_moe.run(rows, routing, *own, *rest)) <= 2 * OWED[torch.float16]
    with pytest.raises(RuntimeError, match=r"x must be \[3, T, H\] and expert_num_tokens \[3\]"):
        batched_marlin.run_batched(x[:2], counts, *packed, *rest)
    with pytest.raises(RuntimeError, match="call run_batched"):
        batched_marlin.run()


@pytest.mark.parametrize("G", [32, 128])
@pytest.mark.parametrize("T", [1, 9])
def test_flashinfer_experts(T: int, G: int, monkeypatch: pytest.MonkeyPatch) -> None:
    op = standins.trtllm_mxint4_block_scale_routed_moe
    standins.module(monkeypatch, "flashinfer.fused_moe", **{op.__name__: op})
    w13, w2 = layer(4, 256, 256, G, "symmetric", torch.bfloat16)
    check(flashinfer_moe, w13, w2, Mlp(routed_scaling=1.5), T, False, False, torch.bfloat16, 1.5 * OWED[torch.bfloat16])


@pytest.mark.parametrize(
    ("mlp", "bias", "mapped"),
    [
        (Mlp(), False, False),
        (Mlp("swigluoai", "interleaved", limit=7.0), True, True),
        (Mlp("gelu", routed_scaling=2.5), True, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_xpu_experts(dtype: torch.dtype, mlp: Mlp, bias: bool, mapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    standins.module(monkeypatch, "vllm_xpu_kernels.fused_moe_interface", xpu_fused_moe=standins.xpu_fused_moe)
    w13, w2 = layer(3, 64, 96, 32, "symmetric", dtype)
    check(xpu_moe, w13, w2, mlp, 5, bias, mapped, dtype, OWED[dtype])


@pytest.mark.parametrize("kernel", [marlin_moe, flashinfer_moe, xpu_moe])
def test_experts_there_and_back(kernel: Any) -> None:
    w13, w2 = layer(4, 256, 256, 64, "symmetric", torch.bfloat16)
    for w, is_w13 in ((w13, True), (w2, False)):
        packed = convert.packed_for(kernel, w, is_w13)
        layout = kernel.layout(packed, w.E, w.N, w.K, 64)
        for t, expected in zip(packed, layout, strict=True):
            assert t is None or (tuple(t.shape) == expected.shape and t.dtype in expected.dtypes)
        same(parted(kernels.unpack_experts(kernel, packed, w.N, w.K, 64, is_w13), w.E), w)


def test_a_zero_that_marlin_has_no_code_for_is_told() -> None:
    w13, _ = layer(2, 128, 64, 32, "asymmetric", torch.float16)
    sixteen = replace(w13, zeros=torch.full_like(w13.zeros, 16))
    with pytest.raises(ValueError, match=r"zeros must be within 0\.\.15, not within 16\.\.16"):
        marlin_moe.pack(sixteen.joined(), 2)


def test_numbers_of_scalar_types() -> None:
    assert marlin_ops.scalar_type(zeros=True) == standins.UINT4
    assert marlin_ops.scalar_type(zeros=False) == standins.UINT4B8


def test_wrong_dtypes_are_refused_by_hand_too() -> None:
    one = weight("symmetric", 1, 64, 128, 32, 3, torch.float16).expert(0)
    for x in (torch.randn(1, 128), torch.randn(1, 128).bfloat16()):
        with pytest.raises(RuntimeError, match="Marlin takes float16 or bfloat16, and scales of x's dtype"):
            torch.ops.w4a16.linear(x, *marlin.pack(one), None, 64, 32, "marlin")
