"""The reference kernel for routed experts with MXFP4 weights: as ``reference_moe``, over the canonical layout."""

from __future__ import annotations

from torch import Tensor

from inductor_ext.formats import PackedMxfp4
from inductor_ext.kernels import Layout, Mlp, MoeProblem, Packed, Routing
from inductor_ext.kernels.canonical import of_experts
from inductor_ext.kernels.reference_linear_mxfp4 import layout_of_width
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
    return of_experts(E, layout_of_width(N, K, K))


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
