"""Regions: the part of a graph that computes routed experts, cut out at what goes in and what comes out.

    x [T, H]   topk_ids [T, k]   topk_weights [T, k] (or scores [T, E])   cuts (the experts' weights)
         \\            |                 |                                /
          sort, gather, matmuls, activation, un-permute, weighting, sum over k
                                       |
                                    out [T, H]

Where routing ends and experts begin is nowhere marked, so candidates are proposed, nearest to the experts first; what
they compute decides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from inductor_ext.patterns.anchors import meta, name
from inductor_ext.patterns.cone import VIEWS, described
from inductor_ext.patterns.experts import Cut, is_index, is_size, selecting
from inductor_ext.patterns.flow import Flow
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true


@dataclasses.dataclass(frozen=True)
class Region:
    out: fx.Node
    x: fx.Node
    ids: fx.Node
    weights: fx.Node
    """[..., k], or [..., E] scores that are zero for experts not chosen."""
    base: fx.Node | None
    """What the result is added to, if the region does that."""
    ups: tuple[Cut, ...]
    down: Cut
    biases: tuple[tuple[fx.Node, ...], ...]
    """Stored float tensors: one [E, n], or one [n] for each expert."""
    nodes: tuple[fx.Node, ...]
    """Everything inside, in graph order; the gathered cuts among them."""
    constants: tuple[fx.Node, ...]
    """Tensors that the graph itself holds, other than the biases: their values are part of what it computes."""
    aliases: tuple[fx.Node, ...]
    """Other names of the result, written in place, that are read after it."""
    top_k: int

    @property
    def cuts(self) -> tuple[Cut, ...]:
        return (*self.ups, self.down)

    @property
    def experts(self) -> int:
        return self.down.experts

    @property
    def dense(self) -> bool:
        """Weights are scores of all experts."""
        return not _same(meta(self.weights).numel(), meta(self.ids).numel())

    @property
    def gathers(self) -> bool:
        """Whether matrices are copied for every row."""
        whole = {cut.nodes[0] for cut in self.cuts if not cut.apart}
        return any(n in whole or (selecting(n) is not None and n.args[0] in whole) for n in self.nodes)

    @property
    def repeats(self) -> bool:
        """Whether a token may choose an expert twice, which a topk never does."""
        return all(name(n) != "topk" for n in (self.ids, *self.ids.all_input_nodes))

    @property
    def hidden(self) -> int:
        return int(meta(self.x).shape[-1])

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        return tuple(n for n in (self.x, self.ids, self.weights, self.base) if n is not None)


def structure(region: Region) -> str:
    """What a region computes, as text: the same for layers that differ in their tensors alone."""
    cuts = [node for cut in region.cuts for node in cut.nodes]
    biases = [node for bias in region.biases for node in bias]
    named = tuple(dict.fromkeys((*region.inputs, *cuts, *biases, *region.nodes)))
    index = {node: f"%{i}" for i, node in enumerate(named)}
    given = [f"{meta(n).dtype} {tuple(meta(n).shape)}" for n in named if n in cuts or n not in region.nodes]
    selects = [(cut.experts, None if cut.select is None else index[cut.select]) for cut in region.cuts]
    lines = [described(n, lambda a: index.get(a) or str(meta(a))) for n in region.nodes if n not in cuts]
    roles = [None if n is None else index[n] for n in (region.x, region.ids, region.weights, region.base, region.out)]
    return "\n".join((*given, f"{selects} {roles} {region.repeats}", *lines))


class Proposals:
    """The candidates for one group of cuts; ``reason`` says, once they are used up, what was in the way."""

    def __init__(
        self,
        flow: Flow,
        ups: tuple[Cut, ...],
        down: Cut,
        is_stored: Callable[[fx.Node], bool],
        position: dict[fx.Node, int],
    ) -> None:
        self.flow, self.ups, self.down, self.is_stored, self.position = flow, ups, down, is_stored, position
        self.readers = [reader for cut in (*ups, down) for reader in cut.readers]
        self._cuts = {node for cut in (*ups, down) for node in cut.nodes}
        self._selects = [cut.select for cut in (*ups, down) if cut.select is not None]
        self.ahead = flow.ahead(self._cuts)
        self.reason = "no result of the tokens' size depends on all of its matmuls"
        self._rank = 0

    def __iter__(self) -> Iterator[Region]:
        for out in self._outs():
            behind = self._behind(out, self._cuts)
            for x in self._xs(out):
                for ids in self._ids(behind, x):
                    for weights in self._weights(behind, x, ids):
                        region = self._region(out, x, ids, weights)
                        if region is not None:
                            yield region

    def refuse(self, rank: int, reason: str) -> None:
        """Keeps the reason of the candidate that came furthest."""
        if rank >= self._rank:
            self._rank, self.reason = rank, reason

    def _behind(self, out: fx.Node, ends: set[fx.Node]) -> set[fx.Node]:
        """What a result, and the selections of the cuts, depend on, back to these ends."""
        return self.flow.behind([out, *self._selects], lambda n: n in ends)

    def _outs(self) -> Iterator[fx.Node]:
        """Nodes through which everything flows that the experts give, in graph order."""
        behind_all = set.intersection(*(self.flow.ahead([reader]) for reader in self.readers))
        reach, last = -1, None
        for node in sorted(self.ahead):
            value = meta(node)
            if node in behind_all and isinstance(value, Tensor) and value.dtype.is_floating_point:
                if reach <= self.position[node]:
                    if value.dim() >= 2 and value.shape[-1] in self.down.matrix:
                        yield node
                elif last is not None:
                    self.refuse(1, f"an intermediate of its experts, {last.name}, has another user")
            ends = [self.position[u] for u in self.flow.users(node) if u in self.flow.live]
            if ends and max(ends) > reach:
                reach, last = max(ends), node

    def _xs(self, out: fx.Node) -> Iterator[fx.Node]:
        """Nodes that may be x, from the first matmuls back through everything that moves, copies, casts or weighs
        rows."""
        seen: set[fx.Node] = set()
        for reader in (r for cut in self.ups for r in cut.readers):
            for operand in reader.all_input_nodes:
                node: fx.Node | None = operand
                while node is not None and node not in seen and node not in self.ahead and _is_float(node):
                    seen.add(node)
                    alike = _same(meta(node).shape[-1], meta(out).shape[-1])
                    if alike and _same(meta(node).numel(), meta(out).numel()) and not self._expands(node):
                        yield node
                    node = self._back(node)

    def _expands(self, x: fx.Node) -> bool:
        """Whether x is made of a tensor with fewer rows, each standing for several: then that one is x, and what its
        rows give is put together further on."""
        node: fx.Node | None = x
        while node is not None:
            if _hint(meta(node)) < _hint(meta(x)):
                return True
            node = self._back(node)
        return False

    def _back(self, node: fx.Node) -> fx.Node | None:
        """The tensor whose rows a node moves: its largest float input."""
        if name(node) not in _MOVES:
            return None
        floats = [n for n in node.all_input_nodes if _is_float(n)]
        return max(floats, key=lambda n: _hint(meta(n)), default=None)

    def _ids(self, behind: set[fx.Node], x: fx.Node) -> Iterator[fx.Node]:
        """Integer tensors [T, k] (or [T]). First those not computed from integers: what a topk gives, an argument."""
        found = [n for n in sorted(behind - self.ahead, reverse=True) if is_index(n) and self._top_k(n, x)]
        found = [n for n in found if n.op not in ("placeholder", "get_attr") or not self.is_stored(n)]
        yield from sorted(found, key=_from_integers)

    def _top_k(self, ids: fx.Node, x: fx.Node) -> int | None:
        shape, rows = meta(ids).shape, math.prod(meta(x).shape[:-1])
        if shape and isinstance(shape[-1], int) and _same(math.prod(shape[:-1]), rows):
            # With one token any vector of integers has the shape, positions in a cache too.
            return int(shape[-1]) if shape[-1] <= self.down.experts else None
        return 1 if len(shape) < meta(x).dim() and _same(math.prod(shape), rows) else None

    def _weights(self, behind: set[fx.Node], x: fx.Node, ids: fx.Node) -> Iterator[fx.Node]:
        pairs, rows = meta(ids).numel(), math.prod(meta(x).shape[:-1])
        for node in sorted(behind - self.ahead, reverse=True):
            value = meta(node)
            if _is_float(node) and node is not x and value.dim() >= 1:
                scores = _same(value.shape[-1], self.down.experts) and _same(value.numel(), rows * value.shape[-1])
                if _same(value.numel(), pairs) or scores:
                    yield node

    def _region(self, out: fx.Node, x: fx.Node, ids: fx.Node, weights: fx.Node) -> Region | None:
        base = self._base(out)
        inside = self._behind(out, self._cuts | {x, ids, weights} | ({base} if base is not None else set()))
        scales = {n.args[1] for n in inside if name(n) == "round_to_fp8"}  # which a trial does without
        ends = sorted(n for n in inside - scales if n.op in ("placeholder", "get_attr") and not is_size(n))
        unknown = next((n for n in ends if not self.is_stored(n)), None)
        if unknown is not None:
            self.refuse(2, f"its computation cannot be told from the routing: {unknown.name} takes part in it")
            return None
        biases = self._biases([n for n in ends if _is_float(n) and meta(n).dim() < 3], inside)
        constants = tuple(n for n in ends if not any(n in bias for bias in biases))
        changing = next((n for n in constants if n.op == "placeholder"), None)
        if changing is not None:
            # Its value now proves nothing: a scale that is one and an adapter that is zero are trained later.
            self.refuse(2, f"a stored tensor that is no bias of its experts, {changing.name}, takes part in it")
            return None
        used = {n for node in inside for n in self.flow.preds(node)} | set(self._selects)
        scores = not _same(meta(weights).numel(), meta(ids).numel())
        if not {x, weights} <= used or not (scores or ids in used) or _shape(out) not in (_shape(x), _flat(x)):
            return None
        if any(self._written(n, out, inside) for n in (x, ids, weights)):
            self.refuse(3, "its input is written to in the graph")
            return None
        aliases = [n for n in self.position if self._renames(n, out)]
        if any(_shape(n) != _shape(out) or meta(n).dtype != meta(out).dtype for n in aliases):
            self.refuse(3, "its result is written in place into another tensor, of which views are read afterwards")
            return None
        nodes = {n for n in inside if n.op not in ("placeholder", "get_attr")}
        nodes |= {cut.nodes[0] for cut in (*self.ups, self.down) if cut.select is not None}
        top_k = self._top_k(ids, x)
        assert top_k is not None
        return Region(
            out=out,
            x=x,
            ids=ids,
            weights=weights,
            base=base,
            ups=self.ups,
            down=self.down,
            biases=biases,
            nodes=tuple(sorted(nodes)),
            constants=constants,
            aliases=tuple(aliases),
            top_k=top_k,
        )

    def _biases(self, floats: list[fx.Node], inside: set[fx.Node]) -> tuple[tuple[fx.Node, ...], ...]:
        """Stored tensors that have the shape of biases; those of single experts in the order in which they are used."""
        E = self.down.experts
        whole = [(n,) for n in floats if meta(n).dim() == 2 and meta(n).shape[0] == E]
        single = [n for n in floats if meta(n).dim() == 1]
        if len(single) % E:
            return tuple(whole)
        single.sort(key=lambda n: min(self.position[user] for user in n.users if user in inside))
        step = len(single) // E
        return (*whole, *(tuple(single[i::step]) for i in range(step)))

    def _base(self, out: fx.Node) -> fx.Node | None:
        """What ``out`` adds the experts' result to, row by row: not part of the experts, unless it is made of zeros."""
        if name(out) not in ("scatter_add", "scatter_add_", "index_add", "index_add_"):
            return None
        first = out.args[0] if out.args else None
        if not isinstance(first, fx.Node) or first in self.ahead or not _is_float(first):
            return None
        return None if name(first) in _ZEROS else first

    def _renames(self, node: fx.Node, out: fx.Node) -> bool:
        return node < out and self.flow.root(node) is self.flow.root(out) and any(out < user for user in node.users)

    def _written(self, node: fx.Node, out: fx.Node, inside: set[fx.Node]) -> bool:
        """Whether a tensor changes after the node and before the result, so that the op would see another value."""
        return any(node < write and (write in inside or write < out) for write in self.flow.writes(node))


