"""Flow: what a node's value depends on, in-place writes included, and who depends on it.

Dynamo's graphs hold ``out.index_add_(...)`` as it was written: the next reader of ``out`` depends on it without naming
it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from inductor_ext.patterns.anchors import meta, name
from inductor_ext.patterns.cone import VIEWS, is_assertion, written
from inductor_ext.patterns.memory import share_memory
from torch import Tensor, fx


class Flow:
    """The dependences of a graph as it is now; nodes compare by their place in it."""

    def __init__(self, graph: fx.Graph) -> None:
        self._roots: dict[fx.Node, fx.Node] = {}
        self._writers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        self._users: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        self._preds: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            preds = dict.fromkeys(node.all_input_nodes)
            for source in node.all_input_nodes:
                preds.update(dict.fromkeys(self._writers[self.root(source)][-1:]))  # which depends on those before it
            self._preds[node] = list(preds)
            for pred in preds:
                self._users[pred].append(node)
            targets = written(node)
            self._roots[node] = self._root(node, targets)
            for target in targets:
                self._writers[self.root(target)].append(node)
        acting = [n for n in graph.nodes if n.op == "output" or written(n)]
        self.live = self.behind(acting, lambda node: False)
        """What results and writes depend on."""

    def _root(self, node: fx.Node, targets: list[fx.Node]) -> fx.Node:
        """The node whose memory this one may share: of a view its base, of an in-place operation its target."""
        if targets:
            return self.root(targets[0])
        for source in node.all_input_nodes:
            if share_memory(node, source):
                return self.root(source)
        if node.op not in ("call_function", "call_method") or name(node) not in VIEWS or not node.all_input_nodes:
            return node
        base = node.all_input_nodes[0]
        # One of several results (values and indices of a topk) shares no memory with the others; a chunk is a view.
        apart = name(node) == "getitem" and not isinstance(meta(base), Tensor) and name(base) not in VIEWS
        return node if apart or _copies(node) else self.root(base)

    def root(self, node: fx.Node) -> fx.Node:
        return self._roots.get(node, node)

    def preds(self, node: fx.Node) -> list[fx.Node]:
        """What the value of a node is computed from: its inputs, and the last write into the memory of each."""
        return self._preds[node]

    def users(self, node: fx.Node) -> list[fx.Node]:
        """Who reads a node's value, or what it has written."""
        return self._users[node]

    def writes(self, node: fx.Node) -> list[fx.Node]:
        """All in-place writes into the memory of a node, in graph order."""
        return self._writers[self.root(node)]

    def behind(self, start: Iterable[fx.Node], stop: Callable[[fx.Node], bool]) -> set[fx.Node]:
        """Everything that these nodes depend on, themselves included; does not look behind a node that ``stop``s, which
        is left out."""
        return _closure(start, self.preds, stop)

    def ahead(self, start: Iterable[fx.Node]) -> set[fx.Node]:
        """Everything that depends on these nodes, themselves included."""
        return _closure(start, self.users, lambda node: node.op == "output" or is_assertion(node))


def _copies(node: fx.Node) -> bool:
    """Whether this is x[index] with a tensor for an index. One integer selects, as a number does: that is a view."""
    indices = node.args[1] if name(node) == "getitem" and len(node.args) > 1 else ()
    values = [meta(i) for i in (indices if isinstance(indices, tuple) else (indices,)) if isinstance(i, fx.Node)]
    return any(isinstance(value, Tensor) and (value.dim() > 0 or value.dtype == torch.bool) for value in values)


def _closure(
    start: Iterable[fx.Node], step: Callable[[fx.Node], list[fx.Node]], stop: Callable[[fx.Node], bool]
) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = list(start)
    while todo:
        node = todo.pop()
        if node not in found and not stop(node):
            found.add(node)
            todo += step(node)
    return found
