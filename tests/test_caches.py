"""Inductor's caches on disk: a second process finds the compiled graph, and it is right with other weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inductor_ext.patterns
import pytest
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

import inductor_ext
from inductor_ext import passes
from inductor_ext.options import Options
from inductor_ext.passes import W4A16Pass

PROGRAM = """
import json, sys
import torch
from models import GPTQ, CompressedTensors, chain, rel_l2
from inductor_ext import kernels

seed = int(sys.argv[1])
if hasattr(torch._inductor.config, "fallback_by_default"):
    torch._inductor.config.fallback_by_default = True  # no C++ is generated, which would take a minute
reference = kernels.load("reference")
ran, original = [], reference.run
reference.run = lambda *args: ran.append(1) or original(*args)

def model():
    return chain(CompressedTensors(96, 64, seed=seed, bias=True), GPTQ(32, 96, seed=seed + 1).act_order_(seed))

def compiled(model):
    torch.compiler.reset()
    return torch.compile(model, backend="w4a16", options={"w4a16.strict": True, "w4a16.kernel": "reference"})

errors = []
x = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))
with torch.no_grad():
    inference = model()
    run = compiled(inference)
    errors += [rel_l2(run(x[:M]), inference.expected(x[:M])) for M in (5, 3)]
    with torch._inductor.config.patch(freezing=True):
        frozen = model()
        errors.append(rel_l2(compiled(frozen)(x), frozen.expected(x)))
x.requires_grad_()
training = model()
compiled(training)(x).sum().backward()
errors.append(rel_l2(x.grad, torch.ones(5, 32).double() @ training[1].dense() @ training[0].dense()))

counters = torch._dynamo.utils.counters
print(json.dumps({
    "errors": errors, "ran": len(ran),
    "fx": {k: v for k, v in counters["inductor"].items() if k.startswith("fxgraph_cache")},
    "aot": {k: v for k, v in counters["aot_autograd"].items() if k.startswith("autograd_cache")},
}))
"""


def another_process(cache: Path, seed: int, **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(seed)],
        cwd=Path(__file__).parent,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert max(told["errors"]) <= 2e-6
    assert told["ran"] == 8
    return told


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The caches of a process that compiled everything for seed 0."""
    folder = tmp_path_factory.mktemp("cache")
    first = another_process(folder, 0)
    # PyTorch keeps no AOT entry of a frozen graph; training has a forward and a backward in the FX cache.
    assert first["aot"] == {"autograd_cache_miss": 3, "autograd_cache_saved": 3, "autograd_cache_bypass": 1}
    assert first["fx"] == {"fxgraph_cache_miss": 5}
    return folder


def test_a_second_process_hits_the_aot_cache_with_other_weights(cache: Path) -> None:
    told = another_process(cache, 1)
    assert told["aot"] == {"autograd_cache_hit": 3, "autograd_cache_bypass": 1}


def test_a_second_process_hits_the_fx_graph_cache_with_other_weights(cache: Path) -> None:
    told = another_process(cache, 2, TORCHINDUCTOR_AUTOGRAD_CACHE="0")
    assert told["fx"] == {"fxgraph_cache_hit": 5}


# -- the pass's key ----------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package's files, which the pass takes for the package."""
    for package, folder in ((inductor_ext, "inductor_ext"), (inductor_ext.patterns, "patterns")):
        shutil.copytree(package.__path__[0], tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(package, "__path__", [str(tmp_path / folder)])
    passes._sources.cache_clear()
    yield tmp_path
    passes._sources.cache_clear()


def uuid_now() -> Any:
    passes._sources.cache_clear()
    return W4A16Pass().uuid()


def test_the_key_changes_with_every_file_of_the_package(copied: Path) -> None:
    first = uuid_now()
    assert uuid_now() == first
    files = [path for path in copied.rglob("*") if path.suffix in (".py", ".so")]
    assert {path.parent.name for path in files} >= {"inductor_ext", "ops", "kernels", "patterns"}
    for path in files:
        original = path.read_bytes()
        path.write_bytes(original + b"\n")
        assert uuid_now() != first, path
        path.write_bytes(original)
    assert uuid_now() == first
    (copied / "patterns" / "new.py").write_text("")
    assert uuid_now() != first


def test_the_key_is_the_same_wherever_the_package_lies(copied: Path) -> None:
    there = uuid_now()
    (copied / "moved").mkdir()
    for package in (inductor_ext, inductor_ext.patterns):
        old = Path(package.__path__[0])
        package.__path__ = [str(shutil.move(old, copied / "moved" / old.name))]
    assert uuid_now() == there


def test_the_key_changes_with_the_options() -> None:
    keys = [W4A16Pass(options).uuid() for options in (Options(), Options(kernel="reference"), Options(strict=True))]
    assert len({repr(key) for key in keys}) == 3
    assert W4A16Pass(Options(kernel="reference")).uuid() == keys[1]


class Theirs(CustomGraphPass):
    """A user's pass with this key."""

    def __init__(self, key: Any) -> None:
        self.key = key

    def __call__(self, graph: fx.Graph) -> None: ...

    def uuid(self) -> Any:
        return self.key


def test_the_key_covers_the_pass_behind() -> None:
    keys = [W4A16Pass(then=then).uuid() for then in (None, Theirs("a"), Theirs("b"))]
    assert len({repr(key) for key in keys}) == 3


@pytest.mark.parametrize("then", [Theirs(None), lambda graph: None], ids=["no key", "a plain function"])
def test_no_key_if_the_pass_behind_has_none(then: Any) -> None:
    """Inductor then bypasses its caches."""
    assert W4A16Pass(then=then).uuid() is None


def test_the_pass_can_be_pickled_and_copied() -> None:
    """Inductor does both with its config."""
    import copy
    import pickle

    own = W4A16Pass(Options(kernel="reference"))
    assert copy.deepcopy(own).uuid() == own.uuid()
    assert pickle.loads(pickle.dumps(own)).uuid() == own.uuid()


def test_the_pass_runs_what_is_behind_it_once() -> None:
    seen = []
    gm = fx.symbolic_trace(lambda x: x + 1)
    W4A16Pass(then=seen.append)(gm.graph)
    assert seen == [gm.graph]
