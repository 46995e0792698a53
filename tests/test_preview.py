"""Devices that are not here: by name, what would run on them, and why not the rest."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from models import CompressedTensors

import inductor_ext
from inductor_ext import cli, devices, kernels, oracle, preview
from inductor_ext.devices import Device, named
from inductor_ext.kernels import table


def test_archs_and_products_are_known_by_name() -> None:
    assert named("gfx1151") == named("8060S") == named("Strix Halo") == Device("cuda", "gfx1151")
    assert named("MI300X") == named("gfx942")
    assert named("h200") == named("sm_90") == Device("cuda", "sm_90")
    assert named("xpu") == Device("xpu", "xpu")
    assert named("cpu") == devices.of(torch.device("cpu"))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no device 'mi9000'; those known by name are .*gfx1151.*mi300x"):
        named("mi9000")


@pytest.mark.parametrize("name", devices.KNOWN)
def test_every_problem_runs_somehow_on_every_known_device(name: str) -> None:
    for problem in preview.problems(named(name)).values():
        choice = oracle.choose(problem, elsewhere=True)
        first = table.priority(problem.op, problem.device, problem.bits)[0]
        assert choice.kernel == first or first in choice.passed_over
        reasons = [reason for reason in oracle.verdicts(problem, elsewhere=True).values() if reason is not None]
        assert all(reason.endswith(".") for reason in reasons)


# What would run: dense, with float zeros, int8; experts, with integer zeros, with biases, int8.
WOULD_RUN = {
    "gfx1100": ("hip", "triton", "triton_int8", "hip", "hip", "hip", "triton_int8"),
    "gfx1151": ("hip", "triton", "triton_int8", "hip", "hip", "hip", "triton_int8"),
    "gfx942": ("triton", "triton", "triton_int8", "triton", "triton", "triton", "triton_int8"),
    "gfx950": ("triton", "triton", "triton_int8", "triton", "triton", "triton", "triton_int8"),
    "sm_90": ("triton", "triton", "triton_int8", "triton", "triton", "triton", "triton_int8"),
    "sm_100": ("triton", "triton", "triton_int8", "triton", "triton", "triton", "triton_int8"),
    "xpu": ("reference", "reference", "reference", "xpu", "reference", "xpu", "reference"),
    "cpu": ("cpu", "cpu", "reference", "cpu", "cpu", "cpu", "reference"),
}
TITLES = (
    "dense", "dense, HQQ", "dense, int8",
    "experts", "experts, GPTQ or AWQ with zeros", "experts with biases", "experts, int8",
)  # fmt: skip


@pytest.mark.parametrize("name", WOULD_RUN)
def test_what_would_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = preview.problems(named(name))
    assert tuple(oracle.choose(asked[title], elsewhere=True).kernel for title in TITLES) == WOULD_RUN[name]
    assert cli.main(["doctor", "--device", name]) == 0
    said = capsys.readouterr().out
    for title, kernel in zip(TITLES, WOULD_RUN[name], strict=True):
        assert re.search(rf"^  {kernel} +{title}: [NE]=", said, re.MULTILINE)
    for op in {problem.op for problem in asked.values()}:
        for kernel in table.priority(op, named(name).type):
            assert kernel in said
            if all(oracle.why_not(p, kernel, True) for p in asked.values() if p.op == op and p.bits == 4):
                assert f"not {kernel}: " in said


def test_a_reason_for_all_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--device", "mi300x"]) == 0
    said = capsys.readouterr().out
    assert said.count("not marlin: The kernel runs on NVIDIA GPUs, not on cuda (gfx942).") == 2  # dense and experts
    assert "needs vLLM" not in said
    assert cli.main(["doctor", "--device", "h100"]) == 0
    assert "marlin needs vLLM, sgl-kernel or GPTQModel" in capsys.readouterr().out


def test_what_is_installed_here_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = preview.problems(named("gfx942"))["dense"]
    monkeypatch.setattr(kernels, "why_unusable", lambda op, name: None if name == "reference" else "Not here.")
    assert oracle.choose(problem).kernel == "reference"
    assert oracle.choose(problem, elsewhere=True).kernel == "triton"


def test_old_architectures_are_told_why() -> None:
    for name in ("t4", "gfx1030"):
        choice = oracle.choose(preview.problems(named(name))["dense"], elsewhere=True)
        assert choice.kernel == "reference"
        assert named(name).arch in choice.passed_over["triton"]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--device", "t4"]) == 0
    said = capsys.readouterr().out
    assert "on sm_75" in said
    assert re.search(r"^  reference +dense: N=4096 K=4096 G=128 bfloat16, symmetric$", said, re.MULTILINE)
    assert "not triton: The kernels need sm_80 or newer" in said
    assert cli.main(["doctor", "--device", "mi9000"]) == 2
    assert "no device 'mi9000'" in capsys.readouterr().err


def test_a_model_explained_for_another_device() -> None:
    model, x = CompressedTensors(64, 128, dtype=torch.bfloat16), torch.randn(3, 128).bfloat16()
    here = inductor_ext.explain(model, x)
    there = inductor_ext.explain_for("h100", model, x)
    old = inductor_ext.explain_for("t4", model, x)
    assert [r.rewritten[0].kernel for r in (there, old)] == ["triton", "reference"]
    assert [r.kernel for r in inductor_ext.explain(model, x).rewritten] == [r.kernel for r in here.rewritten]
    assert "sm_80" in str(old)
    assert "sm_80" not in str(here)


@pytest.mark.parametrize("name", WOULD_RUN)
def test_a_model_explained_for_every_device(name: str) -> None:
    model, x = CompressedTensors(64, 128, dtype=torch.bfloat16), torch.randn(3, 128).bfloat16()
    report = inductor_ext.explain_for(name, model, x)
    assert report.rewritten[0].kernel == WOULD_RUN[name][0]


def test_the_device_is_no_option_of_torch_compile() -> None:
    model = torch.compile(CompressedTensors(64, 128), backend="w4a16", options={"w4a16.device": named("h100")})
    with pytest.raises(Exception, match=r"no option 'w4a16\.device'"):
        model(torch.randn(3, 128))


def test_explain_on_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    loaded: list[Any] = []

    class Model(CompressedTensors):
        def forward(self, ids: Any) -> Any:
            return super().forward(torch.ones(ids.shape[1], 128, dtype=torch.bfloat16))

    def load(args: Any, folder: Any) -> Any:
        loaded.append(args.device)
        return Model(64, 128, dtype=torch.bfloat16)

    monkeypatch.setattr(cli, "_load", load)
    monkeypatch.setattr(cli, "_folder", lambda args: args.path)
    assert cli.main(["explain", "somewhere", "--device", "mi300x"]) == 0
    assert loaded == ["cpu"]
    assert "triton" in capsys.readouterr().out
