"""The report of a model without compiling it."""

from __future__ import annotations

from typing import Any

from torch import nn

from inductor_ext import devices
from inductor_ext.backend import explaining
from inductor_ext.report import Report


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """What ``torch.compile(model, backend="w4a16")`` would rewrite when called with these inputs. Nothing is compiled
    by Inductor.

    ``model`` may also be a plain function. The model is run once, eagerly, graph by graph, so it may have side effects
    (a cache filled).
    """
    return explaining(model, args, kwargs)


def explain_for(device: str, model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """As ``explain``, with the kernels that would be chosen on a device that need not be here: "gfx1151", "mi300x",
    "sm_90", ... (``inductor_ext.devices.KNOWN``). What is installed here does not count.

    Raises ValueError for an unknown device.
    """
    return explaining(model, args, kwargs, devices.named(device))
