"""The Triton kernels for routed experts with MXFP4 weights, W4A16 and W4A8: those of ``w4a16::moe`` with other codes.

Activations that are rounded to fp8 (e4m3) are kept in x's dtype, which holds e4m3's numbers: products are the same, and
nothing has to be converted in the loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_ext.kernels import ACTIVATIONS, GATE_UP, Mlp, MoeProblem, Packed, Routing
from inductor_ext.kernels.gpu import fp4_planes, runtime, tuning
from inductor_ext.kernels.gpu.experts import Projection, layer
from inductor_ext.kernels.gpu.hopper import launch as hopper

NAME = "triton"
CHECKS_WEIGHTS = False

usable = runtime.usable
pack, unpack, layout = fp4_planes.pack, fp4_planes.unpack, fp4_planes.layout


def reject(problem: MoeProblem) -> str | None:
    if problem.op != "moe_mxfp4":
        return f"The kernel computes moe_mxfp4, not {problem.op}."
    if problem.device != "cuda":
        return f"The kernel runs on NVIDIA and AMD GPUs, not on {problem.device}."
    if (reason := tuning.why_not_on(problem.arch)) is not None:
        return reason
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"The activations must be float16 or bfloat16, not {problem.dtype}."
    mlp = problem.mlp
    if mlp.activation not in ACTIVATIONS:
        return f"The activation must be one of {', '.join(ACTIVATIONS)}, not {mlp.activation}."
    if mlp.gate_up not in GATE_UP:
        return f"The layout of gate and up must be one of {', '.join(GATE_UP)}, not {mlp.gate_up}."
    if problem.fp8 and mlp.apply_router_weight_on_input:
        return "The kernel rounds x to fp8 once, not once for each weight of the router on the input."
    return None


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
    runtime.require(x)
    if x.shape[0] == 0:
        return torch.empty_like(x)
    pairs, E, H = routing.topk_ids.numel(), w13.qweight.shape[0], x.shape[1]
    up, down = tuning.mxfp4(pairs, E, runtime.arch_of(x.device))
    many, configs = None, tuning.hopper_moe(pairs, E)
    if configs is not None and hopper.can_fp4(x, w13, w2, mlp, intermediate_size):
        many = hopper.fp4(configs[0], w13), hopper.fp4(configs[1], w2)
    with runtime.on_device_of(x):
        return layer(
            x,
            routing,
            projection(up, w13, w13_bias, H),
            projection(down, w2, w2_bias, intermediate_size),
            mlp,
            intermediate_size,
            input_scales,
            many=many,
        )


def projection(config: tuning.MoeConfig, packed: Packed, bias: Tensor | None, K: int) -> Projection:
    _, down, steps, _ = packed.qweight.shape
    floats = packed.scales.dtype == torch.float32
    scales = packed.scales if floats else packed.scales.view(torch.int32).squeeze(-1)
    variant = {
        "CODES": "e2m1 planes",
        "PAIRWISE": config.PAIRWISE,
        "BN": config.BN,
        "BM": config.BM,
        "WIDTH": 32,
        "G": 32,
        "KIND": "fp32" if floats else "e8m0",
        "ZEROS": "none",
        "ROUNDED": False,
        "WIDE": 2048 * config.num_warps >= config.BN * config.BM,  # else the results take most registers
        "WHOLE": K % fp4_planes.COLUMNS == 0,
        "STAGES": config.STAGES,
        "PTX": runtime.arch_of(packed.qweight.device).startswith("sm_"),
        "num_warps": config.num_warps,
    }
    sizes = down * fp4_planes.ROWS, steps, scales.shape[1], 0
    return Projection(config, (packed.qweight, scales, None), bias, sizes, variant)
