"""Cones: everything in a graph that computes one weight operand, down to its stored tensors.

    qweight  shifts  scales          leaves: parameters, buffers, constants
        \\     /        |
      codes -> ... -> (q - z) * s     nodes: pure functions, and in-place writes into tensors made inside the cone
                        |
                   weight operand

A cone is run to be read and to be proved, so it must give the same value every time, from its leaves alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from inductor_ext.patterns.anchors import Anchor, is_matmul, meta, name
from inductor_ext.patterns.memory import share_memory
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

_LIMIT = 512
"""Nodes in a cone. Real dequantisations have 5 to 60."""


class NotACone(Exception):
    """Why the computation of a weight operand cannot be taken out of the graph. The message is a sentence."""


class Computes(Protocol):
    """A weight's computation, free of the graph it was found in."""

    def run(self, values: Sequence[Tensor]) -> Tensor:
        """[N, K] for the leaves' tensors, which are not written to."""

    def signature(self, values: Sequence[Tensor]) -> str:
        """A hash of what is computed, and of the leaves' shapes and dtypes."""


class Program:
    """What a cone computes, free of the graph it was found in: [N, K] from its leaves' tensors.

    ``aliases`` are further nodes that fetch the attribute of a leaf.
    """

    def __init__(
        self, out: fx.Node, nodes: Sequence[fx.Node], leaves: Sequence[fx.Node], aliases: Sequence[fx.Node], kn: bool
    ) -> None:
        graph = fx.Graph()
        copies = {leaf: graph.placeholder(f"leaf_{i}") for i, leaf in enumerate(leaves)}
        same = {leaf.target: leaf for leaf in leaves if leaf.op == "get_attr"}
        copies |= {node: copies[same[node.target]] for node in aliases}
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {}
        graph.output(copies[out])
        names = {node: i for i, node in enumerate((*leaves, *nodes))}
        names |= {node: names[same[node.target]] for node in aliases}
        lines = [described(node, lambda n: f"%{names[n]}") for node in nodes]
        self._structure = "\n".join((*lines, f"{names[out]} {kn}"))
        self._module, self.kn = fx.GraphModule({}, graph), kn

    def run(self, values: Sequence[Tensor]) -> Tensor:
        """The weight [N, K] for these leaf values, which are not written to; of several experts, all their rows."""
        return rows(self.call(values), self.kn)

    def call(self, values: Sequence[Any]) -> Tensor:
        """What the node itself gives, for the values of all inputs."""
        with _disable_current_modes(), torch.no_grad():
            weight: Tensor = self._module(*values)
        return weight

    def signature(self, values: Sequence[Tensor]) -> str:
        """A hash of what is computed: the operations and constants, and the leaves' shapes and dtypes.

        Small integer leaves (tables of shifts) enter with their values: reading a cone does not vary them.
        """
        leaves = (f"{v.dtype} {tuple(v.shape)} {v.device.type} {_table(v)}" for v in values)
        return hashlib.sha256("\n".join((*leaves, self._structure)).encode()).hexdigest()


def rows(weight: Tensor, kn: bool) -> Tensor:
    """[..., N, K], or [..., K, N] if kn, as [rows, K]."""
    if kn:
        weight = weight.transpose(-2, -1)
    return weight.reshape(-1, weight.shape[-1])


@dataclasses.dataclass(frozen=True)
class Cone:
    """The nodes (in graph order) and leaves behind an anchor's weight operand."""

    nodes: tuple[fx.Node, ...]
    leaves: tuple[fx.Node, ...]
    program: Program
    given: tuple[fx.Node, ...] = ()


