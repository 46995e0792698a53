"""Capture: the graphs that rewriting works on, and where in them stored tensors are to be seen.

Two kinds of graph come to us. Dynamo hands its backend a graph whose placeholders are the module's real parameters and
buffers. Export and AOTInductor reach us later, as ATen graphs that hold their weights as attributes.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch._dynamo.source import AttrSource, ConstantSource, GlobalSource
from torch._guards import Source, TracingContext

from inductor_ext.kernels import Packed
from inductor_ext.patterns.anchors import Anchor, anchors, meta
from inductor_ext.patterns.cone import share, stored_integers, written
from inductor_ext.patterns.memory import memory
from inductor_ext.weights import part


class Site(Protocol):
    """A graph to rewrite."""

    graph: fx.Graph
    training: bool
    """Whether gradients can be asked of what the graph computes."""

    def stored(self, node: fx.Node) -> Tensor | None:
        """The real tensor of a placeholder or get_attr, if it can be seen and belongs to the model."""

    def why_not_stored(self, node: fx.Node) -> str | None:
        """Why a placeholder or get_attr is nothing to rely on, or None."""

    def seen(self, node: fx.Node) -> Any:
        """The real tensor of a placeholder or get_attr, or else the fake one."""

    def attach(self, packed: Packed) -> list[fx.Node | None]:
        """Nodes that give the packed tensors in the graph."""

    def out_of_reach(self) -> list[tuple[Anchor, str]]:
        """Matmuls of int4 weights in graphs within this graph, and why they are not looked at."""

    loudness: int
    """The logging level at which what is left alone is spoken of."""


def clone(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy to rewrite: Dynamo goes on reading its own graph's placeholders after the backend returns."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta.pop("grapharg", None)  # Dynamo's own, which watches the tensor of the first call
        if hasattr(node, "_dynamo_source"):
            copies[node]._dynamo_source = node._dynamo_source
    new = fx.GraphModule(gm, graph)
    new.meta = gm.meta
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(gm, name):
            setattr(new, name, getattr(gm, name))
    return new


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a rewritten graph finds a stored tensor when it is called: in an argument (or a part of that subclass), or
    held here."""

    argument: int
    parts: tuple[str, ...] = ()
    held: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether it is an argument as it stands."""
        return self.held is None and not self.parts

    def find(self, args: Sequence[Any]) -> Tensor:
        if self.held is not None:
            return self.held
        return part(args[self.argument], self.parts)


class _Seeing:
    def seen(self: Site, node: fx.Node) -> Any:
        stored = self.stored(node)
        return meta(node) if stored is None else stored


class DynamoSite(_Seeing):
    """A clone of Dynamo's graph, with the real tensors that it was called with."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self.training = torch.is_grad_enabled()
        self.gm = clone(gm)
        self.graph = self.gm.graph
        self.placeholders = self.graph.find_nodes(op="placeholder")
        self.inputs = list(example_inputs)
        self._position = {node: i for i, node in enumerate(self.placeholders)}
        self._written = {memory(target) for node in self.graph.nodes for target in written(node)} - {None}
        share(self.graph, lambda node: self.stored(node) is not None)

    def slot(self, node: fx.Node) -> Slot:
        if node.op == "get_attr":
            return Slot(-1, held=self.stored(node))
        return Slot(self._position[node])

    def stored(self, node: fx.Node) -> Tensor | None:
        if self.why_not_stored(node) is not None:
            return None
        value = self.inputs[self._position[node]] if node.op == "placeholder" else _attribute(self.gm, node)
        return value if isinstance(value, Tensor) else None

    def why_not_stored(self, node: fx.Node) -> str | None:
        if node.op == "get_attr":
            return (
                None
                if isinstance(_attribute(self.gm, node), Tensor)
                else f"the graph attribute {node.name} takes part in its computation"
            )
        if not isinstance(self.inputs[self._position[node]], Tensor):
            return f"the size {node.name}, which can change, takes part in its computation"
        if memory(node) in self._written:  # by whatever name: also of another tensor in the same memory
            return f"the stored tensor {node.name} is written to in the graph"
        if node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is not None:
            return None
        if _held(getattr(node, "_dynamo_source", None)):
            return None
        return (
            f"the activation or argument {node.name} takes part in its computation; weights are parameters, buffers"
            " or tensors held by a module"
        )

    loudness = logging.WARNING

    def attach(self, packed: Packed) -> list[fx.Node | None]:
        return [None if t is None else self._placeholder(t) for t in packed]

    def out_of_reach(self) -> list[tuple[Anchor, str]]:
        inner = [m for m in self.gm.modules() if isinstance(m, fx.GraphModule) and m is not self.gm]
        where = "a checkpointed region, a branch or a loop"
        reason = f"it is inside a higher-order operation ({where}), where weights cannot be packed"
        return [(a, reason) for m in inner for a in anchors(m.graph) if stored_integers(a.weight, meta)]

    def _placeholder(self, tensor: Tensor) -> fx.Node:
        """One more static input. The compiled graph takes it as it takes parameters: unguarded, at an address that
        stays."""
        name = f"w4a16_packed_{len(self.inputs)}"
        last = self.graph.find_nodes(op="placeholder")
        with self.graph.inserting_after(last[-1]):
            node = self.graph.placeholder(name)
        context = TracingContext.get()
        assert context.fake_mode is not None
        fake = context.fake_mode.from_tensor(tensor, static_shapes=True)
        node.meta = {"tensor_dict": {"_dynamo_static_input_type": "unguarded"}, "example_value": fake}
        node._dynamo_source = ConstantSource(name)
        self.inputs.append(fake)
        return node


