"""fp8 activations in a region: its inputs of both projections go through ``w4a16::round_to_fp8``.

A trial cannot show rounding, for it computes in a precision in which there is none. So where a region rounds is read
from its graph: x before the first projections, act(h) right before the last, and nothing else.
"""

from __future__ import annotations

import dataclasses

from inductor_ext.patterns.anchors import name
from inductor_ext.patterns.cone import VIEWS
from inductor_ext.patterns.flow import Flow
from inductor_ext.patterns.region import Region
from torch import fx

from inductor_ext.kernels import Mlp

OP = "round_to_fp8"


class NotRounded(Exception):
    """Why a region's rounding is none that an op has. The message is a sentence."""


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Of the inputs of both projections."""

    x: fx.Node
    """[T, H] before it is rounded."""
    scales: tuple[fx.Node, fx.Node]


def rounding_of(region: Region, flow: Flow, mlp: Mlp) -> Rounding | None:
    """How a region rounds; None if it does not. Raises NotRounded."""
    inside = [node for node in region.nodes if name(node) == OP]
    outside = name(region.x) == OP
    if not inside and not outside:
        return None
    readers = set(region.down.readers)
    last = {_moved(operand) for reader in readers for operand in reader.all_input_nodes} & set(inside)
    if len(last) != 1:
        raise NotRounded("it rounds to fp8 somewhere else than right before its last projection")
    (h,) = last
    firsts = [node for node in inside if node is not h]
    if len(firsts) + outside != 1:
        raise NotRounded("it rounds to fp8 the input of one of its projections only, or more than once")
    ups = [reader for cut in region.ups for reader in cut.readers]
    if not readers.isdisjoint(_ahead(flow, ups, without=h)):
        raise NotRounded("what is rounded to fp8 is not all that its last projection is given")
    if outside:
        if mlp.apply_router_weight_on_input:
            raise NotRounded("it rounds its input to fp8 before it is weighted; the op does so after")
        first, x = region.x, region.x.args[0]
    else:
        first, x = firsts[0], region.x
        if not set(ups).isdisjoint(_ahead(flow, [region.x], without=first)):
            raise NotRounded("what is rounded to fp8 is not all that its first projection is given")
    scales = first.args[1], h.args[1]
    assert isinstance(x, fx.Node) and isinstance(scales[0], fx.Node) and isinstance(scales[1], fx.Node)
    return Rounding(x, (scales[0], scales[1]))


def _moved(node: fx.Node) -> fx.Node:
    """What a node is a view, a selection of rows or a copy of."""
    while name(node) in _MOVES and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


_MOVES = VIEWS | {"index", "index_select", "contiguous", "clone"}


def _ahead(flow: Flow, start: list[fx.Node], without: fx.Node) -> set[fx.Node]:
    """What depends on these nodes other than by way of one."""
    found: set[fx.Node] = set()
    todo = list(start)
    while todo:
        node = todo.pop()
        if node not in found and node is not without:
            found.add(node)
            todo += flow.users(node)
    return found
