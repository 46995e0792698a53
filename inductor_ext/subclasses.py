"""Weights that are tensor subclasses (torchao, quanto): Dynamo's graph shows ``linear(x, weight)``, the dequantisation
is inside the subclass.

The one matmul is traced by itself down to the subclass's plain parts; recognising and proving then work on that little
graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import tracing
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from inductor_ext.patterns.anchors import Anchor, anchors, meta
from inductor_ext.patterns.cone import Cone, NotACone, cone
from inductor_ext.weights import part


def inside(anchor: Anchor, weight: Tensor) -> tuple[Cone, list[tuple[str, ...]]]:
    """The cone within a matmul whose weight operand is this subclass, and the attribute path of each of its leaves.
    Raises NotACone."""
    K = anchor.size[1]
    x = torch.zeros(2, K, dtype=meta(anchor.x).dtype, device=weight.device)
    paths = _leaf_paths(weight)

    def matmul(x: Tensor, *parts: Tensor) -> Any:
        rebuilt = _rebuild(weight, list(parts))
        return torch.nn.functional.linear(x, rebuilt.t() if anchor.kn else rebuilt)

    try:
        with torch.no_grad(), tracing(None):  # Dynamo's own symbols are none of this graph's
            traced = make_fx(matmul, tracing_mode="fake")(x, *(part(weight, path) for path in paths))
    except Exception as error:
        raise NotACone(f"its {type(weight).__name__} cannot be traced ({type(error).__name__})") from error
    found = anchors(traced.graph)
    placeholders = traced.graph.find_nodes(op="placeholder")
    output = traced.graph.find_nodes(op="output")[0].args[0]
    if (
        len(found) != 1
        or _through_views(found[0].x) is not placeholders[0]
        or _through_views(output) is not found[0].node
    ):
        raise NotACone(f"its {type(weight).__name__} does more than dequantise and multiply")
    path_of = dict(zip(placeholders[1:], paths, strict=True))
    result = cone(
        found[0], lambda n: None if n in path_of else f"the activation {n.name} takes part in its computation"
    )
    return result, [path_of[leaf] for leaf in result.leaves]


_VIEWS = {
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.alias.default,
}


def _through_views(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.target in _VIEWS:
        node = node.args[0]
    return node


def _rebuild(value: Tensor, parts: list[Tensor]) -> Tensor:
    """The subclass again, around other parts (taken from the front of the list)."""
    if not is_traceable_wrapper_subclass(value):
        return parts.pop(0)
    names, context = value.__tensor_flatten__()
    inner = {name: _rebuild(getattr(value, name), parts) for name in names}
    cls: Any = type(value)
    rebuilt: Tensor = cls.__tensor_unflatten__(inner, context, value.shape, value.stride())
    return rebuilt


def _leaf_paths(value: Tensor, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The attribute path of each plain part, depth first."""
    if not is_traceable_wrapper_subclass(value):
        return [prefix]
    names, _ = value.__tensor_flatten__()
    return [path for name in names for path in _leaf_paths(getattr(value, name), (*prefix, name))]
