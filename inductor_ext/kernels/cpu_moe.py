"""The CPU kernel for routed experts: C++ (csrc/cpu) that reads the canonical layout as it is.

It sorts the (token, slot) pairs by expert and touches the selected experts only. No dense weight is ever made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_ext.formats import PackedInt4
from inductor_ext.kernels import ACTIVATIONS, GATE_UP, Mlp, MoeProblem, Packed, Routing, canonical, cpu
from inductor_ext.kernels.pages import in_huge_pages
from inductor_ext.kernels.rows import rows

NAME = "cpu"
CHECKS_WEIGHTS = True

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)

usable = cpu.usable


def reject(problem: MoeProblem) -> str | None:
    if problem.op != "moe":
        return f"The kernel computes moe, not {problem.op}."
    if problem.device != "cpu":
        return f"The kernel runs on the CPU, not on {problem.device}."
    if problem.dtype not in _FLOATS:
        return f"The activations must be bfloat16, float16 or float32, not {problem.dtype}."
    for weight, K in ((problem.w13, problem.H), (problem.w2, problem.I)):
        if weight.scale_dtype not in _FLOATS:
            return f"The scales must be bfloat16, float16 or float32, not {weight.scale_dtype}."
        if weight.group_size % 8 != 0 or K % weight.group_size != 0:
            return f"The group size must be a multiple of 8 that divides K={K}, not {weight.group_size}."
    mlp = problem.mlp
    if mlp.activation not in ACTIVATIONS:
        return f"The activation must be one of {', '.join(ACTIVATIONS)}, not {mlp.activation}."
    if mlp.gate_up not in GATE_UP:
        return f"The layout of gate and up must be one of {', '.join(GATE_UP)}, not {mlp.gate_up}."
    if mlp.activation == "swigluoai" and mlp.gate_up == "none":
        return "swigluoai needs a gate."
    return None


unpack, layout = canonical.unpack_experts, canonical.layout_experts


def pack(weight: PackedInt4, experts: int) -> Packed:
    in_huge_pages(weight.codes)
    return canonical.pack_experts(weight, experts)


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
    if (reason := usable()) is not None:
        raise RuntimeError(reason)
    if w2.qweight.dim() != 3 or w2.qweight.shape[2] * 8 != intermediate_size:  # all else about them C++ checks
        raise RuntimeError(f"w2 must have {intermediate_size} columns, its codes are {list(w2.qweight.shape)}.")
    # Ids without a map are checked and narrowed in C++.
    mapped = routing.expert_map is not None
    y: Tensor = torch.ops.w4a16_cpu.moe.default(
        x,
        routing.topk_weights.float().contiguous(),
        rows(routing, w13.qweight.shape[0]) if mapped else routing.topk_ids.contiguous(),
        w13.qweight,
        w13.scales,
        w13.zeros,
        w13_bias,
        w2.qweight,
        w2.scales,
        w2.zeros,
        w2_bias,
        *group_sizes,
        mlp.activation,
        mlp.gate_up,
        mlp.alpha,
        mlp.limit,
        mlp.apply_router_weight_on_input,
        mlp.routed_scaling,
    )
    return y
