"""The CPU kernel for routed experts with MXFP4 weights: C++ (csrc/cpu) that reads the canonical layout as it is, or
with rows filled up to whole groups by zeros where H or I are none.

In 16 bits as the int4 kernel does it, with another table of values. In W4A8 both inputs are rounded to fp8, whose
values bfloat16 and float32 hold exactly, and multiplied as those.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from inductor_ext.formats import MXFP4_GROUP, PackedMxfp4
from inductor_ext.kernels import ACTIVATIONS, Layout, Mlp, MoeProblem, Packed, Routing, cpu, cpu_linear_mxfp4
from inductor_ext.kernels.canonical import of_experts
from inductor_ext.kernels.cpu_linear_mxfp4 import whole_groups
from inductor_ext.kernels.rows import rows

NAME = "cpu"
CHECKS_WEIGHTS = True

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)

usable = cpu.usable


def reject(problem: MoeProblem) -> str | None:
    if problem.op != "moe_mxfp4":
        return f"The kernel computes moe_mxfp4, not {problem.op}."
    if problem.device != "cpu":
        return f"The kernel runs on the CPU, not on {problem.device}."
    if problem.dtype not in _FLOATS:
        return f"The activations must be bfloat16, float16 or float32, not {problem.dtype}."
    mlp = problem.mlp
    if mlp.activation not in ACTIVATIONS:
        return f"The activation must be one of {', '.join(ACTIVATIONS)}, not {mlp.activation}."
    if mlp.gate_up == "halves" and problem.I % 8 != 0:
        return f"With gates and ups in halves I must be a multiple of 8, not {problem.I}."
    if mlp.activation == "swigluoai" and mlp.gate_up == "none":
        return "swigluoai needs a gate."
    if problem.fp8 and mlp.apply_router_weight_on_input:
        return "The router's weight on the input does not go together with fp8."
    return None


def pack(weight: PackedMxfp4, experts: int) -> Packed:
    codes, scales = (t.unflatten(0, (experts, -1)) for t in (whole_groups(weight), weight.scales))
    return Packed(codes, scales, None, None)


def unpack(packed: Packed, N: int, K: int, group_size: int) -> PackedMxfp4:
    codes = packed.qweight.flatten(0, 1)[:, : K // 2]
    return PackedMxfp4(codes.contiguous(), packed.scales.flatten(0, 1))


def layout(packed: Packed, E: int, N: int, K: int, group_size: int) -> Layout:
    return of_experts(E, cpu_linear_mxfp4.layout(packed, N, K, group_size))


def run(
    x: Tensor,
    routing: Routing,
    w13: Packed,
    w2: Packed,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    mlp: Mlp,
    intermediate_size: int,
    input_scales: tuple[Tensor, Tensor] | None,
) -> Tensor:
    if (reason := usable()) is not None:
        raise RuntimeError(reason)
    wanted = intermediate_size * (1 if mlp.gate_up == "none" else 2)
    # All else about the weights C++ checks; not this, as it has H from w2, and x filled up.
    for name, weight, height in (("w13", w13, wanted), ("w2", w2, x.shape[1])):
        if weight.qweight.dim() != 3 or weight.qweight.shape[1] != height:
            raise RuntimeError(f"{name} must have {height} rows, its codes are {list(weight.qweight.shape)}.")
    mapped = routing.expert_map is not None
    x_scale, h_scale = input_scales or (None, None)
    missing = -x.shape[1] % MXFP4_GROUP
    y: Tensor = torch.ops.w4a16_cpu.moe_mxfp4.default(
        F.pad(x, (0, missing)) if missing else x,
        routing.topk_weights.float().contiguous(),
        rows(routing, w13.qweight.shape[0]) if mapped else routing.topk_ids.contiguous(),
        w13.qweight,
        w13.scales,
        w13_bias,
        w2.qweight,
        w2.scales,
        w2_bias,
        x_scale,
        h_scale,
        mlp.activation,
        mlp.gate_up,
        mlp.alpha,
        mlp.limit,
        mlp.apply_router_weight_on_input,
        mlp.routed_scaling,
    )
    return y
