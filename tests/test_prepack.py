"""prepack_: only the kernel's copy of the codes is kept, the numbers are the same, and the stored layout comes back."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import rel_l2
from torch import Tensor, nn
from zoo.base import pack

import inductor_ext

N, K, GROUP = 64, 128, 32


class Linear(nn.Module):
    """GPTQ's layout, which every kernel converts; permuted: groups by g_idx."""

    def __init__(self, seed: int, bias: bool = False, permuted: bool = False) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.in_features = K
        self.register_buffer("qweight", pack(torch.randint(16, (K, N), generator=random), 0))
        self.register_buffer("scales", torch.randn(K // GROUP, N, generator=random) / 32)
        index = torch.randperm(K, generator=random) % (K // GROUP) if permuted else torch.arange(K) // GROUP
        self.register_buffer("g_idx", index)
        self.bias = nn.Parameter(torch.randn(N, generator=random)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        q = ((self.qweight.unsqueeze(1) >> torch.arange(0, 32, 4, dtype=torch.int32).view(1, 8, 1)) & 15).view(K, N) - 8
        return F.linear(x, (q * self.scales[self.g_idx]).to(x.dtype).t(), self.bias)


class Canonical(Linear):
    """compressed-tensors' layout, which the CPU kernel reads as it is."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.qweight = pack(torch.randint(16, (N, K)), 1)

    def forward(self, x: Tensor) -> Tensor:
        q = ((self.qweight.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15).view(N, -1, GROUP) - 8
        return F.linear(x, (q * self.scales.t().unsqueeze(-1)).view(N, K).to(x.dtype))


class Twice(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


KINDS = [{}, {"bias": True}, {"permuted": True}]


def model(**kind: Any) -> nn.Sequential:
    return nn.Sequential(Linear(1, **kind), nn.ReLU(), nn.Linear(N, K), Linear(2, **kind))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_numbers_and_the_state_are_the_same(kind: dict[str, bool]) -> None:
    net, x = model(**kind), torch.randn(5, K)
    before, state = net(x), {name: t.clone() for name, t in net.state_dict().items()}
    assert inductor_ext.prepack_(net) == 2
    assert rel_l2(net(x), before) < 2e-6
    assert rel_l2(net(x.bfloat16()[0].float()), before[0]) < 1e-2
    after = net.state_dict()
    assert list(after) == list(state) or set(after) == set(state)
    assert all(torch.equal(after[name], t) and after[name].dtype == t.dtype for name, t in state.items())
    assert inductor_ext.prepack_(net) == 0


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_another_checkpoint_loads_into_it(kind: dict[str, bool]) -> None:
    net, other, x = model(**kind), model(**kind), torch.randn(5, K)
    for name, t in other.state_dict().items():
        if name.endswith("qweight"):
            t.copy_(t.flip(0))
        elif t.is_floating_point():
            t.mul_(1.5)
    inductor_ext.prepack_(net)
    net.load_state_dict(other.state_dict())
    assert rel_l2(net(x), other(x)) < 2e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_scales_without_codes_go_with_the_codes_that_are_there(kind: dict[str, bool]) -> None:
    net, x = model(**kind), torch.randn(5, K)
    other = copy.deepcopy(net)
    inductor_ext.prepack_(net)
    some = {"0.scales": other[0].scales * 3}
    other.load_state_dict(some, strict=False)
    net.load_state_dict(some, strict=False)
    assert rel_l2(net(x), other(x)) < 2e-6
    assert torch.equal(net.state_dict()["0.qweight"], other.state_dict()["0.qweight"])


def test_a_checkpoint_that_does_not_fit_is_named() -> None:
    net = nn.Sequential(Linear(1))
    inductor_ext.prepack_(net)
    state = net.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.qweight"):
        net.load_state_dict({name: t for name, t in state.items() if name != "0.qweight"})
    with pytest.raises(RuntimeError, match=r"0\.qweight is torch\.int32 \[8, 64\]; torch\.int32 \[16, 64\] is needed"):
        net.load_state_dict({**state, "0.qweight": state["0.qweight"][:8]})


@torch.no_grad()
def test_it_compiles_and_exports() -> None:
    net, x = nn.Sequential(Linear(1, bias=True), nn.ReLU()), torch.randn(5, K)
    wanted = net(x)
    inductor_ext.prepack_(net)
    assert rel_l2(torch.compile(net, backend="w4a16", fullgraph=True)(x), wanted) < 2e-6
    program = torch.export.export(net, (x,))
    assert torch.ops.w4a16.linear.default in {node.target for node in program.graph.nodes}
    assert rel_l2(program.module()(x), wanted) < 2e-6


def test_the_stored_codes_are_freed() -> None:
    layer = Linear(1)
    held = layer.qweight.untyped_storage().data_ptr()
    inductor_ext.prepack_(layer)
    assert "qweight" not in dict(layer.named_buffers())
    kept = {t.untyped_storage().data_ptr() for t in layer.buffers()}
    assert held not in kept
    assert sum(t.numel() * t.element_size() for t in layer.buffers() if t.numel() >= N * K // 8) == N * K // 2


def test_what_stays_says_why(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(Canonical(1), Twice(2), nn.Linear(K, N))
    with caplog.at_level(logging.INFO, "inductor_ext.prepack"):
        assert inductor_ext.prepack_(net) == 0
    said = [record.getMessage() for record in caplog.records if record.name == "inductor_ext.prepack"]
    assert said[0].startswith("0 stays as it is: the cpu kernel reads its layout as it is")
    assert said[1].startswith("1 stays as it is: it computes more than one linear map")
    assert len(said) == 2
