"""`inductor_ext.from_pretrained`: a transformers model from a W4A16 checkpoint, its 4-bit weights left packed.

config.json -> plan (config.py) -> model without weights -> packed layers (modules.py) and experts (moe.py,
stored_experts.py, mxfp4.py, experts.py) -> tensor by tensor (stream.py)
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

if TYPE_CHECKING:
    from inductor_ext.loader.config import Plan
    from inductor_ext.loader.modules import PackedLinear
    from inductor_ext.loader.mxfp4 import Mxfp4Experts
    from inductor_ext.loader.names import Files
    from inductor_ext.loader.stored_experts import StoredExperts

    Packed = PackedLinear | StoredExperts | Mxfp4Experts

__all__ = ["find_folder", "from_pretrained"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def from_pretrained(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Any:
    """The transformers model of a W4A16 checkpoint, in eval mode, its quantised linear layers replaced by packed ones,
    and the routed experts of each layer by one packed module.

    path: a folder with config.json and safetensors files; or, if there is no such folder, the name of a repository on
    the Hugging Face hub, owner/name.
    dtype: of the activations and of every parameter that is not quantised: float16, bfloat16 or float32. Scales and
    packed tensors stay as they are in the files.
    device: where the model goes. progress: whether to show a bar.

    A packed layer dequantises its weight in every forward, in plain PyTorch (experts: only those that are selected);
    compile the model with backend="w4a16" to run it fused. `state_dict()` gives the files' tensors back. The
    checkpoint's quantization_config is kept as `model.checkpoint_quantization`.

    Raises ValueError for a checkpoint of another kind; CheckpointError (a ValueError) that lists every tensor which is
    missing, surplus, misshapen or of a wrong dtype; FileNotFoundError for a path without a checkpoint; ImportError
    without transformers.
    """
    folder = find_folder(path)
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from inductor_ext.loader.config import read_plan
    from inductor_ext.loader.names import keep_files_names, renamed
    from inductor_ext.loader.stream import CheckpointError, fill, find_misfits, find_shards, find_slots, survey

    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; it must be one of {', '.join(map(str, DTYPES))}.")
    config = AutoConfig.from_pretrained(folder)
    quantization = getattr(config, "quantization_config", None)
    plan = read_plan(quantization)
    del config.quantization_config  # else transformers takes the model for one of its own quantised ones
    shards = survey(find_shards(folder))

    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    packed = _pack_layers(model, plan, files := renamed(shards, model))
    slots = find_slots(model, _always_in_float32(model, dtype))
    faults = find_misfits(slots, files.stored, _ignorable(model))
    if not faults:
        fill(slots, files.stored, torch.device(device), progress)
        faults = [f"values: {layer} {fault}" for layer, module in packed.items() for fault in module.faults()]
    if faults:
        listed = "".join(f"\n  {line}" for line in faults)
        raise CheckpointError(
            f"{folder}: the tensors in the files do not fit {type(model).__name__} as config.json describes it."
            f" Both must come from the same export, complete.{listed}"
        )
    keep_files_names(model, files)
    model.to(device)  # what is left: buffers that no file holds
    model.checkpoint_quantization = quantization
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(
            f"from_pretrained needs {' and '.join(missing)}, not installed here: pip install inductor-ext[transformers]"
        )


def find_folder(path: str | Path) -> Path:
    """The folder of a checkpoint, downloaded from the hub if `path` is owner/name and no folder.

    Raises FileNotFoundError for a path without a checkpoint, and what huggingface_hub raises (OSError) for a download
    that fails.
    """
    _require("transformers", "safetensors")
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{folder} is not a checkpoint: it holds no config.json.")
    if isinstance(path, Path) or len(folder.parts) != 2 or path.startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no folder {folder}, and a repository on the hub is named owner/name.")
    # Folders within hold the same weights in other formats, which nobody reads: gpt-oss's "original".
    given = {"allow_patterns": list(HUB_FILES), "ignore_patterns": ["*/*"]}
    return Path(import_module("huggingface_hub").snapshot_download(path, **given))


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, this thread's modules get their parameters on the meta device, but their buffers for real.

    With everything on meta, as under torch.device("meta"), the buffers that no file holds (rotary frequencies,
    embedding scales) would have to be computed again, by rules that each model has for itself.
    """
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None  # as it was: a parameter that is shared stays shared
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def _pack_layers(model: nn.Module, plan: Plan, files: Files) -> dict[str, Packed]:
    """Replaces the linear layers that the plan names, and the experts, and returns the new modules by path."""
    from inductor_ext.loader.modules import LAYERS

    packed: dict[str, Packed] = dict(_packed_experts(model, plan, files))
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            scheme = files.scheme(plan, path, {cls.__name__ for cls in type(module).__mro__})
            if scheme is not None:
                try:
                    packed[path] = LAYERS[scheme.format](module, scheme)
                except ValueError as error:
                    raise ValueError(f"Layer {path} cannot be stored as {scheme.format}: {error}.") from error
    if not packed:
        raise ValueError("By config.json and the names in the files, none of the model's linear layers is quantised.")
    for path, layer in packed.items():
        model.set_submodule(path, layer)
    return packed


def _packed_experts(model: nn.Module, plan: Plan, files: Files) -> dict[str, StoredExperts | Mxfp4Experts]:
    from inductor_ext.loader.config import SUPPORTED
    from inductor_ext.loader.moe import NotPackable, find_experts, pack_experts

    packed, found = {}, find_experts(model)
    for path, module in found.items():
        try:
            experts = pack_experts(path, module, plan, files)
        except NotPackable as reason:
            kind = type(model).__name__
            raise ValueError(f"{kind} is a mixture of experts ({path}), {reason}. {SUPPORTED}") from reason
        if experts is not None:
            packed[path] = experts
    others = [name for name, _ in model.named_parameters() if ".experts." in name]
    others = [name for name in others if not name.startswith(tuple(f"{path}." for path in found))]
    if others:
        raise ValueError(
            f"{type(model).__name__} is a mixture of experts of an unknown kind ({others[0]}). {SUPPORTED}"
        )
    return packed


def _always_in_float32(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Patterns of tensors that the model's class wants in float32 in a model of this dtype: biases of routers."""
    names = {torch.float16: ("", "_strict"), torch.bfloat16: ("_strict",), torch.float32: ()}[dtype]
    return [pattern for name in names for pattern in getattr(model, f"_keep_in_fp32_modules{name}", None) or ()]


def _ignorable(model: nn.Module) -> list[str]:
    """Patterns of stored tensors that no model needs: what its class says, and rotary frequencies (old checkpoints)."""
    return [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq$"]
