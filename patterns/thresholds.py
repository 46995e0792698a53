"""What trials cannot settle: operations in a region that act on some values only.

A trial shows what a region does with the values that it is given. A clamp at a million, or a limit on the tokens of an
expert, would not show; so a region that has such an operation is left alone, unless it is part of a known activation.
"""

from __future__ import annotations

from typing import Any

import torch
from inductor_ext.patterns.anchors import meta, name
from inductor_ext.patterns.cone import RANDOM, VIEWS
from inductor_ext.patterns.flow import Flow
from inductor_ext.patterns.region import Region
from torch import Tensor, fx

from inductor_ext.kernels import Mlp

_CLAMPS = {"clamp", "clip", "clamp_min", "clamp_max", "hardtanh", "minimum", "maximum", "fmin", "fmax"}
_SELECTIVE = {
    *("where", "masked_fill", "abs", "sign", "round", "floor", "ceil", "trunc", "nan_to_num"),
    *("topk", "sort", "max", "min", "amax", "amin", "relu6", "threshold", "hardshrink", "softshrink", "fmod", "frac"),
    *("hardsigmoid", "hardswish", "remainder", "quantize_per_tensor", "fake_quantize_per_tensor_affine", "heaviside"),
}
_ORDER = {"lt", "le", "gt", "ge", "less", "greater", "less_equal", "greater_equal", "__lt__", "__le__", "__gt__"}
_TESTS = {"isinf", "isnan", "isfinite", "isposinf", "isneginf", "eq", "ne", "__eq__", "__ne__", "isclose", "signbit"}
_MODULO = {"remainder", "fmod", "mod", "__mod__", "bitwise_and", "and", "__and__"}
_MASKED = ("masked_fill",)
_CASTS = ("to", "int", "long", "contiguous", "clone")
_NARROW = tuple(dtype for n in dir(torch) if n.startswith(("float8", "float4")) for dtype in [getattr(torch, n)])


def why_not_tried(region: Region, ahead: set[fx.Node], flow: Flow) -> str | None:
    """Which operation of a region a trial would not show, as a sentence; None if there is none. ``ahead`` is what
    depends on the experts' weights."""
    for node in region.nodes:
        if _settled(node, region, flow):
            continue
        called = _called(node)
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) or called in RANDOM:
            return f"a random operation ({node.name}) takes part in its computation"
        if any(dtype in _NARROW for dtype in _dtypes(node)):
            return f"it rounds to fewer bits than a kernel would ({node.name})"
        on_values = node in ahead and _is_float(node)
        if on_values and called in _MASKED and _settled(_argument(node, 1, "mask"), region, flow):
            continue
        if on_values and called in _SELECTIVE and not (called == "where" and len(node.args) < 3):
            return f"it treats some values in another way ({node.name})"
        if not on_values and called in _CLAMPS and not _beyond(node, region):
            return f"it limits something ({node.name})"
        if called in _TESTS and any(n in ahead and _is_float(n) for n in node.all_input_nodes):
            return f"it looks for some values ({node.name})"
        if called in _ORDER and any(bound != 0 for bound in _numbers(node)):
            return f"it compares something with a limit ({node.name})"
    return None


def why_not_these_clamps(region: Region, ahead: set[fx.Node], mlp: Mlp) -> str | None:
    """Whether the clamps of a region are those of this activation."""
    allowed: set[float] = {0.0} if mlp.activation == "relu" else set()
    if mlp.activation == "swigluoai" and mlp.limit is not None:
        allowed = {mlp.limit, -mlp.limit}
    for node in region.nodes:
        if node not in ahead or _called(node) not in _CLAMPS:
            continue
        bounds = set(_numbers(node))
        if not bounds or not bounds <= allowed:  # without numbers it is by tensors, of whatever values
            return f"it clamps values where no activation that is known does ({node.name})"
    return None


def limits_ids(region: Region) -> bool:
    """Whether an operation compares integers with a number, keeps them within one or takes them modulo."""
    limiting = _CLAMPS | _ORDER | _MODULO
    return any(_called(node) in limiting and _numbers(node) and not _is_float(node) for node in region.nodes)


def _called(node: fx.Node) -> str:
    """The name of an operation, or of the one that an in-place operation is like."""
    called = name(node)
    return called if called.endswith("__") else called.removesuffix("_")


def _settled(node: Any, region: Region, flow: Flow) -> bool:
    """Whether this compares experts' indices with a limit that none of them reaches (as transformers does, for experts
    on another device), or views such a mask. A trial shows what it does: it is the same for all of them."""
    while isinstance(node, fx.Node) and name(node) in VIEWS and name(node) != "getitem":
        node = _argument(node, 0, "input")
    if not isinstance(node, fx.Node) or name(node) not in _ORDER or len(node.args) != 2 or node.kwargs:
        return False
    ids, bound = node.args
    if not isinstance(bound, int) or not _is_ids(ids, region, flow):
        return False
    first = name(node).strip("_") in ("gt", "greater", "le", "less_equal")  # whose answer changes after the bound
    return not 0 <= bound - (0 if first else 1) < region.experts - 1


def _is_ids(node: Any, region: Region, flow: Flow) -> bool:
    """Whether these are experts' indices, in any order and shape."""
    while node is not region.ids:
        if not isinstance(node, fx.Node) or not all(_harmless(write, region) for write in flow.writes(node)):
            return False
        base = _argument(node, 0, "input")
        if name(node) == "getitem" and isinstance(base, fx.Node) and not isinstance(meta(base), Tensor):
            if name(base) != "sort" or node.args[1] != 0:
                return False
            base = _argument(base, 0, "input")
        elif name(node) not in (*VIEWS, *_CASTS) and not _harmless(node, region):
            return False
        node = base
    return True


def _argument(node: fx.Node, place: int, keyword: str) -> Any:
    return node.args[place] if place < len(node.args) else node.kwargs.get(keyword)


def _harmless(node: fx.Node, region: Region) -> bool:
    return _called(node) in _CLAMPS and _beyond(node, region)


def _beyond(node: fx.Node, region: Region) -> bool:
    """Whether a clamp leaves experts' indices as they are."""
    bounds = _numbers(node)
    return bool(bounds) and all(bound <= 0 or bound >= region.experts - 1 for bound in bounds)


def _numbers(node: fx.Node) -> list[float]:
    given = (*node.args, *node.kwargs.values())
    return [float(a) for a in given if isinstance(a, (int, float)) and not isinstance(a, bool)]


def _dtypes(node: fx.Node) -> list[Any]:
    value = meta(node)
    own = [value.dtype] if isinstance(value, Tensor) else []
    return own + [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.dtype)]


def _is_float(node: fx.Node) -> bool:
    value = meta(node)
    return not isinstance(value, Tensor) or value.dtype.is_floating_point
