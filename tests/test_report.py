"""The report of `inductor_ext.explain`, and the log: what was rewritten by which proof, what was left alone and why."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from models import GPTQ, Calls, CompressedTensors, Int8, rel_l2, two_layers, x_of
from torch import Tensor, nn

import inductor_ext


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"gate": CompressedTensors(64, 64, seed=1), "up": GPTQ(64, 64, seed=2, bias=True)})
        self._norm = nn.LayerNorm(64)
        self.odd = Int8(64, 64)
        self.odd.values.mul_(9)
        self.head = nn.Linear(64, 64)

    def forward(this, x: Tensor) -> Tensor:
        x = this._norm(x)
        return this.head(this.odd(this.mlp["gate"](x) * this.mlp["up"](x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(this, x: Tensor) -> Tensor:
        for layer in this.layers:
            x = layer(x)
        return x


def test_the_report_tells_what_and_why() -> None:
    report = inductor_ext.explain(Net(), x_of(2, 3, 64))
    assert report.graphs == 1
    gate, up, *_ = report.rewritten
    assert gate.op == "w4a16::linear"
    assert gate.kernel in ("cpu", "reference")
    assert gate.problem == "N=64 K=64 G=32 float32, symmetric"
    assert up.problem == "N=64 K=64 G=32 float32, int zeros"
    assert gate.proof.startswith("bit-equal, (q - z) * s in float32")
    assert "4096 elements" in gate.proof
    assert {alone.reason for alone in report.left_alone} == {
        "Its stored integers go from -72 to 63, which is beyond 4 bits."
    }
    table = str(report)
    assert table.startswith("4 of 6 int4 matmuls rewritten, in 1 graph\n")
    for entry in (*report.rewritten, *report.left_alone):
        assert entry.where in table
    assert gate.proof in table
    assert report.left_alone[0].reason in table


def test_the_report_names_modules() -> None:
    net = Net()
    paths = [f"layers.{i}.{name}" for i in (0, 1) for name in ("mlp.gate", "mlp.up")]
    for model in (net, net.forward, torch.compile(net, backend="w4a16")):
        report = inductor_ext.explain(model, x_of(3, 64))
        assert [entry.where for entry in report.rewritten] == paths
        assert [alone.where for alone in report.left_alone] == ["layers.0.odd", "layers.1.odd"]
    function = inductor_ext.explain(lambda x: net(x), x_of(3, 64))
    for entry, path in zip(function.rewritten, paths, strict=True):
        assert entry.where.endswith(path)
        assert "'" not in entry.where


def test_explain_of_a_module_compiled_in_place() -> None:
    model = CompressedTensors(64, 64)
    model.compile(backend="w4a16")
    with torch.no_grad():
        model(x_of(3, 64))
    assert len(inductor_ext.explain(model, x_of(3, 64)).rewritten) == 1


def test_explain_does_not_use_up_recompilations(calls: Calls) -> None:
    """Dynamo gives up on a function after 8 compilations."""

    class Broken(CompressedTensors):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            torch._dynamo.graph_break()
            return super().forward(y)

    model = nn.Sequential(Broken(64, 64))
    for _ in range(10):
        assert len(inductor_ext.explain(model, x_of(3, 64)).rewritten) == 2
    before = calls.runs
    with torch.no_grad():
        torch.compile(model, backend="w4a16")(x_of(3, 64))
    assert calls.runs == before + 2


def test_explain_leaves_compiled_models_right(calls: Calls) -> None:
    model = two_layers()
    compiled = torch.compile(model, backend="w4a16")
    with torch.no_grad():
        compiled(x_of(3, 64))
        inductor_ext.explain(compiled, x_of(3, 64))
        before = calls.runs
        assert rel_l2(compiled(x_of(3, 64)), model.expected(x_of(3, 64))) <= 2e-6
    assert calls.runs == before + 2


class Rotated(nn.Module):
    """A packed layer, and rotary embeddings as transformers spells them: a matmul by the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = CompressedTensors(64, 64)
        self.register_buffer("inv_freq", 1e4 ** (torch.arange(0, 64, 2) / -64))
        self.register_buffer("table", torch.arange(32))
        self.register_buffer("cached", torch.tensor([3]))

    def forward(this, x: Tensor, positions: Tensor) -> Tensor:
        inv_freq = this.inv_freq[None, :, None].expand(positions.shape[0], -1, 1).float()
        freqs = (inv_freq @ positions[:, None, :].float()).transpose(1, 2)
        return this.layer(x) * torch.cat((freqs, freqs), dim=-1).cos()


