"""One thread for every test: the tensors are small, and on a busy machine threads wait for each other longer than they
work."""

from collections.abc import Iterator

import hip_lanes
import pytest
import torch
from models import Calls

torch.set_num_threads(1)


@pytest.fixture
def without_codegen() -> Iterator[None]:
    """Inductor with all its passes, but no C++ generated: each node runs as it is. A whole model's code takes a minute to
    compile, nearly all of it in g++."""
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
