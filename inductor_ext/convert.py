"""``convert_(model)``: one packed module in the place of experts that are modules of their own.

Some libraries call such experts in a loop with Python branches ("is any token here for this expert?"), which no graph
can hold, so that there is nothing to recognise. GPTQModel's "linear_loop" is one.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inductor_ext import prepack
from inductor_ext.formats import PackedInt4
from inductor_ext.loader.experts import NAMES, Canonical, PackedExperts
from inductor_ext.prove import NotProved
from inductor_ext.recipes import Recipe

log = logging.getLogger("inductor_ext.convert")

ARGUMENTS = ["hidden_states", "top_k_index", "top_k_weights"]
ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far apart, relatively, two ways to compute the same experts may be: there are several roundings in each."""


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


class NotConverted(Exception):
    """Why a module stays as it is. The message is a sentence."""


def convert_(model: nn.Module) -> int:
    """Replaces experts that are int4 modules of their own by one ``PackedExperts`` a layer, in place and one at a time;
    returns how many layers were converted.

    A module qualifies if it is called as ``forward(hidden_states, top_k_index, top_k_weights)``, holds its experts as
    children 0, 1, ... or in an ``nn.ModuleList``, each with ``gate_proj``, ``up_proj``, ``down_proj`` (or ``w1``,
    ``w3``, ``w2``), and gives the weighted sum of ``down(act_fn(gate(x)) * up(x))``. Each of these layers must qualify
    for ``prepack_``, have no bias and no act-order. Its int4 weight is proved; what the whole module computes is
    compared with the new one on inputs that reach every expert.

    The originals are freed, and ``state_dict()`` has the new module's buffers. What does not qualify stays as it is;
    the log of ``inductor_ext.convert`` says which and why.
    """
    converted, read = 0, _Reader()
    for path in [path for path, module in model.named_modules() if _experts(module)]:
        try:
            packed = _converted(path, model.get_submodule(path), read)
        except NotConverted as reason:
            log.info("%s stays as it is: %s", path or type(model).__name__, reason)
        else:
            model.set_submodule(path, packed)
            converted += 1
    return converted


def _experts(module: nn.Module) -> list[tuple[nn.Module, ...]]:
    """Gate, up and down of every expert of a module; empty if it has no experts, or none of their layers is packed."""
    if isinstance(module, nn.ModuleList):
        return []
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    children = (lists[0] if len(lists) == 1 else module)._modules
    numbered = [child for name, child in children.items() if name.isdigit() and child is not None]
    for names in NAMES:
        experts = [tuple(m for name in names if (m := expert._modules.get(name)) is not None) for expert in numbered]
        whole = bool(experts) and all(len(layers) == len(names) for layers in experts)
        if whole and any(prepack._stores_integers(layer) for layers in experts for layer in layers):
            return experts
    return []


def _converted(path: str, module: Any, read: _Reader) -> PackedExperts:
    if not path:
        raise NotConverted("it is the model itself, so there is nothing to replace it in")
    arguments = list(inspect.signature(module.forward).parameters)
    if arguments != ARGUMENTS:
        raise NotConverted(f"it is called with ({', '.join(arguments)}), not ({', '.join(ARGUMENTS)})")
    if any(getattr(part, hooks, None) for part in module.modules() for hooks in HOOKS):
        raise NotConverted("it has hooks, which would be lost")
    if not callable(getattr(module, "act_fn", None)):
        raise NotConverted("it has no act_fn")
    gate_up, down = [], []
    for i, (gate, up, last) in enumerate(_experts(module)):
        gate_up += [read(gate, f"the gate of expert {i}"), read(up, f"the up of expert {i}")]
        down += [read(last, f"the down of expert {i}")]
    packed = PackedExperts(module.act_fn, _joined(gate_up, len(down)), _joined(down, len(down)))
    _compare(module, packed, gate_up[0].scales)
    return packed.train(module.training)


