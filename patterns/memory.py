"""Which values of a graph lie in the same memory: views of a tensor, and what an operation gives back as it got it
(``x.to(...)`` of an x that is so already). Capture computed the graph on fake tensors, whose storages tell."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def memory(node: fx.Node) -> int | None:
    """A number that nodes in the same memory have in common; None where that is not known: of what is no tensor, of one
    that wraps others, or of a graph that Dynamo did not capture."""
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor) or value.layout != torch.strided or is_traceable_wrapper_subclass(value):
        return None
    return int(value.untyped_storage()._cdata)


def share_memory(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes are known to."""
    own = memory(a)
    return own is not None and own == memory(b)
