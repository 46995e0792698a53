"""`torch.compile(model, backend="w4a16")` as its user meets it."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import (
    GPTQ,
    OWED,
    SPELLINGS,
    Calls,
    CompressedTensors,
    Int8,
    Packed,
    chain,
    recompiles,
    rel_l2,
    two_layers,
    x_of,
)
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache

import inductor_ext


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


# -- getting there -----------------------------------------------------------------------------------------------------


def test_the_name_is_enough() -> None:
    """No import of inductor_ext: the backend is found by its entry point."""
    program = """
import sys, torch
from models import CompressedTensors, rel_l2
layer, x = CompressedTensors(32, 64), torch.randn(3, 64)
assert "w4a16" in torch.compiler.list_backends() and not any(name.startswith("inductor_ext") for name in sys.modules)
with torch.no_grad():
    y = torch.compile(layer, backend="w4a16", options={"w4a16.strict": True})(x)
assert rel_l2(y, layer.expected(x)) <= 2e-6
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"mode": "default"},
        {"mode": "max-autotune"},
        {"mode": "max-autotune-no-cudagraphs"},
        {"mode": "reduce-overhead"},
        {"dynamic": True},
        {"dynamic": False},
        {"fullgraph": True},
        {"options": {"max_autotune": True, "epilogue_fusion": True}},
    ],
    ids=str,
)
def test_every_way_to_call_compile(kwargs: dict[str, Any], calls: Calls) -> None:
    model = two_layers()
    compiled = torch.compile(model, backend="w4a16", **kwargs)
    with torch.no_grad():
        for M in (4, 6):
            assert rel_l2(compiled(x_of(M, 64)), model.expected(x_of(M, 64))) <= 2e-6
    assert calls.runs == 4


def test_a_module_compiled_in_place(calls: Calls) -> None:
    model = two_layers()
    model.compile(backend="w4a16")
    with torch.no_grad():
        assert rel_l2(model(x_of(3, 64)), model.expected(x_of(3, 64))) <= 2e-6
    assert calls.runs == 2


