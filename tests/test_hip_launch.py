"""Launching AMD kernels: what reaches libamdhip64, and what is said when it, or a code object, is not as it must be.

The library here is a stand-in that runs the kernels on the CPU (tests/hip/runtime.cpp), and the machine's own where it
has one."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import hip_lanes
import pytest
import torch
from hip_lanes import Lanes
from torch import Tensor

from inductor_ext import doctor
from inductor_ext.kernels.hip import objects, runtime
from inductor_ext.kernels.hip.probe import ProbeArgs, why_not

ARCH = "gfx1151"
CPU = torch.device("cpu")


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    with hip_lanes.on(ARCH) as lanes:
        yield lanes


def probe(x: Tensor, device: torch.device = CPU, name: str = "probe") -> Tensor:
    """3 x"""
    y = torch.full_like(x, torch.nan)
    args = ProbeArgs(x.data_ptr(), y.data_ptr(), x.numel(), 3)
    runtime.launch(device, name, args, (-(-x.numel() // 256), 1, 1), 256)
    return y


def test_a_kernel_runs_where_there_is_something_to_run_it(hip_device: torch.device) -> None:
    x = torch.randn(1000, device=hip_device)
    assert torch.equal(probe(x, x.device), 3 * x)


def test_a_kernel_runs_and_is_asked_for_once(lanes: Lanes) -> None:
    x = torch.randn(1000)
    for _ in range(3):
        assert torch.equal(probe(x), 3 * x)
    assert [call.what for call in lanes.calls()].count("hipModuleLoadData") == 1
    assert [call.name for call in lanes.calls() if call.what == "hipModuleGetFunction"].count("probe") == 1
    assert len(lanes.launches()) == 3


def test_what_is_loaded_are_the_bytes_that_were_installed(lanes: Lanes) -> None:
    runtime.prepare(CPU)
    (loaded,) = (call for call in lanes.calls() if call.what == "hipModuleLoadData")
    assert loaded.data == (objects.FOLDER / f"{ARCH}.co").read_bytes()


def test_a_prepared_device_loads_nothing_at_the_launch(lanes: Lanes) -> None:
    runtime.prepare(CPU)
    before = len(lanes.calls())
    probe(torch.randn(8))
    assert [call.what for call in lanes.calls()[before:]] == ["hipModuleLaunchKernel"]


def test_the_argument_arrives_byte_by_byte(lanes: Lanes) -> None:
    x, y = torch.randn(300), torch.empty(300)
    args = ProbeArgs(x.data_ptr(), y.data_ptr(), 300, 0.5)
    runtime.launch(CPU, "probe", args, (2, 1, 1), 256, shared=512)
    (call,) = lanes.launches()
    assert call.data == bytes(args) and len(call.data) == 32
    assert (call.grid, call.threads, call.shared, call.stream) == ((2, 1, 1), 256, 512, 0)


def test_kernels_go_to_the_current_stream(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime._hip(), "stream", lambda index: 0x1234 + index)
    probe(torch.randn(8))
    assert lanes.launches()[0].stream == 0x1234


def test_the_library_and_the_stream_are_torchs(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with torch for ROCm: the stand-in has the library's name, and this process has loaded it."""

    class Seen:
        gcnArchName = "gfx1100:sramecc-:xnack-"

    monkeypatch.setattr(runtime, "_stand_in", None)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Seen)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0x5678, raising=False)
    cached = (runtime._torchs, runtime._arch)
    for function in cached:
        function.cache_clear()
    try:
        x = torch.randn(50)
        assert torch.equal(probe(x, torch.device("cuda", 0)), 3 * x)
        assert runtime.why_unusable() is None
    finally:
        for function in cached:
            function.cache_clear()
    (loaded,) = (call for call in lanes.calls() if call.what == "hipModuleLoadData")
    assert loaded.data == (objects.FOLDER / "gfx1100.co").read_bytes()
    assert lanes.launches()[0].stream == 0x5678


