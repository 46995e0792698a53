"""Whether an AMD GPU runs our code objects at all: one small kernel, for `doctor`."""

from __future__ import annotations

import ctypes

import torch

from inductor_ext.kernels.hip import runtime


class ProbeArgs(ctypes.Structure):
    """As csrc/hip/probe.hip has it: n floats, multiplied."""

    _fields_ = (("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("n", ctypes.c_int64), ("by", ctypes.c_float))


def why_not(device: torch.device) -> str | None:
    """What is wrong with a launch on this device, as a sentence; None if its result is right."""
    x = torch.arange(1000, dtype=torch.float32, device=device)
    y = torch.zeros_like(x)
    try:
        runtime.launch(device, "probe", ProbeArgs(x.data_ptr(), y.data_ptr(), x.numel(), 3), (4, 1, 1), 256)
        right = torch.equal(y, 3 * x)
    except RuntimeError as error:
        return str(error)
    return None if right else "A kernel ran and its result is wrong."
