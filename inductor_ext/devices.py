"""Devices as the oracle sees them: a type and an architecture. Any can be named, whether it is here or not."""

from __future__ import annotations

import dataclasses
import platform

import torch


@dataclasses.dataclass(frozen=True)
class Device:
    type: str
    """The torch device type: "cpu", "cuda" (NVIDIA and AMD), "xpu", ..."""
    arch: str
    """"x86_64", "aarch64", "sm_90", "gfx1100", ..."""

    def __str__(self) -> str:
        return self.arch if self.type in ("cpu", "cuda") else self.type


def of(device: torch.device) -> Device:
    """The device that is here."""
    return Device(device.type, _arch(device))


def here() -> Device:
    """The accelerator that torch would take, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return of(torch.device("cpu") if found is None else found)


def _arch(device: torch.device) -> str:
    if device.type == "cpu":
        return platform.machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            return str(properties.gcnArchName).split(":")[0]
        return f"sm_{properties.major}{properties.minor}"
    return device.type


_ARCHS = {
    "cpu": ("x86_64", "aarch64"),
    "cuda": (
        *("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"),
        *("gfx90a", "gfx942", "gfx950"),
        *("gfx1030", "gfx1100", "gfx1101", "gfx1102", "gfx1103", "gfx1150", "gfx1151", "gfx1200", "gfx1201"),
    ),
    "xpu": ("xpu",),
}
_PRODUCTS = {
    "t4": "sm_75",
    "a100": "sm_80",
    "rtx3090": "sm_86",
    "rtx4090": "sm_89",
    "h100": "sm_90",
    "h200": "sm_90",
    "b200": "sm_100",
    "rtx5090": "sm_120",
    "mi210": "gfx90a",
    "mi250x": "gfx90a",
    "mi300x": "gfx942",
    "mi325x": "gfx942",
    "mi350x": "gfx950",
    "mi355x": "gfx950",
    "rx7900xtx": "gfx1100",
    "rx7900xt": "gfx1100",
    "w7900": "gfx1100",
    "rx7800xt": "gfx1101",
    "rx7600": "gfx1102",
    "780m": "gfx1103",
    "890m": "gfx1150",
    "8060s": "gfx1151",
    "strixhalo": "gfx1151",
    "rx9060xt": "gfx1200",
    "rx9070xt": "gfx1201",
    "r9700": "gfx1201",
}
KNOWN = {arch: Device(kind, arch) for kind, archs in _ARCHS.items() for arch in archs}
KNOWN |= {product: KNOWN[arch] for product, arch in _PRODUCTS.items()} | {"cpu": Device("cpu", platform.machine())}
"""By arch and by product, in small letters without spaces."""


def named(name: str) -> Device:
    """The device of this arch or product name. Raises ValueError, listing the known ones."""
    key = name.lower().replace(" ", "").replace("-", "")
    if key not in KNOWN:
        raise ValueError(f"There is no device {name!r}; those known by name are {', '.join(KNOWN)}.")
    return KNOWN[key]
