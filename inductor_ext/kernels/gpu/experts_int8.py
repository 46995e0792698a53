"""The Triton kernel for ``w4a16::moe`` with int8 weights: a launch a projection, and PyTorch's operations between. It
reads the canonical form as it is; nothing waits for the host."""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_ext.kernels import ACTIVATIONS, GATE_UP, Layout, Mlp, MoeProblem, Packed, Routing, canonical
from inductor_ext.kernels.gpu import linear_int8, runtime, tuning
from inductor_ext.kernels.reference_moe import activate
from inductor_ext.kernels.rows import rows
from inductor_ext.ops.align import moe_align_block_size

NAME = "triton_int8"
CHECKS_WEIGHTS = False

usable = runtime.usable


def reject(problem: MoeProblem) -> str | None:
    if problem.device != "cuda":
        return f"The kernel runs on NVIDIA and AMD GPUs, not on {problem.device}."
    if (reason := tuning.why_not_on(problem.arch)) is not None:
        return reason
    if problem.dtype not in runtime.FLOATS:
        return f"The activations must be float16 or bfloat16, not {problem.dtype}."
    for weight, K in ((problem.w13, problem.H), (problem.w2, problem.I)):
        if (reason := linear_int8.why_not(K, weight.group_size, weight.zeros)) is not None:
            return reason
    mlp = problem.mlp
    if mlp.activation not in ACTIVATIONS:
        return f"The activation must be one of {', '.join(ACTIVATIONS)}, not {mlp.activation}."
    if mlp.gate_up not in GATE_UP:
        return f"The layout of gate and up must be one of {', '.join(GATE_UP)}, not {mlp.gate_up}."
    return None


pack, unpack = canonical.pack_experts, canonical.unpack_experts


def layout(packed: Packed, E: int, N: int, K: int, group_size: int) -> Layout:
    return canonical.of_experts(E, linear_int8.layout(packed, N, K, group_size))


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
    runtime.require(x)
    E = w13.qweight.shape[0]
    ids, weights = rows(routing, E), routing.topk_weights.float().contiguous().view(-1)
    (T, k), H = ids.shape, x.shape[1]
    if T == 0:
        return torch.empty_like(x)
    # A choice of nobody has no block, so that its row is never written; its weight may be anything.
    h, y = (torch.zeros(T * k, n, dtype=torch.float32, device=x.device) for n in (w13.qweight.shape[1], H))
    BM = linear_int8.height(T * k // E)
    slots, experts, _ = moe_align_block_size(ids, BM, E)
    on_input = mlp.apply_router_weight_on_input
    up = linear_int8.Routed(slots, experts, k, weights if on_input else None, True)
    down = linear_int8.Routed(slots, experts, 1, None if on_input else weights)
    linear_int8.launch(x, w13, w13_bias, h, group_sizes[0], BM, up)
    linear_int8.launch(activate(h, mlp).to(x.dtype), w2, w2_bias, y, group_sizes[1], BM, down)
    total = torch.zeros(T, H, dtype=torch.float32, device=x.device)
    for j in range(k):  # in their order, so that the same inputs give the same bits
        total += y.view(T, k, H)[:, j]
    return total.mul_(mlp.routed_scaling).to(x.dtype)
