"""Examining a graph: for each anchor recognise, prove and choose a kernel, or say why it is left alone."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from inductor_ext import devices, verdicts, weights
from inductor_ext.capture import Site
from inductor_ext.experts import examine_experts
from inductor_ext.kernels import Problem
from inductor_ext.ops import linear, moe
from inductor_ext.options import Options
from inductor_ext.patterns.anchors import Anchor, anchors, is_matmul, meta, name, read_anchor, swapped
from inductor_ext.patterns.cone import Cone, NotACone, cone, is_assertion, is_write, stored_integers
from inductor_ext.patterns.opaque import already_fused
from inductor_ext.proved import Proved, ProvedLinear, Refused, Weight, chosen, computed_in, sentence, where
from inductor_ext.report import LeftAlone, Report, Rewritten

log = logging.getLogger("inductor_ext.examine")
Subclass = Callable[[Anchor, Tensor], tuple[Cone, list[tuple[str, ...]]]]
"""Reads a tensor subclass: the cone inside it, and where it keeps each of the cone's leaves."""


class Strict(Exception):
    """Raised under ``w4a16.strict`` when a matmul with an int4 weight is left alone."""


def examine(site: Site, options: Options, report: Report, subclass: Subclass | None = None) -> list[Proved]:
    """What ``rewrite`` would rewrite, in graph order; the graph stays as it is. Adds to the report, and raises as
    ``rewrite`` does."""
    fused = [LeftAlone(where(n), reason) for n in site.graph.nodes if (reason := already_fused(n)) is not None]
    left = [LeftAlone(where(anchor.node), sentence(reason)) for anchor, reason in site.out_of_reach()]
    trained = _trained(site)
    experts, refused, taken = examine_experts(site, trained, options)
    left += [LeftAlone(path, sentence(reason)) for path, reason in refused]
    live = _live(site.graph)
    others = [(node, reason) for node, reason in _other_matmuls(site) if node in live - taken]
    left += [LeftAlone(where(node), sentence(reason)) for node, reason in others]
    proved: list[Proved] = list(experts)
    for anchor in anchors(site.graph):
        if anchor.node in taken:
            continue
        try:
            found = _examine(site, anchor, anchor.node in trained, options, subclass)
        except Refused as refusal:
            left.append(LeftAlone(where(anchor.node), sentence(str(refusal))))
        else:
            proved += [found] if found is not None else []
    proved = _without_shared(live, sorted(proved, key=lambda p: p.node), left)
    report.rewritten += [p.rewritten for p in proved]
    report.left_alone += [*fused, *left]
    report.graphs += 1
    for alone in left:
        log.log(site.loudness, "%s is left alone: %s", alone.where, alone.reason)
    if proved or left:
        log.info("%d of %d int4 matmuls rewritten", len(proved), len(proved) + len(left))
    if options.strict and left:
        raise Strict("w4a16.strict: " + "; ".join(f"{a.where} is left alone: {a.reason}" for a in left))
    return proved


def _other_matmuls(site: Site) -> list[tuple[fx.Node, str]]:
    """Matmuls of int4 weights in a form that is not x @ W^T: batches of weights, scaled addmm, convolutions, ..."""
    found = []
    for node in site.graph.nodes:
        if is_matmul(node) and node.target not in (linear, moe) and read_anchor(node) is None:
            operands = [n for n in node.all_input_nodes if stored_integers(n, site.seen)]
            if operands:
                form = "batches of weights, factors alpha and beta, vectors and convolutions are not looked at"
                found.append((node, f"this {name(node)} is not of the form x @ W^T with one weight [N, K]; {form}"))
    return found


def _trained(site: Site) -> set[fx.Node]:
    """The nodes through which gradients can flow: those outside torch.no_grad(), if the graph itself is."""
    found, training = set(), site.training
    for node in site.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            training = bool(node.args[0])
        elif training:
            found.add(node)
    return found


# -- one anchor --------------------------------------------------------------------------------------------------------


