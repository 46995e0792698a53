"""Expert weights: the batches of dequantised matrices in a graph, one matrix an expert, that matmuls read.

    dequantised whole            w [E, N, K]                   read by grouped_mm, bmm, select, or gathered: w[ids]
    gathered, then dequantised   q[ids], s[ids] -> w [*ids, N, K]      the same selection ids behind every part of it
    one by one                   w_0 [N, K], w_1 [N, K], ...           a loop over modules, unrolled

A cut is the node that holds such a batch, or the nodes. Behind it are stored tensors alone (and the selection); ahead
of it is what the experts compute.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from inductor_ext.patterns.anchors import is_matmul, meta, name
from inductor_ext.patterns.cone import VIEWS, stored_integers, why_not_inside
from inductor_ext.patterns.flow import Flow
from torch import Tensor, fx


@dataclasses.dataclass(eq=False)
class Cut:
    nodes: tuple[fx.Node, ...]
    """One with a batch, or one for each expert."""
    select: fx.Node | None
    """The indices that chose the matrices before they were dequantised; None if all experts' are there."""
    experts: int
    readers: list[fx.Node] = dataclasses.field(default_factory=list)
    """The matmuls that it goes into."""

    @property
    def apart(self) -> bool:
        """Every expert's matrix is a node of its own."""
        return len(self.nodes) > 1

    @property
    def matrix(self) -> tuple[int, int]:
        """The size of one expert's matrix as it stands: [N, K] or [K, N]."""
        rows, cols = meta(self.nodes[0]).shape[-2:]
        return int(rows), int(cols)


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Of a node that stored tensors alone determine."""


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Of a node that stored tensors and a selection of experts determine."""

    select: fx.Node
    experts: int


Group = tuple[tuple[Cut, ...], Cut]
"""Cuts that belong together: (gate_up, down) or (gate, up, down), as (the first ones, the last one)."""


def find_groups(
    graph: fx.Graph, flow: Flow, is_stored: Callable[[fx.Node], bool], seen: Callable[[fx.Node], object]
) -> tuple[list[Group], list[Group]]:
    """The groups of batches in a graph, and those of matrices that stand one by one. ``seen`` gives a leaf's tensor."""
    origins = _origins(graph, flow, is_stored)
    batches: dict[fx.Node, Cut] = {}
    singles: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if not is_matmul(node):
            continue
        for operand in node.all_input_nodes:
            if stored_integers(operand, seen):
                found = _cut(operand, origins)
                if found is not None and node in flow.live:
                    batches.setdefault(found.nodes[0], found).readers.append(node)
                elif node in flow.live and isinstance(origins.get(operand), _Stored) and meta(operand).dim() == 2:
                    singles.setdefault(operand, []).append(node)
    return list(_grouped(list(batches.values()), flow)), list(_one_by_one(graph, singles))


def _grouped(cuts: list[Cut], flow: Flow) -> Iterator[Group]:
    """Batches in the order in which their first matmuls stand, grouped by what flows into what."""
    rest = list(cuts)
    while rest:
        first = rest.pop(0)
        ahead = flow.ahead(first.readers)
        if rest and rest[0].experts == first.experts:
            second = rest[0]
            if second.readers[0] in ahead:
                yield (first,), rest.pop(0)
            elif len(rest) > 1 and rest[1].experts == first.experts:
                both = ahead & flow.ahead(second.readers)
                if rest[1].readers[0] in both:
                    del rest[0]
                    yield (first, second), rest.pop(0)


def _one_by_one(graph: fx.Graph, singles: dict[fx.Node, list[fx.Node]]) -> Iterator[Group]:
    """Runs of matrices whose shapes repeat as often as a router has experts: gate, up, down, gate, up, down, ..."""
    routers = [n for n in graph.nodes if name(n) in ("topk", "argmax")]
    counts: set[int | None] = {int(meta(n.args[0]).shape[-1]) for n in routers}
    if any(n.op == "placeholder" and is_index(n) for n in graph.nodes):
        counts.add(None)  # routed outside the graph: as often as they repeat
    nodes, start = list(singles), 0
    while start < len(nodes):
        run = next((r for E in counts for period in (3, 2) if (r := _run(nodes[start:], E, period))), None)
        if run is None:
            start += 1
            continue
        period, experts = run
        taken = nodes[start : start + period * experts]
        cuts = [
            Cut(tuple(taken[i::period]), None, experts, [r for n in taken[i::period] for r in singles[n]])
            for i in range(period)
        ]
        yield tuple(cuts[:-1]), cuts[-1]
        start += period * experts


def _run(nodes: list[fx.Node], experts: int | None, period: int) -> tuple[int, int] | None:
    """(period, experts), if the first matrices repeat so; None experts: as often as they do."""
    shapes = [tuple(meta(n).shape) for n in nodes]
    repeats = 1
    while shapes[repeats * period : (repeats + 1) * period] == shapes[:period]:
        repeats += 1
    experts = repeats if experts is None else experts
    return (period, experts) if 1 < experts <= repeats else None


