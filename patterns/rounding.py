"""fp8 activations in a region: its inputs of both projections go through ``w4a16::round_to_fp8``.

A trial cannot show rounding, for it computes in a precision in which there is none. So where a region rounds is read
from its graph: x before the first projections, act(h) right before the last, and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from inductor_ext.patterns.anchors import name
from inductor_ext.patterns.cone import VIEWS
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


def rounding_of(region: Region, mlp: Mlp) -> Rounding | None:
    """How a region rounds; None if it does not. Raises NotRounded."""
    inside = [node for node in region.nodes if name(node) == OP]
    outside = name(region.x) == OP
    if not inside and not outside:
        return None
    if mlp.apply_router_weight_on_input:
        raise NotRounded("it rounds to fp8 and weighs its input, of which either may come first")
    h = _rounds(region.down.readers, inside)
    if h is None:
        raise NotRounded("it rounds to fp8 somewhere else than right before its last projection")
    others = [node for node in inside if node is not h]
    if len(others) + outside != 1:
        raise NotRounded("it rounds to fp8 the input of one of its projections only, or more than once")
    first: fx.Node | None = region.x
    if not outside:
        first = _rounds([reader for cut in region.ups for reader in cut.readers], others)
        if first is None:
            raise NotRounded("it rounds to fp8 somewhere else than right before its first projection")
    assert first is not None
    x, scales = first.args[0] if outside else region.x, (first.args[1], h.args[1])
    assert isinstance(x, fx.Node) and isinstance(scales[0], fx.Node) and isinstance(scales[1], fx.Node)
    return Rounding(x, (scales[0], scales[1]))


def _rounds(readers: Sequence[fx.Node], nodes: Sequence[fx.Node]) -> fx.Node | None:
    """The one of these nodes that every reader is given; between them rows move, and nothing is computed. What it
    rounds is then what the trial has found the readers to be given."""
    given = [{_moved(operand) for operand in reader.all_input_nodes} for reader in readers]
    return next((node for node in nodes if all(node in operands for operands in given)), None)


def _moved(node: fx.Node) -> fx.Node:
    """What a node is a view, a selection of rows or a copy of."""
    while name(node) in _MOVES and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


_MOVES = VIEWS | {"index", "index_select", "contiguous", "clone"}
