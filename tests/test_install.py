"""What a user gets from `pip install`: the release's wheel, which is built from its sdist, or an editable install.

Each has its own venv. No network: the venvs see this environment's packages (torch above all) through a folder of
links from which every trace of inductor_ext is left out.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import inductor_ext

ROOT = Path(__file__).parent.parent
SOURCES = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
)
FOLDERS = ("inductor_ext", "patterns", "csrc", "tests/hip")
BUILT = ("*.so", "*.co", "manifest.json", "__pycache__")
NO_HIP = {"INDUCTOR_EXT_HIP_KERNELS": "0"}
OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation")
PYTHON = "venv/bin/python"
PIP_WHEEL = (sys.executable, "-m", "pip", "wheel", *OFFLINE)

DOUBLE = """
#include "prelude.h"
struct Args { float* x; };
KERNEL(twice, Args, 32, 16) { args.x[thread()] *= 2; }
"""

PROBE = """
import json, sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
import inductor_ext
seconds, loaded = time.perf_counter() - start, set(sys.modules) - before
import inductor_ext.patterns
from importlib.metadata import distribution
from importlib.resources import files
from importlib.util import find_spec
print(json.dumps({
    "seconds": seconds,
    "loaded": sorted({name.partition(".")[0] for name in loaded}),
    "version": inductor_ext.__version__,
    "metadata version": distribution("inductor-ext").version,
    "file": inductor_ext.__file__,
    "patterns file": inductor_ext.patterns.__file__,
    "typed": files("inductor_ext").joinpath("py.typed").is_file(),
    "library": files("inductor_ext").joinpath("_cpu.so").is_file(),
    "measured": files("inductor_ext.kernels.gpu").joinpath("measured.json").is_file(),
    "a package named patterns": find_spec("patterns") is not None,
}))
"""

COMPILE = """
import sys, torch, torch._dynamo
assert "w4a16" in torch._dynamo.list_backends(exclude_tags=None)
model, x = torch.nn.Linear(8, 8), torch.ones(2, 8)
assert "inductor_ext" not in sys.modules, "it must be found through the entry point"
compiled = torch.compile(model, backend="w4a16")
torch.testing.assert_close(compiled(x), model(x))
assert "inductor_ext.backend" in sys.modules
assert "transformers" not in sys.modules
"""


def attempt(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = tuple(str(part) for part in command)
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=600)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = attempt(*command, cwd=cwd, **environment)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tree(copy: Path) -> Path:
    """A copy of the sources, so that nothing built here lands in, or comes from, the checkout or another build.

    In place of the AMD kernels, which take long to compile, it has one that does not.
    """
    copy.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(*BUILT))
    for path in (copy / "csrc" / "hip").glob("*.hip"):
        path.unlink()
    (copy / "csrc" / "hip" / "double.hip").write_text(DOUBLE)
    return copy


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from the unpacked sdist."""
    home = tmp_path_factory.mktemp("release")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", home / "dist", tree(home / "tree"), cwd=home)
    return home / "dist"


@pytest.fixture(scope="session")
def host_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to everything installed here but inductor_ext."""
    links = tmp_path_factory.mktemp("host")
    for folder in {
        Path(sysconfig.get_path("purelib")),
        Path(sysconfig.get_path("platlib")),
        Path(torch.__file__).parents[1],
    }:
        for entry in folder.iterdir():
            ours = "inductor_ext" in entry.name or entry.suffix == ".pth"
            if not ours and not (links / entry.name).exists():
                (links / entry.name).symlink_to(entry)
    return links


@pytest.fixture(scope="session", params=["wheel", "editable"])
def home(request: pytest.FixtureRequest, host_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a venv, `venv/`, into which inductor-ext was installed; if editable, the sources are in it too, and
    the AMD kernels are left out."""
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder / "venv", symlinks=True)
    (site,) = folder.glob("venv/lib/python*/site-packages")
    (site / "host.pth").write_text(f"{host_packages}\n")
    if request.param == "editable":
        what = ["--editable", tree(folder / "tree")]
    else:
        what = [*request.getfixturevalue("release").glob("*.whl")]
    run(sys.executable, "-m", "pip", "--python", folder / PYTHON, "install", *OFFLINE, *what, cwd=folder, **NO_HIP)
    return folder


@pytest.fixture(scope="session")
def probed(home: Path) -> dict[str, Any]:
    return json.loads(run(home / PYTHON, "-c", PROBE, cwd=home))


def test_every_public_name_leads_somewhere() -> None:
    for name in inductor_ext.__all__:
        assert getattr(inductor_ext, name)
        assert name in dir(inductor_ext)


def test_a_misspelt_name_is_answered_with_the_right_ones() -> None:
    misspelt = "prepacked_"
    with pytest.raises(AttributeError, match=r"no attribute 'prepacked_'; it has .*prepack_"):
        getattr(inductor_ext, misspelt)


def test_import_is_cheap_and_pulls_in_nothing_else(probed: dict[str, Any]) -> None:
    assert probed["seconds"] < 0.3
    assert probed["loaded"] == ["inductor_ext"]