def is_index(node: fx.Node) -> bool:
    """Whether a node's value may be experts' indices."""
    value = meta(node)
    return isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32) and value.dim() > 0


def _origins(graph: fx.Graph, flow: Flow, is_stored: Callable[[fx.Node], bool]) -> dict[fx.Node, _Stored | _Chosen]:
    """What determines each node, for those that stored tensors (and one selection) determine. Sizes do not count."""
    found: dict[fx.Node, _Stored | _Chosen] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            if not is_size(node) and is_stored(node):
                found[node] = _Stored()
        elif why_not_inside(node) is None:
            origin = _selection(node, found) or _common(node, flow, found)
            if origin is not None:
                found[node] = origin
    return found


def _selection(node: fx.Node, found: dict[fx.Node, _Stored | _Chosen]) -> _Chosen | None:
    """If a node chooses matrices of a stored batch by indices that are computed."""
    data = node.args[0] if node.args else None
    if not isinstance(data, fx.Node) or not isinstance(found.get(data), _Stored):
        return None
    index = selecting(node)
    if index is None or index in found:
        return None
    return _Chosen(index, int(meta(data).shape[0]))


def selecting(node: fx.Node) -> fx.Node | None:
    """The integer tensor by which a node indexes the first dimension of its first argument, and no other dimension."""
    called, index = name(node), None
    if called in ("getitem", "index") and len(node.args) == 2:
        given = node.args[1]
        first, *rest = given if isinstance(given, (tuple, list)) else (given,)
        whole = all(r in (slice(None), Ellipsis) for r in rest if not isinstance(r, fx.Node))
        index = first if whole and not any(isinstance(r, fx.Node) for r in rest) else None
    elif called == "index_select" and len(node.args) == 3:
        index = node.args[2] if node.args[1] == 0 else None
    if not isinstance(index, fx.Node) or not isinstance(meta(index), Tensor) or meta(index).dim() == 0:
        return None
    return None if meta(index).dtype.is_floating_point or meta(index).dtype == torch.bool else index


def _common(node: fx.Node, flow: Flow, found: dict[fx.Node, _Stored | _Chosen]) -> _Stored | _Chosen | None:
    """The one origin of a node's inputs."""
    tensors = [pred for pred in flow.preds(node) if not is_size(pred)]
    if any(pred not in found for pred in tensors):
        return None
    chosen = {origin for pred in tensors if isinstance(origin := found[pred], _Chosen)}
    if len(chosen) == 1:
        return chosen.pop()
    sized = len(tensors) < len(flow.preds(node))  # by a size that can change: nothing that is stored
    return _Stored() if not chosen and not sized else None


def is_size(node: fx.Node) -> bool:
    """Whether a node is a size, or a number computed from sizes."""
    value = meta(node)
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, torch.Size))


def _cut(operand: fx.Node, origins: dict[fx.Node, _Stored | _Chosen]) -> Cut | None:
    """The cut behind a matmul's operand, or None if it is no batch of experts' matrices."""
    node: fx.Node | None = operand
    # One matrix, [N, K] or [1, N, K], is one of a batch only if it was picked out of one.
    picked = meta(operand).dim() > 2 and not all(size == 1 for size in meta(operand).shape[:-2])
    while node is not None:
        origin, value = origins.get(node), meta(node)
        if isinstance(value, Tensor) and value.dtype.is_floating_point:
            if isinstance(origin, _Stored) and value.dim() == 3 and value.shape[0] > 1 and picked:
                return Cut((node,), None, int(value.shape[0]))
            batch = isinstance(origin, _Chosen) and value.dim() == meta(origin.select).dim() + 2 and _matrices(node)
            if isinstance(origin, _Chosen) and batch and not _gathered_late(node, origins):
                return Cut((node,), origin.select, origin.experts)
        picked = picked or name(node) in _PICKS
        node = _step(node, origins)
    return None


_PICKS = {"getitem", "select", "unbind"}


def _matrices(node: fx.Node) -> bool:
    return all(isinstance(size, int) for size in meta(node).shape[-2:])


def _gathered_late(node: fx.Node, origins: dict[fx.Node, _Stored | _Chosen]) -> bool:
    """Whether these matrices were gathered from a dequantised batch: then that one is the cut."""
    behind: fx.Node | None = node
    while behind is not None:
        if isinstance(origins.get(behind), _Stored):
            return bool(meta(behind).dtype.is_floating_point and meta(behind).dim() == 3)
        behind = _step(behind, origins)
    return False


def _step(node: fx.Node, origins: dict[fx.Node, _Stored | _Chosen]) -> fx.Node | None:
    """The tensor of which a node is a view or a selection."""
    data = node.args[0] if node.args else None
    moved = name(node) in VIEWS or name(node) in _COPIES or selecting(node) is not None
    return data if moved and isinstance(data, fx.Node) and data in origins else None


_COPIES = {"index", "index_select", "contiguous", "clone", "_unsafe_view", "expand"}
