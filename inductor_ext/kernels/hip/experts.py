"""The HIP kernels for ``w4a16::moe`` on RDNA 3: dot2 for few tokens an expert, WMMA for many, from one copy of the
weights.

    qweight  int32 [E, K/8, N]: codes 2 p and 2 p + 1 of 8 neighbours along K in bits 4 p and 16 + 4 p
    scales   [E, K/G, N], in the activations' dtype
    zeros    uint8 [E, K/G, N], 0..16

Three launches with many tokens: the slots sorted, W13 with the activation behind it, W2; and one more adds up the
choices of each token. With few the activation is a launch of its own, and W2 adds them up itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_ext.bits import transposed
from inductor_ext.formats import EXLLAMA, SEQUENTIAL, PackedInt, PackedInt4
from inductor_ext.kernels import ACTIVATIONS, GATE_UP, Layout, Mlp, MoeProblem, Packed, Routing, canonical
from inductor_ext.kernels.hip import dot, linear, moe, objects, profile, routing, runtime, wmma
from inductor_ext.kernels.hip.routing import MOST_EXPERTS

NAME = "hip"
CHECKS_WEIGHTS = False

usable = runtime.why_unusable


def reject(problem: MoeProblem) -> str | None:
    if problem.op != "moe":
        return f"The kernel computes moe, not {problem.op}."
    if problem.device != "cuda" or not problem.arch.startswith("gfx"):
        return f"The kernel runs on AMD GPUs, not on {problem.device} ({problem.arch})."
    if not problem.arch.startswith("gfx11"):
        return f"The kernel needs the WMMA of RDNA 3 (gfx11); this is {problem.arch}."
    if (reason := objects.why_not_for(problem.arch)) is not None:
        return reason
    if problem.dtype not in dot.NAMES:
        return f"The activations must be float16 or bfloat16, not {problem.dtype}."
    if problem.E > MOST_EXPERTS:
        return f"There may be {MOST_EXPERTS} experts at most, not {problem.E}."
    rows = problem.I * (1 if problem.mlp.gate_up == "none" else 2)
    for weight, N, K in ((problem.w13, rows, problem.H), (problem.w2, problem.H, problem.I)):
        if weight.scale_dtype != problem.dtype:
            return f"The scales must have the activations' dtype, {problem.dtype}, not {weight.scale_dtype}."
        if weight.zeros == "float":
            return "The zeros must be integers, not floats."
        if (reason := linear.why_not(N, K, weight.group_size)) is not None:
            return reason
    if problem.mlp.activation not in ACTIVATIONS:
        return f"The activation must be one of {', '.join(ACTIVATIONS)}, not {problem.mlp.activation}."
    if problem.mlp.gate_up not in GATE_UP:
        return f"The layout of gate and up must be one of {', '.join(GATE_UP)}, not {problem.mlp.gate_up}."
    return None


def pack(weight: PackedInt, experts: int) -> Packed:
    N = weight.N // experts
    words = transposed(weight.codes.view(experts, N, -1), SEQUENTIAL, EXLLAMA)

    def by_group(t: Tensor) -> Tensor:
        return t.view(experts, N, -1).transpose(1, 2).contiguous()

    return Packed(
        words,
        by_group(weight.scales),
        None if weight.zeros is None else by_group(weight.zeros),
        None,
    )


def unpack(packed: Packed, N: int, K: int, group_size: int) -> PackedInt4:
    codes = transposed(packed.qweight, EXLLAMA, SEQUENTIAL)

    def by_row(t: Tensor) -> Tensor:
        return t.transpose(1, 2).flatten(0, 1)

    return PackedInt4(
        codes.flatten(0, 1),
        by_row(packed.scales),
        None if packed.zeros is None else by_row(packed.zeros),
    )


def layout(packed: Packed, E: int, N: int, K: int, group_size: int) -> Layout:
    if N % 8 != 0:
        raise ValueError(f"N must be a multiple of 8, it is {N}.")
    return canonical.of_experts(E, linear.layout(packed, N, K, group_size))


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
    require(x, routing, w13, w2, intermediate_size)
    slots = routing.topk_ids.numel()
    if slots == 0:
        return torch.zeros_like(x)
    routing = contiguous(routing)
    few = w13_bias is None and w2_bias is None and slots <= 8 * routing.number
    with profile.scope(x, routing, w13, w2, group_sizes, height(slots, routing.number, few)):
        if few:
            return _few(x, routing, w13, w2, mlp, intermediate_size)
        first, second = wmma.Weight(*_tensors(w13), w13_bias), wmma.Weight(*_tensors(w2), w2_bias)
        return many(x, routing, first, second, mlp, intermediate_size, height(slots, routing.number, False))


def require(x: Tensor, routing: Routing, w13: Packed, w2: Packed, intermediate_size: int) -> None:
    """An op may be called with a kernel's name by hand, too. Raises RuntimeError."""
    if not x.dtype == w13.scales.dtype == w2.scales.dtype:
        raise RuntimeError(
            f"The HIP kernels take x in the scales' dtype; x is {x.dtype}, the scales are {w13.scales.dtype} and"
            f" {w2.scales.dtype}."
        )
    if len(w13.qweight) > MOST_EXPERTS:
        raise RuntimeError(f"There may be {MOST_EXPERTS} experts at most, not {len(w13.qweight)}.")
    slots = routing.topk_ids.numel()
    if 2 * max(x.numel(), slots * intermediate_size) >= dot.MOST_BYTES:
        raise RuntimeError(
            f"x {list(x.shape)} and what its {slots} choices become between the projections must each have less than"
            " 4 GiB; split the tokens."
        )


