"""The reference kernel for routed experts with MXFP4 weights: as ``reference_moe``, over the canonical layout."""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_ext.formats import MXFP4_GROUP, PackedMxfp4
from inductor_ext.kernels import Expected, Layout, Mlp, MoeProblem, Packed, Routing
from inductor_ext.kernels.reference_moe import Experts, compute

NAME = "reference"
CHECKS_WEIGHTS = False


def usable() -> str | None:
    return None


def reject(problem: MoeProblem) -> str | None:
    return None


def pack(weight: PackedMxfp4, experts: int) -> Packed:
    codes, scales = (t.unflatten(0, (experts, -1)) for t in (weight.codes, weight.scales))
    return Packed(codes, scales, None, None)


def unpack(packed: Packed, N: int, K: int, group_size: int) -> PackedMxfp4:
    return PackedMxfp4(packed.qweight.flatten(0, 1), packed.scales.flatten(0, 1))


def layout(packed: Packed, E: int, N: int, K: int, group_size: int) -> Layout:
    if K % 2:
        raise ValueError(f"K must be even, it is {K}.")
    absent = Expected((0,), (torch.uint8,))
    groups = -(-K // MXFP4_GROUP)
    return Layout(Expected((E, N, K // 2), (torch.uint8,)), Expected((E, N, groups), (torch.uint8,)), absent, absent)


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
    return compute(x, routing, Experts(w13, w2, w13_bias, w2_bias, mlp, True, input_scales or (None, None)))
