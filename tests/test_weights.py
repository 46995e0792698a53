"""Weights that change, move and die under a compiled model."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import GPTQ, SPELLINGS, CompressedTensors, Packed, recompiles, rel_l2, unpack
from torch import Tensor, nn

import inductor_ext
from inductor_ext import kernels, weights

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        yield
    torch.compiler.reset()


class Runs:
    count = 0


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Counts the calls of packed kernels: a right answer must come from the fused op, not from the graph as it was."""
    counted = Runs()
    for name in ("cpu", "reference"):
        kernel: Any = kernels.load(name)

        def run(*args: Any, run: Any = kernel.run) -> Any:
            counted.count += 1
            return run(*args)

        monkeypatch.setattr(kernel, "run", run)
    return counted


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="w4a16")


def right(model: Any, run: Any, limit: float = 2e-6) -> bool:
    return rel_l2(run(X), model.expected(X)) <= limit


def without_compiling(model: Any, run: Any, runs: Runs) -> bool:
    """Right through the fused op, and without another graph."""
    graphs, before = recompiles(), runs.count
    return right(model, run) and recompiles() == graphs and runs.count == before + 1


class Grouped(CompressedTensors):
    """compressed-tensors with g_idx: while that sorts nothing, its words are the canonical form itself."""

    def store(self, codes: Tensor, zeros: Tensor, scales: Tensor) -> None:
        super().store(codes, zeros, scales)
        self.register_buffer("g_idx", torch.arange(self.K, dtype=torch.int32) // self.group)

    def forward(self, x: Tensor) -> Tensor:
        q = (self.weight_packed.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
        q = (q.view(self.N, self.K) - 8).to(x.dtype)
        return F.linear(x, q * self.weight_scale[:, self.g_idx.long()], self.bias)

    def dense(self) -> Tensor:
        return (unpack(self.weight_packed, 1) - 8) * self.weight_scale.double()[:, self.g_idx.long()]


# -- changes that PyTorch counts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True], ids=["in place", "assign"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_load_state_dict(spelling: type[Packed], assign: bool, runs: Runs) -> None:
    model = spelling(32, 64, bias=True, seed=1)
    run = compiled(model)
    assert right(model, run)
    model.load_state_dict(spelling(32, 64, bias=True, seed=2).state_dict(), assign=assign)
    assert without_compiling(model, run, runs)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_stored_tensor_replaced_or_changed(spelling: type[Packed], runs: Runs) -> None:
    model, other = spelling(32, 64, seed=1), spelling(32, 64, seed=2)
    run = compiled(model)
    assert right(model, run)
    for name, tensor in other.named_buffers():
        setattr(model, name, tensor.clone())
        assert without_compiling(model, run, runs), name
    for name, tensor in spelling(32, 64, seed=3).named_buffers():
        getattr(model, name).copy_(tensor)
        assert without_compiling(model, run, runs), name


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_requantised_in_place(spelling: type[Packed], runs: Runs) -> None:
    """Every code becomes 15 less it."""
    model = spelling(32, 64)
    run = compiled(model)
    before = run(X)
    next(model.buffers()).bitwise_not_()
    assert without_compiling(model, run, runs)
    assert rel_l2(run(X), before) > 0.1


def test_one_row_of_scales_changed_through_a_view(runs: Runs) -> None:
    model = CompressedTensors(32, 64)
    run = compiled(model)
    assert right(model, run)
    model.weight_scale[3].mul_(5)
    assert without_compiling(model, run, runs)


@pytest.mark.parametrize("spelling", [Grouped, GPTQ])
def test_columns_put_into_other_groups_in_place(spelling: type[Packed]) -> None:
    """The graph was compiled for groups that are runs of columns; it must not serve those that are not."""
    model: Any = spelling(32, 64)
    run = compiled(model)
    assert right(model, run)
    trivial = model.g_idx.clone()
    for changed in (trivial.flip(0), trivial[torch.randperm(64)], torch.zeros_like(trivial), trivial):
        model.g_idx.copy_(changed)
        assert right(model, run)


@pytest.mark.parametrize("spelling", [Grouped, GPTQ])
def test_stored_tensors_are_never_written_to(spelling: type[Packed]) -> None:
    model: Any = spelling(32, 64)
    run = compiled(model)
    run(X)
    for seed in range(3):
        model.g_idx.copy_(model.g_idx[torch.randperm(64, generator=torch.Generator().manual_seed(seed))].clone())
        stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        run(X)
        assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("spelling", [Grouped, GPTQ])
def test_compiled_again_after_the_kind_changed(spelling: type[Packed], runs: Runs) -> None:
    model: Any = spelling(32, 64)
    trivial = model.g_idx.clone()
    for g_idx in (trivial, trivial[torch.randperm(64)], trivial, trivial.flip(0)):
        model.g_idx.copy_(g_idx)
        torch.compiler.reset()
        before = runs.count
        assert right(model, compiled(model))
        assert runs.count == before + 1


def test_two_graphs_of_one_weight_follow_its_kind() -> None:
    model: Any = GPTQ(32, 64)
    first = compiled(model)
    assert right(model, first)
    model.g_idx.copy_(model.g_idx[torch.randperm(64)].clone())
    second = torch.compile(lambda x: model(x), backend="w4a16")
    assert right(model, second)
    assert right(model, first)
    model.g_idx.copy_(torch.arange(64) // 32)
    assert right(model, second)
    assert right(model, first)


def test_scales_of_another_dtype() -> None:
    model = CompressedTensors(32, 64)
    run = compiled(model)
    assert right(model, run)
    model.weight_scale = model.weight_scale.bfloat16()
    assert right(model, run)


def test_a_change_between_two_uses_in_one_graph_is_refused() -> None:
    """The write is in the graph: there is no moment at which the packed copy would be right."""
    model = CompressedTensors(32, 64)

    def twice(x: Tensor) -> Tensor:
        first = model(x)
        model.weight_packed.bitwise_not_()
        return first + model(x)

    expected = model.expected(X)
    with torch.no_grad():
        y = compiled(twice)(X)
    assert rel_l2(y, expected + model.expected(X)) <= 2e-6


# -- changes that PyTorch does not count ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_data_copied_and_invalidated(spelling: type[Packed], runs: Runs) -> None:
    model = spelling(32, 64, seed=1)
    outer = nn.Sequential(model)
    run = compiled(model)
    assert right(model, run)
    for mine, other in zip(model.buffers(), spelling(32, 64, seed=2).buffers(), strict=True):
        mine.data.copy_(other)
    assert inductor_ext.invalidate(outer) == 1
    assert without_compiling(model, run, runs)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_inference_tensors_changed_and_invalidated(spelling: type[Packed], runs: Runs) -> None:
    with torch.inference_mode():
        model = spelling(32, 64, seed=1)
        run = compiled(model)
        assert right(model, run)
        model.load_state_dict(spelling(32, 64, seed=2).state_dict())
        inductor_ext.invalidate(model)
        assert without_compiling(model, run, runs)


def test_swapped_data_keeps_both_weights(runs: Runs) -> None:
    """`p.data = other`, as people swap adapters: neither storage is written to."""
    model, other = CompressedTensors(32, 64, seed=1), CompressedTensors(32, 64, seed=2)
    run = compiled(model)
    assert right(model, run)
    data = [model.weight_packed.data, other.weight_packed.data]
    copies = [t.clone() for t in data]
    for i in (1, 0, 1):
        model.weight_packed.data = data[i]
        inductor_ext.invalidate(model)
        assert without_compiling(model, run, runs)
        assert all(torch.equal(t, copy) for t, copy in zip(data, copies, strict=True))


def test_invalidate_of_a_model_that_was_never_compiled() -> None:
    assert inductor_ext.invalidate(nn.Sequential(CompressedTensors(32, 64), nn.Linear(32, 8))) == 0


def test_invalidate_leaves_other_models_alone() -> None:
    models = [CompressedTensors(32, 64, seed=i) for i in range(2)]
    for model in models:
        assert right(model, compiled(model))
    assert inductor_ext.invalidate(models[0]) == 1


def test_swap_tensors(runs: Runs) -> None:
    """torch.utils.swap_tensors, which module.to() uses for tensor subclasses, refuses tensors that others watch."""
    model, other = CompressedTensors(32, 64, seed=1), CompressedTensors(32, 64, seed=2)
    run = compiled(model)
    assert right(model, run)
    torch.utils.swap_tensors(model.weight_packed, other.weight_packed)
    assert right(model, run)


# -- memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_packed_copies_die_with_the_weights(spelling: type[Packed]) -> None:
    gc.collect()
    start = len(weights._CACHE)
    layers = [spelling(32, 64, seed=i) for i in range(3)]
    run = torch.compile(lambda layer, x: layer(x), backend="w4a16")
    for layer in layers:
        run(layer, X)
    assert len(weights._CACHE) == start + 3
    watched = [weakref.ref(t) for t in layers[1].buffers()]
    del layer, layers[1:]
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)
    assert len(weights._CACHE) == start + 1
    assert rel_l2(run(layers[0], X), layers[0].expected(X)) <= 2e-6


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_dead_model_holds_no_memory(spelling: type[Packed]) -> None:
    gc.collect()
    start = len(weights._CACHE)
    model = spelling(32, 64)
    run = compiled(model)
    run(X)
    run(X[:2])
    watched = [weakref.ref(t) for t in model.buffers()]
    del model, run
    torch.compiler.reset()
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)
    assert len(weights._CACHE) == start


def test_replaced_weights_hold_no_memory() -> None:
    gc.collect()
    model = GPTQ(32, 64)
    run = compiled(model)
    run(X)
    start = len(weights._CACHE)
    for seed in range(1, 6):
        model.load_state_dict(GPTQ(32, 64, seed=seed).state_dict(), assign=True)
        assert right(model, run)
    gc.collect()
    assert len(weights._CACHE) == start


def test_explain_keeps_nothing() -> None:
    gc.collect()
    start = len(weights._CACHE)
    model = GPTQ(32, 64)
    inductor_ext.explain(model, X)
    watched = [weakref.ref(t) for t in model.buffers()]
    del model
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)
    assert len(weights._CACHE) == start


