"""Routed experts with MXFP4 weights by Triton's ``dot_scaled``, over the canonical layout: the weights as they are in
the checkpoint, and on gfx950 its matrix instructions for MXFP4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_ext.formats import MXFP4_GROUP
from inductor_ext.kernels import Mlp, MoeProblem, Packed, Routing, reference_mxfp4
from inductor_ext.kernels.gpu import mxfp4, runtime, tuning
from inductor_ext.kernels.gpu.experts import Projection, layer

NAME = "dot_scaled"
CHECKS_WEIGHTS = False

usable = runtime.usable
pack, unpack, layout = reference_mxfp4.pack, reference_mxfp4.unpack, reference_mxfp4.layout


def reject(problem: MoeProblem) -> str | None:
    if (reason := mxfp4.reject(problem)) is not None:
        return reason
    if problem.arch != "gfx950":
        return f"The kernel is for gfx950, whose matrix units take MXFP4; this is {problem.arch}."
    return None


def why_not_on(arch: str) -> str | None:
    """Why it does not run at all; elsewhere than on gfx950 it is there to be compared with (bench/mxfp4_gpu.py)."""
    if arch in ("gfx950", "sm_90", "sm_100"):
        return None
    return f"Triton's dot_scaled is compiled for gfx950, sm_90 and sm_100; this is {arch}."


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
    arch = runtime.arch_of(x.device)
    if (reason := why_not_on(arch)) is not None:
        raise RuntimeError(reason)
    if x.shape[0] == 0:
        return torch.empty_like(x)
    pairs, E, H = routing.topk_ids.numel(), w13.qweight.shape[0], x.shape[1]
    up, down = tuning.mxfp4_scaled(pairs, E, arch)
    with runtime.on_device_of(x):
        return layer(
            x,
            routing,
            projection(up, w13, w13_bias, H),
            projection(down, w2, w2_bias, intermediate_size),
            mlp,
            intermediate_size,
            input_scales,
            torch.float8_e4m3fn if arch == "gfx950" and input_scales else None,
        )


def projection(config: tuning.MoeConfig, packed: Packed, bias: Tensor | None, K: int) -> Projection:
    rows = packed.qweight.shape[1]
    variant = {
        "CODES": "e2m1 pairs",
        "PAIRWISE": config.PAIRWISE,
        "BN": config.BN,
        "BM": config.BM,
        "WIDTH": config.WIDTH,
        "G": 32,
        "KIND": "e8m0",
        "ZEROS": "none",
        "ROUNDED": False,
        "WIDE": True,
        "WHOLE": K % config.WIDTH == 0,
        "STAGES": config.STAGES,
        "PTX": False,
        "num_warps": config.num_warps,
    }
    sizes = rows, K // 2, -(-K // MXFP4_GROUP), 0
    return Projection(config, (packed.qweight, packed.scales, None), bias, sizes, variant)
