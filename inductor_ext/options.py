"""``torch.compile(model, backend="w4a16", options=...)``: our own keys, apart from Inductor's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from inductor_ext import kernels
from inductor_ext.devices import Device

PREFIX = "w4a16."


@dataclasses.dataclass(frozen=True)
class Options:
    kernel: str | None = None
    """Use this kernel and no other; an error where it cannot."""
    strict: bool = False
    """Raise if a matmul whose weight is int4 is left alone."""
    activation: str | None = None
    """"fp8": experts with MXFP4 weights round their activations to fp8 (W4A8), by scale 1 where the model has none."""
    device: Device | None = None
    """Choose as for this device, which need not be here. For ``explain`` alone."""


def split(options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """Our options, and the rest for Inductor. Raises ValueError or TypeError for an unknown ``w4a16.`` key or a value
    of the wrong type."""
    own: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in (options or {}).items():
        (own if key.startswith(PREFIX) else rest)[key.removeprefix(PREFIX)] = value
    known = {"kernel": str, "strict": bool, "activation": str}
    for name, value in own.items():
        if name not in known:
            listed = ", ".join(PREFIX + k for k in known)
            raise ValueError(f"There is no option {PREFIX + name!r}; the options of this backend are {listed}.")
        if not isinstance(value, known[name]) and not (name in ("kernel", "activation") and value is None):
            raise TypeError(f"Option {PREFIX + name!r} is {value!r}; a {known[name].__name__} is needed.")
    if own.get("kernel") is not None:
        kernels.check_name(own["kernel"])
    if own.get("activation") not in (None, "fp8"):
        raise ValueError(f"Option {PREFIX}activation is {own['activation']!r}; it must be 'fp8' or None.")
    return Options(**own), rest


def inductor_config(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's config patches for ``mode=`` and ``options=``: made and checked by the class behind
    ``backend="inductor"``."""
    wrapper: Any = torch._TorchCompileInductorWrapper
    config: dict[str, Any] = wrapper(mode, dict(options), dynamic=None).config
    return config