def _joined(weights: Sequence[PackedInt4], experts: int) -> Canonical:
    """The rows of all weights, cut into as many matrices as there are experts."""
    if len({(w.N, w.K, w.group_size, w.scales.dtype) for w in weights}) > 1:
        raise NotConverted("its experts differ in their sizes, their groups or the dtype of their scales")
    zeros = None
    if any(w.zeros is not None for w in weights):
        zeros = _cut([_full_8(w) if w.zeros is None else w.zeros for w in weights], experts)
    return Canonical(_cut([w.codes for w in weights], experts), _cut([w.scales for w in weights], experts), zeros)


def _cut(parts: Sequence[Tensor], experts: int) -> Tensor:
    rows: Tensor = torch.cat(list(parts)).unflatten(0, (experts, -1))
    return rows


def _full_8(weight: PackedInt4) -> Tensor:
    return torch.full_like(weight.scales, 8, dtype=torch.uint8)


@torch.no_grad()
def _compare(module: nn.Module, packed: PackedExperts, like: Tensor) -> None:
    """Raises NotConverted if the two give different results. Large inputs are among those tried, so that a limit in an
    activation shows."""
    experts, random = packed.num_experts, torch.Generator().manual_seed(0)
    token = torch.arange(experts, device=like.device)
    ids = torch.stack([token, (token + 1) % experts], dim=1)
    weights = torch.rand(experts, 2, generator=random).to(like)
    for size in (1, 30):
        x = (size * torch.randn(experts, packed.hidden_dim, generator=random)).to(like)
        try:
            wanted = module(x, ids, weights).double().flatten(0, -2)
        except Exception as error:
            raise NotConverted(f"it fails on a random input ({type(error).__name__}: {error})") from error
        got = packed(x, ids, weights).double().flatten(0, -2)
        distance = float(((got - wanted).norm(dim=1) / wanted.norm(dim=1)).max())  # each expert has rows of its own
        factor = float((got * wanted).sum() / got.square().sum())
        if not distance <= ROUNDING[like.dtype] or not abs(factor - 1) <= ROUNDING[like.dtype] / 10:
            off = f"{distance:.1e} away, {factor:.4f} times"
            raise NotConverted(f"it computes something else than weighted sums of its experts ({off})")


# -- the int4 weights of linear layers, by way of prepack_ -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Captured:
    """What a layer computes: a recipe for its weight, and the names of its tensors that the recipe reads."""

    recipe: Recipe
    names: tuple[str, ...]

    def weight(self, layer: nn.Module) -> PackedInt4:
        """The layer's weight, proved. Raises NotProved."""
        weight, _ = self.recipe.prove([getattr(layer, name) for name in self.names])
        assert isinstance(weight, PackedInt4)
        return weight


class _Reader:
    """Gives the weights of layers. Of layers that are alike one is captured; every weight is proved."""

    def __init__(self) -> None:
        self._known: dict[Any, _Captured] = {}

    def __call__(self, layer: nn.Module, what: str) -> PackedInt4:
        if getattr(layer, "bias", None) is not None:
            raise NotConverted(f"{what} has a bias")
        kind = _kind(layer)
        try:
            if kind not in self._known:
                self._known[kind] = _capture(layer)
            try:
                weight = self._known[kind].weight(layer)
            except NotProved:  # its own tensors may be stored in a way that those of the layer captured are not
                weight = _capture(layer).weight(layer)
        except (prepack.NotPrepacked, NotProved) as reason:
            raise NotConverted(f"of {what}: {reason}") from reason
        if weight.order is not None:
            raise NotConverted(f"{what} is in act-order, which experts cannot have")
        return weight


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    tensors = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
    plain = {name: value for name, value in vars(layer).items() if isinstance(value, int | float | torch.dtype | None)}
    shapes = ((name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in tensors.items())
    return type(layer), tuple(shapes), tuple(sorted(plain.items(), key=repr))


def _capture(layer: nn.Module) -> _Captured:
    site, found = prepack._captured(layer)
    prepack._require_linear(site.graph)
    own = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
    name_of = {id(tensor): name for name, tensor in own}
    names = [name_of.get(id(tensor)) for tensor in found.weight.sources]
    if found.weight.parts or None in names:
        raise prepack.NotPrepacked("its int4 tensors are not all parameters or buffers of its own")
    return _Captured(found.recipe, tuple(name for name in names if name is not None))
