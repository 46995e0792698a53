"""From safetensors shards into a model on the meta device.

First all headers are compared with the model, then the tensors are read one by one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from inductor_ext.loader.filled import Filled
from inductor_ext.loader.modules import SCALE_DTYPES, PackedLinear

logger = logging.getLogger(__name__)

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES = FLOATS | INTEGERS
"""safetensors' names of the dtypes that may occur; another dtype is reported by its safetensors name."""


class CheckpointError(ValueError):
    """The tensors in a checkpoint's files are not those that its config.json asks for; the message lists them all."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor in a shard, as its header describes it; `name` is its name there."""

    name: str
    shard: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor of the model, still on the meta device: where it goes and what the file may hold for it.

    leaf: the name within the module; for experts that of an expert's tensor, "3.up_proj.qweight".
    """

    module: nn.Module
    leaf: str
    meta: Tensor
    dtypes: tuple[torch.dtype, ...]
    cast: torch.dtype | None  # None: kept as it is in the file

    def place(self, tensor: Tensor) -> None:
        """Puts a loaded tensor in the place of the meta tensor."""
        if isinstance(self.module, Filled):
            self.module.put(self.leaf, tensor)
            return
        if isinstance(self.meta, nn.Parameter) and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=self.meta.requires_grad)
        setattr(self.module, self.leaf, tensor)


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises FileNotFoundError if one, or all, are not there, and
    CheckpointError if it is not clear which they are."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        names = json.loads(index.read_text()).get("weight_map")
        if not isinstance(names, dict):
            raise CheckpointError(f"{index} has no weight_map, which says in which file each tensor is.")
        shards = [folder / name for name in sorted(set(names.values()))]
        if single.exists() and single not in shards:
            raise CheckpointError(
                f"{folder} holds {single.name}, and {index.name}, which names other files; remove what is out of date."
            )
        if absent := [shard.name for shard in shards if not shard.exists()]:
            raise FileNotFoundError(
                f"{index} names {', '.join(absent)}, which {folder} lacks; copy or download it again."
            )
        return shards
    if single.exists():
        return [single]
    raise FileNotFoundError(
        f"{folder} holds neither model.safetensors nor {index.name}; no other format can be loaded."
    )


def survey(shards: Iterable[Path]) -> dict[str, Stored]:
    """Every tensor in the files, from their headers alone. Raises CheckpointError if two files hold the same name."""
    found: dict[str, Stored] = {}
    for path in shards:
        with _open(path) as shard:
            for name in shard.offset_keys():
                if name in found:
                    raise CheckpointError(f"{found[name].shard} and {path} both hold {name}; remove the wrong one.")
                view = shard.get_slice(name)
                shape, dtype = tuple(view.get_shape()), DTYPES.get(view.get_dtype(), view.get_dtype())
                nbytes = torch.Size(shape).numel() * (dtype.itemsize if isinstance(dtype, torch.dtype) else 1)
                found[name] = Stored(name, path, shape, dtype, nbytes)
    return found


def find_slots(model: nn.Module, in_float32: Iterable[str] = ()) -> dict[str, Slot]:
    """A slot for every name in the model's state dict.

    in_float32: patterns of names of tensors that are float32 whatever dtype the model has; "*" stands for anything.
    """
    always = [re.compile(pattern.replace("*", ".*")) for pattern in in_float32]
    slots = {}
    experts = {path: module for path, module in model.named_modules() if isinstance(module, Filled)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, *of_expert = name.rsplit(".", 3)
        if path in experts:
            bias = of_expert[-1] == "bias"  # as of any layer, in the model's dtype
            dtypes, cast = (tuple(FLOATS.values()), tensor.dtype) if bias else ((tensor.dtype,), None)
            slots[name] = Slot(experts[path], ".".join(of_expert), tensor, dtypes, cast)
            continue
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if not tensor.is_floating_point():
            slots[name] = Slot(module, leaf, tensor, (tensor.dtype,), None)
        elif isinstance(module, PackedLinear) and leaf in module._buffers:
            slots[name] = Slot(module, leaf, tensor, SCALE_DTYPES, None)
        else:
            cast = torch.float32 if any(pattern.search(name) for pattern in always) else tensor.dtype
            slots[name] = Slot(module, leaf, tensor, tuple(FLOATS.values()), cast)
    return slots


def find_misfits(slots: Mapping[str, Slot], stored: Mapping[str, Stored], ignored: Iterable[str]) -> list[str]:
    """A line for every tensor that is missing, surplus, misshapen or of a wrong dtype.

    ignored: regular expressions; a surplus tensor in whose name one of them is found is no error.
    """
    lines = []
    for names in _tied(slots):
        if not any(name in stored for name in names):
            slot = slots[names[0]]
            lines.append(f"missing: {' or '.join(names)}, {_dtypes(slot)} {list(slot.meta.shape)}")
    for name, found in stored.items():
        if name in slots:
            slot = slots[name]
            if found.shape != tuple(slot.meta.shape):
                lines.append(f"shape: {found.name} is {list(found.shape)}, the model needs {list(slot.meta.shape)}")
            if found.dtype not in slot.dtypes:
                lines.append(f"dtype: {found.name} is {_name(found.dtype)}, the model needs {_dtypes(slot)}")
        elif not any(re.search(pattern, found.name) for pattern in ignored):
            lines.append(f"surplus: {found.name}, {_name(found.dtype)} {list(found.shape)}")
    return lines


def fill(slots: Mapping[str, Slot], stored: Mapping[str, Stored], device: torch.device, progress: bool) -> None:
    """Reads every tensor that has a slot, one at a time, in the order of the files; then shares the tied ones."""
    by_shard: dict[Path, list[str]] = defaultdict(list)
    for name in stored:
        if name in slots:
            by_shard[stored[name].shard].append(name)
    total = sum(stored[name].nbytes for names in by_shard.values() for name in names)
    with tqdm(total=total, desc="Loading", unit="B", unit_scale=True, disable=not progress) as bar:
        for path, names in by_shard.items():
            with _open(path) as shard:
                for name in names:
                    slot = slots[name]
                    slot.place(shard.get_tensor(stored[name].name).to(device=device, dtype=slot.cast))
                    bar.update(stored[name].nbytes)
    for names in _tied(slots):
        if len(names) > 1:
            held = [name for name in names if name in stored]
            _share([slots[name] for name in held], [slots[name] for name in names if name not in held])
    for module in {slot.module for slot in slots.values()}:
        if isinstance(module, Filled):
            module.settle()


def _share(loaded: list[Slot], absent: list[Slot]) -> None:
    first = getattr(loaded[0].module, loaded[0].leaf)
    for slot in loaded[1:]:
        if torch.equal(first, getattr(slot.module, slot.leaf)):
            slot.place(first)
        else:
            logger.warning(
                "The config ties several tensors (%s) that differ in the files; they are left apart.", slot.leaf
            )
    for slot in absent:
        slot.place(first)


def _tied(slots: Mapping[str, Slot]) -> list[list[str]]:
    """The names, by the parameter they stand for: most lists have one."""
    names = defaultdict(list)
    for name, slot in slots.items():
        names[id(slot.meta)].append(name)
    return list(names.values())


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        # "pread" reads a tensor into memory of its own; the pages of a mapped file stay resident until it is closed.
        with safe_open(path, framework="pt", device="cpu", backend="pread") as shard:
            yield shard
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy or download it again.") from error


def _dtypes(slot: Slot) -> str:
    return " or ".join(_name(dtype) for dtype in slot.dtypes)


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
