"""Compiled graphs call the CPU kernels' own ops, with the same results as through ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import CompressedTensors, rel_l2
from mxfp4_problems import Mxfp4Experts
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from inductor_ext import passes
from inductor_ext.formats import PackedInt4
from inductor_ext.kernels import cpu, cpu_moe

pytestmark = pytest.mark.skipif(cpu.usable() is not None, reason=str(cpu.usable()))

N, K, G = 48, 64, 32
E, TOP_K, H, I = 4, 2, 64, 32  # noqa: E741
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def both(model: nn.Module, monkeypatch: pytest.MonkeyPatch, *args: Any) -> tuple[Tensor, Tensor]:
    """The results with direct calls, and through our ops; and that it is they that were called."""
    results = []
    for direct in (True, False):
        torch.compiler.reset()
        monkeypatch.setattr(passes, "DIRECT", direct)
        with torch.no_grad():
            result, (code,) = run_and_get_code(torch.compile(model, backend="w4a16", fullgraph=True), *args)
        assert ("torch.ops.w4a16_cpu." in code) == direct
        assert ("torch.ops.w4a16." in code) != direct
        results.append(result)
    return results[0], results[1]


class Around(nn.Module):
    """A layer on what ``view`` makes of x."""

    def __init__(self, layer: nn.Module, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.view = layer, view

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.view(x))


VIEWS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "rows": ((5, K), lambda x: x),
    "one row": ((1, K), lambda x: x),
    "a vector": ((K,), lambda x: x),
    "no rows": ((0, K), lambda x: x),
    "three dimensions": ((2, 3, K), lambda x: x),
    "a transpose": ((K, 5), lambda x: x.t()),
    "some columns": ((5, 2 * K), lambda x: x[:, 8 : K + 8]),
    "one row repeated": ((1, K), lambda x: x.expand(4, K)),
    "two dimensions swapped": ((3, 2, K), lambda x: x.transpose(0, 1)),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_linear(view: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, make = VIEWS[view]
    model = Around(CompressedTensors(N, K, group=G, dtype=dtype, bias=True), make)
    direct, ours = both(model, monkeypatch, torch.randn(shape).to(dtype))
    assert direct.shape == ours.shape
    assert torch.equal(direct, ours)


def test_any_number_of_rows_without_compiling_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "DIRECT", True)
    layer = CompressedTensors(N, K, group=G)
    compiled = torch.compile(layer, backend="w4a16", dynamic=True, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (7, 2, 64, 513):
            x = torch.randn(rows, K)
            assert rel_l2(compiled(x), layer.expected(x)) <= 1e-5


class Experts(nn.Module):
    """Routed experts as a graph that holds the op already."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, rows, columns in (("w13", 2 * I, H), ("w2", H, I)):
            codes = torch.randint(-(2**31), 2**31 - 1, (E * rows, columns // 8), dtype=torch.int32)
            scales = ((torch.rand(E * rows, columns // G) + 0.5) / columns).to(dtype)
            packed = cpu_moe.pack(PackedInt4(codes, scales, None), E)
            self.register_buffer(f"{name}_codes", packed.qweight)
            self.register_buffer(f"{name}_scales", packed.scales)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        w13, w2 = (self.w13_codes, self.w13_scales), (self.w2_codes, self.w2_scales)
        result: Tensor = torch.ops.w4a16.moe(
            x, weights, ids, *w13, None, None, *w2, None, None, None, I, G, G, "gelu", kernel="cpu"
        )
        return result


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weights_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_moe(dtype: torch.dtype, weights_dtype: torch.dtype, strided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    T = 6
    x, weights = torch.randn(T, H).to(dtype), torch.rand(T, TOP_K).to(weights_dtype)
    ids = torch.rand(T, E).topk(TOP_K).indices
    if strided:
        x, weights, ids = (t.t().contiguous().t() for t in (x, weights, ids))
    monkeypatch.setattr(passes, "DIRECT", True)
    model = Experts(dtype)
    expected = model(x, weights, ids)
    torch.compiler.reset()
    with torch.no_grad(), torch._inductor.config.patch(joint_custom_pre_pass=passes.W4A16Pass(direct=True)):
        result, (code,) = run_and_get_code(torch.compile(model, fullgraph=True), x, weights, ids)
    assert "torch.ops.w4a16_cpu.moe" in code
    assert torch.equal(result, expected)


def test_what_the_kernel_cannot_take_stays_with_our_op() -> None:
    """An expert_map, and act-order."""
    T, model = 6, Experts(torch.float32)
    mapped = torch.arange(E, dtype=torch.int32)

    def with_map(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        w13, w2 = (model.w13_codes, model.w13_scales), (model.w2_codes, model.w2_scales)
        result: Tensor = torch.ops.w4a16.moe(
            x, weights, ids, *w13, None, None, *w2, None, None, mapped, I, G, G, kernel="cpu"
        )
        return result

    def permuted(x: Tensor) -> Tensor:
        order = torch.arange(H, dtype=torch.int32).flip(0)
        result: Tensor = torch.ops.w4a16.linear(
            x, model.w13_codes[0], model.w13_scales[0], None, order, None, 2 * I, G, "cpu"
        )
        return result

    x, weights, ids = torch.randn(T, H), torch.rand(T, TOP_K), torch.rand(T, E).topk(TOP_K).indices
    for f, args in ((with_map, (x, weights, ids)), (permuted, (x,))):
        with torch.no_grad(), torch._inductor.config.patch(joint_custom_pre_pass=passes.W4A16Pass(direct=True)):
            result, (code,) = run_and_get_code(torch.compile(f, fullgraph=True), *args)
        assert "w4a16_cpu" not in code
        assert torch.equal(result, f(*args))


def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "DIRECT", True)
    torch.compiler.reset()
    layer = CompressedTensors(N, K, group=G)
    x = torch.randn(5, K, requires_grad=True)
    result, codes = run_and_get_code(torch.compile(layer, backend="w4a16", fullgraph=True), x)
    assert any("torch.ops.w4a16_cpu.linear" in code for code in codes)
    result.sum().backward()
    assert x.grad is not None
    assert rel_l2(x.grad, torch.ones(5, N).double() @ layer.dense()) <= 1e-5


class Mxfp4(nn.Module):
    """Experts in MXFP4 as a graph that holds the op already, in 16 bits or with fp8 activations."""

    def __init__(self, dtype: torch.dtype, scales: tuple[float, float] | None, hidden: int) -> None:
        super().__init__()
        self.experts = Mxfp4Experts(E, hidden, I, dtype, input_scales=scales, kernel="cpu")
        tensors, self.settings = self.experts.arguments()
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"t{i}", tensor)
        self.count, self.op = (
            len(tensors),
            torch.ops.w4a16.moe_mxfp4 if scales is None else torch.ops.w4a16.moe_gemm_a8w4,
        )

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        result: Tensor = self.op(x, weights, ids, *(getattr(self, f"t{i}") for i in range(self.count)), **self.settings)
        return result


@pytest.mark.parametrize("scales", [None, (0.02, 0.05)], ids=["16 bit", "fp8"])
def test_mxfp4(scales: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mxfp4(torch.bfloat16, scales, H)
    x, weights, ids = model.experts.routed(6)
    direct, ours = both(model, monkeypatch, x, weights.bfloat16(), ids)
    assert torch.equal(direct, ours)


def test_mxfp4_that_needs_filling_up_goes_through_our_op(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mxfp4(torch.bfloat16, None, H + 6)
    given = model.experts.routed(6)
    monkeypatch.setattr(passes, "DIRECT", True)
    torch.compiler.reset()
    with torch.no_grad():
        y, (code,) = run_and_get_code(torch.compile(model, backend="w4a16", fullgraph=True), *given)
    assert "torch.ops.w4a16_cpu." not in code and torch.equal(y, model(*given))
