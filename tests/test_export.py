"""Graph capture other than torch.compile: make_fx, torch.export, AOTAutograd, AOTInductor, freezing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import aot_module, nop
from models import GPTQ, Calls, CompressedTensors, chain, rel_l2
from torch import Tensor, fx, nn
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch.fx.experimental.proxy_tensor import make_fx
from torch.torch_version import TorchVersion as Version

from inductor_ext import passes
from inductor_ext.examine import Strict
from inductor_ext.formats import SEQUENTIAL
from inductor_ext.ops import linear
from inductor_ext.options import Options
from inductor_ext.passes import W4A16Pass

MODES = ("real", "fake", "symbolic")
ROWS = ({0: torch.export.Dim("M", min=1, max=4096)},)


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def x_of(M: int, K: int = 64) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M))


class Fused(nn.Module):
    """The op, called by hand: y = x @ W.T + bias with W [32, 64] and zeros."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.codes = torch.randint(16, (32, 64), generator=random)
        self.register_buffer("qweight", SEQUENTIAL.pack(self.codes, 1))
        self.register_buffer("scales", torch.rand(32, 2, generator=random))
        self.register_buffer("zeros", torch.randint(17, (32, 2), generator=random).to(torch.uint8))
        self.register_buffer("order", torch.randperm(64, generator=random).int())
        self.bias = nn.Parameter(torch.randn(32, generator=random))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.w4a16.linear(x, self.qweight, self.scales, self.zeros, self.order, self.bias, 32, 32)

    def dense(self) -> Tensor:
        value = (self.codes.view(32, 2, 32) - self.zeros.double().unsqueeze(-1)) * self.scales.double().unsqueeze(-1)
        return value.view(32, 64)[:, self.order.long()]

    def expected(self, x: Tensor) -> Tensor:
        return x.double() @ self.dense().T + self.bias.double()


def packed_model() -> Any:
    """One layer of each spelling; the second is converted."""
    return chain(CompressedTensors(96, 64, seed=1, bias=True), GPTQ(32, 96, seed=2).act_order_())


def fused(graph: fx.Graph) -> int:
    return len(graph.find_nodes(op="call_function", target=linear))


def rewritten(gm: Any) -> Any:
    """A captured graph after the joint pass; it must still be one that export and Inductor would accept."""
    W4A16Pass(Options(strict=True))(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm


# -- the op ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_make_fx_keeps_the_op(mode: str) -> None:
    module = Fused()
    gm = make_fx(module, tracing_mode=mode, _allow_non_fake_inputs=True)(x_of(5))
    assert fused(gm.graph) == 1
    assert rel_l2(gm(x_of(5)), module.expected(x_of(5))) <= 2e-6
    if mode == "symbolic":
        assert rel_l2(gm(x_of(9)), module.expected(x_of(9))) <= 2e-6


@pytest.mark.parametrize("mode", MODES)
def test_make_fx_of_the_gradient(mode: str) -> None:
    module = Fused()

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(module(x).sum(), x)[0]

    gm = make_fx(gradient, tracing_mode=mode, _allow_non_fake_inputs=True)(x_of(5))
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.w4a16.linear_grad_x.default)) == 1
    assert rel_l2(gm(x_of(5)), torch.ones(5, 32).double() @ module.dense()) <= 2e-6


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export_keeps_the_op(strict: bool) -> None:
    module = Fused()
    program = torch.export.export(module, (x_of(5),), dynamic_shapes=ROWS, strict=strict)
    assert fused(program.graph) == 1
    for M in (1, 5, 12):
        assert rel_l2(program.module()(x_of(M)), module.expected(x_of(M))) <= 2e-6
    lowered = program.run_decompositions()
    assert fused(lowered.graph) == 1


def test_an_exported_op_is_saved_and_loaded(tmp_path: Path) -> None:
    module = Fused()
    torch.export.save(torch.export.export(module, (x_of(5),), dynamic_shapes=ROWS), tmp_path / "op.pt2")
    loaded = torch.export.load(tmp_path / "op.pt2")
    assert rel_l2(loaded.module()(x_of(7)), module.expected(x_of(7))) <= 2e-6


def test_dynamo_captures_the_op_in_one_graph() -> None:
    module = Fused()
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(module, backend=keep, fullgraph=True, dynamic=True)
    for M in (5, 8):
        assert rel_l2(compiled(x_of(M)), module.expected(x_of(M))) <= 2e-6
    (gm,) = graphs
    assert [node.op for node in gm.graph.nodes if "linear" in str(node.target)] == ["call_function"]


