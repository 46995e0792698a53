"""PackedExperts: what the forwards compute, run eagerly and captured, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inductor_ext.loader.experts import Canonical, PackedExperts


def packed_experts(zeros: torch.dtype | None, scales: torch.dtype = torch.float32) -> PackedExperts:
    random, (experts, hidden, intermediate, group) = torch.Generator().manual_seed(0), (6, 64, 96, 32)

    def weight(n: int, k: int) -> Canonical:
        words = torch.randint(-(2**31), 2**31, (experts, n, k // 8), dtype=torch.int32, generator=random)
        scale = (torch.rand(experts, n, k // group, generator=random) * 0.02 + 0.01).to(scales)
        zero = torch.randint(17, (experts, n, k // group), generator=random)
        return Canonical(words, scale, None if zeros is None else zero.to(zeros))

    return PackedExperts(nn.SiLU(), weight(2 * intermediate, hidden), weight(hidden, intermediate))


def exact(module: PackedExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The same in float64, expert by expert, token by token."""
    gate_up, down = (module.dequantize(name, torch.float32).double() for name in ("gate_up", "down"))
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, slot in torch.cartesian_prod(torch.arange(ids.shape[0]), torch.arange(ids.shape[1])).tolist():
        expert = int(ids[token, slot])
        gate, up = (gate_up[expert] @ x[token].double()).chunk(2)
        out[token] += weights[token, slot].double() * (down[expert] @ (nn.functional.silu(gate) * up))
    return out


def routing(tokens: int, top_k: int = 2, experts: int = 6) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, experts, generator=random).topk(top_k, -1)[1]
    return ids, torch.rand(tokens, top_k, generator=random)


ROUNDING = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@torch.no_grad()
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("zeros", [None, torch.uint8, torch.float32], ids=str)
def test_eager_and_compiled_forwards_compute_the_weighted_sum(zeros: torch.dtype | None, dtype: torch.dtype) -> None:
    module = packed_experts(zeros)
    torch.compiler.reset()
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, backend=keep, fullgraph=True, dynamic=True)
    for tokens in (5, 2, 33):
        x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
        ids, weights = routing(tokens)
        wanted = exact(module, x, ids, weights)
        for found in (module(x, ids, weights), module(x, ids.int(), weights.to(dtype)), compiled(x, ids, weights)):
            assert found.dtype == dtype
            assert (found.double() - wanted).norm() / wanted.norm() < ROUNDING[dtype]
    assert len(graphs) == 1  # one for every number of tokens
    ops = {node.target for node in graphs[0].graph.nodes}
    assert not [op for op in ops if isinstance(op, torch._ops.OpOverload | torch._ops.OpOverloadPacket)]


@torch.no_grad()
@pytest.mark.parametrize(
    "ids",
    [
        torch.full((7, 2), 3),
        torch.tensor([[1, 1], [4, 4]]),
        torch.arange(6).view(6, 1),
        torch.zeros(0, 2, dtype=torch.long),
    ],
    ids=["one expert", "an expert twice", "each expert once", "no tokens"],
)
def test_extremes_of_routing(ids: Tensor) -> None:
    module, x, weights = packed_experts(torch.uint8), torch.randn(len(ids), 64), torch.rand(ids.shape)
    wanted = exact(module, x, ids, weights).float()
    torch.testing.assert_close(module(x, ids, weights), wanted, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, ids, weights), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_every_expert_on_rows_of_its_own(tokens: int) -> None:
    module = packed_experts(torch.uint8)
    blocks = torch.randn(6, tokens, 64)
    blocks[2] = 0  # no row for this expert
    ids = torch.arange(6).repeat_interleave(tokens).view(-1, 1)
    x = blocks.view(-1, 64)
    wanted = exact(module, x, ids, torch.ones(ids.shape)).float()
    torch.testing.assert_close(module(x), wanted, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), wanted, rtol=1e-5, atol=1e-5)


def test_eager_dequantises_the_selected_experts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module, dequantized = packed_experts(None), []
    dequantize = module.dequantize

    def watched(projection: str, dtype: torch.dtype, experts: Any = None) -> Tensor:
        dequantized.append((projection, experts))
        return dequantize(projection, dtype, experts)

    monkeypatch.setattr(module, "dequantize", watched)
    module(torch.randn(3, 64), torch.tensor([[4, 1], [1, 4], [4, 4]]), torch.rand(3, 2))
    assert dequantized == [("gate_up", 1), ("down", 1), ("gate_up", 4), ("down", 4)]
    dequantized.clear()
    rows = torch.zeros(6, 2, 64)
    rows[5, 1] = 1
    module(rows.view(-1, 64))
    assert dequantized == [("gate_up", 5), ("down", 5)]


@pytest.mark.parametrize("expert", [-1, 6])
def test_an_expert_that_is_not_there_is_an_error(expert: int) -> None:
    with pytest.raises(IndexError, match=rf"Expert {expert} was selected; the experts are 0\.\.5\."):
        packed_experts(None)(torch.randn(1, 64), torch.tensor([[2, expert]]), torch.rand(1, 2))
    with pytest.raises(TypeError, match="top_k_index was given without top_k_weights"):
        packed_experts(None)(torch.randn(1, 64), torch.tensor([[2, 3]]))


def test_gradients_reach_inputs_and_weights() -> None:
    module, (ids, weights) = packed_experts(None), routing(4)
    x = torch.randn(4, 64, requires_grad=True)
    weights.requires_grad_()
    found = torch.autograd.grad(module(x, ids, weights).sum(), (x, weights))
    wanted = torch.autograd.grad(exact(module, x, ids, weights).sum(), (x, weights))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-4)
