"""The recogniser on ATen graphs, with Inductor's decompositions: what W4A16Pass sees of a model that was exported."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch._inductor.decomposition import select_decomp_table
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from zoo import NEGATIVES, POSITIVES, Idiom
from zoo.base import call, distance, given

from inductor_ext.passes import W4A16Pass

# Their weights are no attributes once traced, or the trace itself would bake in what the test is about.
NOT_TRACED = {"torchao", "argument", "trained", "written", "copied", "noise", "dropout", "activation"}


def traced(module: nn.Module, x: torch.Tensor, functional: bool) -> fx.GraphModule:
    """The module's forward as one ATen graph that holds its buffers, before or after functionalisation and Inductor's
    decompositions."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        return call(module, x)

    if functional:
        forward = functionalize(forward, remove="mutations_and_views")
    table = select_decomp_table() if functional else None
    with torch.no_grad():
        return make_fx(forward, decomposition_table=table, tracing_mode="real")(x)


def ops(graph: fx.Graph) -> int:
    return sum(node.target is torch.ops.w4a16.linear.default for node in graph.nodes)


@pytest.mark.parametrize("idiom", POSITIVES, ids=lambda idiom: idiom.name)
def test_every_spelling_is_rewritten(idiom: Idiom) -> None:
    module, dense, x = given(idiom, torch.float32, leading=idiom.leading[-1])
    gm = traced(module, x, functional=True)
    W4A16Pass()(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert ops(gm.graph) == idiom.rewritten
    y = gm(x)
    assert distance(y, module.expected(x, dense)) <= (1e-5 if y.dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("idiom", NEGATIVES, ids=lambda idiom: idiom.name)
def test_near_misses_are_left_alone(idiom: Idiom) -> None:
    if any(word in idiom.name for word in NOT_TRACED):
        pytest.skip("its point is lost when it is traced: what makes it a near miss becomes a constant")
    module, _, x = given(idiom, torch.float32, leading=idiom.leading[-1])
    gm = traced(module, x, functional=True)
    before = gm(x)
    W4A16Pass()(gm.graph)
    gm.recompile()
    assert ops(gm.graph) == 0
    assert torch.equal(gm(x), before)