@pytest.mark.parametrize("make", [Fused, packed_model])
def test_aot_autograd(make: Callable[[], Any]) -> None:
    module = make()
    x = x_of(5).requires_grad_()
    y = aot_module(module, fw_compiler=nop, bw_compiler=nop)(x)
    assert rel_l2(y, module.expected(x)) <= 2e-6
    (found,) = torch.autograd.grad(y.square().sum(), x)
    (wanted,) = torch.autograd.grad(module.expected(x).square().sum(), x)
    assert rel_l2(found, wanted) <= 4e-6


def test_aot_autograd_under_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """What AOTAutograd makes of the rewritten graph: one op forward, one backward, no dense weight kept between."""
    monkeypatch.setattr(passes, "DIRECT", False)
    module = CompressedTensors(32, 64)
    seen: list[str] = []

    def note(graph: fx.Graph) -> None:
        seen.extend(str(node.target) for node in graph.nodes if node.op == "call_function")

    x = x_of(5).requires_grad_()
    with torch._inductor.config.patch(joint_custom_post_pass=note, force_disable_caches=True):
        torch.compile(module, backend="w4a16")(x).sum().backward()
    assert seen.count("w4a16.linear.default") == seen.count("w4a16.linear_grad_x.default") == 1
    assert not any("mm" in target or "bitwise" in target for target in seen)


# -- packed modules through the joint pass -----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_the_pass_rewrites_what_make_fx_captures(mode: str) -> None:
    model = packed_model()
    gm = rewritten(make_fx(model, tracing_mode=mode, _allow_non_fake_inputs=True)(x_of(5)))
    assert fused(gm.graph) == 2
    assert rel_l2(gm(x_of(5)), model.expected(x_of(5))) <= 2e-6


@torch.no_grad()
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_the_pass_rewrites_what_export_captures(strict: bool) -> None:
    model = packed_model()
    program = torch.export.export(model, (x_of(5),), dynamic_shapes=ROWS, strict=strict)
    assert rel_l2(program.module()(x_of(3)), model.expected(x_of(3))) <= 2e-6
    gm = rewritten(program.module())
    assert fused(gm.graph) == 2
    for M in (1, 5, 12):
        assert rel_l2(gm(x_of(M)), model.expected(x_of(M))) <= 2e-6


@torch.no_grad()
def test_inputs_are_not_taken_for_weights() -> None:
    """In an exported program's own graph every weight is an input: the pass must leave it alone, and say why."""
    program = torch.export.export(packed_model(), (x_of(5),))
    before = str(program.graph)
    W4A16Pass()(program.graph)
    assert str(program.graph) == before
    with pytest.raises(Strict, match="not known when this graph is compiled"):
        W4A16Pass(Options(strict=True))(program.graph)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason="torch 2.11 crashes when it loads any package with a custom op that is implemented in Python",
)
@torch.no_grad()
def test_aot_inductor(tmp_path: Path, calls: Calls) -> None:
    """Exported, compiled ahead of time with the joint pass, loaded and called with several M: right, by the op."""
    model = packed_model()
    program = torch.export.export(model, (x_of(5),), dynamic_shapes=ROWS)
    package = aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "model.pt2"),
        inductor_configs={"joint_custom_pre_pass": W4A16Pass(Options(strict=True))},
    )
    loaded: Any = aoti_load_package(package)
    for M in (1, 2, 5, 33):
        calls.ran.clear()
        assert rel_l2(loaded(x_of(M)), model.expected(x_of(M))) <= 2e-6
        assert calls.runs == 2


@torch.no_grad()
def test_freezing(calls: Calls) -> None:
    """Weights that Inductor takes for constants: rewritten before it folds their dequantisation."""
    with torch._inductor.config.patch(freezing=True):
        for seed in (1, 2):
            model = chain(CompressedTensors(96, 64, seed=seed, bias=True), GPTQ(32, 96, seed=seed).act_order_()).eval()
            calls.ran.clear()
            for M in (5, 3):
                y = torch.compile(model, backend="w4a16")(x_of(M))
                assert rel_l2(y, model.expected(x_of(M))) <= 2e-6
            assert calls.runs == 4


@torch.no_grad()
def test_freezing_with_the_pass_alone() -> None:
    """Two models of one structure, one after the other: a frozen graph must not be found with the other's weights."""
    with torch._inductor.config.patch(freezing=True, joint_custom_pre_pass=W4A16Pass()):
        for seed in (1, 2):
            model = CompressedTensors(32, 64, seed=seed).eval()
            torch.compiler.reset()
            assert rel_l2(torch.compile(model)(x_of(5)), model.expected(x_of(5))) <= 2e-6
