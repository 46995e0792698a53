"""convert_: experts that are modules of their own, looped over with Python branches, become one packed module."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import GPTQ, CompressedTensors, Int8, Packed, rel_l2
from torch import Tensor, nn

import inductor_ext
from inductor_ext.loader.experts import PackedExperts

E, H, I, TOP_K = 4, 64, 96, 2  # noqa: E741  as everywhere: intermediate size
NAMES = ("gate_proj", "up_proj", "down_proj")
ROUNDING = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def layer(kind: Callable[..., Packed], n: int, k: int, **settings: Any) -> Any:
    made: Any = kind(n, k, **settings)
    made.in_features = k
    return made


def expert(kind: Callable[..., Packed], names: tuple[str, ...] = NAMES, seed: int = 0, **settings: Any) -> nn.Module:
    made = nn.Module()
    for i, (name, size) in enumerate(zip(names, ((I, H), (I, H), (H, I)), strict=True)):
        made.add_module(name, layer(kind, *size, seed=3 * seed + i, **settings))
    return made


class LinearLoop(nn.Module):
    """Experts as children 0, 1, ...; an expert is run only if a token came for it."""

    def __init__(self, kind: Callable[..., Packed] = GPTQ, names: tuple[str, ...] = NAMES, **settings: Any) -> None:
        super().__init__()
        self.names, self.act_fn = names, nn.SiLU()
        for i in range(E):
            self.add_module(str(i), expert(kind, names, i, **settings))

    @property
    def experts(self) -> list[Any]:
        return [self.get_submodule(str(i)) for i in range(E)]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(top_k_index == i)
            if not token.numel():
                continue
            gate, up, down = (getattr(expert, name) for name in self.names)
            y = down(self.joined(gate(hidden_states[token]), up(hidden_states[token])))
            out.index_add_(0, token, y * top_k_weights[token, slot, None])
        return out

    def joined(self, gate: Tensor, up: Tensor) -> Tensor:
        joined: Tensor = self.act_fn(gate) * up
        return joined

    def exact(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The same in float64, from the layers' own float64 weights."""
        w = [[getattr(expert, name).dense() for name in self.names] for expert in self.experts]
        rows = []
        for token, chosen, factors in zip(x.double(), ids.tolist(), weights.double(), strict=True):
            each = [w[i][2] @ (F.silu(w[i][0] @ token) * (w[i][1] @ token)) for i in chosen]
            rows.append(sum(factor * y for factor, y in zip(factors, each, strict=True)))
        return torch.stack(rows)


class InAList(LinearLoop):
    """Experts in a ModuleList, beside other children."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.listed = nn.ModuleList([self._modules.pop(str(i)) for i in range(E)])

    @property
    def experts(self) -> list[Any]:
        return list(self.listed)


class Limited(LinearLoop):
    """As some models do: gate and up are limited, which small inputs do not show."""

    def joined(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.clamp(max=40)) * up.clamp(-40, 40)


class Swapped(LinearLoop):
    def joined(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().joined(up, gate)


class WeightsFirst(LinearLoop):
    def forward(self, hidden_states: Tensor, top_k_weights: Tensor, top_k_index: Tensor) -> Tensor:
        return super().forward(hidden_states, top_k_index, top_k_weights)


class Block(nn.Module):
    """Routes every token to the experts with the highest scores."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(H, E, bias=False), experts

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K, -1)
        out: Tensor = self.experts(x, ids, weights)
        return out


def routed(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, E, generator=random).topk(TOP_K, -1)[1]
    return (
        torch.randn(tokens, H, generator=random).to(dtype),
        ids,
        torch.rand(tokens, TOP_K, generator=random).to(dtype),
    )


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, "inductor_ext.convert")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "inductor_ext.convert"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("experts", "symmetric"),
    [
        (lambda **s: LinearLoop(CompressedTensors, **s), True),
        (lambda **s: LinearLoop(GPTQ, **s), False),
        (lambda **s: LinearLoop(GPTQ, names=("w1", "w3", "w2"), **s), False),
        (lambda **s: LinearLoop(Int8, **s), True),
        (InAList, False),
    ],
    ids=["compressed-tensors", "gptq", "w1 w3 w2", "int8 values", "in a list"],
)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_the_packed_module_computes_what_the_experts_did(
    experts: Callable[..., LinearLoop], symmetric: bool, dtype: torch.dtype
) -> None:
    before = experts(dtype=dtype).eval()
    model = nn.Sequential(nn.Identity(), before)
    assert inductor_ext.convert_(model) == 1
    after = model[1]
    assert isinstance(after, PackedExperts) and not after.training and after.act_fn is before.act_fn
    assert (after.gate_up_zeros is None) == symmetric
    for i, each in enumerate(before.experts):
        gate, up, down = (getattr(each, name).dense() for name in before.names)
        assert torch.equal(after.dequantize("gate_up", torch.float32, i), torch.cat((gate, up)).float())
        assert torch.equal(after.dequantize("down", torch.float32, i), down.float())
    for tokens in (1, 7, 64):
        inputs = routed(tokens, dtype)
        assert rel_l2(after(*inputs), before.exact(*inputs)) < ROUNDING[dtype]
    assert inductor_ext.convert_(model) == 0


