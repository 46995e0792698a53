"""Weights that change, move and die under a compiled model."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import GPTQ, SPELLINGS, Calls, CompressedTensors, Packed, recompiles, rel_l2, unpack
from torch import Tensor, nn

import inductor_ext

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(7))


pytestmark = pytest.mark.usefixtures("only_new_garbage")  # `alive` collects often


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="w4a16")


def right(model: Any, run: Any, limit: float = 2e-6) -> bool:
    return rel_l2(run(X), model.expected(X)) <= limit


def without_compiling(model: Any, run: Any, calls: Calls) -> bool:
    """Right through the fused op, and without another graph."""
    graphs, before = recompiles(), calls.runs
    return right(model, run) and recompiles() == graphs and calls.runs == before + 1


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


# -- changes that PyTorch counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True], ids=["in place", "assign"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_load_state_dict(spelling: type[Packed], assign: bool, calls: Calls) -> None:
    model = spelling(32, 64, bias=True, seed=1)
    run = compiled(model)
    assert right(model, run)
    model.load_state_dict(spelling(32, 64, bias=True, seed=2).state_dict(), assign=assign)
    assert without_compiling(model, run, calls)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_stored_tensor_replaced_or_changed(spelling: type[Packed], calls: Calls) -> None:
    model, other = spelling(32, 64, seed=1), spelling(32, 64, seed=2)
    run = compiled(model)
    assert right(model, run)
    for name, tensor in other.named_buffers():
        setattr(model, name, tensor.clone())
        assert without_compiling(model, run, calls), name
    for name, tensor in spelling(32, 64, seed=3).named_buffers():
        getattr(model, name).copy_(tensor)
        assert without_compiling(model, run, calls), name


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_requantised_in_place(spelling: type[Packed], calls: Calls) -> None:
    """Every code becomes 15 less it."""
    model = spelling(32, 64)
    run = compiled(model)
    before = run(X)
    next(model.buffers()).bitwise_not_()
    assert without_compiling(model, run, calls)
    assert rel_l2(run(X), before) > 0.1


def test_one_row_of_scales_changed_through_a_view(calls: Calls) -> None:
    model = CompressedTensors(32, 64)
    run = compiled(model)
    assert right(model, run)
    model.weight_scale[3].mul_(5)
    assert without_compiling(model, run, calls)


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
def test_compiled_again_after_the_kind_changed(spelling: type[Packed], calls: Calls) -> None:
    model: Any = spelling(32, 64)
    trivial = model.g_idx.clone()
    for g_idx in (trivial, trivial[torch.randperm(64)], trivial, trivial.flip(0)):
        model.g_idx.copy_(g_idx)
        torch.compiler.reset()
        before = calls.runs
        assert right(model, compiled(model))
        assert calls.runs == before + 1


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


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_functional_call(spelling: type[Packed]) -> None:
    """The module's tensors replaced for one call, inside the compiled function."""
    model, other = spelling(32, 64, seed=1), spelling(32, 64, seed=2)
    run = torch.compile(lambda state, x: torch.func.functional_call(model, state, (x,)), backend="w4a16")
    for layer in (model, other, model):
        assert rel_l2(run(layer.state_dict(), X), layer.expected(X)) <= 2e-6


def test_views_of_one_buffer(calls: Calls) -> None:
    """Three layers sliced from one stored tensor, as fused q, k, v: a change of one is seen by all."""
    layers = [CompressedTensors(32, 64, seed=i) for i in range(3)]
    fused = torch.cat([layer.weight_packed for layer in layers])
    for layer, rows in zip(layers, fused.split(32), strict=True):
        layer.weight_packed = rows
    run = compiled(lambda x: [layer(x) for layer in layers])
    for _ in range(2):
        for y, layer in zip(run(X), layers, strict=True):
            assert rel_l2(y, layer.expected(X)) <= 2e-6
        layers[1].weight_packed.bitwise_not_()
    assert calls.runs == 6


def test_stored_tensors_with_strides(calls: Calls) -> None:
    model = CompressedTensors(32, 64)
    model.weight_packed = model.weight_packed.t().contiguous().t()
    model.weight_scale = torch.stack([model.weight_scale, model.weight_scale], -1)[..., 0]
    run = compiled(model)
    assert right(model, run)
    model.weight_packed.bitwise_not_()
    assert without_compiling(model, run, calls)


def test_compiled_under_no_grad_and_called_in_inference_mode() -> None:
    model = GPTQ(32, 64)
    run = compiled(model)
    assert right(model, run)
    with torch.inference_mode():
        assert right(model, run)
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


# -- changes that PyTorch does not count -------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_data_copied_and_invalidated(spelling: type[Packed], calls: Calls) -> None:
    model = spelling(32, 64, seed=1)
    outer = nn.Sequential(model)
    run = compiled(model)
    assert right(model, run)
    for mine, other in zip(model.buffers(), spelling(32, 64, seed=2).buffers(), strict=True):
        mine.data.copy_(other)
    assert inductor_ext.invalidate(outer) == 1
    assert without_compiling(model, run, calls)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_inference_tensors_changed_and_invalidated(spelling: type[Packed], calls: Calls) -> None:
    with torch.inference_mode():
        model = spelling(32, 64, seed=1)
        run = compiled(model)
        assert right(model, run)
        model.load_state_dict(spelling(32, 64, seed=2).state_dict())
        inductor_ext.invalidate(model)
        assert without_compiling(model, run, calls)


