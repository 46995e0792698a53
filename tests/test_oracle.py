"""Which kernel is chosen, what is told about the others, and that a forced one is never replaced."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import CompressedTensors, Int8

import inductor_ext
from inductor_ext import kernels, oracle
from inductor_ext.kernels import Problem

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


def made_up(monkeypatch: pytest.MonkeyPatch, **given: tuple[str | None, str | None]) -> None:
    """A world of kernels, in this order of priority: name=(why not usable, why rejected)."""
    modules = {
        name: SimpleNamespace(usable=lambda u=usable: u, reject=lambda problem, r=rejects: r)
        for name, (usable, rejects) in given.items()
    }

    def load(name: str) -> Any:
        if name not in modules:
            raise ValueError(f"There is no kernel {name!r}; the kernels are {', '.join(sorted(modules))}.")
        return modules[name]

    monkeypatch.setattr(kernels, "load", load)
    monkeypatch.setattr(oracle, "PRIORITY", {"cpu": tuple(given)})


def test_the_first_that_can_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, fast=(None, None), slow=(None, None))
    assert oracle.choose(PROBLEM) == oracle.Choice("fast", {})


def test_reasons_of_those_passed_over_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, a=("Not built.", None), b=(None, "N is odd."), c=(None, None), d=(None, "Never asked."))
    assert oracle.choose(PROBLEM) == oracle.Choice("c", {"a": "Not built.", "b": "N is odd."})


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


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"There is no kernel 'cup'; the kernels are cpu, reference"):
        oracle.choose(PROBLEM, "cup")


def test_every_list_ends_with_the_kernel_that_runs_everywhere() -> None:
    assert all(names[-1] == "reference" for names in oracle.PRIORITY.values())
    assert {name for names in oracle.PRIORITY.values() for name in names} <= set(kernels.KERNELS)
    for device in ("cpu", "cuda", "xpu", "mps", "unheard-of"):
        assert oracle.choose(replace(PROBLEM, device=device, dtype=torch.float32)).kernel in kernels.KERNELS


def test_a_device_without_a_list_has_the_reference() -> None:
    assert oracle.choose(replace(PROBLEM, device="xpu")) == oracle.Choice("reference", {})


def test_the_cpu_kernel_comes_before_the_reference() -> None:
    choice = oracle.choose(PROBLEM)
    if (reason := kernels.load("cpu").usable()) is None:
        assert choice == oracle.Choice("cpu", {})
    else:
        assert choice == oracle.Choice("reference", {"cpu": reason})


def test_every_kernel_says_what_it_is() -> None:
    for name in kernels.KERNELS:
        assert name == kernels.load(name).NAME


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


def test_the_architecture_of_this_machine() -> None:
    import platform

    assert oracle.arch(torch.device("cpu")) == platform.machine()
    assert oracle.arch(torch.device("meta")) == "meta"


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
    monkeypatch.setattr(oracle, "PRIORITY", {"cpu": ("reference",)})
    report = inductor_ext.explain(Int8(32, 64), torch.randn(3, 64))
    assert report.rewritten == []
    assert "reference: On holiday." in report.left_alone[0].reason
    torch.compiler.reset()
