"""`python -m inductor_ext doctor`: what a user reads when something does not work."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from inductor_ext import doctor, kernels
from inductor_ext.kernels import table


class Kernel:
    """A kernel module that says what it is told to say."""

    def __init__(self, why: str | None):
        self.why = why

    def usable(self) -> str | None:
        return self.why


@pytest.fixture
def no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_backend", list)


def lines(printed: str) -> dict[str, str]:
    """The table as {name: value}."""
    rows = [line.strip().partition("  ") for line in printed.splitlines() if line.startswith("  ")]
    return {name: value.strip() for name, _, value in rows}


def only(monkeypatch: pytest.MonkeyPatch, *kernels: tuple[str, str]) -> None:
    """A world of these kernels, by op and name."""
    monkeypatch.setattr(table, "TABLE", tuple(table.Row(op, name, "", ("cpu",), "CPU") for op, name in kernels))


def test_a_healthy_install_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    said = lines(capsys.readouterr().out)
    assert said["torch"] == torch.__version__
    assert said["linear: reference"] == said["moe: reference"] == "usable"
    assert "backend='w4a16'" in said["w4a16"]
    assert said["entry point"].startswith("inductor_ext.backend:w4a16 from ")
    assert {f"{row.op}: {row.name}" for row in table.TABLE} <= set(said)


def test_values_stand_in_one_column(capsys: pytest.CaptureFixture[str], no_backend: None) -> None:
    doctor.main()
    printed = capsys.readouterr().out
    starts = {line.index(value) for line in printed.splitlines() for name, value in [*lines(line).items()] if value}
    assert len(starts) == 1


def test_a_kernel_that_cannot_run_gives_its_reason(monkeypatch: pytest.MonkeyPatch, no_backend: None) -> None:
    only(monkeypatch, ("linear", "reference"), ("linear", "fast"), ("moe", "fast"))
    said = {"reference": Kernel(None), "fast": Kernel("the library was not built")}
    monkeypatch.setattr(kernels, "load_for", lambda op, name: said[name])
    assert doctor.facts()["kernels"] == [
        doctor.Fact("linear: reference", "usable"),
        doctor.Fact("linear: fast", "the library was not built"),
        doctor.Fact("moe: fast", "the library was not built"),
    ]
    assert doctor.main() == 0


def test_a_kernel_that_does_not_load_hides_no_other(monkeypatch: pytest.MonkeyPatch, no_backend: None) -> None:
    def load_for(op: str, name: str) -> Kernel:
        if name == "broken":
            raise OSError("undefined symbol: aoti_torch_x")
        return Kernel(None)

    only(monkeypatch, ("moe", "broken"), ("moe", "reference"))
    monkeypatch.setattr(kernels, "load_for", load_for)
    broken, reference = doctor.facts()["kernels"]
    assert broken.value == "does not load: OSError: undefined symbol: aoti_torch_x"
    assert reference.value == "usable"


def test_no_reference_kernel_fails(
    monkeypatch: pytest.MonkeyPatch, no_backend: None, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, ("moe", "reference"))
    monkeypatch.setattr(kernels, "load_for", lambda op, name: Kernel("no int4 today"))
    assert doctor.main() == 1
    assert lines(capsys.readouterr().out)["moe: reference"] == "WRONG: no int4 today"


def test_a_backend_that_torch_does_not_list_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "BACKEND", "w4a17")
    (fact,) = doctor.facts()["backend"]
    assert fact.wrong and "does not list it" in fact.value


def test_two_installs_of_the_backend_are_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("w4a16", value, "torch_dynamo_backends")
        for value in ("old.place:w4a16", "inductor_ext.backend:w4a16")
    ]
    monkeypatch.setattr(doctor, "entry_points", lambda **_: points)
    fact = doctor.facts()["backend"][-1]
    assert fact.wrong and "old.place:w4a16" in fact.value and "inductor_ext.backend:w4a16" in fact.value


def test_what_inductor_lacks_to_compile_is_said(
    monkeypatch: pytest.MonkeyPatch, no_backend: None, tmp_path: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    wrong = {fact.name: fact.value for fact in doctor.facts()["machine"] if fact.wrong}
    assert "apt install g++" in wrong["c++ compiler"]
    assert f"no {tmp_path}/Python.h" in wrong["python headers"]


def test_each_gpu_is_named_with_its_arch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen:
        name, major, minor, total_memory, gcnArchName = "Some Card", 9, 0, 80 * 2**30, "gfx1100"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Seen)
    for hip, arch in ((None, "sm_90"), ("6.4", "gfx1100")):
        monkeypatch.setattr(torch.version, "hip", hip)
        gpus = [fact for fact in doctor.facts()["machine"] if fact.name.startswith("gpu")]
        assert [(gpu.name, gpu.value) for gpu in gpus] == [
            ("gpu 0", f"Some Card, {arch}, 80 GiB"),
            ("gpu 1", f"Some Card, {arch}, 80 GiB"),
        ]