class _Label:
    """Stands for a node in the printed arguments."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def described(node: fx.Node, label: Callable[[fx.Node], str]) -> str:
    """A call as text, with labels for its arguments: what is the same in two graphs is the same text."""
    arguments: Any = (node.args, node.kwargs)
    stand_in: Callable[[fx.Node], Any] = lambda n: _Label(label(n))  # noqa: E731
    return f"{_target(node)} {fx.map_arg(arguments, stand_in)!r}"


def _target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return f"{node.op} {node.target}"
    return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', node.target)} {node.target}"


def _table(value: Tensor) -> str:
    return repr(value.tolist()) if value.numel() <= 64 and not value.is_floating_point() else ""


def cone(anchor: Anchor, why_not_leaf: Callable[[fx.Node], str | None]) -> Cone:
    """The cone of an anchor's weight. ``why_not_leaf`` says of a placeholder or get_attr why its value is none to rely
    on, or None.

    Raises NotACone with the reason: an activation takes part, a stored tensor is written to, a random or unknown
    operation, ...
    """
    return cone_of(anchor.weight, anchor.node, anchor.kn, why_not_leaf)


def cone_of(
    weight: fx.Node,
    before: fx.Node,
    kn: bool,
    why_not_leaf: Callable[[fx.Node], str | None],
    given: Callable[[fx.Node], bool] = lambda node: False,
) -> Cone:
    """The cone of a node's value as it is when ``before`` reads it. Nodes that are ``given`` are further inputs of the
    program, after the leaves."""
    inside: set[fx.Node] = set()
    at_leaves: set[fx.Node] = set()
    inputs: set[fx.Node] = set()
    todo = [weight]
    while todo:
        node = todo.pop()
        if node in inside or node in at_leaves:
            continue
        if given(node):
            inputs.add(node)
            continue
        writes = [write for write in _writes(node) if write < before]  # nodes compare by their place in the graph
        if node.op in ("placeholder", "get_attr"):
            if (reason := why_not_leaf(node)) is not None:
                raise NotACone(reason)
            if any(_writes(node)):  # also afterwards: what is fed to the op shares the stored tensor's memory
                raise NotACone(f"the stored tensor {node.name} is written to in the graph")
            at_leaves.add(node)
            continue
        if (reason := why_not_inside(node)) is not None:
            raise NotACone(reason)
        inside.add(node)
        if len(inside) > _LIMIT:
            raise NotACone(f"its computation has more than {_LIMIT} operations")
        todo += [*node.all_input_nodes, *writes]
    nodes = tuple(sorted(inside))
    ends = sorted(at_leaves)
    # An attribute may be fetched more than once. It is one stored tensor.
    first = {leaf.target: leaf for leaf in reversed(ends) if leaf.op == "get_attr"}
    leaves = tuple(leaf for leaf in ends if first.get(leaf.target, leaf) is leaf)
    aliases = [leaf for leaf in ends if leaf not in leaves]
    program = Program(weight, nodes, (*leaves, *sorted(inputs)), aliases, kn)
    return Cone(nodes, leaves, program, tuple(sorted(inputs)))


def why_not_inside(node: fx.Node) -> str | None:
    if node.op not in ("call_function", "call_method"):
        return f"the operation {node.name} ({node.op}) takes part in its computation"
    if is_matmul(node):
        return f"a matmul ({node.name}) takes part in its computation"
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return f"a higher-order operation ({node.name}) takes part in its computation"
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags or name(node) in RANDOM:
        return f"a random operation ({node.name}) takes part in its computation"
    return None


RANDOM = {
    "rand",
    "randn",
    "randint",
    "rand_like",
    "randn_like",
    "randint_like",
    "randperm",
    "bernoulli",
    "multinomial",
    "normal",
    "dropout",
}
_WRITES = {
    *(operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv),
    *(operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
}
VIEWS = {
    *("view", "reshape", "view_as", "getitem", "getattr", "narrow", "select", "slice", "unbind", "split", "chunk"),
    *("t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute", "movedim", "expand", "detach", "data"),
    *("unsqueeze", "squeeze", "flatten", "unflatten"),
}


def is_write(node: fx.Node) -> bool:
    """Whether a node writes into one of its arguments."""
    return bool(written(node))


def is_assertion(node: fx.Node) -> bool:
    """Whether a node only states something about a tensor or a size (its dtype and device after casts, as export has
    it; the range of a size that depends on data). It goes with what it speaks of."""
    return name(node) in ("_assert_tensor_metadata", "_assert_scalar")


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node writes into."""
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema.arguments
        values = [
            *zip(schema, node.args, strict=False),
            *((a, node.kwargs[a.name]) for a in schema if a.name in node.kwargs),
        ]
        targets = [value for a, value in values if a.alias_info is not None and a.alias_info.is_write]
    else:
        called = (
            "" if getattr(node.target, "__module__", "") == "_operator" else name(node)
        )  # operator.and_ writes nothing
        in_place = (
            node.target in _WRITES
            or node.kwargs.get("inplace") is True
            or (called.endswith("_") and not called.endswith("__"))
        )
        targets = [*(node.args[:1] if in_place else ()), node.kwargs.get("out")]
    return [n for n in tree_leaves(targets) if isinstance(n, fx.Node)]  # of torch._foreach_add_(...) a list


