"""FlashInfer's TensorRT-LLM experts in MXINT4 for ``w4a16::moe`` on sm_100: one launch for all, sorting and activation
included.

Weights as in ``layouts/flashinfer.py``; the rows of w13 come in another order than those of w2, hence ``pack_w13``.
Larger groups are split into groups of 32. The router's weights are rounded to bfloat16, as the op takes them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inductor_ext.formats import PackedInt, packed_int
from inductor_ext.kernels import Expected, Layout, Mlp, MoeProblem, Packed, Routing
from inductor_ext.kernels.rows import rows
from inductor_ext.layouts import adjust, flashinfer
from inductor_ext.layouts.experts import parted

NAME = "flashinfer"
CHECKS_WEIGHTS = False

_OP = "trtllm_mxint4_block_scale_routed_moe"
_NEEDED = {
    "topk_ids", "hidden_states", "gemm1_weights", "gemm1_weights_scale", "gemm1_alpha", "gemm1_beta",
    "gemm1_clamp_limit", "gemm2_weights", "gemm2_weights_scale", "num_experts", "top_k", "n_group", "topk_group",
    "intermediate_size", "local_expert_offset", "local_num_experts", "routed_scaling_factor",
}  # fmt: skip
_RENORMALIZE = 1
"""FlashInfer's RoutingMethodType; the routing itself is done before."""


@functools.cache
def usable() -> str | None:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "There is no NVIDIA GPU that torch can use."
    op = _op()
    return op if isinstance(op, str) else None


def _op() -> Callable[..., Any] | str:
    """The op, or why there is none that is understood."""
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed."
    op: Callable[..., Any] | None = getattr(importlib.import_module("flashinfer.fused_moe"), _OP, None)
    if op is None:
        return f"flashinfer.fused_moe has no {_OP}, as older versions do not."
    parameters = inspect.signature(op).parameters
    missing = _NEEDED - set(parameters)
    wanted = {name for name, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD} - _NEEDED
    if missing or wanted:
        return f"{_OP} has other arguments than are known here: {', '.join(sorted(missing | wanted))}."
    return op


def reject(problem: MoeProblem) -> str | None:
    if problem.op != "moe":
        return f"The kernel computes moe, not {problem.op}."
    if problem.device != "cuda" or problem.arch not in ("sm_100", "sm_103"):
        return f"The kernel runs on sm_100, not on {problem.device} ({problem.arch})."
    if problem.dtype != torch.bfloat16:
        return f"The activations must be bfloat16, not {problem.dtype}."
    for weight, N, K in ((problem.w13, 2 * problem.I, problem.H), (problem.w2, problem.H, problem.I)):
        if weight.scale_dtype != torch.bfloat16:
            return f"The scales must be bfloat16, not {weight.scale_dtype}."
        if weight.zeros != "none":
            return "The weights must be symmetric: the layout has no zeros."
        if (reason := why_not(N, K, weight.group_size)) is not None:
            return reason
    if problem.bias:
        return "There must be no bias: the op has none."
    if problem.expert_map:
        return "There must be no expert_map: the op takes experts in one run only."
    mlp = problem.mlp
    if (mlp.activation, mlp.gate_up) != ("silu", "halves"):
        return f"The activation must be silu with gate and up as halves, not {mlp.activation} ({mlp.gate_up})."
    return "The router's weight cannot be applied on the input." if mlp.apply_router_weight_on_input else None


def why_not(N: int, K: int, group_size: int) -> str | None:
    if N % flashinfer.ROWS != 0 or K % flashinfer.COLUMNS != 0:
        return f"N must be a multiple of {flashinfer.ROWS} and K of {flashinfer.COLUMNS}; they are {N} and {K}."
    if group_size % flashinfer.GROUP != 0 or K % group_size != 0:
        return f"The group size must be a multiple of {flashinfer.GROUP} that divides K={K}, not {group_size}."
    return None


def pack(weight: PackedInt, experts: int) -> Packed:
    return _packed(weight, experts, False)


def pack_w13(weight: PackedInt, experts: int) -> Packed:
    return _packed(weight, experts, True)


def _packed(weight: PackedInt, experts: int, gated: bool) -> Packed:
    p = flashinfer.pack(adjust.finer(parted(weight, experts), flashinfer.GROUP), gated)
    return Packed(p.weights, p.scales, None, None)


def unpack(packed: Packed, N: int, K: int, group_size: int) -> PackedInt:
    return _unpacked(packed, group_size, False)


def unpack_w13(packed: Packed, N: int, K: int, group_size: int) -> PackedInt:
    return _unpacked(packed, group_size, True)


def _unpacked(packed: Packed, group_size: int, gated: bool) -> PackedInt:
    fine = flashinfer.unpack(flashinfer.MxInt4(packed.qweight, packed.scales), gated).joined()
    return packed_int(fine.codes, fine.scales[:, :: group_size // flashinfer.GROUP].contiguous())


def layout(packed: Packed, E: int, N: int, K: int, group_size: int) -> Layout:
    if (reason := why_not(N, K, group_size)) is not None:
        raise ValueError(reason)
    if packed.zeros is not None:
        raise ValueError("zeros must be None: the layout has a place for none.")
    groups = Expected((E, N, K // flashinfer.GROUP), (torch.bfloat16,))
    codes = Expected((E, K // flashinfer.COLUMNS, N, flashinfer.COLUMNS // 2), (torch.uint8,))
    return Layout(codes, groups, groups, Expected((K,), (torch.int32,)))


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
    plain = (mlp.activation, mlp.gate_up, mlp.apply_router_weight_on_input) == ("silu", "halves", False)
    if not plain or w13_bias is not None or w2_bias is not None or x.dtype != torch.bfloat16:
        raise RuntimeError("FlashInfer's MXINT4 experts take bfloat16, silu with gate and up as halves, and no bias.")
    op = _op()
    if isinstance(op, str):
        raise RuntimeError(op)
    E = w13.qweight.shape[0]
    ids, weights = rows(routing, E), routing.topk_weights.float() * mlp.routed_scaling
    if x.shape[0] == 0:
        return torch.empty_like(x)
    # Nobody's choice is one of expert 0 that counts for nothing.
    weights = weights.where(ids >= 0, 0).bfloat16().contiguous().view(torch.int16).int() & 0xFFFF
    given = {
        "topk_ids": ids.clamp(min=0) << 16 | weights, "hidden_states": x,
        "gemm1_weights": w13.qweight, "gemm1_weights_scale": w13.scales,
        "gemm1_alpha": None, "gemm1_beta": None, "gemm1_clamp_limit": None,
        "gemm2_weights": w2.qweight, "gemm2_weights_scale": w2.scales,
        "num_experts": E, "top_k": ids.shape[1], "n_group": None, "topk_group": None,
        "intermediate_size": intermediate_size, "local_expert_offset": 0, "local_num_experts": E,
        "routed_scaling_factor": None, "routing_method_type": _RENORMALIZE,
    }  # fmt: skip
    result = op(**given)
    out: Tensor = result[0] if isinstance(result, list | tuple) else result
    return out
