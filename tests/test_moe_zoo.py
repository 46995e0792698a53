"""Every spelling of routed experts becomes one w4a16::moe, and computes what its codes, zeros and scales stand for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.export import Dim, export
from zoo.base import distance, fresh
from zoo_moe import EITHER, NEGATIVES, POSITIVES, ZOO, Case
from zoo_moe.base import inputs

import inductor_ext
from inductor_ext import backend
from inductor_ext.passes import W4A16Pass

# Relative L2 against float64: of eager modules, which round at every step, and what the op owes.
EAGER = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
OWED = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}
TOKENS = (7, 1, 2, 33)

CORE = [case for case in POSITIVES if case.core]
ROTATED = [(case, case.dtypes[i % len(case.dtypes)]) for i, case in enumerate(POSITIVES)]
EVERY_DTYPE = [(case, dtype) for case in CORE for dtype in case.dtypes]
# Export has no graph for loops over tokens that are chosen by their values.
EXPORTED = [(case, i % 2 == 1) for i, case in enumerate(case for case in CORE if not case.unbacked)]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    torch._dynamo.utils.counters.clear()
    with fresh():
        yield


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewritten graph runs as it is: its ops do their work, and no code is generated around them."""

    def as_it_is(gm: fx.GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any]) -> Any:
        return gm.forward

    monkeypatch.setattr(backend, "compile_fx", as_it_is)


def named(value: Any) -> str:
    return value.name if isinstance(value, Case) else str(value).removeprefix("torch.")


def dynamic(case: Case, dtype: torch.dtype, T: int) -> tuple[Tensor, ...]:
    """The inputs for T tokens, with T marked as what changes; 0 and 1 are compiled for themselves."""
    given = inputs(case, dtype, T)
    for tensor in given if T > 1 else ():
        torch._dynamo.mark_dynamic(tensor, tensor.dim() - 2)
    return given


