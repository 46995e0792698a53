"""Near misses of routed experts are left alone, with a reason, and compute to the bit what plain Inductor computes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves
from zoo.base import distance, fresh
from zoo_moe import NEGATIVES, Case
from zoo_moe.base import Form, inputs
from zoo_moe.formats import COMPRESSED_TENSORS
from zoo_moe.gathered import columns
from zoo_moe.grouped import transformers
from zoo_moe.near_misses import gathered

import inductor_ext
from inductor_ext import backend
from inductor_ext.passes import W4A16Pass

ROTATED = [(case, case.dtypes[i % len(case.dtypes)]) for i, case in enumerate(NEGATIVES)]
CORE = [case for case in NEGATIVES if case.core]
# An exported program computes no gradients, and knows no loops over tokens that are chosen by their values.
EXPORTED = [case for case in NEGATIVES if not case.unbacked and case.prepare.__name__ != "trained"][::3]
LOOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of loops whose matmuls are rewritten one by one."""


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with fresh():
        yield


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph runs as it is: what was left alone computes to the bit what the module does."""

    def as_it_is(gm: fx.GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any]) -> Any:
        return gm.forward

    monkeypatch.setattr(backend, "compile_fx", as_it_is)


def named(value: Any) -> str:
    return value.name if isinstance(value, Case) else str(value).removeprefix("torch.")


def ran(run: Any, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """With a number of tokens that is marked as what changes: then nothing is known of it when a graph is examined."""
    torch.manual_seed(0)
    given = inputs(case, dtype, case.tokens)
    for tensor in given:
        torch._dynamo.mark_dynamic(tensor, tensor.dim() - 2)
    return tree_leaves(run(*given))


@pytest.mark.parametrize(("case", "dtype"), ROTATED, ids=named)
def test_near_misses_are_left_alone(case: Case, dtype: torch.dtype, without_inductor: None) -> None:
    module = case.make(dtype)
    with case.capture():
        report = inductor_ext.explain(module, *inputs(case, dtype, case.tokens))
        assert [found for found in report.rewritten if found.op == "w4a16::moe"] == []
        if not case.linears:
            assert report.rewritten == []
            assert report.left_alone
        for alone in report.left_alone:
            assert re.fullmatch(r"[A-Z].{20,}\.", alone.reason, re.DOTALL), alone.reason
        torch.compiler.reset()
        run = torch.compile(module, backend="w4a16", fullgraph=True)
        for y, expected in zip(ran(run, case, dtype), ran(module, case, dtype), strict=True):
            if case.linears:
                assert float((y - expected).norm() / expected.norm()) < LOOSE[dtype]
            else:
                assert torch.equal(y, expected)


@pytest.mark.parametrize("case", CORE, ids=named)
def test_left_alone_is_plain_inductor_to_the_bit(case: Case, request: pytest.FixtureRequest) -> None:
    if case is not CORE[0]:
        request.getfixturevalue("without_codegen")
    results = []
    for name in ("inductor", "w4a16"):
        torch.compiler.reset()
        module = case.make(torch.bfloat16)
        results.append(ran(torch.compile(module, backend=name, fullgraph=True), case, torch.bfloat16))
    for expected, y in zip(*results, strict=True):
        assert torch.equal(y, expected)


def test_trained_scales_get_their_gradient() -> None:
    (case,) = (case for case in NEGATIVES if case.name == "miss: scales that are trained")
    gradients = []
    for name in ("inductor", "w4a16"):
        torch.compiler.reset()
        module = case.make(torch.float32)
        torch.compile(module, backend=name)(*inputs(case, torch.float32, 7)).square().sum().backward()
        gradients.append(module.w2_scale.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def times_scale(m: Any, y: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    return y * m.expert_scale[ids].unsqueeze(-1)


def plus_adapter(m: Any, y: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    """LoRA that is trained from zero on."""
    return y + torch.einsum("th,tkoh->tko", x, m.adapter[ids])


STORED: dict[str, tuple[Form, tuple[int, ...], float]] = {
    "w2_scale": (columns, (), 0),
    "w2_packed": (columns, (), 0),
    "expert_scale": (gathered(y_of=times_scale), (8,), 1),
    "h_scale": (gathered(h_of=lambda m, h: h * m.h_scale), (32,), 1),
    "h_shift": (gathered(h_of=lambda m, h: h + m.h_shift), (32,), 0),
    "adapter": (gathered(y_of=plus_adapter), (8, 64, 64), 0),
}


@pytest.mark.parametrize("of", STORED)
def test_what_is_stored_may_change(of: str, without_inductor: None) -> None:
    """Weights are not what they were; and a factor that is one when the graph is compiled looks like no factor."""
    form, shape, value = STORED[of]
    case = Case("", form, COMPRESSED_TENSORS)
    module = case.make(torch.float32)
    if shape:
        module.register_buffer(of, torch.full(shape, float(value)))
    run = torch.compile(module, backend="w4a16", fullgraph=True)
    given = inputs(case, torch.float32, 7)
    before = module(*given)
    assert distance(run(*given), before.double()) < 1e-5
    stored = getattr(module, of)
    stored.copy_(torch.rand(shape) if shape else stored.flip(0))
    after = module(*given).double()
    assert distance(before, after) > 0.1
    assert distance(run(*given), after) < 1e-5


def test_weights_may_be_more_than_tokens(without_inductor: None) -> None:
    """Where nothing says that they are not, the graph is for both."""
    case = Case("", transformers, COMPRESSED_TENSORS, loose=True)
    module = case.make(torch.bfloat16)
    run = torch.compile(module, backend="w4a16", fullgraph=True)
    for more in (0, 3):
        x, ids, weights = inputs(case, torch.bfloat16, 7)
        given = (x, ids, torch.cat((weights, weights[:more])))
        for tensor in given:
            torch._dynamo.mark_dynamic(tensor, 0)
        assert distance(run(*given), module(*given).double()) < 2e-2


def test_strict_names_the_reason() -> None:
    (case,) = (case for case in NEGATIVES if case.name == "miss: gather, weight applied twice")
    strict = torch.compile(case.make(torch.float32), backend="w4a16", options={"w4a16.strict": True})
    with pytest.raises(Exception, match=r"w4a16\.strict: .* is left alone: [A-Z].*\."):
        strict(*inputs(case, torch.float32, 7))


@pytest.mark.parametrize("case", EXPORTED, ids=named)
def test_exported_near_misses_are_left_alone(case: Case) -> None:
    dtype = case.dtypes[0]
    given = inputs(case, dtype, case.tokens)
    module = case.make(dtype)
    gm: Any = torch.export.export(module, given).module()
    W4A16Pass()(gm.graph)
    gm.recompile()
    assert gm.graph.find_nodes(op="call_function", target=torch.ops.w4a16.moe.default) == []
