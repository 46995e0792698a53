"""The GPU that the Triton kernels run on: whether there is one, what it is, and what may be given to them there."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from inductor_ext import devices
from inductor_ext.kernels.gpu import tuning

FLOATS = (torch.float16, torch.bfloat16)
"""Of activations."""


@functools.cache
def usable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "The package triton is not installed."
    if not torch.cuda.is_available():
        return "There is no GPU that torch can use."
    return None


def require(x: Tensor) -> None:
    """The oracle chooses these kernels where they can run; an op may be called with their name by hand, too. Raises
    RuntimeError."""
    if x.dtype not in FLOATS:
        raise RuntimeError(f"The Triton kernels take float16 or bfloat16 activations; x is {_short(x.dtype)}.")
    if os.environ.get("TRITON_INTERPRET") == "1":
        if x.dtype == torch.bfloat16:
            raise RuntimeError("Triton's interpreter computes wrong bfloat16 products; x must be float16 there.")
    elif not x.is_cuda:
        raise RuntimeError(f"The Triton kernels run on NVIDIA and AMD GPUs; x is on {x.device}.")
    elif (reason := tuning.why_not_on(arch_of(x.device))) is not None:
        raise RuntimeError(reason)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def arch_of(device: torch.device) -> str:
    return devices.of(device).arch


@functools.cache
def processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
