"""vllm_xpu_kernels' experts for ``w4a16::moe`` on Intel GPUs.

    qweight  uint8 [E, N, K/2]: as in ``layouts/xpu.py``, but signed nibbles
    scales   [E, N, K/G]

The callee makes codes signed itself, in place, at its first call with a tensor, which it then marks. A packed weight
that changes under a reader is no good here (its gradient, ``state_dict``, another graph), so ours are signed when they
are packed, and marked before every call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inductor_ext.formats import CODE_BOOKS, PackedInt
from inductor_ext.kernels import Expected, Layout, Mlp, MoeProblem, Packed, Routing
from inductor_ext.kernels.rows import rows
from inductor_ext.layouts import xpu
from inductor_ext.layouts.experts import parted

NAME = "xpu"
CHECKS_WEIGHTS = False

_FLOATS = (torch.float16, torch.bfloat16)
_MARK = "xpu_fused_moe"
_SIGNS = CODE_BOOKS["two's complement"][0] * 0x11
"""A code differs from its signed nibble in these bits of a byte."""
_BACKEND = "VLLM_XPU_GROUPED_GEMM_BACKEND"
_ACTIVATIONS = {("silu", "halves"): "silu", ("gelu", "halves"): "gelu", ("swigluoai", "interleaved"): "swigluoai"}
_NEEDED = {
    "hidden_states", "w13", "w13_scales", "w13_bias", "w2", "w2_scales", "w2_bias", "topk_weights", "topk_ids",
    "n_experts_per_token", "activation", "num_experts", "expert_map", "is_int4",
}  # fmt: skip


@functools.cache
def usable() -> str | None:
    if not torch.xpu.is_available():
        return "There is no Intel GPU that torch can use."
    op = _op()
    return op if isinstance(op, str) else None


def _op() -> Callable[..., Any] | str:
    """The op, or why there is none that is understood."""
    if importlib.util.find_spec("vllm_xpu_kernels") is None:
        return "vllm_xpu_kernels is not installed."
    if os.environ.get(_BACKEND, "").strip().lower() == "onednn":
        return f"{_BACKEND} is onednn, which takes codes that are not signed."
    module = importlib.import_module("vllm_xpu_kernels.fused_moe_interface")
    op: Callable[..., Any] | None = getattr(module, "xpu_fused_moe", None)
    if op is None:
        return "vllm_xpu_kernels.fused_moe_interface has no xpu_fused_moe."
    parameters = inspect.signature(op).parameters
    missing = _NEEDED - set(parameters)
    wanted = {name for name, p in parameters.items() if p.default is p.empty} - _NEEDED
    if missing or wanted:
        return f"xpu_fused_moe has other arguments than are known here: {', '.join(sorted(missing | wanted))}."
    return op


def reject(problem: MoeProblem) -> str | None:
    if problem.op != "moe":
        return f"The kernel computes moe, not {problem.op}."
    if problem.device != "xpu":
        return f"The kernel runs on Intel GPUs, not on {problem.device}."
    if problem.dtype not in _FLOATS:
        return f"The activations must be float16 or bfloat16, not {problem.dtype}."
    for weight, K in ((problem.w13, problem.H), (problem.w2, problem.I)):
        if weight.scale_dtype != problem.dtype:
            return f"The scales must have the activations' dtype, {problem.dtype}, not {weight.scale_dtype}."
        if weight.zeros != "none":
            return "The weights must be symmetric: the layout has no zeros."
        if (reason := why_not(K, weight.group_size)) is not None:
            return reason
    return why_not_mlp(problem.mlp)


def why_not(K: int, group_size: int) -> str | None:
    if group_size % 32 != 0 or K % group_size != 0:
        return f"The group size must be a multiple of 32 that divides K={K}, not {group_size}."
    return None


def why_not_mlp(mlp: Mlp) -> str | None:
    if (mlp.activation, mlp.gate_up) not in _ACTIVATIONS:
        known = ", ".join(f"{name} ({layout})" for name, layout in _ACTIVATIONS)
        return f"The activation must be one of {known}, not {mlp.activation} ({mlp.gate_up})."
    if mlp.activation == "swigluoai" and (mlp.alpha, mlp.limit) != (1.702, 7.0):
        return f"swigluoai must have alpha 1.702 and limit 7, not {mlp.alpha} and {mlp.limit}."
    return "The router's weight cannot be applied on the input." if mlp.apply_router_weight_on_input else None


def pack(weight: PackedInt, experts: int) -> Packed:
    p = xpu.pack(parted(weight, experts))
    return Packed(p.weights ^ _SIGNS, p.scales, None, None)


def unpack(packed: Packed, N: int, K: int, group_size: int) -> PackedInt:
    return xpu.unpack(xpu.Xpu(packed.qweight ^ _SIGNS, packed.scales, None)).joined()


def layout(packed: Packed, E: int, N: int, K: int, group_size: int) -> Layout:
    if (reason := why_not(K, group_size)) is not None:
        raise ValueError(reason)
    if packed.zeros is not None:
        raise ValueError("zeros must be None: the layout has a place for none.")
    groups = Expected((E, N, K // group_size), _FLOATS)
    return Layout(Expected((E, N, K // 2), (torch.uint8,)), groups, groups, Expected((K,), (torch.int32,)))


def run(
    x: Tensor,
    routing: Routing,
    w13: Packed,
    w2: Packed,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    mlp: Mlp,
    intermediate_size: int,
    group_sizes: tuple[int, int],
) -> Tensor:
    if (reason := why_not_mlp(mlp)) is not None:
        raise RuntimeError(reason)
    if not x.dtype == w13.scales.dtype == w2.scales.dtype:
        raise RuntimeError(f"x and the scales must have one dtype: {x.dtype}, {w13.scales.dtype}, {w2.scales.dtype}.")
    op = _op()
    if isinstance(op, str):
        raise RuntimeError(op)
    if x.shape[0] == 0:
        return torch.empty_like(x)
    E = w13.qweight.shape[0]
    ids = rows(routing, E)
    weights = (routing.topk_weights.float() * mlp.routed_scaling).where(ids >= 0, 0).contiguous()
    # Nobody's choices are of an expert that is not here.
    here = torch.arange(E + 1, dtype=torch.int32, device=x.device)
    here[E] = -1
    setattr(w13.qweight, _MARK, True)
    out: Tensor = op(
        hidden_states=x, w13=w13.qweight, w13_scales=w13.scales, w13_bias=_bias(w13_bias, x),
        w2=w2.qweight, w2_scales=w2.scales, w2_bias=_bias(w2_bias, x),
        topk_weights=weights, topk_ids=ids.where(ids >= 0, E).long(), n_experts_per_token=ids.shape[1],
        activation=_ACTIVATIONS[mlp.activation, mlp.gate_up], num_experts=E, expert_map=here, is_int4=True,
    )  # fmt: skip
    return out


def _bias(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)
