"""Which kernel is chosen, what is told about the others, and that a forced one is never replaced."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import CompressedTensors, Int8

import inductor_ext
from inductor_ext import devices, kernels, oracle
from inductor_ext.kernels import Mlp, MoeProblem, Problem, WeightKind, table
from inductor_ext.oracle import wna16

PROBLEM = Problem(
    op="linear",
    device="cpu",
    arch="x86_64",
    dtype=torch.bfloat16,
    scale_dtype=torch.bfloat16,
    N=64,
    K=128,
    group_size=32,
    zeros="none",
    order=False,
    bias=False,
)
KIND = WeightKind(torch.bfloat16, 32, "none")
MOE = MoeProblem(
    device="cpu",
    arch="x86_64",
    dtype=torch.bfloat16,
    E=8,
    top_k=2,
    H=64,
    I=128,
    w13=KIND,
    w2=KIND,
    mlp=Mlp(),
    bias=False,
    expert_map=False,
)


def made_up(monkeypatch: pytest.MonkeyPatch, **given: tuple[str | None, str | None]) -> None:
    """A world of kernels, in this order of priority: name=(why not usable, why rejected)."""
    modules = {
        name: SimpleNamespace(usable=lambda u=usable: u, reject=lambda problem, r=rejects: r)
        for name, (usable, rejects) in given.items()
    }

    rows = [table.Row(op, name, "", ("cpu",), "CPU") for op in ("linear", "moe") for name in given]
    monkeypatch.setattr(table, "TABLE", (*rows, table.Row("other", "elsewhere", "", ("cpu",), "CPU")))
    monkeypatch.setattr(kernels, "load_for", lambda op, name: modules[name])


@pytest.mark.parametrize("problem", [PROBLEM, MOE], ids=lambda problem: problem.op)
def test_the_first_that_can_is_chosen(problem: Problem | MoeProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, fast=(None, None), slow=(None, None))
    assert oracle.choose(problem) == oracle.Choice("fast", {})


def test_reasons_of_those_passed_over_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, a=("Not built.", None), b=(None, "N is odd."), c=(None, None), d=(None, "Never asked."))
    assert oracle.choose(PROBLEM) == oracle.Choice("c", {"a": "Not built.", "b": "N is odd."})


def test_groups_that_do_not_divide_k_are_nobody_s(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, a=(None, None))
    for problem, K in (
        (replace(PROBLEM, K=2880, group_size=128), 2880),
        (replace(MOE, H=96, w13=replace(MOE.w13, group_size=64)), 96),
        (replace(MOE, I=192, w2=replace(MOE.w2, group_size=128)), 192),
    ):
        with pytest.raises(oracle.NoKernel, match=f"Groups of .* do not divide K={K}"):
            oracle.choose(problem)


def test_no_kernel_at_all_tells_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, a=("Not built.", None), b=(None, "N is odd."))
    with pytest.raises(oracle.NoKernel) as error:
        oracle.choose(PROBLEM)
    for part in ("linear", "N=64 K=128", "cpu", "a: Not built.", "b: N is odd."):
        assert part in str(error.value)


def test_a_forced_kernel_is_taken_whatever_its_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, fast=(None, None), slow=(None, None))
    assert oracle.choose(PROBLEM, "slow") == oracle.Choice("slow", {})


@pytest.mark.parametrize("why", [("Not built.", None), (None, "N is odd.")])
def test_a_forced_kernel_that_cannot_is_an_error(
    why: tuple[str | None, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(monkeypatch, forced=why, other=(None, None))
    with pytest.raises(oracle.NoKernel, match=why[0] or why[1]):
        oracle.choose(PROBLEM, "forced")


def test_a_forced_kernel_of_another_op_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, fast=(None, None), slow=(None, None))
    with pytest.raises(oracle.NoKernel, match="elsewhere: There is no such kernel for moe; its kernels are fast, slow"):
        oracle.choose(MOE, "elsewhere")


def test_a_kernel_that_does_not_load_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = [table.Row(op, "gone", "inductor_ext.kernels.gone", ("cpu",), "CPU") for op in table.ops()]
    slow = [row for row in table.TABLE if row.name == "reference"]
    monkeypatch.setattr(table, "TABLE", (*gone, *slow))
    for problem in (PROBLEM, MOE):
        choice = oracle.choose(problem)
        assert choice.kernel == "reference"
        assert "does not load: ModuleNotFoundError" in choice.passed_over["gone"]
        with pytest.raises(oracle.NoKernel, match="gone: does not load"):
            oracle.choose(problem, "gone")


@pytest.mark.parametrize("problem", [PROBLEM, MOE], ids=lambda problem: problem.op)
def test_an_unknown_name_lists_the_known_ones(problem: Problem | MoeProblem) -> None:
    with pytest.raises(ValueError, match=r"There is no kernel 'cup'; the kernels are aiter, .*cpu, .*reference"):
        oracle.choose(problem, "cup")


def test_a_name_of_another_op_lists_those_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "TABLE", (*table.TABLE, table.Row("linear", "only", "", ("cpu",), "CPU")))
    with pytest.raises(
        ValueError, match=r"There is no kernel 'only' for moe; its kernels are batched_marlin, cpu, .*triton"
    ):
        kernels.load_for("moe", "only")


@pytest.mark.parametrize(("op", "bits"), sorted({(row.op, bits) for row in table.TABLE for bits in row.bits}))
def test_every_list_ends_with_a_kernel_that_runs_everywhere(op: str, bits: int) -> None:
    for device in ("cpu", "cuda", "xpu", "mps", "unheard-of"):
        last = table.priority(op, device, bits)[-1]
        assert table.rows(op)[last].backend == "EMULATION"
        assert kernels.load_for(op, last).usable() is None


def test_a_row_is_of_one_kernel() -> None:
    assert len({(row.op, row.name) for row in table.TABLE}) == len(table.TABLE)
    assert {row.backend for row in table.TABLE} <= {backend.value for backend in wna16.WNA16MoEBackend}


def test_every_problem_has_a_kernel_on_every_device() -> None:
    for problem, device in itertools.product((PROBLEM, MOE), ("cpu", "cuda", "xpu", "mps", "unheard-of")):
        chosen = oracle.choose(replace(problem, device=device, dtype=torch.float32)).kernel
        assert chosen in table.priority(problem.op, device)


def test_a_device_without_a_list_has_the_reference() -> None:
    for problem in (PROBLEM, MOE):
        assert oracle.choose(replace(problem, device="mps")) == oracle.Choice("reference", {})


@pytest.mark.parametrize("problem", [PROBLEM, MOE], ids=lambda problem: problem.op)
def test_the_cpu_kernel_comes_before_the_reference(problem: Problem | MoeProblem) -> None:
    choice = oracle.choose(problem)
    if (reason := kernels.why_unusable(problem.op, "cpu")) is None:
        assert choice == oracle.Choice("cpu", {})
    else:
        assert choice == oracle.Choice("reference", {"cpu": reason})


def test_every_kernel_says_what_it_is() -> None:
    for row in table.TABLE:
        assert row.name == kernels.load_for(row.op, row.name).NAME


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "N=64 K=128 G=32 bfloat16, symmetric"),
        ({"zeros": "int", "bias": True}, "N=64 K=128 G=32 bfloat16, int zeros, bias"),
        ({"zeros": "float", "order": True}, "N=64 K=128 G=32 bfloat16, float zeros, act-order"),
    ],
)
def test_a_problem_reads_as_a_line(change: dict[str, Any], text: str) -> None:
    assert str(replace(PROBLEM, **change)) == text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "E=8 top_k=2 H=64 I=128 G=32 bfloat16, symmetric, silu"),
        (
            {"w2": replace(KIND, group_size=64, zeros="int"), "bias": True, "expert_map": True},
            "E=8 top_k=2 H=64 I=128 G=32/64 bfloat16, int zeros, silu, bias, expert_map",
        ),
        (
            {"mlp": Mlp("gelu", "none", apply_router_weight_on_input=True)},
            "E=8 top_k=2 H=64 I=128 G=32 bfloat16, symmetric, gelu (none), weighted input",
        ),
    ],
)
def test_a_problem_of_experts_reads_as_a_line(change: dict[str, Any], text: str) -> None:
    assert str(replace(MOE, **change)) == text


def test_the_architecture_of_this_machine() -> None:
    import platform

    assert devices.of(torch.device("cpu")) == devices.Device("cpu", platform.machine())
    assert devices.of(torch.device("meta")) == devices.Device("meta", "meta")


def test_the_report_keeps_the_reasons() -> None:
    """A group of 4 is too small for the C++ kernel."""
    torch.compiler.reset()
    layer, x = CompressedTensors(32, 64, group=4), torch.randn(3, 64)
    (entry,) = inductor_ext.explain(layer, x).rewritten
    assert entry.kernel == "reference"
    assert set(entry.passed_over) == {"cpu"}
    assert "4" in entry.passed_over["cpu"] or "missing" in entry.passed_over["cpu"]
    torch.compiler.reset()


def test_no_kernel_leaves_the_layer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(kernels.load("reference"), "reject", lambda problem: "On holiday.")
    monkeypatch.setattr(table, "TABLE", tuple(row for row in table.TABLE if row.name == "reference"))
    report = inductor_ext.explain(Int8(32, 64), torch.randn(3, 64))
    assert report.rewritten == []
    assert "reference: On holiday." in report.left_alone[0].reason
    torch.compiler.reset()
