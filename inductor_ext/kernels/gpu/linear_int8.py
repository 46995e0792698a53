"""The Triton kernel for ``w4a16::linear`` with int8 weights. It reads the canonical form as it is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from inductor_ext.kernels import Layout, Packed, Problem, canonical
from inductor_ext.kernels.gpu import runtime, tuning

NAME = "triton_int8"


usable = runtime.usable


def reject(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return f"The kernel runs on NVIDIA and AMD GPUs, not on {problem.device}."
    if (reason := tuning.why_not_on(problem.arch)) is not None:
        return reason
    if problem.dtype not in runtime.FLOATS:
        return f"The activations must be float16 or bfloat16, not {problem.dtype}."
    return why_not(problem.K, problem.group_size, problem.zeros)


def why_not(K: int, group_size: int, zeros: str) -> str | None:
    if zeros == "float":
        return "The zeros must be integers, not floats."
    if group_size % 32 != 0 or K % group_size != 0:
        return f"The group size must be a multiple of 32 that divides K={K}, not {group_size}."
    return None


pack, unpack = canonical.pack, canonical.unpack


def layout(packed: Packed, N: int, K: int, group_size: int) -> Layout:
    float_zeros = packed.zeros is not None and packed.zeros.is_floating_point()
    if (reason := why_not(K, group_size, "float" if float_zeros else "int")) is not None:
        raise ValueError(reason)
    return canonical.layout_int8(packed, N, K, group_size)


def run(x: Tensor, packed: Packed, bias: Tensor | None, N: int, group_size: int) -> Tensor:
    runtime.require(x)
    if packed.order is not None:
        x = torch.zeros_like(x).index_copy_(1, packed.order.long(), x)
    out = torch.empty(x.shape[0], N, dtype=x.dtype, device=x.device)
    if x.shape[0] > 0:
        launch(x, packed, bias, out, group_size, height(x.shape[0]))
    return out


def height(rows: int) -> int:
    """Of a tile: rows. Not tuned; with 64 the compiler spills registers on gfx11."""
    return 16 if rows <= 16 else 32


class Routed(NamedTuple):
    """Slots of experts, whose weights are [E, N, ...]."""

    slots: Tensor
    experts: Tensor
    """As moe_align_block_size gives them."""
    per_row: int
    """How many slots share a row of x."""
    weights: Tensor | None = None
    """float32, by slot."""
    on_input: bool = False
    """The weights multiply x, not the result."""


def launch(
    x: Tensor, packed: Packed, bias: Tensor | None, out: Tensor, group_size: int, BM: int, routed: Routed | None = None
) -> None:
    """Writes out [rows, N], or the rows of out [slots, N] that a block of BM slots has."""
    from inductor_ext.kernels.gpu.int8 import int8_kernel

    (M, N), K = out.shape, x.shape[1]
    slots, experts, per_row, weights, on_input = routed or (None, None, 1, None, False)
    down = -(-M // BM) if experts is None else experts.numel()
    BN = 64
    with runtime.on_device_of(x):
        int8_kernel[(-(-N // BN), down)](
            x, packed.qweight, packed.scales, packed.zeros, bias, slots, experts, weights, out,
            M, N, K, per_row,
            G=group_size, BM=BM, BN=BN, BK=32 if group_size % 64 else 64, ON_INPUT=on_input, num_warps=4,
        )  # fmt: skip