def test_nothing_is_loaded_while_a_graph_is_captured(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime._hip(), "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be loaded while a graph is captured"):
        probe(torch.randn(8))
    assert not lanes.calls()
    monkeypatch.setattr(runtime._hip(), "capturing", lambda: False)
    runtime.prepare(CPU)
    monkeypatch.setattr(runtime._hip(), "capturing", lambda: True)
    x = torch.randn(8)
    assert torch.equal(probe(x), 3 * x)


def test_each_device_has_its_own_module_and_the_current_one_stays(lanes: Lanes) -> None:
    x = torch.randn(100)
    for index in (0, 1, 0, 1):
        assert torch.equal(probe(x, torch.device("cpu", index)), 3 * x)
    loaded = [call.device for call in lanes.calls() if call.what == "hipModuleLoadData"]
    assert loaded == [0, 1]
    assert [call.device for call in lanes.launches()] == [0, 1, 0, 1]
    assert runtime._hip().current() == 0


def test_a_device_that_is_not_there_is_the_runtimes_to_refuse(lanes: Lanes) -> None:
    with pytest.raises(RuntimeError, match=r"hipSetDevice\(7\) failed: invalid device ordinal \(hipError 101\)"):
        probe(torch.randn(8), torch.device("cpu", 7))


def test_a_failed_launch_says_what_was_launched_and_why(lanes: Lanes) -> None:
    runtime.prepare(CPU)
    lanes.fail_next(719)
    with pytest.raises(RuntimeError, match=r"probe, grid \(1, 1, 1\), 256 threads.*unspecified launch failure.*719"):
        probe(torch.randn(8))
    probe(torch.randn(8))


def test_a_failed_load_is_tried_again(lanes: Lanes) -> None:
    lanes.fail_next(200)
    with pytest.raises(RuntimeError, match="failed: device kernel image is invalid"):
        probe(torch.randn(8))
    x = torch.randn(8)
    assert torch.equal(probe(x), 3 * x)


def test_an_unknown_error_still_says_its_number(lanes: Lanes) -> None:
    runtime.prepare(CPU)
    lanes.fail_next(12345)
    with pytest.raises(RuntimeError, match="hipError 12345"):
        probe(torch.randn(8))


def test_reading_outside_of_memory_ends_the_launch(lanes: Lanes) -> None:
    with pytest.raises(RuntimeError, match=r"memory that is not there was read or written, by lane \d+ of block 0"):
        runtime.launch(CPU, "probe", ProbeArgs(8, 8, 5, 1), (1, 1, 1), 256)


def test_a_guarded_tensor_has_nothing_behind_it(lanes: Lanes) -> None:
    x, y = hip_lanes.guarded(torch.randn(12)), hip_lanes.guarded(torch.zeros(12))
    runtime.launch(CPU, "probe", ProbeArgs(x.data_ptr(), y.data_ptr(), 12, 3), (1, 1, 1), 256)
    assert torch.equal(y, 3 * x)
    with pytest.raises(RuntimeError, match="memory that is not there"):
        runtime.launch(CPU, "probe", ProbeArgs(x.data_ptr(), y.data_ptr(), 13, 3), (1, 1, 1), 256)
    with pytest.raises(RuntimeError, match="memory that is not there"):
        runtime.launch(CPU, "probe", ProbeArgs(x.data_ptr() - 8192, y.data_ptr(), 12, 3), (1, 1, 1), 256)


def test_the_argument_must_be_the_kernels(lanes: Lanes) -> None:
    class Short(ctypes.Structure):
        _fields_ = (("n", ctypes.c_int64),)

    with pytest.raises(RuntimeError, match="invalid argument"):
        runtime.launch(CPU, "probe", Short(1), (1, 1, 1), 256)


def test_an_empty_grid_is_refused(lanes: Lanes) -> None:
    with pytest.raises(RuntimeError, match="invalid configuration argument"):
        probe(torch.empty(0))


def test_a_kernel_that_is_not_there_is_named_with_the_arch(lanes: Lanes) -> None:
    with pytest.raises(RuntimeError, match=f"There is no kernel prob for {ARCH}"):
        probe(torch.randn(8), name="prob")