def padded_attention(model: Rotated, x: Tensor, positions: Tensor) -> Tensor:
    """Where the positions mask what is attended to, and rotate what attends."""
    y = model(x, positions)
    scores = (y @ y.mT).masked_fill(positions[:, None, :] == 0, -1e4)
    return scores.softmax(-1) @ y


NO_WEIGHTS: dict[str, Callable[[Rotated, Tensor, Tensor], Tensor]] = {
    "positions that are an argument": lambda model, x, positions: model(x, positions),
    "positions from the padding": lambda model, x, positions: model(x, (positions > 0).long().cumsum(-1) - 1),
    "positions made in the graph": lambda model, x, _: model(x, torch.arange(x.shape[1]).unsqueeze(0)),
    "positions after the cached ones": lambda model, x, _: model(x, (torch.arange(x.shape[1]) + model.cached)[None]),
    "positions that are stored": lambda model, x, _: model(x, model.table[None, : x.shape[1]]),
    "attention under a padding mask": padded_attention,
    "a mean under a padding mask": lambda model, x, mask: mask[:, None, :].to(x.dtype) @ model.layer(x),
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
@pytest.mark.parametrize("batch", (1, 2))
def test_positions_and_masks_are_no_weights(name: str, batch: int, calls: Calls, without_codegen: None) -> None:
    """The report does not speak of matmuls by them, and strict compiles them."""
    model, function = Rotated(), NO_WEIGHTS[name]
    x, positions = x_of(batch, 9, 64), torch.arange(9).repeat(batch, 1)
    report = inductor_ext.explain(function, model, x, positions)
    assert len(report.rewritten) == 1
    assert report.left_alone == []
    compiled = torch.compile(function, backend="w4a16", fullgraph=True, options={"w4a16.strict": True})
    with torch.no_grad():
        assert rel_l2(compiled(model, x, positions), function(model, x, positions)) <= 1e-5
    assert calls.runs == 1


def test_a_checkpointed_layer_is_reported() -> None:
    layer = CompressedTensors(64, 64)

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

    x = x_of(3, 64).requires_grad_()
    report = inductor_ext.explain(checkpointed, x)
    assert len(report.rewritten) + len(report.left_alone) == 1
    y = torch.compile(checkpointed, backend="w4a16")(x)
    assert rel_l2(y, layer.expected(x)) <= 2e-6
    y.sum().backward()
    assert rel_l2(x.grad, torch.ones(3, 64).double() @ layer.dense()) <= 2e-6


def test_the_log_tells_what_happened(caplog: pytest.LogCaptureFixture) -> None:
    odd = Int8(64, 64, seed=3)
    odd.values.mul_(9)
    model = nn.Sequential(CompressedTensors(64, 64), odd)
    with torch.no_grad(), caplog.at_level(logging.INFO, "inductor_ext"):
        torch.compile(model, backend="w4a16")(x_of(3, 64))
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert ("INFO", "1 of 2 int4 matmuls rewritten") in told
    warned = [message for level, message in told if level == "WARNING"]
    assert warned == ["1 is left alone: Its stored integers go from -72 to 63, which is beyond 4 bits."]


def test_nothing_is_printed_or_warned_by_default(capfd: pytest.CaptureFixture[str]) -> None:
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(two_layers(), backend="w4a16")(x_of(3, 64))
    assert [str(w.message) for w in caught if "inductor_ext" in str(w.filename)] == []
    assert capfd.readouterr().out == ""
