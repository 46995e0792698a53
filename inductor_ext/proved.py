"""What examining finds: parts of a graph that can be rewritten, with their weights proved."""

from __future__ import annotations

import dataclasses
import re

import torch
from torch import Tensor, fx

from inductor_ext import oracle, weights
from inductor_ext.kernels import MoeProblem, Packed, Problem
from inductor_ext.options import Options
from inductor_ext.patterns.anchors import Anchor, meta
from inductor_ext.patterns.routed import Routed
from inductor_ext.recipes import ExpertRecipe, Recipe
from inductor_ext.report import Rewritten


class Refused(Exception):
    """Why one matmul, or the experts of one layer, are left alone. The message is a sentence."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """A packed weight that an op will take, and where its stored tensors are."""

    nodes: tuple[fx.Node, ...]
    """What dequantises it in the graph."""
    leaves: tuple[fx.Node, ...]
    """The graph's inputs or attributes that hold the stored tensors; or the one that holds the tensor subclass."""
    parts: tuple[tuple[str, ...], ...]
    """Where in the subclass each stored tensor is; empty for plain tensors."""
    sources: tuple[Tensor, ...]
    """The stored tensors."""
    recipe: Recipe | ExpertRecipe
    entry: weights.Entry

    def pack(self, kernel: str) -> Packed:
        return self.entry.pack(kernel, self.sources)


@dataclasses.dataclass(frozen=True)
class Proved:
    """One op to come."""

    node: fx.Node
    """The node that it replaces."""
    weights: tuple[Weight, ...]
    kernel: str
    rewritten: Rewritten

    @property
    def inner(self) -> set[fx.Node]:
        """The nodes that it makes superfluous, but for what others read."""
        return {node for weight in self.weights for node in weight.nodes}


@dataclasses.dataclass(frozen=True)
class ProvedLinear(Proved):
    anchor: Anchor

    @property
    def weight(self) -> Weight:
        return self.weights[0]

    @property
    def recipe(self) -> Recipe:
        recipe = self.weight.recipe
        assert isinstance(recipe, Recipe)
        return recipe


@dataclasses.dataclass(frozen=True)
class ProvedExperts(Proved):
    routed: Routed
    fp8: bool
    """Activations are rounded to fp8."""

    @property
    def x(self) -> fx.Node:
        """[.., H], not yet rounded."""
        rounding = self.routed.rounding
        return self.routed.region.x if rounding is None else rounding.x

    @property
    def inner(self) -> set[fx.Node]:
        outside = {self.routed.region.x} - {self.x}  # the rounded x
        return super().inner | outside | set(self.routed.region.nodes) - {self.node}

    @property
    def group_sizes(self) -> tuple[int, int]:
        first, second = (weight.recipe for weight in self.weights)
        assert isinstance(first, ExpertRecipe) and isinstance(second, ExpertRecipe)
        return first.group_size, second.group_size


_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Of activations, as the ops take them."""


def computed_in(node: fx.Node) -> torch.dtype:
    """The dtype in which an op in a matmul's place computes: what the matmul gives, which under autocast is not what
    its input has. Raises Refused."""
    dtype: torch.dtype = meta(node).dtype
    if dtype not in _DTYPES:
        raise Refused(f"its activations are {dtype}; float16, bfloat16 and float32 are what the op takes")
    return dtype


def chosen(problem: Problem | MoeProblem, options: Options) -> oracle.Choice:
    """The kernel for a problem. Raises Refused if there is none, or oracle.Required if one was forced that cannot."""
    try:
        return oracle.choose(problem, options.kernel, elsewhere=options.device is not None)
    except oracle.Required:
        raise
    except oracle.NoKernel as error:
        raise Refused(str(error)) from None


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def where(node: fx.Node) -> str:
    """The path of the innermost module that a node comes from, else its own name."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    if named := re.fullmatch(r"([LG])\['([^']*)'\]?(.*)", path):
        # Dynamo names a module by the variable that holds it. A local one (self) says nothing; a global one (net) is
        # where to look.
        scope, root, rest = named.groups()
        if scope == "L" and root == "args":  # of a wrapper: the model is one of the arguments, as in transformers 5.24
            rest = re.sub(r"^\[\d+\](?=.)", "", rest)
        path = rest if scope == "L" and rest else root + rest
    path = re.sub(r"\.?(_modules)?\[['\"]?([^\]'\"]*)['\"]?\]", r".\2", path).strip(".")
    return path or node.name