def _writes(node: fx.Node) -> Iterable[fx.Node]:
    """The in-place writes into a node's tensor, directly or through views of it."""
    todo, seen = [node], {node}
    while todo:
        alias = todo.pop()
        for user in alias.users:
            if user in seen:
                continue
            writes = alias in written(user)
            if writes:
                yield user
            if writes or name(user) in VIEWS or share_memory(user, alias):
                seen.add(user)
                todo.append(user)


def stored_integers(out: fx.Node, value: Callable[[fx.Node], Any]) -> list[fx.Node]:
    """The integer placeholders and constants behind a weight operand that are large enough to be its codes; looks no
    further than matmuls.

    This decides whether a matmul is one whose weight comes from integer storage, and so is spoken of at all. ``value``
    gives a leaf's tensor, real or fake; a real one is stored with the model.
    """
    weight = meta(out)
    if not isinstance(weight, Tensor) or weight.dim() < 2 or not all(isinstance(n, int) for n in weight.shape[-2:]):
        return []
    elements = weight.shape[-1] * weight.shape[-2]
    leaves: dict[fx.Node, Tensor] = {}
    shifted = False
    seen, todo = {out}, [out]
    while todo and len(seen) < _LIMIT:
        node = todo.pop()
        if node.op in ("placeholder", "get_attr"):
            leaf = value(node)
            if isinstance(leaf, Tensor):
                leaves[node] = leaf
        elif not is_matmul(node):
            shifted = shifted or "shift" in name(node)
            behind = [n for n in (*node.all_input_nodes, *_writes(node)) if n not in seen]
            todo += behind
            seen.update(behind)
    # Positions, ids and masks are int64 too, and taken as they are. Codes in int64 are shifted out of words, or else
    # are stored with the model and have scales beside them.
    scaled = any(leaf.dtype not in (torch.int64, torch.bool) for leaf in leaves.values())
    return [
        node
        for node, leaf in leaves.items()
        if leaf.dtype in _INTEGERS
        and isinstance(leaf.numel(), int)  # else it is an argument, and to compare would add a guard
        and 2 * elements <= leaf.numel() * leaf.dtype.itemsize * 8
        and (leaf.dtype != torch.int64 or shifted or (scaled and not isinstance(leaf, FakeTensor)))
    ]


_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64}


def share(graph: fx.Graph, is_stored: Callable[[fx.Node], bool]) -> None:
    """Computes what depends on stored tensors once, where a graph has it several times on the way to a matmul.

    A module that dequantises its experts in a property does so for every expert that is looked up. What is returned,
    written to or used in any other way stays apart, and so does what is computed with gradients and without, or under
    another autocast.
    """
    first: dict[str, fx.Node] = {}
    label: dict[fx.Node, str] = {}
    stored: set[fx.Node] = set()
    elsewhere = _not_for_matmuls_alone(graph)
    context = 0
    for node in list(graph.nodes):
        context += name(node) in _CONTEXTS
        if node.op in ("placeholder", "get_attr"):
            if is_stored(node) and not any(_writes(node)):
                label[node] = f"{node.op} {node.target}"
                stored.add(node)
        elif (
            all(n in label for n in node.all_input_nodes)
            and why_not_inside(node) is None
            and not written(node)
            and not any(_writes(node))
        ):
            text = f"{context} {described(node, label.__getitem__)}"
            same = first.setdefault(text, node)
            if same is node:
                label[node] = f"%{len(first)}"
            if stored.isdisjoint(node.all_input_nodes):
                label[node] = label[same]  # a table of shifts, say: the graph may keep two
            elif same is node:
                stored.add(node)
            elif node not in elsewhere and same not in elsewhere:
                node.replace_all_uses_with(same)
                graph.erase_node(node)


_CONTEXTS = {"_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode"}


def _not_for_matmuls_alone(graph: fx.Graph) -> set[fx.Node]:
    """What reaches a result or a write by a way on which there is no matmul."""
    found: set[fx.Node] = set()
    todo = [node for node in graph.nodes if node.op == "output" or is_write(node)]
    while todo:
        for node in todo.pop().all_input_nodes:
            if node not in found and not is_matmul(node):
                found.add(node)
                todo.append(node)
    return found
