"""Gradients through packed layers: to activations, biases and adapters, never to codes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import GPTQ, SPELLINGS, Calls, CompressedTensors, Packed, rel_l2
from torch import Tensor, nn

import inductor_ext
from inductor_ext.ops import linear

# Of a gradient in its dtype: the sum over rows rounds once more than the op's own result.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1.2e-3}


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="w4a16", fullgraph=True, options={"w4a16.strict": True, **options})


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_gradients_are_those_of_the_dense_layer(
    spelling: type[Packed], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer = spelling(32, 64, bias=True, dtype=dtype)
    if isinstance(layer, GPTQ):
        layer.act_order_()
    x, grad = drawn(*shape, 64, dtype=dtype).requires_grad_(), drawn(*shape, 32, dtype=dtype)
    compiled(layer)(x).backward(grad)
    assert x.grad.dtype == layer.bias.grad.dtype == dtype
    assert rel_l2(x.grad, grad.double() @ layer.dense()) <= BOUNDS[dtype]
    assert rel_l2(layer.bias.grad, grad.double().reshape(-1, 32).sum(0)) <= BOUNDS[dtype]
    assert all(buffer.grad is None for buffer in layer.buffers())


def test_a_bias_alone_is_trained() -> None:
    """x needs no gradient, and none is computed for it."""
    layer = CompressedTensors(32, 64, bias=True)
    compiled(layer)(drawn(5, 64)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((32,), 5.0))


def test_gradients_accumulate() -> None:
    layer = CompressedTensors(32, 64, bias=True)
    run, x = compiled(layer), drawn(5, 64).requires_grad_()
    for _ in range(2):
        run(x).sum().backward()
    assert rel_l2(x.grad, 2 * torch.ones(5, 32).double() @ layer.dense()) <= 2e-6
    assert torch.equal(layer.bias.grad, torch.full((32,), 10.0))


def test_frozen_parameters_get_no_gradient() -> None:
    """Codes and scales as parameters with requires_grad=False, as most loaders make them."""
    layer: Any = CompressedTensors(32, 64)
    for name, tensor in list(layer.named_buffers()):
        delattr(layer, name)
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    x = drawn(5, 64).requires_grad_()
    compiled(layer)(x).sum().backward()
    assert rel_l2(x.grad, torch.ones(5, 32).double() @ layer.dense()) <= 2e-6
    assert [p.grad for p in layer.parameters()] == [None, None]


class Adapted(nn.Module):
    """Two frozen packed layers with low-rank adapters beside them (LoRA)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.ModuleList([CompressedTensors(48, 64, seed=1), GPTQ(32, 48, group=16, seed=2)])
        random = torch.Generator().manual_seed(3)
        sizes = ((4, 64), (48, 4), (4, 48), (32, 4))
        self.adapters = nn.ParameterList([nn.Parameter(torch.randn(s, generator=random) / 8) for s in sizes])

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.adapters
        x = torch.tanh(self.base[0](x) + x @ a.T @ b.T)
        return self.base[1](x) + x @ c.T @ d.T


def test_adapters_are_trained_as_in_eager() -> None:
    eager = Adapted()
    trained = copy.deepcopy(eager)
    stored = {name: tensor.clone() for name, tensor in trained.base.state_dict().items()}
    x, wanted = drawn(16, 64), drawn(16, 32)
    losses = []
    for model, run in ((eager, eager), (trained, compiled(trained))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            loss = (run(x) - wanted).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-5)
    assert losses[5] < losses[3]
    for mine, theirs in zip(trained.parameters(), eager.parameters(), strict=True):
        assert rel_l2(mine, theirs) <= 1e-5
    assert all(torch.equal(tensor, stored[name]) for name, tensor in trained.base.state_dict().items())


def test_gradient_checkpointing() -> None:
    model = Adapted()
    x = drawn(4, 64)
    gradients = []
    for run in (model, torch.compile(model, backend="w4a16")):
        model.zero_grad()
        torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(rel_l2(mine, theirs) <= 1e-5 for mine, theirs in zip(*reversed(gradients), strict=True))


def test_training_and_inference_of_one_model() -> None:
    """The same compiled model under grad and no_grad, in turn."""
    layer = GPTQ(32, 64, bias=True)
    run, x = compiled(layer), drawn(5, 64)
    for _ in range(2):
        with torch.no_grad():
            assert rel_l2(run(x), layer.expected(x)) <= 2e-6
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.sum().backward()
        assert rel_l2(y, layer.expected(x)) <= 2e-6
        assert rel_l2(leaf.grad, torch.ones(5, 32).double() @ layer.dense()) <= 2e-6


def test_the_backward_pass_under_autocast() -> None:
    layer = CompressedTensors(32, 64, bias=True)
    x = drawn(5, 64).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(layer)(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert rel_l2(x.grad, torch.ones(5, 32).double() @ layer.dense()) <= 4e-3


def with_trained_scales(seed: int = 0) -> Any:
    layer: Any = CompressedTensors(32, 64, seed=seed)
    scales = layer.weight_scale
    del layer.weight_scale
    layer.weight_scale = nn.Parameter(scales)
    return layer


def test_scales_that_are_trained_are_left_alone_and_trained() -> None:
    layer, x = with_trained_scales(), drawn(5, 64)
    (alone,) = inductor_ext.explain(layer, x).left_alone
    assert "requires a gradient" in alone.reason
    gradients = []
    for backend in ("inductor", "w4a16"):
        torch.compiler.reset()
        layer.zero_grad()
        torch.compile(layer, backend=backend)(x).square().sum().backward()
        gradients.append(layer.weight_scale.grad.clone())
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


def test_scales_that_are_trained_are_fused_for_inference(calls: Calls) -> None:
    """And follow the training: every step moves them."""
    layer, x = with_trained_scales(), drawn(5, 64)
    run = torch.compile(layer, backend="w4a16")
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
    for step in range(3):
        with torch.no_grad():
            assert len(inductor_ext.explain(layer, x).rewritten) == 1
            assert rel_l2(run(x), layer.expected(x)) <= 2e-6
        assert calls.runs == step + 1
        optimizer.zero_grad()
        run(x).square().sum().backward()
        optimizer.step()


def test_a_layer_whose_scales_begin_to_be_trained() -> None:
    """requires_grad_() after compilation: the fused graph would give those scales no gradient."""
    layer: Any = with_trained_scales()
    layer.weight_scale.requires_grad_(False)
    x = drawn(5, 64).requires_grad_()
    run = torch.compile(layer, backend="w4a16")
    run(x).sum().backward()
    layer.weight_scale.requires_grad_(True)
    run(x).square().sum().backward()
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), layer.weight_scale)
    assert rel_l2(layer.weight_scale.grad, wanted) <= 1e-5


@pytest.mark.filterwarnings("error")
def test_the_gradient_of_the_gradient() -> None:
    """y is linear in x, so the second derivative of its square is 2 W^T W."""
    layer = CompressedTensors(32, 64)
    x, direction = drawn(64).requires_grad_(), drawn(64).roll(1)
    y = linear(x, layer.weight_packed, layer.weight_scale, None, None, None, 32, 32, "reference")
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first, x, direction)
    assert rel_l2(second, 2 * layer.dense().T @ (layer.dense() @ direction.double())) <= 2e-6