@torch.no_grad()
def test_a_converted_model_is_captured_whole_and_rewritten() -> None:
    model = Block(LinearLoop())
    x = routed(9)[0]
    wanted = model(x)
    assert inductor_ext.convert_(model) == 1
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert rel_l2(compiled(x), wanted) < 2e-6
    report = inductor_ext.explain(model, x)
    assert [entry.op for entry in report.rewritten] == ["w4a16::moe"] and not report.left_alone


def test_every_layer_of_a_model_is_converted_and_the_originals_are_freed() -> None:
    model = nn.Sequential(*(Block(LinearLoop()) for _ in range(3)))
    held = [weakref.ref(module) for module in model.modules() if isinstance(module, GPTQ)]
    words = [weakref.ref(module.qweight) for module in model.modules() if isinstance(module, GPTQ)]
    assert inductor_ext.convert_(model) == 3
    assert len(held) == 3 * E * 3 and not [ref for ref in (*held, *words) if ref() is not None]


def test_the_state_dict_is_the_new_modules_own() -> None:
    model, other = Block(LinearLoop()), Block(LinearLoop(CompressedTensors))
    assert inductor_ext.convert_(model) == inductor_ext.convert_(other) == 1
    assert {name for name in model.state_dict() if name.startswith("experts.gate_up")} == {
        f"experts.gate_up_{part}" for part in ("qweight", "scales", "zeros")
    }
    again = Block(LinearLoop())
    inductor_ext.convert_(again)
    again.experts.gate_up_qweight.zero_()
    again.load_state_dict(model.state_dict())
    x = routed(5)[0]
    assert torch.equal(again(x), model(x))


def test_alike_layers_are_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from inductor_ext import prepack

    captured, capture = [], prepack._captured
    monkeypatch.setattr(prepack, "_captured", lambda layer: captured.append(layer) or capture(layer))
    inductor_ext.convert_(nn.Sequential(LinearLoop(), LinearLoop(CompressedTensors)))
    assert len(captured) == 4  # for each module a layer [I, H] and one [H, I]


def broken(change: Callable[[LinearLoop], object], kind: Callable[..., LinearLoop] = LinearLoop) -> LinearLoop:
    made = kind()
    change(made)
    return made


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        (lambda: LinearLoop(bias=True), "the gate of expert 0 has a bias"),
        (lambda: broken(lambda m: m.experts[2].up_proj.act_order_()), "the up of expert 2 is in act-order"),
        (
            lambda: broken(lambda m: setattr(m.experts[1], "down_proj", nn.Linear(I, H))),
            "the down of expert 1 has a bias",
        ),
        (
            lambda: broken(lambda m: setattr(m.experts[1], "down_proj", nn.Linear(I, H, bias=False))),
            "of the down of expert 1: 0 of its matmuls are int4, one is needed",
        ),
        (
            lambda: broken(lambda m: setattr(m.experts[3], "up_proj", layer(GPTQ, I, H, group=16))),
            "its experts differ in their sizes, their groups or the dtype of their scales",
        ),
        (lambda: broken(lambda m: delattr(m, "act_fn")), "it has no act_fn"),
        (Swapped, "it computes something else than weighted sums of its experts"),
        (Limited, "it computes something else than weighted sums of its experts"),
        (
            WeightsFirst,
            "it is called with (hidden_states, top_k_weights, top_k_index), not (hidden_states, top_k_index, ",
        ),
    ],
)
def test_what_stays_says_why(experts: Callable[[], nn.Module], reason: str, said: Callable[[], list[str]]) -> None:
    model = Block(experts())
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert inductor_ext.convert_(model) == 0
    (line,) = said()
    assert line.startswith("experts stays as it is: ") and reason in line
    after = model.state_dict(keep_vars=True)
    assert {name: id(tensor) for name, tensor in after.items()} == {name: id_ for name, (id_, _) in before.items()}
    assert all(torch.equal(after[name], tensor) for name, (_, tensor) in before.items())


def test_what_has_no_packed_experts_is_passed_over_in_silence(said: Callable[[], list[str]]) -> None:
    dense = broken(lambda m: [setattr(e, n, nn.Linear(1, 1)) for e in m.experts for n in NAMES])
    assert inductor_ext.convert_(nn.Sequential(dense, nn.Linear(2, 2), layer(GPTQ, I, H), nn.ModuleList())) == 0
    assert said() == []


def test_experts_cannot_be_replaced_in_themselves(said: Callable[[], list[str]]) -> None:
    assert inductor_ext.convert_(LinearLoop()) == 0
    assert said() == ["LinearLoop stays as it is: it is the model itself, so there is nothing to replace it in"]


def test_hooks_would_be_lost(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(LinearLoop())
    model[0].register_forward_hook(lambda *given: None)
    with caplog.at_level(logging.INFO):
        assert inductor_ext.convert_(model) == 0
    assert "it has hooks, which would be lost" in caplog.text


@pytest.mark.parametrize("factor", [1.04, "one expert"], ids=str)
def test_a_little_more_than_rounding_is_something_else(factor: float | str) -> None:
    class Off(LinearLoop):
        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            if isinstance(factor, float):
                return factor * super().forward(hidden_states, top_k_index, top_k_weights)
            return super().forward(hidden_states, top_k_index, top_k_weights * (top_k_index != 1))

    model = nn.Sequential(Off(dtype=torch.bfloat16))
    assert inductor_ext.convert_(model) == 0