def _held(source: Source | None) -> bool:
    """Whether a tensor is held by an object or a module (``self.meta["scale"]``), and is no argument of the compiled
    function."""
    while source is not None:
        if isinstance(source, (AttrSource, GlobalSource)):
            return True
        source = getattr(source, "base", None)
    return False


class ConstantSite(_Seeing):
    """An ATen graph whose weights are attributes: what export and AOTInductor compile."""

    def __init__(self, graph: fx.Graph, loudness: int = logging.WARNING) -> None:
        assert graph.owning_module is not None
        self.loudness = loudness
        self.training = False
        self.gm, self.graph = graph.owning_module, graph
        self._written = {target.target for node in graph.nodes for target in written(node)}
        share(graph, lambda node: self.stored(node) is not None)

    def stored(self, node: fx.Node) -> Tensor | None:
        return _attribute(self.gm, node) if self.why_not_stored(node) is None else None

    def why_not_stored(self, node: fx.Node) -> str | None:
        if node.op == "placeholder":
            return f"the value of the graph input {node.name} is not known when this graph is compiled"
        value = _attribute(self.gm, node)
        if not isinstance(value, Tensor) or isinstance(value, torch._subclasses.FakeTensor):
            return f"the value of the attribute {node.name} is not known when this graph is compiled"
        if node.target in self._written:
            return f"the stored tensor {node.name} is written to in the graph"
        return None

    def attach(self, packed: Packed) -> list[fx.Node | None]:
        return [None if t is None else self._constant(t) for t in packed]

    def out_of_reach(self) -> list[tuple[Anchor, str]]:
        return []

    def _constant(self, tensor: Tensor) -> fx.Node:
        name = next(n for i in range(1 << 30) if not hasattr(self.gm, n := f"_w4a16_packed_{i}"))
        self.gm.register_buffer(name, tensor)
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.get_attr(name)
        mode = next(
            (v.fake_mode for n in self.graph.nodes if isinstance(v := meta(n), torch._subclasses.FakeTensor)), None
        )
        node.meta["val"] = tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
        return node


def _attribute(gm: torch.nn.Module, node: fx.Node) -> Any:
    value: Any = gm
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value
