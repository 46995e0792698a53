"""The CPU kernel: C++ (csrc/cpu) that reads the canonical layout as it is and never makes a dense weight.

The library `_cpu*.so` beside the package is loaded at first use. It holds code for several instruction sets and takes
the best one that the machine has.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from inductor_ext.formats import PackedInt4
from inductor_ext.kernels import Packed, Problem, canonical
from inductor_ext.kernels.pages import in_huge_pages

NAME = "cpu"

_PACKAGE = Path(__file__).resolve().parent.parent
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def usable() -> str | None:
    """Loads the library, once a process."""
    found = sorted(_PACKAGE.glob("_cpu*.so"))
    if not found:
        return "The compiled library inductor_ext/_cpu*.so is missing; install the package with a C++ compiler at hand."
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"The compiled library {found[0].name} cannot be loaded: {error}."
    # For graphs that call these ops themselves, which are made by our passes alone (see direct.py).
    for name in ("linear", "linear_mxfp4"):
        torch.library.register_fake(
            f"w4a16_cpu::{name}", lambda x, codes, *rest: x.new_empty(*x.shape[:-1], codes.shape[0])
        )
    for name in ("moe", "moe_mxfp4"):
        torch.library.register_fake(f"w4a16_cpu::{name}", lambda x, *rest: x.new_empty(x.shape))
    torch.library.register_fake("w4a16_cpu::rearrange", lambda source, out, steps: None)
    return None


def reject(problem: Problem) -> str | None:
    if problem.op != "linear":
        return f"The kernel computes linear, not {problem.op}."
    if problem.device != "cpu":
        return f"The kernel runs on the CPU, not on {problem.device}."
    for role, dtype in (("activations", problem.dtype), ("scales", problem.scale_dtype)):
        if dtype not in _FLOATS:
            return f"The {role} must be bfloat16, float16 or float32, not {dtype}."
    if problem.group_size % 8 != 0:
        return f"The group size must be a multiple of 8, not {problem.group_size}."
    return None


unpack, layout = canonical.unpack, canonical.layout


def pack(weight: PackedInt4) -> Packed:
    in_huge_pages(weight.codes)
    return canonical.pack(weight)


def run(x: Tensor, packed: Packed, bias: Tensor | None, N: int, group_size: int) -> Tensor:
    if (reason := usable()) is not None:
        raise RuntimeError(reason)
    if packed.order is not None:
        # Added, not copied: an order that is no permutation then means what PackedInt4 says, with no column unset.
        x = torch.zeros_like(x).scatter_add_(1, packed.order.long().expand_as(x), x)
    y: Tensor = torch.ops.w4a16_cpu.linear(x, packed.qweight, packed.scales, packed.zeros, bias, group_size)
    return y
