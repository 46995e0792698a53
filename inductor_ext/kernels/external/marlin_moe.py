"""Marlin for ``w4a16::moe`` on NVIDIA GPUs: an op a projection, our routing before, PyTorch's activation between.

Weights as in ``layouts/marlin.py``. Integer zeros must be codes, 0..15: packing refuses 16. Each choice's result is
rounded to x's dtype before the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_ext.formats import PackedInt
from inductor_ext.kernels import ACTIVATIONS, GATE_UP, Layout, Mlp, MoeProblem, Packed, Routing, canonical
from inductor_ext.kernels.external import marlin, marlin_ops
from inductor_ext.kernels.reference_moe import activate
from inductor_ext.kernels.rows import rows
from inductor_ext.layouts.experts import parted
from inductor_ext.ops.align import moe_align_block_size

NAME = "marlin"
CHECKS_WEIGHTS = False

_HEIGHTS = (8, 16, 32, 48, 64)
"""Of blocks."""


def usable() -> str | None:
    return marlin.why_unusable(marlin_ops.EXPERTS)


def reject(problem: MoeProblem) -> str | None:
    if problem.op != "moe":
        return f"The kernel computes moe, not {problem.op}."
    if (reason := marlin.why_not_on(problem.device, problem.arch, problem.dtype)) is not None:
        return reason
    up = problem.I * (1 if problem.mlp.gate_up == "none" else 2)
    for weight, N, K in ((problem.w13, up, problem.H), (problem.w2, problem.H, problem.I)):
        if (reason := marlin.why_not_scaled(weight.scale_dtype, problem.dtype, weight.zeros)) is not None:
            return reason
        if (reason := why_not(N, K, weight.group_size)) is not None:
            return reason
    mlp = problem.mlp
    if mlp.apply_router_weight_on_input:
        return "The router's weight cannot be applied on the input."
    if mlp.activation not in ACTIVATIONS:
        return f"The activation must be one of {', '.join(ACTIVATIONS)}, not {mlp.activation}."
    if mlp.gate_up not in GATE_UP:
        return f"The layout of gate and up must be one of {', '.join(GATE_UP)}, not {mlp.gate_up}."
    return None


def why_not(N: int, K: int, group_size: int) -> str | None:
    """Whole tiles are 128 x 64 here, the other way round than for dense weights."""
    if N % 128 != 0 or K % 64 != 0:
        return f"N must be a multiple of 128 and K of 64; they are {N} and {K}."
    return marlin.why_not_grouped(K, group_size)


def pack(weight: PackedInt, experts: int) -> Packed:
    return marlin.packed_experts(parted(weight, experts))


def unpack(packed: Packed, N: int, K: int, group_size: int) -> PackedInt:
    return marlin.unpacked_experts(packed).joined()


def layout(packed: Packed, E: int, N: int, K: int, group_size: int) -> Layout:
    if (reason := why_not(N, K, group_size)) is not None:
        raise ValueError(reason)
    return canonical.of_experts(E, marlin.tensors(N, K, group_size))


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
    marlin.require(x, w13, w2)
    if mlp.apply_router_weight_on_input:
        raise RuntimeError("Marlin cannot apply the router's weight on the input.")
    E = w13.qweight.shape[0]
    ids, weights = rows(routing, E), routing.topk_weights.float().contiguous()
    T, k = ids.shape
    if T == 0:
        return torch.empty_like(x)
    height = next((h for h in _HEIGHTS if T * k < 0.9 * h * E), _HEIGHTS[-1])
    blocks = moe_align_block_size(ids, height, E)
    h = _gemm(x, w13, w13_bias, blocks, weights, height, k, False)
    y = _gemm(activate(h.float(), mlp).to(x.dtype), w2, w2_bias, blocks, weights, height, 1, True)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for j in range(k):  # in their order, so that the same inputs give the same bits
        total += y.view(T, k, -1)[:, j]
    return total.mul_(mlp.routed_scaling).to(x.dtype)


def _gemm(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    blocks: tuple[Tensor, Tensor, Tensor],
    weights: Tensor,
    height: int,
    top_k: int,
    weigh: bool,
) -> Tensor:
    """[slots, N]. Rows of nobody's choices are zero, as no block has them."""
    (M, K), N = x.shape, packed.scales.shape[2]
    given = {
        "a": x, "c": x.new_zeros(M * top_k, N), "b_q_weight": packed.qweight,
        "b_bias": None if bias is None else marlin.permuted(bias.to(x.dtype)), "b_scales": packed.scales,
        "b_zeros": packed.zeros, "workspace": marlin.workspace(x.device),
        "type": marlin_ops.scalar_type(packed.zeros is not None),
        "sorted_token_ids": blocks[0], "expert_ids": blocks[1], "end": blocks[2], "topk_weights": weights,
        "moe_block_size": height, "top_k": top_k, "mul_topk_weights": weigh,
        "size_m": M, "size_n": N, "size_k": K,
    }  # fmt: skip
    return marlin_ops.call(marlin_ops.EXPERTS, given)
