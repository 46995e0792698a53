"""Gradients through `torch.ops.w4a16.moe`: to x and the router's weights, and to nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models import recompiles, rel_l2
from moe_problems import DTYPES, KERNELS, MAP, MLPS, OWED, Experts, on_a_gpu
from torch import Tensor


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def gradients(y: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """Of a sum in which every element of y counts differently."""
    factors = torch.linspace(-1, 2, y.numel()).view(y.shape)
    return torch.autograd.grad((y * factors.to(y)).sum(), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_are_those_of_the_dense_experts(kernel: str, mlp: str, dtype: torch.dtype) -> None:
    """Eagerly; choices of nobody, of experts elsewhere and of one expert twice among them."""
    experts = Experts(dtype=dtype, zeros="float", bias=True, mlp=MLPS[mlp], expert_map=MAP, kernel=kernel)
    x, weights, ids = experts.routed(12, 3)
    ids[2, 1], ids[3], ids[4, 1] = -1, -1, ids[4, 0]
    leaves = x.requires_grad_(), weights.requires_grad_()
    found = gradients(experts(*leaves, ids), *leaves)
    wanted = gradients(experts.expected(*leaves, ids), *leaves)
    for own, other in zip(found, wanted, strict=True):
        assert rel_l2(own, other) <= OWED[dtype]
        assert torch.equal(own == 0, other == 0)  # exactly nothing where nothing was chosen
    assert torch.equal(found[0], gradients(experts(*leaves, ids), *leaves)[0])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mlp", ["silu", "weight on the input", "swigluoai", "gelu_tanh without a gate"])
def test_gradients_are_what_differences_say(mlp: str, kernel: str) -> None:
    experts = Experts(bias=True, mlp=MLPS[mlp], kernel=kernel)
    x, weights, ids = experts.routed(6)
    leaves = x.requires_grad_(), weights.requires_grad_()
    for i, found in enumerate(gradients(experts(*leaves, ids), *leaves)):
        step = torch.randn(leaves[i].shape, generator=torch.Generator().manual_seed(i)) * 1e-2
        ends = [[t + sign * step if i == j else t for j, t in enumerate(leaves)] for sign in (1, -1)]
        high, low = (experts(*end, ids).detach().double() for end in ends)
        factors = torch.linspace(-1, 2, high.numel()).view(high.shape)
        difference = float(((high - low) * factors).sum()) / 2
        assert difference == pytest.approx(float((found * step).sum()), rel=2e-3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_when_compiled(kernel: str) -> None:
    """One graph, forward and backward, for any number of tokens; x alone or the weights alone as well."""
    experts = Experts(bias=True, kernel=kernel)
    compiled = torch.compile(lambda x, w, ids: experts(x.sin(), w.sigmoid(), ids), fullgraph=True, dynamic=True)
    for T, needed in ((7, (0, 1)), (3, (0, 1)), (5, (0,)), (5, (1,))):
        x, weights, ids = experts.routed(T)
        leaves = [(x, weights)[i].requires_grad_() for i in needed]
        found = gradients(compiled(x, weights, ids), *leaves)
        wanted = gradients(experts.expected(x.sin(), weights.sigmoid(), ids), *leaves)
        assert all(rel_l2(own, other) <= 1e-5 for own, other in zip(found, wanted, strict=True))
    assert recompiles() <= 3  # one for each set of leaves


def test_weights_of_what_is_not_chosen_do_not_reach_a_gradient() -> None:
    experts = Experts()
    x, weights, ids = experts.routed(3)
    ids[1, 0], weights[1, 0] = -1, float("nan")
    leaves = x.requires_grad_(), weights.requires_grad_()
    for_x, for_weights = gradients(experts(*leaves, ids), *leaves)
    assert torch.isfinite(for_x).all() and for_weights[1, 0] == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_of_tensors_with_strides(kernel: str) -> None:
    experts = Experts(bias=True, kernel=kernel)
    x, weights, ids = experts.routed(6)
    leaves = [t.t().contiguous().t().requires_grad_() for t in (x, weights)]
    y = experts(*leaves, ids.t().contiguous().t())
    found = torch.autograd.grad(y, leaves, torch.ones(64, 6).t())
    wanted = torch.autograd.grad(experts.expected(*leaves, ids), leaves, torch.ones(6, 64).double())
    assert all(rel_l2(own, other) <= 1e-5 for own, other in zip(found, wanted, strict=True))


def test_no_gradient_without_tokens() -> None:
    experts = Experts()
    x, weights, ids = experts.routed(0)
    x.requires_grad_()
    (for_x,) = gradients(experts(x, weights, ids), x)
    assert for_x.shape == (0, 64)


@pytest.mark.parametrize("name", ["w13_bias", "w2_bias", "w13_scales", "w2_zeros"])
def test_what_gets_no_gradient_may_not_ask_for_one(name: str) -> None:
    experts = Experts(zeros="float", bias=True)
    experts.tensors[name].requires_grad_()
    x, weights, ids = experts.routed(3)
    with pytest.raises(RuntimeError, match=f"gives no gradient to {name}, which requires one.*Freeze it"):
        experts(x, weights, ids)
    with torch.no_grad():
        experts(x, weights, ids)


def test_there_is_no_second_derivative() -> None:
    experts = Experts()
    x, weights, ids = experts.routed(3)
    x.requires_grad_()
    (once,) = torch.autograd.grad(experts(x, weights, ids).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        once.sum().backward()


@on_a_gpu
def test_gradients_on_a_gpu() -> None:
    experts = Experts(zeros="int", bias=True, expert_map=MAP)
    x, weights, ids = experts.routed(30, 3)
    wanted = gradients(experts.expected(x.requires_grad_(), weights.requires_grad_(), ids), x, weights)
    leaves = [t.detach().cuda().requires_grad_() for t in (x, weights)]
    for found, other in zip(gradients(experts.on_the_gpu()(*leaves, ids.cuda()), *leaves), wanted, strict=True):
        assert rel_l2(found.cpu(), other) <= 1e-5
