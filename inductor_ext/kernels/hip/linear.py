"""The HIP kernels for ``w4a16::linear`` on RDNA.

    qweight  int32 [K/8, Np]: codes 2 p and 2 p + 1 of 8 neighbours along K in bits 4 p and 16 + 4 p
    scales   [K/G, Np], in the activations' dtype
    zeros    uint8 [K/G, Np], 0..16
    order    int32 [K]: stored k is the weight's column order[k] (the inverse of the canonical form's)

Np is N filled up to a multiple of 8, with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_ext.bits import reorder_
from inductor_ext.formats import EXLLAMA, SEQUENTIAL, PackedInt4
from inductor_ext.kernels import Expected, Layout, Packed, Problem
from inductor_ext.kernels.hip import dense, dot, objects, runtime, wmma

NAME = "hip"

_FLOATS = (torch.float16, torch.bfloat16)

usable = runtime.why_unusable


def reject(problem: Problem) -> str | None:
    if problem.op != "linear":
        return f"The kernel computes linear, not {problem.op}."
    if problem.device != "cuda" or not problem.arch.startswith("gfx"):
        return f"The kernel runs on AMD GPUs, not on {problem.device} ({problem.arch})."
    if (reason := objects.why_not_for(problem.arch)) is not None:
        return reason
    if problem.dtype not in _FLOATS:
        return f"The activations must be float16 or bfloat16, not {problem.dtype}."
    if problem.scale_dtype != problem.dtype:
        return f"The scales must have the activations' dtype, {problem.dtype}, not {problem.scale_dtype}."
    if problem.zeros == "float":
        return "The zeros must be integers, not floats."
    return why_not(problem.N, problem.K, problem.group_size)


def why_not(N: int, K: int, group_size: int) -> str | None:
    if N >= dot.MOST_COLUMNS:
        return f"N must be less than {dot.MOST_COLUMNS}, it is {N}."
    if group_size % dot.STEP != 0 or K % group_size != 0:
        return f"The group size must be a multiple of {dot.STEP} that divides K={K}; it is {group_size}."
    return None


def pack(weight: PackedInt4) -> Packed:
    return Packed(
        reorder_(_by_group(weight.codes), SEQUENTIAL, EXLLAMA),
        _by_group(weight.scales),
        None if weight.zeros is None else _by_group(weight.zeros),
        None if weight.order is None else weight.order.argsort().int(),
    )


def unpack(packed: Packed, N: int, K: int, group_size: int) -> PackedInt4:
    codes = packed.qweight[:, :N].t().clone(memory_format=torch.contiguous_format)
    return PackedInt4(
        reorder_(codes, EXLLAMA, SEQUENTIAL),
        packed.scales[:, :N].t().contiguous(),
        None if packed.zeros is None else packed.zeros[:, :N].t().contiguous(),
        None if packed.order is None else packed.order.argsort().int(),
    )


def layout(packed: Packed, N: int, K: int, group_size: int) -> Layout:
    if (reason := why_not(N, K, group_size)) is not None:
        raise ValueError(reason)
    groups = (K // group_size, _filled(N))
    return Layout(
        Expected((K // 8, _filled(N)), (torch.int32,)),
        Expected(groups, _FLOATS),
        Expected(groups, (torch.uint8,)),
        Expected((K,), (torch.int32,)),
    )


def run(x: Tensor, packed: Packed, bias: Tensor | None, N: int, group_size: int) -> Tensor:
    if x.dtype != packed.scales.dtype:
        raise RuntimeError(f"The HIP kernel takes x in the scales' dtype, {packed.scales.dtype}, not {x.dtype}.")
    if packed.order is not None:
        x = x.index_select(1, packed.order)
    out = torch.empty(x.shape[0], N, dtype=x.dtype, device=x.device)
    kind = dot.Zeros.EIGHT if packed.zeros is None else dot.Zeros.BYTES
    many = x.shape[0] > 8 and runtime.arch(x.device).startswith("gfx11")
    if many and x.nbytes >= dot.MOST_BYTES:
        raise RuntimeError(f"x {list(x.shape)} must have less than 4 GiB; split its rows.")
    gemm = wmma.gemm if many else dense.gemm
    gemm(x, packed.qweight, packed.scales, packed.zeros, kind, bias, out)
    return out


def _filled(N: int) -> int:
    return -(-N // 8) * 8


def _by_group(values: Tensor) -> Tensor:
    """A new [groups, Np] of [N, groups]."""
    N, groups = values.shape
    filled = values.new_zeros(groups, _filled(N))
    filled[:, :N] = values.t()
    return filled
