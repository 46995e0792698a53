"""One thread for every test: the tensors are small, and on a busy machine threads wait for each other longer than they
work. And 15 % of the time of tests that compile is spared, which went to what no test looks at."""

import gc
import logging
from collections.abc import Iterator

import hip_lanes
import pytest
import torch
import torch._dynamo.guards
from models import Calls

torch.set_num_threads(1)

# Compiling makes millions of objects that stay; by default Python looks through them for garbage time and again.
gc.set_threshold(50_000, 20, 20)
# pytest listens to loggers that do not propagate; when anybody listens to this one, PyTorch writes every graph into it.
logging.getLogger("torch.__trace").propagate = True
# How long a graph's guards take, with the processor's caches emptied before: 18 ms a graph, for a log.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0


@pytest.fixture(scope="module")
def only_new_garbage() -> Iterator[None]:
    """What other tests left, millions of objects, is not looked through for garbage in this module's."""
    torch.compiler.reset()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def without_codegen() -> Iterator[None]:
    """Inductor with all its passes, but no C++ generated: each node runs as it is. A whole model's code takes a minute
    to compile, nearly all of it in g++."""
    known = hasattr(torch._inductor.config, "fallback_by_default")  # not in torch 2.11
    with torch._inductor.config.patch({"fallback_by_default": True} if known else {}):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the kernels are asked to do during the test."""
    return Calls(monkeypatch)


@pytest.fixture(params=hip_lanes.places())
def hip_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the AMD kernels' tensors go: to the CPU, with a stand-in for a gfx1100, or to this machine's AMD GPU."""
    if request.param == "gpu":
        yield torch.device("cuda")
        return
    with hip_lanes.on("gfx1100"):
        yield torch.device("cpu")