def compiles() -> int:
    """How many graphs this test has compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def check(case: Case, dtype: torch.dtype, tokens: Sequence[int] = TOKENS) -> None:
    """One dynamic compilation gives every T right."""
    module = case.make(dtype)
    run = torch.compile(module, backend="w4a16", fullgraph=True, options={"w4a16.strict": True})
    with case.capture():
        for T in tokens:
            y = run(*dynamic(case, dtype, T))
            assert y.dtype == dtype
            off = distance(y, module.expected(*inputs(case, dtype, T)))
            assert off <= OWED[dtype] * case.roundings**0.5, f"{off:.1e} at T={T}"
    assert compiles() <= 2


# -- the zoo itself ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", POSITIVES, ids=named)
def test_the_module_computes_its_experts(case: Case) -> None:
    for dtype in case.dtypes:
        module = case.make(dtype)
        for T in TOKENS:
            y = module(*inputs(case, dtype, T))
            assert y.dtype == dtype
            assert distance(y, module.expected(*inputs(case, dtype, T))) < EAGER[dtype], (dtype, T)


@pytest.mark.parametrize("case", [case for case in NEGATIVES if case.differs], ids=named)
def test_a_near_miss_computes_something_else(case: Case) -> None:
    for dtype in case.dtypes:
        given = inputs(case, dtype, case.tokens)
        module = case.make(dtype)
        y = module(*given)
        assert y.isfinite().all()
        assert distance(y, module.expected(*inputs(case, dtype, case.tokens))) > 5 * OWED[dtype]


def test_names_are_unique() -> None:
    names = [case.name for case in ZOO]
    assert len(set(names)) == len(names)


# -- Dynamo's graphs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "dtype"), ROTATED, ids=named)
def test_every_spelling_is_rewritten(case: Case, dtype: torch.dtype, without_inductor: None) -> None:
    with case.capture():
        report = inductor_ext.explain(case.make(dtype), *inputs(case, dtype, 7))
    assert [alone.reason for alone in report.left_alone] == []
    assert [found.op for found in report.rewritten] == ["w4a16::moe"] * case.layers
    assert report.graphs == 1
    for found in report.rewritten:
        assert f"E={case.E} top_k={case.k} H={case.H} I={case.I} G={case.group}" in found.problem
        assert case.mlp.activation in found.problem.replace(" (", ", ").split(", ")
        assert found.proof
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    check(case, dtype)


@pytest.mark.parametrize(("case", "dtype"), sorted(set(EVERY_DTYPE) - set(ROTATED), key=str), ids=named)
def test_every_dtype_is_rewritten(case: Case, dtype: torch.dtype, without_inductor: None) -> None:
    check(case, dtype)


@pytest.mark.parametrize("case", EITHER, ids=named)
def test_what_may_be_rewritten_is_right(case: Case, without_inductor: None) -> None:
    dtype = case.dtypes[0]
    with case.capture():
        report = inductor_ext.explain(case.make(dtype), *inputs(case, dtype, case.tokens))
        assert all(found.op in ("w4a16::moe", "w4a16::linear") for found in report.rewritten)
        torch.compiler.reset()
        run = torch.compile(case.make(dtype), backend="w4a16", fullgraph=True)
        for T in (case.tokens, 1, 33):
            given, again = dynamic(case, dtype, T), inputs(case, dtype, T)
            assert distance(run(*given), case.make(dtype)(*again).double()) < EAGER[dtype]
            assert all(torch.equal(a, b) for a, b in zip(given, again, strict=True)), "what it writes to its inputs"


def test_one_graph_serves_other_experts(without_inductor: None) -> None:
    """Two modules of one class are one graph to Dynamo, which asks for the weights at every call."""
    (case,) = (case for case in POSITIVES if case.name == "gather, bmm, as transformers")
    first, second = case.make(torch.float32), case.make(torch.float32)
    second.w13_packed.copy_(second.w13_packed.flip(0))
    second.exact.update({name: second.exact[name].flip(0) for name in ("gate", "up")})
    second.w13_scale.copy_(second.w13_scale.flip(0))
    run = torch.compile(lambda m, *given: m(*given), backend="w4a16", fullgraph=True, options={"w4a16.strict": True})
    given = inputs(case, torch.float32, 7)
    for module in (first, second, first):
        assert distance(run(module, *given), module.expected(*given)) <= OWED[torch.float32]


def test_other_integers_are_not_taken_for_ids(without_inductor: None) -> None:
    """With one token a vector of any length may be its ids by its shape: the positions of a static cache are not. All
    that may be ids is tried where nothing fits."""
    (case,) = (case for case in NEGATIVES if case.name == "miss: gather, weight applied twice")
    module = case.make(torch.float32)

    def layer(positions: Tensor, x: Tensor, logits: Tensor) -> Tensor:
        scores = logits.softmax(-1) * (positions >= 0).to(logits.dtype).mean()
        weights, ids = scores.topk(case.k)
        return module(x, ids, weights)

    run = torch.compile(layer, backend="w4a16", fullgraph=True)
    given = torch.arange(512), inputs(case, torch.float32, 1)[0], torch.randn(1, case.E)
    assert distance(run(*given), layer(*given).double()) <= EAGER[torch.float32]


# -- through Inductor, and ATen graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CORE, ids=named)
def test_compiled_by_inductor(case: Case) -> None:
    check(case, case.dtypes[0], (7, 33))


@pytest.mark.parametrize(("case", "decomposed"), EXPORTED, ids=named)
def test_exported(case: Case, decomposed: bool) -> None:
    dtype = case.dtypes[0]
    module = case.make(dtype)
    given = inputs(case, dtype, 7)
    shapes = tuple({tensor.dim() - 2: Dim.AUTO} for tensor in given)
    program = export(module, given, dynamic_shapes=(shapes[0], shapes[1:]) if case.route is None else shapes)
    gm: Any = (program.run_decompositions() if decomposed else program).module()
    W4A16Pass()(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.w4a16.moe.default)) == case.layers
    for T in (7, 2, 33):
        given = inputs(case, dtype, T)
        assert distance(gm(*given), module.expected(*given)) <= OWED[dtype] * case.roundings**0.5