def _examine(
    site: Site, anchor: Anchor, trained: bool, options: Options, subclass: Subclass | None
) -> ProvedLinear | None:
    """The anchor, proved; None if its weight does not come from integer storage. Raises Refused."""
    found = _cone(site, anchor, subclass)
    if found is None:
        return None
    inner, leaves, parts, sources = found
    if trained and meta(anchor.weight).requires_grad:
        raise Refused(
            "a stored tensor of it requires a gradient, which the fused op does not give; freeze it, or compile under"
            " torch.no_grad()"
        )
    N, K = anchor.size
    dtype = computed_in(anchor.node)
    case = verdicts.Case(inner.program, tuple(sources), N, K)
    recipe, entry = verdicts.settle([case], case.recipe)
    device, kind = options.device or devices.of(sources[0].device), entry.kind
    op = "linear" if kind.codes == "int4" else "linear_mxfp4"
    problem = Problem(
        op=op,
        device=device.type,
        arch=device.arch,
        dtype=dtype,
        scale_dtype=kind.scale_dtype,
        N=N,
        K=K,
        group_size=recipe.reading.group_size,
        zeros=kind.zeros,
        order=kind.permuted,
        bias=anchor.bias is not None,
        codes=kind.codes,
    )
    choice = chosen(problem, options)
    told = Rewritten(where(anchor.node), f"w4a16::{op}", choice.kernel, str(problem), entry.proof, choice.passed_over)
    weight = Weight(() if parts else inner.nodes, leaves, parts, tuple(sources), recipe, entry)
    return ProvedLinear(anchor.node, (weight,), choice.kernel, told, anchor)


def _cone(
    site: Site, anchor: Anchor, subclass: Subclass | None
) -> tuple[Cone, tuple[fx.Node, ...], tuple[tuple[str, ...], ...], list[Tensor]] | None:
    """The weight's cone, where its stored tensors are, and these. None, or raises Refused, as ``_examine``."""
    weight = site.stored(anchor.weight) if anchor.weight.op in ("placeholder", "get_attr") else None
    try:
        if subclass is not None and weight is not None and is_traceable_wrapper_subclass(weight):
            if all(t.dtype.is_floating_point for t in weights.stored_tensors(weight)):
                return None
            inner, parts = subclass(anchor, weight)
            return inner, (anchor.weight,), tuple(parts), [weights.part(weight, path) for path in parts]
        if not _speaks_of(site, anchor):
            return None
        inner = cone(anchor, site.why_not_stored)
        return inner, inner.leaves, (), [t for leaf in inner.leaves if (t := site.stored(leaf)) is not None]
    except NotACone as error:
        raise Refused(str(error)) from None


def _speaks_of(site: Site, anchor: Anchor) -> bool:
    """Whether this is a matmul with a weight from integer storage. Raises Refused if that weight is the left
    operand."""
    if stored_integers(anchor.weight, site.seen):
        return True
    left = swapped(anchor)
    if left is not None and stored_integers(left, site.seen):
        try:
            cone(dataclasses.replace(anchor, x=anchor.weight, weight=left), site.why_not_stored)
        except NotACone:
            return False
        raise Refused("the weight is the left operand of this matmul; x @ W^T is what is rewritten")
    return False


def _live(graph: fx.Graph) -> set[fx.Node]:
    """What results and writes depend on."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        acts = node.op == "output" or is_write(node) or node.is_impure()
        if (acts or not live.isdisjoint(node.users)) and not is_assertion(node):
            live.add(node)
    return live


def _without_shared(live: set[fx.Node], proved: list[Proved], left: list[LeftAlone]) -> list[Proved]:
    """Leaves alone what would not save the dequantisation: a weight-sized intermediate with a user that stays in the
    graph."""
    while True:
        gone = {p.node for p in proved}.union(*(p.inner for p in proved))
        for p in proved:
            user = _stays(p, live - gone)
            if user is not None:
                reason = (
                    f"its dequantised weight is also used by {user.name}, for which it would be computed all the same"
                )
                left.append(LeftAlone(p.rewritten.where, sentence(reason)))
                proved = [other for other in proved if other is not p]
                break
        else:
            return proved


def _stays(p: Proved, staying: set[fx.Node]) -> fx.Node | None:
    for weight in p.weights:
        for node in weight.nodes:
            value = meta(node)
            if not isinstance(value, Tensor) or not statically_known_true(value.numel() < weight.recipe.elements):
                for user in node.users:
                    if user in staying:
                        return user
    return None
