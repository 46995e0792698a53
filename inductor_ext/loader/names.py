"""What tensors are called in a checkpoint's files and in the model: transformers renames parts of some old models.

Mixtral's files have `block_sparse_moe` where its model has `mlp`, for one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Any

from torch import nn

from inductor_ext.loader.config import Plan, Scheme
from inductor_ext.loader.stream import CheckpointError, Stored


@dataclasses.dataclass(frozen=True)
class Files:
    """The tensors in the files by the names that the model has for them."""

    stored: Mapping[str, Stored]

    @functools.cached_property
    def _names(self) -> set[str]:
        return {tensor.name for tensor in self.stored.values()}

    @functools.cached_property
    def _moved(self) -> dict[str, str]:
        """The paths of modules that the files call otherwise, and what they call them."""
        pairs = ((name.rpartition(".")[0], tensor.name.rpartition(".")[0]) for name, tensor in self.stored.items())
        return {path: in_files for path, in_files in pairs if path != in_files}

    def scheme(self, plan: Plan, path: str, classes: Collection[str]) -> Scheme | None:
        """The plan's scheme of the layer that is at `path` in the model."""
        return plan.scheme(path, classes, self._names, self._moved.get(path))


def renamed(stored: Mapping[str, Stored], model: nn.Module) -> Files:
    """Finds the model's names. Raises CheckpointError if two tensors in the files stand for the same one."""
    mapping = import_module("transformers.conversion_mapping").get_model_conversion_mapping(model, add_legacy=False)
    kind = import_module("transformers.core_model_loading").WeightRenaming  # not those that also compute something
    renamings = [transform for transform in mapping if isinstance(transform, kind)]
    own = set(model.state_dict()) if renamings else set()
    found: dict[str, Stored] = {}
    for name, tensor in stored.items():
        to = name
        if name not in own:
            for renaming in renamings:
                to = renaming.rename_source_key(to)[0]
        if to in found:
            raise CheckpointError(f"The files hold both {found[to].name} and {name}, which stand for the same tensor.")
        found[to] = tensor
    return Files(found)


def keep_files_names(model: nn.Module, files: Files) -> None:
    """Has `state_dict()` use the files' names, and `load_state_dict()` take them, where the model's are others."""
    moved = {name: tensor.name for name, tensor in files.stored.items() if name != tensor.name}
    if moved:
        model.register_state_dict_post_hook(functools.partial(_to_files, moved))
        model.register_load_state_dict_pre_hook(functools.partial(_from_files, moved))


def _to_files(moved: Mapping[str, str], module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    items = list(state.items())
    state.clear()
    for key, value in items:
        name = key.removeprefix(prefix) if key.startswith(prefix) else ""
        state[prefix + moved[name] if name in moved else key] = value


def _from_files(moved: Mapping[str, str], module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    for name, in_files in moved.items():
        if prefix + in_files in state:
            state[prefix + name] = state.pop(prefix + in_files)
