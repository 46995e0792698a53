"""Anchors: the matmul-like nodes of a graph, brought to one form.

    y = x @ W^T (+ bias)      x [..., K], W [N, K], y [..., N]

The spellings (linear, mm, matmul, @, bmm of batch 1, addmm, einsum) differ only in where the operands stand and whether
W is [K, N].
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Anchor:
    node: fx.Node
    x: fx.Node
    weight: fx.Node
    kn: bool
    """The weight operand is [K, N] (mm), not [N, K] (linear)."""
    bias: fx.Node | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(N, K)."""
        rows, cols = (int(size) for size in meta(self.weight).shape[-2:])
        return (cols, rows) if self.kn else (rows, cols)


def meta(node: fx.Node) -> Any:
    """The fake value that capture left on a node: Dynamo calls it example_value, AOTAutograd val. None where there is
    none."""
    return node.meta.get("example_value", node.meta.get("val"))


def anchors(graph: fx.Graph) -> list[Anchor]:
    """Every matmul-like node with two tensor operands, in graph order."""
    return [found for node in graph.nodes if (found := read_anchor(node)) is not None]


def name(node: fx.Node) -> str:
    """What a node calls, without overload or namespace: "linear", "matmul", ..."""
    if isinstance(node.target, str):
        return node.target
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", ""))


def is_matmul(node: fx.Node) -> bool:
    """Whether a node multiplies matrices, in a form that we rewrite or in another."""
    if node.op not in ("call_function", "call_method") or name(node) not in _MATMULS:
        return False
    equation = node.args[0] if name(node) == "einsum" and node.args else None
    if isinstance(equation, str) and "->" in equation:
        inputs, result = equation.split("->")
        return not set(inputs) - {",", " "} <= set(result)  # else nothing is summed over: a product of elements
    return True


_MATMULS = {
    *(
        "linear",
        "matmul",
        "mm",
        "bmm",
        "addmm",
        "einsum",
        "__matmul__",
        "mv",
        "addmv",
        "inner",
        "tensordot",
        "baddbmm",
        "addbmm",
        "addmm_",
    ),
    *(
        "baddbmm_",
        "multi_dot",
        "chain_matmul",
        "bilinear",
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
        "_grouped_mm",
        "grouped_mm",
        "grouped_mm_fallback",
    ),
}


def read_anchor(node: fx.Node) -> Anchor | None:
    """The node as an anchor, or None if it is no matmul that we can bring to the one form."""
    reader = _READERS.get(node.target) if node.op in ("call_function", "call_method") else None
    if reader is None:
        return None
    operands = _operands(node)
    found = reader(node, *operands) if len(operands) > 1 else None
    if found is None or not all(isinstance(n, fx.Node) for n in (found.x, found.weight)):
        return None
    return found if _same_form(found) else None


def _same_form(found: Anchor) -> bool:
    """x [..., K] and one weight matrix give [..., N]: no broadcasting of x over a batch, no batch of weights, no vector
    weight."""
    x, weight, y = meta(found.x), meta(found.weight), meta(found.node)
    if not all(isinstance(t, Tensor) for t in (x, weight, y)):
        return False
    one = weight.dim() >= 2 and all(size == 1 for size in weight.shape[:-2])
    if not one or x.dim() < 1 or x.dim() != y.dim():
        return False
    K, width = weight.shape[-2 if found.kn else -1], x.shape[-1]
    return not (isinstance(K, int) and isinstance(width, int)) or width == K  # einsum broadcasts a width of 1


def swapped(found: Anchor) -> fx.Node | None:
    """The operand that would be the weight if the matmul were written the other way round (W @ x); None for spellings
    without that way."""
    return None if found.node.target in _LINEAR else found.x


_NAMES = ("input", "mat1", "mat2", "other", "weight", "bias", "self", "batch1", "batch2", "tensor")


def _operands(node: fx.Node) -> list[Any]:
    """Positional arguments, then the keyword ones in the order in which PyTorch's signatures have them."""
    return [*node.args, *(node.kwargs[name] for name in _NAMES if name in node.kwargs and name != "bias")]


def _linear(node: fx.Node, x: Any, weight: Any, bias: Any = None) -> Anchor | None:
    bias = node.kwargs.get("bias", bias)
    if not isinstance(bias, fx.Node):
        return Anchor(node, x, weight, kn=False, bias=None)
    given, y = meta(bias), meta(node)
    of_rows = isinstance(given, Tensor) and isinstance(y, Tensor) and given.dim() == 1 and given.shape[0] == y.shape[-1]
    return Anchor(node, x, weight, kn=False, bias=bias) if of_rows else None


def _matmul(node: fx.Node, x: Any, weight: Any, *rest: Any) -> Anchor | None:
    return None if rest or "out" in node.kwargs else Anchor(node, x, weight, kn=True)


def _addmm(node: fx.Node, bias: Any, x: Any, weight: Any, *rest: Any) -> Anchor | None:
    """Only input + x @ W with a bias [N]: other factors, or a matrix to add, stay outside as they are."""
    other = rest or "out" in node.kwargs or node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1
    if other or not isinstance(bias, fx.Node):
        return None
    one_row = isinstance(meta(bias), Tensor) and meta(bias).dim() == 1 and meta(bias).shape[0] != 1
    return Anchor(node, x, weight, kn=True, bias=bias) if one_row else None


def _einsum(node: fx.Node, equation: Any, *operands: Any) -> Anchor | None:
    """Two operands, one contracted index, last in x; the result is x's other indices (an ellipsis among them), then the
    weight's."""
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if len(operands) != 2 or not isinstance(equation, str) or "->" not in equation:
        return None
    inputs, result = equation.replace(" ", "").replace("...", ".").split("->")
    if inputs.count(",") != 1:
        return None
    x, w = inputs.split(",")
    for a, b, left, right in ((x, w, *operands), (w, x, *reversed(operands))):
        if len(set(a)) == len(a) > 0 and len(b) == 2 and a[-1] in b and b[0] != b[1] and "." not in b + a[-1]:
            n = b.replace(a[-1], "")
            if n not in a and result == a[:-1] + n:
                return Anchor(node, left, right, kn=b[0] == a[-1])
    return None


_LINEAR: set[Any] = {torch.nn.functional.linear, torch._C._nn.linear, aten.linear.default}
_READERS: dict[Any, Callable[..., Anchor | None]] = {
    **dict.fromkeys(_LINEAR, _linear),
    **dict.fromkeys((torch.matmul, operator.matmul, torch.mm, torch.bmm, "matmul", "mm", "bmm", "__matmul__"), _matmul),
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten.matmul.default), _matmul),
    **dict.fromkeys((torch.addmm, "addmm", aten.addmm.default), _addmm),
    **dict.fromkeys((torch.einsum, torch.functional.einsum, aten.einsum.default), _einsum),
}
