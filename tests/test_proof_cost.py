"""What recognising, proving and converting cost at compile time, apart from Dynamo's capture and Inductor.

On one thread (conftest.py), which is the same on an idle machine and on a busy one.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from models import SPELLINGS, CompressedTensors, Packed, chain
from torch import Tensor, fx

from inductor_ext import backend, verdicts

pytestmark = pytest.mark.alone


@pytest.fixture(autouse=True)
def nothing_known_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No graph compiled, no structure recognised; and the rewritten graph is not compiled by Inductor."""
    torch.compiler.reset()
    monkeypatch.setattr(verdicts, "_VERDICTS", {})

    def as_it_is(gm: fx.GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any]) -> Any:
        return gm.forward

    monkeypatch.setattr(backend, "compile_fx", as_it_is)
    with torch.no_grad():
        yield
    torch.set_num_threads(1)
    torch.compiler.reset()


def seconds(model: Any, x: Tensor) -> float:
    """In our backend, for compiling this model: everything that comes before Inductor."""
    spent = []

    def timed(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        gc.collect()
        gc.disable()  # a full collection walks over all that this process has ever imported
        start = time.perf_counter()
        compiled = backend.w4a16(gm, inputs, options={"w4a16.strict": True})
        spent.append(time.perf_counter() - start)
        gc.enable()
        return compiled

    torch.compiler.reset()
    torch.compile(model, backend=timed, fullgraph=True)(x)
    return sum(spent)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_large_layer(spelling: type[Packed], monkeypatch: pytest.MonkeyPatch) -> None:
    """4096 x 4096 in bfloat16, G=128: under 2 s for the first, 0.5 s for another of its structure; best of a few."""
    x = torch.zeros(1, 4096, dtype=torch.bfloat16)
    layer = spelling(4096, 4096, group=128, dtype=torch.bfloat16)
    first, second = [], []
    for _ in range(2):
        monkeypatch.setattr(verdicts, "_VERDICTS", {})
        for buffers in range(3):
            for name, buffer in list(layer.named_buffers()):  # new tensors: nothing is known of these
                setattr(layer, name, buffer.clone())
            (second if buffers else first).append(seconds(layer, x))
    print(f"{spelling.__name__}: first {first}, another {second}")
    assert min(first) < 2
    assert min(second) < 0.5


def test_the_cost_is_linear_in_the_number_of_layers() -> None:
    x = torch.zeros(1, 32)
    spent = {}
    for count in (56, 224):
        models = [chain(*(CompressedTensors(32, 32, group=16, seed=i) for i in range(count))) for _ in range(2)]
        spent[count] = min(seconds(model, x) for model in models)
    print(f"seconds: {spent}")
    assert spent[224] < 6 * spent[56]
