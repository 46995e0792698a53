"""Which modules of a model are routed experts, and the packed modules that take their place.

transformers keeps a layer's experts in one module with 3-D parameters; quantised checkpoints hold each by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import nn

from inductor_ext.loader.config import Mxfp4, Plan, Scheme
from inductor_ext.loader.experts import NAMES
from inductor_ext.loader.modules import LAYERS, SCALE_DTYPES
from inductor_ext.loader.mxfp4 import Mxfp4Experts, QuarkExperts, is_gpt_oss
from inductor_ext.loader.names import Files
from inductor_ext.loader.stored_experts import Projection, StoredExperts, lay_out

UNDESCRIBED = {"Llama4TextExperts": {"is_transposed": True}}
"""Experts that lack the attributes by which transformers' `use_experts_implementation` describes the others."""
_CODES = {leaf for layer in LAYERS.values() for leaf, part in layer.PARTS.items() if part == "qweight"}


class NotPackable(ValueError):
    """Why a module's experts cannot be packed. The message goes on after "... is a mixture of experts, "."""


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold the weights of several experts, by path."""

    def holds_experts(module: nn.Module) -> bool:
        down = module._parameters.get("down_proj")
        return down is not None and down.ndim == 3

    return {path: module for path, module in model.named_modules() if holds_experts(module)}


def pack_experts(path: str, module: Any, plan: Plan, files: Files) -> StoredExperts | Mxfp4Experts | None:
    """The module that takes the place of the experts at `path`; None if the files hold them dense, as the model does.

    Raises NotPackable.
    """
    if f"{path}.down_proj" in files.stored:
        return None
    if plan.mxfp4 is not None:
        return _pack_mxfp4(path, module, plan.mxfp4, files)
    experts, hidden, intermediate = _sizes(module)
    names = _names(path, experts, files)
    gate, up, down = (_scheme(path, experts, name, plan, files) for name in names)
    if gate is not None and up is not None and gate != up:
        raise NotPackable(f"whose gates and ups are stored in different ways: {gate} and {up}")
    both = gate or up or down
    down = down or both
    assert both is not None and down is not None  # _names has seen one of them
    try:
        first, last = lay_out(both, intermediate, hidden), lay_out(down, hidden, intermediate)
    except ValueError as error:
        raise NotPackable(f"which cannot be stored as {both.format}: {error}") from error
    projections = (
        Projection(names[0], "gate_up", 0, first),
        Projection(names[1], "gate_up", intermediate, first),
        Projection(names[2], "down", 0, last),
    )
    scale_dtypes = {p.weight: _scale_dtype(path, experts, p, files) for p in projections}
    return StoredExperts(module.act_fn, experts, projections, scale_dtypes)


def _pack_mxfp4(path: str, module: Any, how: Mxfp4, files: Files) -> Mxfp4Experts:
    kind = type(module).__name__
    if not is_gpt_oss(module):
        raise NotPackable(f"and {kind} is not gpt-oss's experts, the only ones that are loaded in MXFP4")
    try:
        if not how.each:
            return Mxfp4Experts(module)
        first = files.stored.get(f"{path}.0.down_proj.input_scale")
        if how.input_scales and first is None:
            raise NotPackable(f"whose config.json has fp8 activations, and the files no {path}.0.down_proj.input_scale")
        return QuarkExperts(module, first.shape if how.input_scales and first is not None else None)
    except NotPackable:
        raise
    except ValueError as error:
        raise NotPackable(f"which cannot be stored in MXFP4: {error}") from error


def _sizes(module: Any) -> tuple[int, int, int]:
    """The number of experts, hidden and intermediate size. Raises NotPackable for experts that compute anything but
    down(act(gate(x)) * up(x))."""
    kind = type(module)
    described = {"is_transposed": False, "has_gate": True, "has_bias": False, "has_post_expert_norm": False}
    if kind.__name__ in UNDESCRIBED:
        described |= UNDESCRIBED[kind.__name__]
    elif all(hasattr(module, name) for name in described):
        described = {name: getattr(module, name) for name in described}
        if kind._apply_gate is not import_module("transformers.integrations.moe")._default_apply_gate:
            raise NotPackable(f"and {kind.__name__} joins gate and up in a way of its own")
    else:
        raise NotPackable(f"and {kind.__name__} is no kind of experts that is known")
    if not described["has_gate"]:
        raise NotPackable(f"and {kind.__name__} has no gates")
    if described["has_bias"] or described["has_post_expert_norm"]:
        raise NotPackable(
            f"and {kind.__name__} has {'biases' if described['has_bias'] else 'a norm after each expert'}"
        )
    experts, *gate_up = module.gate_up_proj.shape
    down = list(module.down_proj.shape[1:])
    if described["is_transposed"]:
        gate_up, down = gate_up[::-1], down[::-1]
    if gate_up != [2 * down[1], down[0]] or module.down_proj.shape[0] != experts:
        shapes = f"{list(module.gate_up_proj.shape)} and {list(module.down_proj.shape)}"
        raise NotPackable(f"and the shapes {shapes} are not those of gates and ups, and downs")
    return experts, down[0], down[1]


def _names(path: str, experts: int, files: Files) -> tuple[str, str, str]:
    """What the files call the projections of the experts at `path`."""
    for names in NAMES:
        if any(_first(path, experts, name, _CODES, files) for name in names):
            return names
    if any(f"{path}.0.{names[0]}.weight" in files.stored for names in NAMES):
        raise NotPackable("which the files hold dense, each expert by itself; only packed experts are read so")
    looked_for = " or ".join(f"{path}.0.{names[0]}.{leaf}" for names in NAMES for leaf in sorted(_CODES))
    raise NotPackable(f"and the files hold no packed tensors of them that are named like {looked_for}")


def _first(path: str, experts: int, name: str, leaves: Iterable[str], files: Files) -> str | None:
    """The first tensor in the files, among all experts', of the projection `name` that is one of `leaves`."""
    tensors = (f"{path}.{expert}.{name}.{leaf}" for expert in range(experts) for leaf in leaves)
    return next((tensor for tensor in tensors if tensor in files.stored), None)


def _scheme(path: str, experts: int, name: str, plan: Plan, files: Files) -> Scheme | None:
    """The scheme of the first expert whose projection `name` is packed. Where others differ, their tensors will not
    fit. None if no expert's is packed."""
    codes = _first(path, experts, name, _CODES, files)
    if codes is None:
        return None
    scheme = files.scheme(plan, codes.rpartition(".")[0], {"Linear"})
    if scheme is None:
        raise NotPackable(f"and by config.json this is no packed tensor: {files.stored[codes].name}")
    return scheme


def _scale_dtype(path: str, experts: int, p: Projection, files: Files) -> torch.dtype:
    """The dtype of the first scales in the files; a dtype that is none of scales will not fit any other either."""
    scales = [leaf for leaf, part in p.layout.PARTS.items() if part == "scales"]
    found = _first(path, experts, p.name, scales, files)
    dtype = files.stored[found].dtype if found is not None else None
    return dtype if dtype in SCALE_DTYPES else torch.float32
