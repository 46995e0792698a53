"""Marlin for ``w4a16::linear`` on NVIDIA GPUs.

    qweight  int32 [K/16, 2 N], scales [K/G, N], zeros int32 [K/G, N/8]: as in ``layouts/marlin.py``, of one expert
    order    int32 [K]: which of x's columns belongs to each stored column. They are brought into that order before

Integer zeros must be codes, 0..15: packing refuses 16, which some checkpoints of GPTQ have.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from inductor_ext.formats import PackedInt
from inductor_ext.kernels import Expected, Layout, Packed, Problem
from inductor_ext.kernels.external import marlin_ops
from inductor_ext.kernels.gpu.workspace import counters
from inductor_ext.layouts import Experts, marlin
from inductor_ext.layouts.experts import parted

NAME = "marlin"

_FLOATS = (torch.float16, torch.bfloat16)
_N, _K = 64, 128
"""What N and K must be multiples of."""


def usable() -> str | None:
    return why_unusable(marlin_ops.DENSE)


def why_unusable(sources: tuple[marlin_ops.Source, ...]) -> str | None:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "There is no NVIDIA GPU that torch can use."
    for dtype in _FLOATS:
        if isinstance(op := marlin_ops.found(sources, dtype), str):
            return op
    return None


def reject(problem: Problem) -> str | None:
    if problem.op != "linear":
        return f"The kernel computes linear, not {problem.op}."
    if (reason := why_not_on(problem.device, problem.arch, problem.dtype)) is not None:
        return reason
    if (reason := why_not_scaled(problem.scale_dtype, problem.dtype, problem.zeros)) is not None:
        return reason
    return why_not(problem.N, problem.K, problem.group_size)


def why_not_on(device: str, arch: str, dtype: torch.dtype) -> str | None:
    if device != "cuda" or not arch.startswith("sm_"):
        return f"The kernel runs on NVIDIA GPUs, not on {device} ({arch})."
    if int(arch[3:]) < 80:
        return f"The kernel needs sm_80 or newer; this is {arch}."
    if dtype not in _FLOATS:
        return f"The activations must be float16 or bfloat16, not {dtype}."
    return None


def why_not_scaled(scale_dtype: torch.dtype, dtype: torch.dtype, zeros: str) -> str | None:
    if scale_dtype != dtype:
        return f"The scales must have the activations' dtype, {dtype}, not {scale_dtype}."
    return "The zeros must be integers, not floats." if zeros == "float" else None


def why_not(N: int, K: int, group_size: int) -> str | None:
    if N % _N != 0 or K % _K != 0:
        return f"N must be a multiple of {_N} and K of {_K}; they are {N} and {K}."
    return why_not_grouped(K, group_size)


def why_not_grouped(K: int, group_size: int) -> str | None:
    if K % group_size != 0 or group_size not in (*marlin.GROUPS, K):
        return f"The group size must be {', '.join(map(str, marlin.GROUPS))} or K={K}, not {group_size}."
    return None


def pack(weight: PackedInt) -> Packed:
    qweight, scales, zeros, _ = packed_experts(parted(dataclasses.replace(weight, order=None), 1))
    order = None if weight.order is None else weight.order.argsort().int()
    return Packed(qweight[0], scales[0], None if zeros is None else zeros[0], order)


def unpack(packed: Packed, N: int, K: int, group_size: int) -> PackedInt:
    zeros = None if packed.zeros is None else packed.zeros[None]
    one = unpacked_experts(Packed(packed.qweight[None], packed.scales[None], zeros, None)).expert(0)
    return dataclasses.replace(one, order=None if packed.order is None else packed.order.argsort().int())


def packed_experts(weight: Experts) -> Packed:
    p = marlin.pack(weight)
    return Packed(p.qweight, p.scales, p.zeros, None)


def unpacked_experts(packed: Packed) -> Experts:
    none = packed.qweight.new_empty(packed.qweight.shape[0], 0)
    return marlin.unpack(marlin.Marlin(packed.qweight, packed.scales, packed.zeros, none, none, None))


def layout(packed: Packed, N: int, K: int, group_size: int) -> Layout:
    if (reason := why_not(N, K, group_size)) is not None:
        raise ValueError(reason)
    return tensors(N, K, group_size)


def tensors(N: int, K: int, group_size: int) -> Layout:
    groups = K // group_size
    return Layout(
        Expected((K // 16, 2 * N), (torch.int32,)),
        Expected((groups, N), _FLOATS),
        Expected((groups, N // 8), (torch.int32,)),
        Expected((K,), (torch.int32,)),
    )


def run(x: Tensor, packed: Packed, bias: Tensor | None, N: int, group_size: int) -> Tensor:
    require(x, packed)
    if packed.order is not None:
        x = x.index_select(1, packed.order)
    M, K = x.shape
    if M == 0:
        return x.new_empty(0, N)
    given = {
        "a": x, "c": None, "b_q_weight": packed.qweight, "b_bias": permuted(bias), "b_scales": packed.scales,
        "b_zeros": packed.zeros, "workspace": workspace(x.device),
        "type": marlin_ops.scalar_type(packed.zeros is not None), "size_m": M, "size_n": N, "size_k": K,
    }  # fmt: skip
    return marlin_ops.call(marlin_ops.DENSE, given)


def require(x: Tensor, *weights: Packed) -> None:
    """An op may be called with the kernel's name by hand, too. Raises RuntimeError."""
    if x.dtype not in _FLOATS or any(packed.scales.dtype != x.dtype for packed in weights):
        dtypes = ", ".join(str(packed.scales.dtype) for packed in weights)
        raise RuntimeError(
            f"Marlin takes float16 or bfloat16, and scales of x's dtype; x is {x.dtype}, scales {dtypes}."
        )


def permuted(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else marlin.by_result(bias)


def workspace(device: torch.device) -> Tensor:
    """Locks, zero before and after: four for each SM, and at least 128."""
    return counters(max(128, 4 * _processors(device)), device)


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
