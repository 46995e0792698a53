"""Examining a graph: for each anchor recognise, prove and choose a kernel, or say why it is left alone."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from inductor_ext import oracle, prove, weights
from inductor_ext.capture import Site
from inductor_ext.kernels import Problem
from inductor_ext.ops import linear
from inductor_ext.options import Options
from inductor_ext.patterns.anchors import Anchor, anchors, is_matmul, meta, name, read_anchor, swapped
from inductor_ext.patterns.cone import Cone, NotACone, Program, cone, is_assertion, is_write, stored_integers
from inductor_ext.patterns.opaque import already_fused
from inductor_ext.patterns.reading import Reading
from inductor_ext.patterns.recognise import NotRecognised, recognise, roles
from inductor_ext.report import LeftAlone, Report, Rewritten

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Of activations, as the op takes them."""
_VERDICTS: dict[str, Reading | str] = {}
"""Cone signature -> its reading, or why it has none."""
log = logging.getLogger("inductor_ext.examine")
Subclass = Callable[[Anchor, Tensor], tuple[Cone, list[tuple[str, ...]]]]
"""Reads a tensor subclass: the cone inside it, and where it keeps each of the cone's leaves."""


class Strict(Exception):
    """Raised under ``w4a16.strict`` when a matmul with an int4 weight is left alone."""


class _Refused(Exception):
    """Why one anchor is left alone. The message is a sentence."""


@dataclasses.dataclass
class Proved:
    """An anchor that can be rewritten."""

    anchor: Anchor
    cone: Cone
    inside: bool
    """The cone is inside a tensor subclass, not in the graph."""
    parts: list[tuple[str, ...]]
    """Then, where each leaf is found in the subclass."""
    sources: list[Tensor]
    """The stored tensors, one a leaf of the cone."""
    recipe: weights.Recipe
    entry: weights.Entry
    kernel: str
    rewritten: Rewritten


