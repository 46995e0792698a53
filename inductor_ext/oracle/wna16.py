"""The field's oracle for WNA16, routed experts with int4 or int8 weights and 16-bit activations: its names and
signatures over the one table and the one choice (``select.py``).

    backend, kernel = select_wna16_moe_backend(config, weight_key)

What differs from the field: an explicit choice is honoured or an error, never another backend with a warning; the last
error quotes every reason; and a device can be named that is not here.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import torch

from inductor_ext import devices, kernels
from inductor_ext.devices import Device
from inductor_ext.kernels import Mlp, MoeProblem, WeightKind, table
from inductor_ext.oracle import select


class WNA16MoEBackend(enum.Enum):
    RDNA3 = "RDNA3"
    RDNA3_WMMA = "RDNA3_WMMA"
    TRITON = "TRITON"
    AITER_W4A8 = "AITER_W4A8"
    MARLIN = "MARLIN"
    BATCHED_MARLIN = "BATCHED_MARLIN"
    FLASHINFER_TRTLLM = "FLASHINFER_TRTLLM"
    XPU = "XPU"
    CPU = "CPU"
    EMULATION = "EMULATION"


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Of a layer, what a backend is selected by. The attributes are the field's, so that its ``FusedMoEConfig`` will do
    as well."""

    num_experts: int
    """Of all ranks."""
    num_local_experts: int
    experts_per_token: int
    hidden_dim: int
    intermediate_size_per_partition: int
    in_dtype: torch.dtype
    activation: Any = "silu"
    """A name among ACTIVATIONS, or an enum's member with such a value."""
    has_bias: bool = False
    moe_backend: str = "auto"
    """"auto", or a backend's name in small letters."""
    moe_parallel_config: Any = None
    """None, or something with ``use_batched_activation_format``."""


@dataclasses.dataclass(frozen=True)
class WeightKey:
    """How both projections are quantised."""

    bits: int
    """4 or 8."""
    group_size: int
    """-1: one scale a channel."""
    symmetric: bool = True
    desc_act: bool = False
    """Act-order."""
    scale_dtype: torch.dtype | None = None
    """None: the activations'."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, not {self.bits}.")
        if self.group_size < 1 and self.group_size != -1:
            raise ValueError(f"group_size must be positive, or -1 for one scale a channel; it is {self.group_size}.")


ACTIVATIONS = {
    "silu": Mlp(),
    "gelu": Mlp("gelu"),
    "gelu_tanh": Mlp("gelu_tanh"),
    "swigluoai": Mlp("swigluoai", "interleaved", limit=7.0),
    "swigluoai_uninterleave": Mlp("swigluoai", limit=7.0),
    "silu_no_mul": Mlp("silu", "none"),
    "gelu_no_mul": Mlp("gelu", "none"),
    "gelu_tanh_no_mul": Mlp("gelu_tanh", "none"),
}
"""The field's activations that ``w4a16::moe`` has, by their values."""


def get_priority_backends(device: str | Device, bits: int = 4) -> list[WNA16MoEBackend]:
    """The backends that are tried on a device, the first first. A device is a ``Device`` or the name of one."""
    found = devices.named(device) if isinstance(device, str) else device
    known = table.rows("moe")
    return list(dict.fromkeys(WNA16MoEBackend(known[name].backend) for name in table.priority("moe", found.type, bits)))


def backend_to_kernel_cls(backend: WNA16MoEBackend) -> list[kernels.MoeKernel]:
    """The kernels of a backend: modules here, classes in the field. None of them, if it has none for integers."""
    return [kernels.load_moe(row.name) for row in table.rows("moe").values() if row.backend == backend.value]


def map_wna16_backend(name: str) -> WNA16MoEBackend:
    """The backend of this name, as users write it. Raises ValueError, listing the known ones."""
    for backend in WNA16MoEBackend:
        if backend.value.lower() == name:
            return backend
    known = ", ".join(["auto", *(backend.value.lower() for backend in WNA16MoEBackend)])
    raise ValueError(f"There is no WNA16 MoE backend {name!r}; moe_backend may be {known}.")


def select_wna16_moe_backend(
    config: Any, weight_key: WeightKey, device: str | Device | None = None, elsewhere: bool = False
) -> tuple[WNA16MoEBackend, kernels.MoeKernel]:
    """The backend for a layer's experts, and its kernel.

    config: a ``MoEConfig``, or something with its attributes. device: by default the one that is here, ``elsewhere``:
    it is not here, and what is installed here does not count. Raises ValueError for an unknown backend, and
    select.NoKernel, quoting every reason, if the one asked for cannot or none is left.
    """
    problem = moe_problem(config, weight_key, device_of(device))
    backend = None if config.moe_backend == "auto" else map_wna16_backend(config.moe_backend).value
    row = select.choose_backend(problem, backend, elsewhere)
    return WNA16MoEBackend(row.backend), kernels.load_moe(row.name)


def moe_problem(config: Any, weight_key: WeightKey, device: Device) -> MoeProblem:
    """The problem that such a layer is. Raises ValueError for an activation that w4a16::moe does not have."""
    name = str(getattr(config.activation, "value", config.activation))
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {name!r}.")
    H, I = config.hidden_dim, config.intermediate_size_per_partition  # noqa: E741

    def kind(K: int) -> WeightKind:
        group = K if weight_key.group_size == -1 else weight_key.group_size
        zeros = "none" if weight_key.symmetric else "int"
        return WeightKind(
            weight_key.scale_dtype or config.in_dtype, group, zeros, f"int{weight_key.bits}", weight_key.desc_act
        )

    parallel = config.moe_parallel_config
    return MoeProblem(
        device=device.type,
        arch=device.arch,
        dtype=config.in_dtype,
        E=config.num_local_experts,
        top_k=config.experts_per_token,
        H=H,
        I=I,
        w13=kind(H),
        w2=kind(I),
        mlp=ACTIVATIONS[name],
        bias=config.has_bias,
        expert_map=config.num_local_experts != config.num_experts,
        batched=parallel is not None and bool(parallel.use_batched_activation_format),
    )


def device_of(device: str | Device | None) -> Device:
    """A device, or the one of this name, or the one that is here."""
    if isinstance(device, str):
        return devices.named(device)
    return devices.here() if device is None else device