def test_without_an_amd_gpu_the_reason_is_said() -> None:
    if torch.version.hip is not None and torch.cuda.is_available():
        pytest.skip("there is one")
    assert runtime.why_unusable() in (
        "This torch is not built for ROCm.",
        f"torch ({torch.version.hip}) sees no AMD GPU.",
    )
    with pytest.raises(RuntimeError, match=r"ROCm|AMD GPU"):
        probe(torch.randn(8))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of an editable install's csrc/hip and code objects, to be spoilt."""
    shutil.copytree(objects.SOURCES, tmp_path / "sources", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(objects.FOLDER, tmp_path / "objects")
    monkeypatch.setattr(objects, "SOURCES", tmp_path / "sources")
    monkeypatch.setattr(objects, "FOLDER", tmp_path / "objects")
    objects._find.cache_clear()
    objects._manifest.cache_clear()
    yield tmp_path
    objects._find.cache_clear()
    objects._manifest.cache_clear()


def test_code_objects_are_of_these_sources(installed: Path) -> None:
    assert objects.why_unusable(ARCH) is None
    assert "probe" in objects.load(ARCH).kernels


def test_a_changed_source_makes_them_stale(installed: Path) -> None:
    with (installed / "sources" / "prelude.h").open("a") as header:
        header.write("// another thought\n")
    assert "stale: prelude.h changed" in (objects.why_unusable(ARCH) or "")


def test_a_new_source_makes_them_stale(installed: Path) -> None:
    (installed / "sources" / "new.hip").touch()
    assert "stale: new.hip changed" in (objects.why_unusable(ARCH) or "")


def test_installed_without_sources_they_are_trusted(installed: Path) -> None:
    shutil.rmtree(installed / "sources")
    assert objects.why_unusable(ARCH) is None


def test_a_damaged_one_is_not_loaded(installed: Path) -> None:
    path = installed / "objects" / f"{ARCH}.co"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert "damaged" in (objects.why_unusable(ARCH) or "")
    assert objects.why_unusable("gfx1100") is None
    with pytest.raises(RuntimeError, match=f"{ARCH} is damaged"):
        objects.load(ARCH)


def test_a_missing_one_is_said(installed: Path) -> None:
    (installed / "objects" / f"{ARCH}.co").unlink()
    assert f"for {ARCH} are missing" in (objects.why_unusable(ARCH) or "")


def test_a_damaged_manifest_is_said(installed: Path) -> None:
    (installed / "objects" / "manifest.json").write_text("{")
    assert "manifest of the AMD kernels cannot be read" in (objects.why_unusable(ARCH) or "")


def test_another_arch_is_answered_with_those_that_there_are(installed: Path) -> None:
    assert objects.why_unusable("gfx906") == (
        "There are no AMD kernels for gfx906; there are for " + ", ".join(hip_lanes.toolchain.ARCHS) + "."
    )


def test_doctor_tells_which_there_are(installed: Path) -> None:
    told = json.loads((installed / "objects" / "manifest.json").read_text())["compiler"]
    (fact,) = doctor.facts()["code objects"]
    assert not fact.wrong
    assert "gfx1100" in fact.value and told in fact.value


def test_doctor_tells_how_to_get_them(installed: Path) -> None:
    shutil.rmtree(installed / "objects")
    (fact,) = doctor.facts()["code objects"]
    assert not fact.wrong
    assert "were not compiled" in fact.value and "pip install ziglang" in fact.value


def test_they_are_built_for_what_the_kernels_are_chosen_for() -> None:
    assert objects.ARCHS == hip_lanes.toolchain.ARCHS


def test_no_kernel_is_usable_where_its_code_object_is_not(installed: Path, lanes: Lanes) -> None:
    assert runtime.why_unusable() is None
    (installed / "objects" / f"{ARCH}.co").unlink()
    objects._find.cache_clear()
    assert f"for {ARCH} are missing" in (runtime.why_unusable() or "")


def test_doctor_launches_a_kernel(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not(CPU) is None
    lanes.fail_next(719)
    assert "unspecified launch failure" in (why_not(CPU) or "")
    monkeypatch.setattr(runtime, "launch", lambda *given: None)
    assert why_not(CPU) == "A kernel ran and its result is wrong."
