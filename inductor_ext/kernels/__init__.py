"""Kernels by name. A kernel is a module: what it rejects and why, its layout, packing, launch (see ``Kernel``)."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from inductor_ext.formats import PackedInt4


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a kernel is asked to compute, as plain data: a kernel is chosen from this alone, so any device can be
    simulated."""

    op: str
    """"linear"."""
    device: str
    """The torch device type: "cpu", "cuda" (NVIDIA and AMD), ..."""
    arch: str
    """"x86_64", "aarch64", "sm_90", "gfx1100", ..."""
    dtype: torch.dtype
    """Of the activations and the result."""
    scale_dtype: torch.dtype
    N: int
    K: int
    group_size: int
    zeros: str
    """"none" (constant 8), "int" or "float"."""
    order: bool
    """Act-order: columns are stored permuted."""
    bias: bool

    def __str__(self) -> str:
        extras = [f"{self.zeros} zeros"] if self.zeros != "none" else ["symmetric"]
        extras += ["act-order"] if self.order else []
        extras += ["bias"] if self.bias else []
        return (
            f"N={self.N} K={self.K} G={self.group_size} {str(self.dtype).removeprefix('torch.')}, {', '.join(extras)}"
        )


class Packed(NamedTuple):
    """A weight in a kernel's own layout: the tensor arguments of ``w4a16::linear`` after x."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None


class Kernel(Protocol):
    """The functions that a kernel module has."""

    NAME: str

    def usable(self) -> str | None:
        """Why this process cannot run the kernel at all (not built, no device), or None."""

    def reject(self, problem: Problem) -> str | None:
        """Why the kernel cannot compute this problem, as a sentence; None if it can."""

    def pack(self, canonical: PackedInt4) -> Packed:
        """The kernel's layout of a weight. Tensors that need no change are passed through, not copied."""

    def unpack(self, packed: Packed) -> PackedInt4:
        """The inverse of pack, without loss."""

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, group_size: int) -> Tensor:
        """x [M, K] contiguous -> [M, N] in x's dtype, accumulated in float32 and rounded once."""


KERNELS = {"cpu": "inductor_ext.kernels.cpu", "reference": "inductor_ext.kernels.reference"}
"""Every kernel, in no order: the oracle's priority lists say which is tried first on which device."""


@functools.cache
def load(name: str) -> Kernel:
    """The kernel module of this name. Raises ValueError, naming the known ones, for any other name."""
    if name not in KERNELS:
        raise ValueError(f"There is no kernel {name!r}; the kernels are {', '.join(sorted(KERNELS))}.")
    return cast(Kernel, importlib.import_module(KERNELS[name]))