def test_the_version_is_the_packages(probed: dict[str, Any]) -> None:
    assert probed["version"] == probed["metadata version"]


def test_patterns_is_a_subpackage_and_no_top_level_one(probed: dict[str, Any]) -> None:
    assert Path(probed["patterns file"]).parent.name == "patterns"
    assert not probed["a package named patterns"]


def test_types_and_the_cpu_library_come_along(probed: dict[str, Any]) -> None:
    assert probed["typed"]
    assert probed["library"]
    assert probed["measured"]


def test_what_runs_is_what_was_installed(probed: dict[str, Any], home: Path) -> None:
    assert Path(probed["file"]).is_relative_to(home)
    assert Path(probed["patterns file"]).is_relative_to(home)


def test_doctor_finds_all_well(home: Path) -> None:
    printed = run(home / PYTHON, "-m", "inductor_ext", "doctor", cwd=home)
    assert re.search(r"^ +linear: cpu +usable$", printed, re.MULTILINE), printed
    if (home / "tree").exists():
        assert "AMD kernels were not compiled when the package was installed" in printed
    else:
        assert re.search(r"^ +amd gpus +gfx1100, .* compiled by .*clang", printed, re.MULTILINE), printed


def test_torch_compile_finds_the_backend_by_its_name(home: Path) -> None:
    run(home / PYTHON, "-c", COMPILE, cwd=home)


def test_the_wheel_serves_every_python(release: Path) -> None:
    (wheel,) = release.glob("*.whl")
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "inductor_ext/_cpu.so" in names
    assert {f"inductor_ext/kernels/hip/objects/{name}" for name in ("gfx1100.co", "manifest.json")} <= set(names)
    assert not [name for name in names if not name.startswith(("inductor_ext/", "inductor_ext-"))]


def test_without_a_compiler_the_build_says_what_to_do(tmp_path: Path) -> None:
    done = attempt(*PIP_WHEEL, tree(tmp_path / "tree"), cwd=tmp_path, CXX="/no/such/compiler", **NO_HIP)
    assert done.returncode != 0
    assert "apt install g++" in done.stdout + done.stderr
    assert "INDUCTOR_EXT_CPU_KERNEL=0" in done.stdout + done.stderr


def test_the_compiled_kernels_can_be_left_out(tmp_path: Path) -> None:
    out = {"CXX": "/no/such/compiler", "INDUCTOR_EXT_CPU_KERNEL": "0"} | NO_HIP
    run(*PIP_WHEEL, tree(tmp_path / "tree"), cwd=tmp_path, **out)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".co", "manifest.json"))]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return tree(tmp_path / "tree")


BUILD_HIP = ("setup.py", "build_hip", "--inplace")


def test_without_a_compiler_for_them_the_amd_kernels_are_left_out(sources: Path) -> None:
    """-S: without site-packages there is no ziglang, and setuptools alone is put back."""
    setuptools = Path(find_spec("setuptools").origin).parents[1]
    alone = sources.parent / "alone"
    alone.mkdir()
    for name in ("setuptools", "_distutils_hack", "wheel", "pkg_resources"):
        if (setuptools / name).exists():
            (alone / name).symlink_to(setuptools / name)
    no_clang = {"PATH": "/no/such/folder", "PYTHONPATH": str(alone), "INDUCTOR_EXT_CPU_KERNEL": "0"}
    done = attempt(sys.executable, "-S", *BUILD_HIP, cwd=sources, **no_clang)
    assert done.returncode == 0, done.stderr
    assert "built without the AMD kernels: no ziglang wheel" in done.stdout + done.stderr
    assert not (sources / "inductor_ext/kernels/hip/objects").exists()


def test_an_amd_kernel_that_does_not_compile_is_an_error(sources: Path) -> None:
    (sources / "csrc/hip/wrong.hip").write_text(
        '#include "prelude.h"\nint there_is_no_such_type() { return nothing; }\n'
    )
    done = attempt(sys.executable, *BUILD_HIP, cwd=sources, INDUCTOR_EXT_CPU_KERNEL="0")
    assert done.returncode != 0
    assert "the AMD kernels did not compile" in done.stderr and "'nothing'" in done.stderr
    assert "INDUCTOR_EXT_HIP_KERNELS=0" in done.stderr


def test_the_sdist_has_the_sources_and_nothing_built(release: Path) -> None:
    (sdist,) = release.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tree = release.parent / "tree"
    sources = {str(path.relative_to(tree)) for path in tree.glob("csrc/*/*") if path.suffix in (".cpp", ".h", ".hip")}
    assert sources | {"csrc/hip/toolchain.py", "tests/hip/runtime.cpp", "tests/hip/lanes.h"} <= names
    assert {"LICENSE", "CHANGELOG.md", "Makefile", "setup.py", "patterns/__init__.py", "inductor_ext/py.typed"} <= names
    assert "inductor_ext/kernels/gpu/measured.json" in names
    assert not [name for name in names if name.endswith((".so", ".co", ".pyc"))]