_MOVES = VIEWS | {
    *("index", "index_select", "repeat_interleave", "repeat", "expand", "expand_as", "clone", "contiguous", "gather"),
    *("to", "float", "half", "bfloat16", "type", "type_as", "_to_copy", "convert_element_type", "_unsafe_view", "tile"),
    *("mul", "imul", "broadcast_to", "alias", "embedding", "mul_", "stack", "cat", "round_to_fp8"),
}
_ZEROS = {"zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full"}


def _from_integers(node: fx.Node) -> bool:
    """Whether a node is computed from an integer tensor; what one of several results is computed from counts."""
    tuples = [n for n in node.all_input_nodes if not isinstance(meta(n), Tensor)]
    inputs = [*node.all_input_nodes, *(n for t in tuples for n in t.all_input_nodes)]
    return any(isinstance(meta(n), Tensor) and not meta(n).dtype.is_floating_point for n in inputs)


def _is_float(node: fx.Node) -> bool:
    value = meta(node)
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _same(a: object, b: object) -> bool:
    """Whether two sizes are equal for every size that the graph serves; asks without adding a guard."""
    return bool(statically_known_true(a == b))


def _hint(value: Tensor) -> int:
    """About how many elements, for telling larger from smaller."""
    sizes: Sequence[int | torch.SymInt] = value.shape
    return math.prod(s if isinstance(s, int) else (s.node.hint or 2) for s in sizes)


def _shape(node: fx.Node) -> tuple[str, ...]:
    return tuple(str(size) for size in meta(node).shape)


def _flat(node: fx.Node) -> tuple[str, ...]:
    shape = meta(node).shape
    return (str(math.prod(shape[:-1])), str(shape[-1]))