def contiguous(routing: Routing) -> Routing:
    """As the kernels read it."""
    return routing._replace(
        topk_ids=routing.topk_ids.contiguous(), topk_weights=routing.topk_weights.float().contiguous()
    )


def height(slots: int, experts: int, few: bool) -> int:
    """Of blocks: about as many slots as an expert has. Not tuned: nobody has run it."""
    if few:
        return dot.height(-(-slots // experts))
    return 16 if slots < 24 * experts else 32 if slots < 192 * experts else 64


def _few(x: Tensor, routed: Routing, w13: Packed, w2: Packed, mlp: Mlp, I: int) -> Tensor:  # noqa: E741
    k, E, slots = routed.topk_ids.shape[1], w13.qweight.shape[0], routed.topk_ids.numel()
    blocks = routing.route(routed, E, height(slots, routed.number, True))
    weights = routed.topk_weights.view(-1)
    weigh_x = mlp.apply_router_weight_on_input
    h = torch.empty(slots, w13.qweight.shape[2], dtype=torch.float32, device=x.device)
    moe.gemm(x, *_tensors(w13), *blocks[:3], weights if weigh_x else None, h, blocks.height, k, 1)
    act = torch.empty(slots, I, dtype=x.dtype, device=x.device)
    routing.activate(h, mlp, act)
    if weigh_x:
        weights = torch.ones_like(weights)
    out = torch.zeros_like(x)
    moe.gemm(act, *_tensors(w2), *blocks[:3], weights * mlp.routed_scaling, out, blocks.height, 1, k)
    return out


def many(
    x: Tensor,
    routed: Routing,
    w13: wmma.Weight,
    w2: wmma.Weight,
    mlp: Mlp,
    I: int,  # noqa: E741
    height: int,
) -> Tensor:
    """By WMMA, in blocks of so many slots."""
    k, E, slots = routed.topk_ids.shape[1], w13.words.shape[0], routed.topk_ids.numel()
    blocks = routing.route(routed, E, height)
    weights = routed.topk_weights.view(-1)
    before, behind = wmma.Weigh.NOTHING, wmma.Weigh.RESULT
    if mlp.apply_router_weight_on_input:
        before, behind = wmma.Weigh.INPUT, wmma.Weigh.NOTHING

    act = torch.empty(slots, I, dtype=x.dtype, device=x.device)
    alpha, limit = routing.steepness(mlp)
    wmma.routed(
        x,
        w13,
        wmma.Slots(blocks.sorted, blocks.experts, blocks.height, k, before, weights),
        act,
        wmma.Act(mlp.activation, mlp.gate_up, alpha, limit),
    )
    # float32 up to where its traffic would count; rounded to x's dtype beyond (see MoeKernel.run).
    y = torch.empty(slots, x.shape[1], dtype=torch.float32 if slots <= 8192 else x.dtype, device=x.device)
    wmma.routed(
        act,
        w2,
        wmma.Slots(blocks.sorted, blocks.experts, blocks.height, 1, behind, weights),
        y,
    )
    out = torch.empty_like(x)
    routing.combine(y, routed, E, mlp.routed_scaling, out)
    return out


def _tensors(packed: Packed) -> tuple[Tensor, Tensor, Tensor | None, dot.Zeros]:
    kind = dot.Zeros.EIGHT if packed.zeros is None else dot.Zeros.BYTES
    return packed.qweight, packed.scales, packed.zeros, kind
