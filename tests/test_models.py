"""The main job: a transformers model from a packed checkpoint, compiled, every quantised linear rewritten, and
right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import checkpoints
import pytest
import torch
from torch import Tensor, nn

import inductor_ext

MODELS: dict[str, Callable[[], Any]] = {
    "llama": checkpoints.llama,
    "qwen3": checkpoints.qwen3,
    "gemma3": checkpoints.gemma3,
}
FORMATS: dict[str, Callable[..., checkpoints.Checkpoint]] = {
    "compressed-tensors": checkpoints.write_compressed_tensors,
    "compressed-tensors act-order": lambda *a: checkpoints.write_compressed_tensors(*a, group_index=True),
    "compressed-tensors asymmetric": lambda *a: checkpoints.write_compressed_tensors(*a, symmetric=False),
    "gptq": checkpoints.write_gptq,
    "gptq act-order": lambda *a: checkpoints.write_gptq(*a, desc_act=True),
    "awq": checkpoints.write_awq,
}
PAIRS = [(model, "compressed-tensors") for model in MODELS] + [
    ("llama", name) for name in FORMATS if name != "compressed-tensors"
]


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> checkpoints.Checkpoint:
    model, name = request.param
    return FORMATS[name](tmp_path_factory.mktemp("checkpoint"), MODELS[model]())


def over(*pairs: tuple[str, str]) -> Any:
    return pytest.mark.parametrize("checkpoint", pairs, ids=" ".join, indirect=True)


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> None:
    torch.compiler.reset()
    if request.node.callspec.params["checkpoint"] != PAIRS[0]:  # one model is enough for Inductor's own code
        request.getfixturevalue("without_codegen")


def _ids(model: nn.Module, length: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))


def _distance(logits: Tensor, exact: Tensor) -> float:
    return float((logits.double() - exact.double()).norm() / exact.double().norm())


@torch.no_grad()
@pytest.mark.parametrize(
    ("checkpoint", "dtype"),
    [*((pair, torch.bfloat16) for pair in PAIRS), (PAIRS[0], torch.float16)],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else " ".join(value),
    indirect=["checkpoint"],
)
def test_logits_are_as_good_as_the_dense_models(checkpoint: checkpoints.Checkpoint, dtype: torch.dtype) -> None:
    model = inductor_ext.from_pretrained(checkpoint.folder, dtype=dtype, progress=False)
    ids = _ids(model, 48)
    report = inductor_ext.explain(model, ids)
    assert sorted(r.where for r in report.rewritten) == sorted(checkpoint.packed)
    assert not report.left_alone
    exact = checkpoint.reference(torch.float32)(ids).logits
    dense = checkpoint.reference(dtype)(ids).logits
    ours = torch.compile(model, backend="w4a16", options={"w4a16.strict": True})(ids).logits
    assert ours.dtype == dense.dtype
    assert _distance(ours, exact) <= 1.1 * _distance(dense, exact)


@torch.no_grad()
@over(*PAIRS[: len(MODELS)], ("llama", "gptq act-order"), ("llama", "awq"))
def test_greedy_tokens_are_the_references(checkpoint: checkpoints.Checkpoint) -> None:
    model = inductor_ext.from_pretrained(checkpoint.folder, dtype=torch.float32, progress=False)
    reference = checkpoint.reference(torch.float32)
    prompt = _ids(model, 9)
    wanted = reference.generate(prompt, max_new_tokens=12, do_sample=False)
    model.forward = torch.compile(model.forward, backend="w4a16", options={"w4a16.strict": True})
    assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False), wanted)