def test_a_function_around_modules(calls: Calls) -> None:
    layers = [CompressedTensors(64, 64, seed=1), GPTQ(64, 64, seed=2)]

    @torch.compile(backend="w4a16", fullgraph=True)
    def both(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return layers[0](x), {"second": layers[1](x)}

    with torch.no_grad():
        first, rest = both(x_of(2, 3, 64))
    assert rel_l2(first, layers[0].expected(x_of(2, 3, 64))) <= 2e-6
    assert rel_l2(rest["second"], layers[1].expected(x_of(2, 3, 64))) <= 2e-6
    assert calls.runs == 2


@pytest.mark.parametrize("dtype", list(OWED), ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_layers_in_a_row(spelling: type[Packed], dtype: torch.dtype, calls: Calls) -> None:
    """The activation of one rewritten matmul is the result of another, and goes to several."""
    first, left, right = (spelling(64, 64, dtype=dtype, bias=True, seed=i) for i in range(3))
    compiled = torch.compile(lambda x: (left(h := first(x)), right(h)), backend="w4a16", fullgraph=True)
    x = x_of(3, 64, dtype=dtype)
    with torch.no_grad():
        h = kernels_output(first, x)
        for y, layer in zip(compiled(x), (left, right), strict=True):
            assert y.dtype == dtype
            assert rel_l2(y, layer.expected(h)) <= OWED[dtype]
    assert calls.runs == 3 + 1


def kernels_output(layer: Packed, x: Tensor) -> Tensor:
    """What the compiled layer alone gives: the input of the next, with its rounding."""
    with torch.no_grad():
        return torch.compile(layer, backend="w4a16")(x)


# -- graphs ------------------------------------------------------------------------------------------------------------


def test_a_graph_break_leaves_two_parts_rewritten(calls: Calls) -> None:
    first, second = CompressedTensors(64, 64, seed=1), GPTQ(64, 64, seed=2)

    def broken(x: Tensor) -> Tensor:
        y = first(x)
        torch._dynamo.graph_break()
        return second(y)

    report = inductor_ext.explain(broken, x_of(3, 64))
    assert (report.graphs, len(report.rewritten)) == (2, 2)
    with torch.no_grad():
        y = torch.compile(broken, backend="w4a16", options={"w4a16.strict": True})(x_of(3, 64))
    assert rel_l2(y, second.expected(first.expected(x_of(3, 64)))) <= 2e-6
    assert calls.runs == 2


def test_graphs_without_inputs() -> None:
    compiled = torch.compile(lambda: torch.arange(6).float() * 2, backend="w4a16", fullgraph=True)
    assert torch.equal(compiled(), torch.arange(6).float() * 2)


def test_weights_made_in_inference_mode(calls: Calls) -> None:
    with torch.inference_mode():
        model = two_layers()
        compiled = torch.compile(model, backend="w4a16")
        for _ in range(2):
            y = compiled(x_of(3, 64))
    assert rel_l2(y, model.expected(x_of(3, 64))) <= 2e-6
    assert calls.runs == 4
    assert calls.packs == 2


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_class_reused_eight_times_packs_eight_times(spelling: type[Packed], calls: Calls) -> None:
    """One compiled graph serves eight layers: their weights are packed at the first round and never again."""
    layers = [spelling(64, 64, seed=i) for i in range(8)]
    compiled = torch.compile(lambda layer, x: layer(x), backend="w4a16")
    with torch.no_grad():
        for _ in range(3):
            for layer in layers:
                assert rel_l2(compiled(layer, x_of(3, 64)), layer.expected(x_of(3, 64))) <= 2e-6
    assert calls.packs == 8
    assert calls.runs == 24
    assert recompiles() == 1


def test_one_layer_used_twice_in_a_graph_packs_once(calls: Calls) -> None:
    layer = GPTQ(64, 64)
    model = chain(layer, layer)
    with torch.no_grad():
        y = torch.compile(model, backend="w4a16", fullgraph=True)(x_of(3, 64))
    assert rel_l2(y, model.expected(x_of(3, 64))) <= 2e-6
    assert (calls.packs, calls.runs) == (1, 2)


def test_as_many_graphs_as_inductor_for_changing_sizes() -> None:
    """M = 1 specialises and another M makes the graph dynamic, neither more nor less often than with Inductor."""
    counts = []
    for backend in ("inductor", "w4a16"):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model = two_layers()
        compiled = torch.compile(model, backend=backend)
        seen = []
        with torch.no_grad():
            for M in (1, 5, 7, 1, 16, 2):
                assert rel_l2(compiled(x_of(M, 64)), model.expected(x_of(M, 64))) <= 2e-6
                seen.append(recompiles())
        counts.append(seen)
    assert counts[0] == counts[1]
    assert counts[1] == [1, 2, 2, 2, 2, 2]


def test_no_rows() -> None:
    model = two_layers()
    compiled = torch.compile(model, backend="w4a16", dynamic=True)
    with torch.no_grad():
        assert compiled(x_of(0, 64)).shape == (0, 32)
        assert rel_l2(compiled(x_of(3, 64)), model.expected(x_of(3, 64))) <= 2e-6


def test_autocast(calls: Calls) -> None:
    """A float32 model under bfloat16 autocast: bfloat16 comes out, as with Inductor, and only x and y are rounded."""
    layer = CompressedTensors(64, 64, bias=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = torch.compile(layer, backend="w4a16", options={"w4a16.strict": True})(x_of(5, 64))
    assert y.dtype == torch.bfloat16
    rounded = x_of(5, 64).bfloat16()
    bias = layer.bias.detach().bfloat16().double()
    assert rel_l2(y, rounded.double() @ layer.dense().T + bias) <= 4e-3
    assert calls.runs == 1


# -- left alone --------------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(F.gelu(self.up(x)), 0.25)).softmax(-1)


@pytest.mark.parametrize("training", [False, True])
def test_graphs_without_int4_are_inductors_to_the_bit(training: bool) -> None:
    torch.manual_seed(0)
    model, x = Dense().train(training), x_of(5, 64).requires_grad_(training)
    results = []
    for backend in ("inductor", "w4a16"):
        torch.compiler.reset()
        torch.manual_seed(1)
        with torch.set_grad_enabled(training):
            y = torch.compile(model, backend=backend, fullgraph=True)(x)
        results.append(
            [y.detach(), *(torch.autograd.grad(y.square().sum(), [x, *model.parameters()]) if training else [])]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert inductor_ext.explain(model, x).rewritten == []
    assert inductor_ext.explain(model, x).left_alone == []


def test_a_weight_that_is_an_argument_is_left_alone() -> None:
    layers = [CompressedTensors(64, 64, seed=i) for i in range(3)]
    scales = layers[0].weight_scale

    def linear(x: Tensor, words: Tensor) -> Tensor:
        q = ((words.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15).view(64, 2, 32) - 8
        return F.linear(x, (q * scales.unsqueeze(-1)).view(64, 64))

    (alone,) = inductor_ext.explain(linear, x_of(3, 64), layers[0].weight_packed.clone()).left_alone
    assert "argument" in alone.reason
    compiled = torch.compile(linear, backend="w4a16")
    for layer in layers:  # a module's buffer, given as an argument: rewritten or not, it must be right
        layer.weight_scale.copy_(scales)
        for words in (layer.weight_packed, layer.weight_packed.clone()):
            assert rel_l2(compiled(x_of(3, 64), words), layer.expected(x_of(3, 64))) <= 2e-6


def test_a_layer_of_the_same_graph_that_is_not_int4_runs_unrewritten(
    calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    """Dynamo gives one graph to layers of the same shapes; one of them may hold integers beyond 4 bits."""
    layers = [Int8(64, 64, seed=i) for i in range(3)]
    layers[1].values.mul_(9)
    compiled = torch.compile(lambda layer, x: layer(x), backend="w4a16")
    with torch.no_grad(), caplog.at_level(logging.WARNING, "inductor_ext"):
        for _ in range(2):
            for layer in layers:
                assert rel_l2(compiled(layer, x_of(3, 64)), layer.expected(x_of(3, 64))) <= 2e-6
    assert recompiles() == 1
    assert calls.runs == 4
    (warning,) = [r.getMessage() for r in caplog.records if "beyond 4 bits" in r.getMessage()]
    assert "runs as it was before rewriting" in warning


def test_a_dynamic_graph_runs_unrewritten_for_every_size() -> None:
    layers = [Int8(64, 64, seed=i, bias=True) for i in range(2)]
    layers[1].values.mul_(9)
    compiled = torch.compile(lambda layer, x: layer(x), backend="w4a16", dynamic=True)
    for M in (3, 5, 9):
        for layer in layers:
            x = x_of(M, 64).requires_grad_()
            y = compiled(layer, x)
            y.sum().backward()
            assert rel_l2(y, layer.expected(x)) <= 2e-6
            assert rel_l2(x.grad, torch.ones(M, 64).double() @ layer.dense()) <= 2e-6
    assert recompiles() == 1


def test_strict_raises_for_a_layer_of_the_same_graph_that_is_not_int4() -> None:
    layers = [Int8(64, 64, seed=i) for i in range(2)]
    layers[1].values.mul_(9)
    compiled = torch.compile(lambda layer, x: layer(x), backend="w4a16", options={"w4a16.strict": True})
    with torch.no_grad():
        compiled(layers[0], x_of(3, 64))
        with pytest.raises(Exception, match=r"w4a16\.strict.*beyond 4 bits"):
            compiled(layers[1], x_of(3, 64))


def test_strict_is_content_with_dense_layers() -> None:
    model = nn.Sequential(CompressedTensors(64, 64), nn.Linear(64, 8))
    with torch.no_grad():
        assert torch.compile(model, backend="w4a16", options={"w4a16.strict": True})(x_of(3, 64)).shape == (3, 8)


def test_strict_raises_for_what_is_left_alone() -> None:
    layer = Int8(64, 64)
    layer.values.mul_(9)
    with pytest.raises(Exception, match=r"w4a16\.strict: .*left alone.*beyond 4 bits"):
        torch.compile(layer, backend="w4a16", options={"w4a16.strict": True})(x_of(3, 64))


# -- with other extensions ---------------------------------------------------------------------------------------------


class Counting(CustomGraphPass):
    """A user's own pass."""

    ran = 0

    def __call__(self, graph: fx.Graph) -> None:
        Counting.ran += 1

    def uuid(self) -> Any:
        return "counting"


@pytest.mark.parametrize("how", ["options", "config"])
def test_the_users_own_pass_still_runs(how: str, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "ran", 0)
    options: dict[str, Any] = {"joint_custom_pre_pass": Counting()} if how == "options" else {}
    patch = {"joint_custom_pre_pass": Counting()} if how == "config" else {}
    with fresh_cache(), torch.no_grad(), torch._inductor.config.patch(patch):
        torch.compile(CompressedTensors(64, 64), backend="w4a16", options=options)(x_of(3, 64))
    assert Counting.ran == 1
    assert calls.runs == 1