def examine(site: Site, options: Options, report: Report, subclass: Subclass | None = None) -> list[Proved]:
    """What ``rewrite`` would rewrite; the graph stays as it is. Adds to the report, and raises as ``rewrite`` does."""
    proved: list[Proved] = []
    fused = [LeftAlone(where(n), reason) for n in site.graph.nodes if (reason := already_fused(n)) is not None]
    left = [LeftAlone(where(anchor.node), _sentence(reason)) for anchor, reason in site.out_of_reach()]
    left += [LeftAlone(where(node), _sentence(reason)) for node, reason in _other_matmuls(site)]
    trained = _trained(site)
    for anchor in anchors(site.graph):
        try:
            found = _examine(site, anchor, anchor.node in trained, options, subclass)
        except _Refused as refusal:
            left.append(LeftAlone(where(anchor.node), _sentence(str(refusal))))
        else:
            proved += [found] if found is not None else []
    proved = _without_shared(site.graph, proved, left)
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


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def where(node: fx.Node) -> str:
    """The path of the innermost module that a node comes from, else its own name."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    if named := re.fullmatch(r"([LG])\['([^']*)'\]?(.*)", path):
        # Dynamo names a module by the variable that holds it. A local one (self) says nothing; a global one (net) is
        # where to look.
        scope, root, rest = named.groups()
        path = rest if scope == "L" and rest else root + rest
    path = re.sub(r"\.?(_modules)?\[['\"]?([^\]'\"]*)['\"]?\]", r".\2", path).strip(".")
    return path or node.name


def _other_matmuls(site: Site) -> list[tuple[fx.Node, str]]:
    """Matmuls of int4 weights in a form that is not x @ W^T: batches of weights, scaled addmm, convolutions, ..."""
    found = []
    for node in site.graph.nodes:
        if is_matmul(node) and node.target is not linear and read_anchor(node) is None:
            operands = [n for n in node.all_input_nodes if stored_integers(n, lambda leaf: _seen(site, leaf))]
            if operands:
                form = "batches of weights, factors alpha and beta, vectors and convolutions are not looked at"
                found.append((node, f"this {name(node)} is not of the form x @ W^T with one weight [N, K]; {form}"))
    return found


def _seen(site: Site, leaf: fx.Node) -> Any:
    return stored if (stored := site.stored(leaf)) is not None else meta(leaf)


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


def _examine(site: Site, anchor: Anchor, trained: bool, options: Options, subclass: Subclass | None) -> Proved | None:
    """The anchor, proved; None if its weight does not come from integer storage. Raises _Refused."""
    weight = site.stored(anchor.weight) if anchor.weight.op in ("placeholder", "get_attr") else None
    inside = subclass is not None and weight is not None and is_traceable_wrapper_subclass(weight)
    parts: list[tuple[str, ...]] = []
    try:
        if inside:
            assert subclass is not None and weight is not None
            if all(t.dtype.is_floating_point for t in weights.stored_tensors(weight)):
                return None
            found, parts = subclass(anchor, weight)
            sources = [weights.part(weight, path) for path in parts]
        else:
            if not _speaks_of(site, anchor):
                return None
            found = cone(anchor, site.why_not_stored)
            sources = [t for leaf in found.leaves if (t := site.stored(leaf)) is not None]
    except NotACone as error:
        raise _Refused(str(error)) from None
    if trained and meta(anchor.weight).requires_grad:
        raise _Refused(
            "a stored tensor of it requires a gradient, which the fused op does not give; freeze it, or compile under"
            " torch.no_grad()"
        )
    N, K = anchor.size
    dtype = _dtype(anchor)
    # What a stored tensor may be taken for depends on its values too (int8 within 4 bits or not), and so does the
    # verdict.
    signature = f"{found.program.signature(sources)} {list(roles(sources, N, K))}"
    recipe, entry = _proof(found.program, signature, sources, N, K)
    device, kind = sources[0].device, entry.kind
    problem = Problem(
        op="linear",
        device=device.type,
        arch=oracle.arch(device),
        dtype=dtype,
        scale_dtype=kind.scale_dtype,
        N=N,
        K=K,
        group_size=K // recipe.reading.groups,
        zeros=kind.zeros,
        order=kind.permuted,
        bias=anchor.bias is not None,
    )
    try:
        choice = oracle.choose(problem, options.kernel)
    except oracle.NoKernel as error:
        if options.kernel is not None:
            raise
        raise _Refused(str(error)) from None
    told = Rewritten(where(anchor.node), "w4a16::linear", choice.kernel, str(problem), entry.proof, choice.passed_over)
    return Proved(anchor, found, inside, parts, sources, recipe, entry, choice.kernel, told)


def _speaks_of(site: Site, anchor: Anchor) -> bool:
    """Whether this is a matmul with a weight from integer storage. Raises _Refused if that weight is the left
    operand."""
    if stored_integers(anchor.weight, lambda leaf: _seen(site, leaf)):
        return True
    left = swapped(anchor)
    if left is not None and stored_integers(left, lambda leaf: _seen(site, leaf)):
        try:
            cone(dataclasses.replace(anchor, x=anchor.weight, weight=left), site.why_not_stored)
        except NotACone:
            return False
        raise _Refused("the weight is the left operand of this matmul; x @ W^T is what is rewritten")
    return False


def _dtype(anchor: Anchor) -> torch.dtype:
    """The dtype in which the op computes: what the anchor gives, which under autocast is not what x has."""
    dtype: torch.dtype = meta(anchor.node).dtype
    if dtype not in _DTYPES:
        raise _Refused(f"its activations are {dtype}; float16, bfloat16 and float32 are what the op takes")
    return dtype


def _proof(
    program: Program, signature: str, sources: Sequence[Tensor], N: int, K: int
) -> tuple[weights.Recipe, weights.Entry]:
    known = signature in _VERDICTS
    reading = _verdict(program, signature, sources, N, K)
    recipe = weights.Recipe(program, reading, f"{signature} {reading!r}")
    try:
        return recipe, weights.entry(recipe, sources)
    except prove.NotProved as error:
        if not known:
            raise _Refused(str(error)) from None
    # The verdict came from a sibling whose stored tensors allowed another reading (a g_idx that sorts nothing): read
    # this one itself.
    del _VERDICTS[signature]
    return _proof(program, signature, sources, N, K)


def _verdict(program: Program, signature: str, sources: Sequence[Tensor], N: int, K: int) -> Reading:
    if signature not in _VERDICTS:
        try:
            _VERDICTS[signature] = recognise(program, sources, N, K)
        except NotRecognised as error:
            _VERDICTS[signature] = str(error)
        except Exception as error:  # the cone is the user's code, run on values it was not written for
            log.debug("probing failed", exc_info=True)
            _VERDICTS[signature] = f"its computation fails on probe values ({type(error).__name__}: {error})"
    verdict = _VERDICTS[signature]
    if isinstance(verdict, str):
        raise _Refused(verdict)
    return verdict


def _without_shared(graph: fx.Graph, proved: list[Proved], left: list[LeftAlone]) -> list[Proved]:
    """Leaves alone what would not save the dequantisation: a weight-sized intermediate with a user that stays in the
    graph."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        acts = node.op == "output" or is_write(node) or node.is_impure()
        if (acts or not live.isdisjoint(node.users)) and not is_assertion(node):
            live.add(node)
    while True:
        gone = {p.anchor.node for p in proved}
        inside = {node for p in proved if not p.inside for node in p.cone.nodes}
        for p in proved:
            user = None if p.inside else _stays(p, live - gone - inside)
            if user is not None:
                reason = (
                    f"its dequantised weight is also used by {user.name}, for which it would be computed all the same"
                )
                left.append(LeftAlone(p.rewritten.where, _sentence(reason)))
                proved = [other for other in proved if other is not p]
                break
        else:
            return proved


def _stays(p: Proved, staying: set[fx.Node]) -> fx.Node | None:
    for node in p.cone.nodes:
        value = meta(node)
        if not isinstance(value, Tensor) or value.numel() >= p.recipe.reading.N * p.recipe.reading.K:
            for user in node.users:
                if user in staying:
                    return user
    return None
