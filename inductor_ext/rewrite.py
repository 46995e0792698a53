"""Rewriting a graph: one op in the place of each proved matmul, and what only that matmul needed taken out."""

from __future__ import annotations

import torch
from torch import fx

from inductor_ext.capture import Site
from inductor_ext.examine import Proved, Subclass, examine
from inductor_ext.ops import linear
from inductor_ext.options import Options
from inductor_ext.patterns.anchors import meta
from inductor_ext.patterns.cone import is_assertion, is_write
from inductor_ext.report import Report


def rewrite(site: Site, options: Options, report: Report, subclass: Subclass | None = None) -> list[Proved]:
    """Rewrites the site's graph in place and adds to the report. Returns what was rewritten, in graph order.

    Raises oracle.NoKernel if a forced kernel cannot do a problem, and Strict.
    """
    proved = examine(site, options, report, subclass)
    replaced: dict[fx.Node, fx.Node] = {}
    for p in proved:
        _replace(site, p, replaced)
    _erase(site.graph, proved)
    return proved


def _replace(site: Site, p: Proved, replaced: dict[fx.Node, fx.Node]) -> None:
    """Puts the op in the anchor's place. Casts what autocast would have cast. ``replaced`` has the anchors before this
    one."""
    node = p.anchor.node
    packed = site.attach(p.entry.pack(p.kernel, p.sources))
    dtype, reading = meta(node).dtype, p.recipe.reading
    with site.graph.inserting_before(node):
        x, bias = (
            _cast(site.graph, n if n is None else replaced.get(n, n), dtype) for n in (p.anchor.x, p.anchor.bias)
        )
        assert x is not None
        new = site.graph.call_function(linear, (x, *packed, bias, reading.N, reading.K // reading.groups, p.kernel))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    site.graph.erase_node(node)
    replaced[node] = new


def _cast(graph: fx.Graph, node: fx.Node | None, dtype: torch.dtype) -> fx.Node | None:
    if node is None or meta(node).dtype == dtype:
        return node
    new = graph.call_function(torch.ops.aten.to.dtype, (node, dtype))
    new.meta = {key: value.to(dtype) if key in ("example_value", "val") else value for key, value in node.meta.items()}
    return new


def _erase(graph: fx.Graph, proved: list[Proved]) -> None:
    """Removes the cones, but for what the rest of the graph still reads."""
    nodes = {node for p in proved if not p.inside for node in p.cone.nodes}
    nodes |= {user for node in nodes for user in node.users if is_assertion(user)}
    order = [node for node in graph.nodes if node in nodes]
    kept = True
    while kept:
        kept = False
        for node in order:
            # A write stays with the tensor that it writes into; that tensor is an input of it, so look both ways.
            partners = [*node.users, *(n for n in node.all_input_nodes if is_write(node))]
            if node in nodes and any(n not in nodes and n.op != "placeholder" for n in partners):
                nodes.discard(node)
                kept = True
    for node in reversed(order):
        if node in nodes:
            graph.erase_node(node)
