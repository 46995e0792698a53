"""In a graph that Inductor compiles for this process, the CPU kernels in C++ are called without our ops in between.

Our ops look at every argument in Python at every call, for they may be called by hand. What is in a graph was looked at
when it was traced, and the C++ ops look again. A decoding step is some hundred calls, so it is worth the difference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten


def call_directly(graph: fx.Graph) -> None:
    """Replaces each ``w4a16::linear`` and op of routed experts of the kernel "cpu" by the kernel's own op, where that
    can take its arguments."""
    for node in list(graph.nodes):
        if node.target == torch.ops.w4a16.linear.default:
            call = _named(node)
            if call["kernel"] == "cpu" and call["order"] is None:
                _replace(graph, node, torch.ops.w4a16_cpu.linear.default, _linear, call)
        elif node.target == torch.ops.w4a16.linear_mxfp4.default:
            call = _named(node)
            if call["kernel"] == "cpu" and statically_known_true(call["x"].meta["val"].shape[-1] % 32 == 0):
                _replace(graph, node, torch.ops.w4a16_cpu.linear_mxfp4.default, _linear_mxfp4, call)
        elif node.target == torch.ops.w4a16.moe.default:
            call = _named(node)
            if call["kernel"] == "cpu" and call["expert_map"] is None:
                _replace(graph, node, torch.ops.w4a16_cpu.moe.default, _moe, call)
        elif node.target in (torch.ops.w4a16.moe_mxfp4.default, torch.ops.w4a16.moe_gemm_a8w4.default):
            call = _named(node)
            whole = statically_known_true(call["x"].meta["val"].shape[1] % 32 == 0)
            if call["kernel"] == "cpu" and call["expert_map"] is None and whole:
                _replace(graph, node, torch.ops.w4a16_cpu.moe_mxfp4.default, _moe_mxfp4, call)


def _linear(graph: fx.Graph, call: dict[str, Any]) -> tuple[Any, ...]:
    weight = (call["qweight"], call["scales"], call["zeros"])
    return (_contiguous(graph, call["x"]), *weight, call["bias"], call["group_size"])


def _linear_mxfp4(graph: fx.Graph, call: dict[str, Any]) -> tuple[Any, ...]:
    return _contiguous(graph, call["x"]), call["qweight"], call["scales"], call["bias"]


def _tokens(graph: fx.Graph, call: dict[str, Any]) -> tuple[fx.Node, ...]:
    weights = call["topk_weights"]
    if weights.meta["val"].dtype != torch.float32:
        weights = _call(graph, torch.ops.prims.convert_element_type.default, weights, torch.float32)
    return tuple(_contiguous(graph, n) for n in (call["x"], weights, call["topk_ids"]))


_LAST = ("activation", "gate_up", "alpha", "limit", "apply_router_weight_on_input", "routed_scaling")


def _moe_mxfp4(graph: fx.Graph, call: dict[str, Any]) -> tuple[Any, ...]:
    packed = (call[f"{projection}_{name}"] for projection in ("w13", "w2") for name in ("qweight", "scales", "bias"))
    scales = (call.get(f"{projection}_input_scale") for projection in ("w13", "w2"))
    return (*_tokens(graph, call), *packed, *scales, *(call[name] for name in _LAST))


def _moe(graph: fx.Graph, call: dict[str, Any]) -> tuple[Any, ...]:
    of = ("qweight", "scales", "zeros", "bias")
    packed = (call[f"{projection}_{name}"] for projection in ("w13", "w2") for name in of)
    settings = ("w13_group_size", "w2_group_size", *_LAST)
    return (*_tokens(graph, call), *packed, *(call[name] for name in settings))


def _named(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an op by their names, defaults among them."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, node.args, strict=False)}
    return {argument.name: argument.default_value for argument in arguments} | given | dict(node.kwargs)


def _replace(graph: fx.Graph, node: fx.Node, target: Any, arguments: Any, call: dict[str, Any]) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(target, arguments(graph, call))
    # Inductor gives the arguments the strides of these, and without them any.
    values = fx.map_arg(new.args, lambda n: n.meta["val"])
    new.meta = {**node.meta, "eager_input_vals": (values, {})}
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _contiguous(graph: fx.Graph, node: fx.Node) -> fx.Node:
    value, expected = node.meta["val"], 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not statically_known_true(stride == expected):
            return _call(graph, aten.clone.default, node, memory_format=torch.contiguous_format)
        expected = expected * size
    return node


def _call(graph: fx.Graph, target: Any, node: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    new = graph.call_function(target, (node, *args), kwargs)
    new.meta["val"] = target(node.meta["val"], *args, **kwargs)
    return new