def packed_tensors(model: nn.Module) -> list[Tensor]:
    own = {id(t) for t in model.buffers()}
    (entry,) = (entry for key, entry in weights._CACHE.items() if own.intersection(key[1:]))
    (packed,) = entry._packs.values()
    return [t for t in packed if t is not None]


def test_a_layout_that_needs_no_packing_is_not_copied() -> None:
    model = CompressedTensors(32, 64)
    compiled(model)(X)
    assert [t.data_ptr() for t in packed_tensors(model)] == [t.data_ptr() for t in model.buffers()]


def test_packed_copies_stay_at_their_addresses() -> None:
    """Captured CUDA graphs read them there."""
    model = GPTQ(32, 64)
    run = compiled(model)
    run(X)
    before = [t.data_ptr() for t in packed_tensors(model)]
    model.load_state_dict(GPTQ(32, 64, seed=2).state_dict())
    assert right(model, run)
    assert [t.data_ptr() for t in packed_tensors(model)] == before


def test_a_deep_copy_has_its_own_weights(runs: Runs) -> None:
    import copy

    model = GPTQ(32, 64)
    run = torch.compile(lambda layer, x: layer(x), backend="w4a16")
    run(model, X)
    twin = copy.deepcopy(model)
    twin.scales.mul_(3)
    assert rel_l2(run(twin, X), twin.expected(X)) <= 2e-6
    assert rel_l2(run(model, X), model.expected(X)) <= 2e-6
