"""The oracle: which kernel computes a problem on a device, and why the others do not."""

from __future__ import annotations

import dataclasses
import platform

import torch

from inductor_ext import kernels
from inductor_ext.kernels import Problem

PRIORITY: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
}
"""Kernels by device type, the one to try first first. A device without a list has the reference kernel, which runs
everywhere."""


class NoKernel(Exception):
    """No kernel, or not the one asked for, computes a problem. The message quotes every reason."""


@dataclasses.dataclass(frozen=True)
class Choice:
    kernel: str
    passed_over: dict[str, str]
    """Kernel -> why it was not chosen, for those with a higher priority."""


def choose(problem: Problem, forced: str | None = None) -> Choice:
    """The first kernel of the device's list that does not reject the problem; or the forced one, if it does not.

    Raises NoKernel with every reason. A forced kernel is never replaced by another.
    """
    candidates = (forced,) if forced is not None else PRIORITY.get(problem.device, ("reference",))
    reasons: dict[str, str] = {}
    for name in candidates:
        kernel = kernels.load(name)
        reason = kernel.usable() or kernel.reject(problem)
        if reason is None:
            return Choice(name, reasons)
        reasons[name] = reason
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise NoKernel(f"No kernel computes {problem.op} {problem} on {problem.device}: {told}")


def arch(device: torch.device) -> str:
    """The architecture of a device as problems name it: "x86_64", "sm_90", "gfx1100", ..."""
    if device.type == "cpu":
        return platform.machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            return str(properties.gcnArchName).split(":")[0]
        return f"sm_{properties.major}{properties.minor}"
    return device.type