def test_swapped_data_keeps_both_weights(calls: Calls) -> None:
    """`p.data = other`, as people swap adapters: neither storage is written to."""
    model, other = CompressedTensors(32, 64, seed=1), CompressedTensors(32, 64, seed=2)
    run = compiled(model)
    assert right(model, run)
    data = [model.weight_packed.data, other.weight_packed.data]
    copies = [t.clone() for t in data]
    for i in (1, 0, 1):
        model.weight_packed.data = data[i]
        inductor_ext.invalidate(model)
        assert without_compiling(model, run, calls)
        assert all(torch.equal(t, copy) for t, copy in zip(data, copies, strict=True))


def test_invalidate_of_a_model_that_was_never_compiled() -> None:
    assert inductor_ext.invalidate(nn.Sequential(CompressedTensors(32, 64), nn.Linear(32, 8))) == 0


def test_invalidate_leaves_other_models_alone() -> None:
    models = [CompressedTensors(32, 64, seed=i) for i in range(2)]
    for model in models:
        assert right(model, compiled(model))
    assert inductor_ext.invalidate(models[0]) == 1


def test_swap_tensors(calls: Calls) -> None:
    """torch.utils.swap_tensors, which module.to() uses for tensor subclasses, refuses tensors that others watch."""
    model, other = CompressedTensors(32, 64, seed=1), CompressedTensors(32, 64, seed=2)
    run = compiled(model)
    assert right(model, run)
    torch.utils.swap_tensors(model.weight_packed, other.weight_packed)
    assert right(model, run)


# -- memory ------------------------------------------------------------------------------------------------------------


def alive(watched: list[weakref.ref[Tensor]]) -> int:
    gc.collect()
    return sum(ref() is not None for ref in watched)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_packed_copies_die_with_the_weights(spelling: type[Packed], calls: Calls) -> None:
    """One graph serves three layers, and lives on when one of them is gone."""
    layers = [spelling(32, 64, seed=i) for i in range(3)]
    run = torch.compile(lambda layer, x: layer(x), backend="w4a16")
    run(layers[0], X)
    calls.packed.clear()
    for layer in layers[1:]:
        run(layer, X)
    watched = [*calls.packed, *(weakref.ref(t) for layer in layers[1:] for t in layer.buffers())]
    assert alive(watched) == len(watched) > 4
    del layer, layers[1:]
    assert alive(watched) == 0
    assert rel_l2(run(layers[0], X), layers[0].expected(X)) <= 2e-6


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_dead_model_holds_no_memory(spelling: type[Packed], calls: Calls) -> None:
    model = spelling(32, 64)
    run = compiled(model)
    run(X)
    run(X[:2])
    watched = [*calls.packed, *(weakref.ref(t) for t in model.buffers())]
    del model, run
    torch.compiler.reset()
    assert alive(watched) == 0


def test_replaced_weights_hold_no_memory(calls: Calls) -> None:
    model = GPTQ(32, 64)
    run = compiled(model)
    run(X)
    watched = [*calls.packed, *(weakref.ref(t) for t in model.buffers())]
    model.load_state_dict(GPTQ(32, 64, seed=1).state_dict(), assign=True)
    assert right(model, run)
    assert alive(watched) == 0


def test_explain_keeps_nothing() -> None:
    model = GPTQ(32, 64)
    inductor_ext.explain(model, X)
    watched = [weakref.ref(t) for t in model.buffers()]
    del model
    assert alive(watched) == 0


def test_a_layout_that_needs_no_packing_is_not_copied(calls: Calls) -> None:
    model = CompressedTensors(32, 64)
    compiled(model)(X)
    assert calls.addresses == [t.data_ptr() for t in model.buffers()]


def test_packed_copies_stay_at_their_addresses(calls: Calls) -> None:
    """Captured CUDA graphs read them there."""
    model = GPTQ(32, 64)
    run = compiled(model)
    run(X)
    before = calls.addresses
    model.load_state_dict(GPTQ(32, 64, seed=2).state_dict())
    assert right(model, run)
    assert calls.addresses == before
    assert set(before).isdisjoint(t.data_ptr() for t in model.buffers())


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_deep_copy_has_its_own_weights(spelling: type[Packed]) -> None:
    model: Any = spelling(32, 64)
    run = torch.compile(lambda layer, x: layer(x), backend="w4a16")
    run(model, X)
    twin = copy.deepcopy(model)
    next(twin.buffers()).bitwise_not_()
    for layer in (twin, model):
        assert rel_l2(run(layer, X), layer.expected(X)) <= 2e-6


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_compiled_model_is_saved_as_any_other(spelling: type[Packed], tmp_path: Path) -> None:
    """Packed copies are no part of what is saved, and torch.load's safe mode reads it."""
    model = spelling(32, 64)
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    torch.save(model.state_dict(), tmp_path / "before" / "model.pt")
    compiled(model)(X)
    torch.save(model.state_dict(), tmp_path / "after" / "model.pt")
    loaded = torch.load(tmp_path / "after" / "model.pt", weights_only=True)
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    sizes = [(tmp_path / name / "model.pt").stat().st_size for name in ("before", "after")]
    assert sizes[0] == sizes[1]


def test_layers_that_share_their_codes(calls: Calls) -> None:
    """Tied codes under scales of their own."""
    first, second = CompressedTensors(32, 64, seed=1), CompressedTensors(32, 64, seed=2)
    second.weight_packed = first.weight_packed
    run = torch.compile(lambda layer, x: layer(x), backend="w4a16")
    for layer in (first, second) * 2:
        assert rel_l2(run(layer, X), layer.expected(X)) <= 2e-6
    both = torch.compile(lambda x: first(x) + second(x), backend="w4a16")
    assert rel_l2(both(X), first.expected(X) + second.expected(X)) <= 2e-6
    assert calls.runs == 6
