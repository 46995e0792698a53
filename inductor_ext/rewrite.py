"""Rewriting a graph: one op in the place of each proved matmul or each layer's experts, and what only these needed
taken out."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from inductor_ext.capture import Site
from inductor_ext.examine import Subclass, examine
from inductor_ext.ops import linear, linear_mxfp4, moe, moe_gemm_a8w4, moe_mxfp4
from inductor_ext.options import Options
from inductor_ext.patterns.anchors import meta
from inductor_ext.patterns.cone import is_assertion, is_write
from inductor_ext.patterns.region import Region
from inductor_ext.proved import Proved, ProvedExperts, ProvedLinear
from inductor_ext.report import Report

aten = torch.ops.aten


def rewrite(site: Site, options: Options, report: Report, subclass: Subclass | None = None) -> list[Proved]:
    """Rewrites the site's graph in place and adds to the report. Returns what was rewritten, in graph order.

    Raises oracle.NoKernel if a forced kernel cannot do a problem, and Strict.
    """
    proved = examine(site, options, report, subclass)
    replaced: dict[fx.Node, fx.Node] = {}
    for p in proved:
        with site.graph.inserting_before(p.node):
            if isinstance(p, ProvedExperts):
                _replace_experts(site, p, replaced)
            elif isinstance(p, ProvedLinear):
                _replace_linear(site, p, replaced)
    _erase(site.graph, proved)
    return proved


def _replace_linear(site: Site, p: ProvedLinear, replaced: dict[fx.Node, fx.Node]) -> None:
    """Puts the op in the anchor's place. Casts what autocast would have cast. ``replaced`` has the nodes replaced
    before."""
    node, reading = p.node, p.recipe.reading
    packed = site.attach(p.weight.pack(p.kernel))
    x, bias = (
        None if n is None else _cast(site.graph, replaced.get(n, n), meta(node).dtype)
        for n in (p.anchor.x, p.anchor.bias)
    )
    assert x is not None
    if p.rewritten.op == "w4a16::linear":
        arguments = (x, *packed, bias, reading.N, reading.group_size, p.kernel)
        new = site.graph.call_function(linear, arguments)
    else:
        new = site.graph.call_function(linear_mxfp4, (x, *packed[:2], bias, reading.N, p.kernel))
    new.meta = dict(node.meta)
    _put(site.graph, node, new, replaced)


def _replace_experts(site: Site, p: ProvedExperts, replaced: dict[fx.Node, fx.Node]) -> None:
    """Puts the op in the place of the region's result; rows flattened before it, and its result shaped, cast and added
    as the region did."""
    graph, region, finding = site.graph, p.routed.region, p.routed.finding
    dtype, out = meta(region.ups[0].readers[0]).dtype, region.out
    x, ids, weights = (replaced.get(n, n) for n in (p.x, region.ids, region.weights))
    x = _cast(graph, _shaped(graph, x, [-1, region.hidden]), dtype)
    ids = _shaped(graph, ids, [-1, region.top_k])
    given = ids
    if region.repeats:
        ids = _from_anywhere(graph, ids, region)
    if finding.skips_beyond:  # to the op that is -1; another number is an error
        beyond = _call(graph, aten.ge.Scalar, given, region.experts)
        ids = _call(graph, aten.where.self, beyond, _call(graph, aten.full_like.default, ids, -1), ids)
    if region.dense:
        scores = _shaped(graph, weights, [-1, region.experts])
        weights = _call(graph, aten.gather.default, scores, 1, _cast(graph, ids, torch.int64))
    else:
        weights = _shaped(graph, weights, [-1, region.top_k])
    w13, w2 = (site.attach(weight.pack(p.kernel))[:3] for weight in p.weights)
    b13 = [_bias(graph, region, i, dtype, rows.taken) for i, rows in zip(finding.w13_bias, finding.w13, strict=False)]
    b13_all = None if not b13 else b13[0] if len(b13) == 1 else _call(graph, aten.cat.default, b13, 1)
    b2 = None if finding.w2_bias is None else _bias(graph, region, finding.w2_bias, dtype, slice(0, region.hidden))
    mlp = (*dataclasses.astuple(finding.mlp), -1, p.kernel)
    if p.rewritten.op == "w4a16::moe":
        settings = (finding.intermediate, *p.group_sizes, *mlp)
        new = graph.call_function(moe, (x, weights, ids, *w13, b13_all, *w2, b2, None, *settings))
    else:
        tensors = (x, weights, ids, *w13[:2], b13_all, *w2[:2], b2, None, *_input_scales(graph, p))
        op = moe_gemm_a8w4 if p.fp8 else moe_mxfp4
        new = graph.call_function(op, (*tensors, finding.intermediate, *mlp))
    _has(new, torch.empty_like(meta(x)))  # not called: the packed weights' fake tensors are of another mode
    new = _cast(graph, new, meta(out).dtype)
    if meta(out).dim() != 2:
        new = _call(graph, aten.view_as.default, new, replaced.get(p.x, p.x))
    if region.base is not None:
        new = _call(graph, aten.add.Tensor, replaced.get(region.base, region.base), new)
    for key, value in out.meta.items():
        new.meta.setdefault(key, value)
    for alias in region.aliases:
        for user in [user for user in alias.users if out < user]:
            user.replace_input_with(alias, new)
    _put(graph, out, new, replaced)


def _input_scales(graph: fx.Graph, p: ProvedExperts) -> tuple[fx.Node, ...]:
    """Of both projections, in W4A8."""
    if p.routed.rounding is not None:
        return p.routed.rounding.scales
    if not p.fp8:
        return ()
    one = _call(graph, aten.full.default, [], 1.0, dtype=torch.float32, device=meta(p.x).device)
    return one, one


def _from_anywhere(graph: fx.Graph, ids: fx.Node, region: Region) -> fx.Node:
    """Ids that no topk gave may be negative. The op would skip -1; ``W[-1]`` is the last expert, and what else is
    negative is made an error, as an id beyond the last expert is."""
    if region.gathers:
        from_end = _call(graph, aten.add.Tensor, ids, region.experts)
        ids = _call(graph, aten.where.self, _call(graph, aten.lt.Scalar, ids, 0), from_end, ids)
    beyond = _call(graph, aten.full_like.default, ids, region.experts)
    return _call(graph, aten.where.self, _call(graph, aten.lt.Scalar, ids, 0), beyond, ids)


def _bias(graph: fx.Graph, region: Region, place: int, dtype: torch.dtype, rows: slice) -> fx.Node:
    """[E, n], or some of its columns."""
    bias = region.biases[place]
    whole = bias[0] if len(bias) == 1 else _call(graph, aten.stack.default, list(bias))
    whole = _cast(graph, whole, dtype)
    if rows.indices(meta(whole).shape[1]) == (0, meta(whole).shape[1], 1):
        return whole
    taken = _call(graph, aten.slice.Tensor, whole, 1, rows.start, rows.stop, rows.step)
    return _call(graph, aten.clone.default, taken)


def _put(graph: fx.Graph, node: fx.Node, new: fx.Node, replaced: dict[fx.Node, fx.Node]) -> None:
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    replaced[node] = new


def _call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call, with the fake value that capture would have left on it."""
    new = graph.call_function(target, args, kwargs)
    _has(new, target(*fx.map_arg(args, meta), **fx.map_arg(kwargs, meta)))
    return new


def _has(node: fx.Node, value: torch.Tensor) -> None:
    node.meta["val" if any("val" in n.meta for n in node.all_input_nodes) else "example_value"] = value


def _shaped(graph: fx.Graph, node: fx.Node, shape: list[int]) -> fx.Node:
    value = meta(node)
    if value.dim() == 2 and isinstance(value.shape[1], int) and value.shape[1] == shape[1]:
        return node
    return _call(graph, aten.reshape.default, node, shape)


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if meta(node).dtype == dtype else _call(graph, aten.to.dtype, node, dtype)


def _erase(graph: fx.Graph, proved: list[Proved]) -> None:
    """Removes what the ops have made superfluous, but for what the rest of the graph still reads."""
    nodes = {node for p in proved for node in p.inner}
    said: set[fx.Node] = set()  # what only states something, and what only that needs
    for node in reversed(graph.nodes):
        if is_assertion(node) or (node.users and said.issuperset(node.users) and not is_write(node)):
            said.add(node)
    for node in graph.nodes:
        if node in said and not nodes.isdisjoint(node.all_input_nodes):
            nodes.add(node)
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
