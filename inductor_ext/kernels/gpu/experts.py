"""The Triton kernels for ``w4a16::moe``: from two launches, with few tokens, to five, and no wait for the host."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from inductor_ext.formats import PackedInt4
from inductor_ext.kernels import ACTIVATIONS, GATE_UP, Layout, Mlp, MoeProblem, Packed, Routing, canonical
from inductor_ext.kernels.gpu import planes, runtime, tuning, weight
from inductor_ext.kernels.gpu.hopper import launch as hopper

NAME = "triton"
CHECKS_WEIGHTS = False

usable = runtime.usable


def reject(problem: MoeProblem) -> str | None:
    if problem.op != "moe":
        return f"The kernel computes moe, not {problem.op}."
    if problem.device != "cuda":
        return f"The kernel runs on NVIDIA and AMD GPUs, not on {problem.device}."
    if (reason := tuning.why_not_on(problem.arch)) is not None:
        return reason
    if problem.dtype not in runtime.FLOATS:
        return f"The activations must be float16 or bfloat16, not {problem.dtype}."
    for kind, K in ((problem.w13, problem.H), (problem.w2, problem.I)):
        if kind.scale_dtype not in planes.SCALES:
            return f"The scales must be float16, bfloat16 or float32, not {kind.scale_dtype}."
        if (reason := planes.why_not(K, kind.group_size)) is not None:
            return reason
    mlp = problem.mlp
    if mlp.activation not in ACTIVATIONS:
        return f"The activation must be one of {', '.join(ACTIVATIONS)}, not {mlp.activation}."
    if mlp.gate_up not in GATE_UP:
        return f"The layout of gate and up must be one of {', '.join(GATE_UP)}, not {mlp.gate_up}."
    return None


def pack(weight: PackedInt4, experts: int) -> Packed:
    """The rows of all experts at once, each expert's filled up to whole tiles."""
    N = weight.N // experts
    extra = planes.filled(N, planes.ROWS) - N

    def tall(t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t.unflatten(0, (experts, N)), (0, 0, 0, extra)).flatten(0, 1) if extra else t

    def split(t: Tensor) -> Tensor:
        by_expert: Tensor = t.unflatten(1, (experts, -1))
        return by_expert.movedim(1, 0).contiguous()

    zeros = None if weight.zeros is None else tall(weight.zeros)
    whole = planes.pack(PackedInt4(tall(weight.codes), tall(weight.scales), zeros))
    return Packed(
        whole.qweight.unflatten(0, (experts, -1)),
        split(whole.scales),
        None if whole.zeros is None else split(whole.zeros),
        None,
    )


def unpack(packed: Packed, N: int, K: int, group_size: int) -> PackedInt4:
    experts, down = packed.qweight.shape[:2]

    def joined(t: Tensor) -> Tensor:
        return t.movedim(0, 1).flatten(1, 2)

    def own(t: Tensor) -> Tensor:
        by_expert: Tensor = t.unflatten(0, (experts, -1))
        return by_expert[:, :N].flatten(0, 1)

    zeros = None if packed.zeros is None else joined(packed.zeros)
    whole = Packed(packed.qweight.flatten(0, 1), joined(packed.scales), zeros, None)
    weight = planes.unpack(whole, experts * down * planes.ROWS, K, group_size)
    return PackedInt4(own(weight.codes), own(weight.scales), None if weight.zeros is None else own(weight.zeros))


def layout(packed: Packed, E: int, N: int, K: int, group_size: int) -> Layout:
    return canonical.of_experts(E, planes.layout(packed, N, K, group_size))


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
    if x.shape[0] == 0:
        return torch.empty_like(x)
    pairs, E, H = routing.topk_ids.numel(), w13.qweight.shape[0], x.shape[1]
    up, down = tuning.moe(pairs, E, H, intermediate_size, runtime.arch_of(x.device))
    many, configs = None, tuning.hopper_moe(pairs, E)
    if configs is not None and hopper.can_experts(x, w13, w2, mlp, intermediate_size):
        sizes = ((H, group_sizes[0]), (intermediate_size, group_sizes[1]))
        w13_many, w2_many = (hopper.int4(c, w, *size) for c, w, size in zip(configs, (w13, w2), sizes, strict=True))
        many = w13_many, w2_many
    with runtime.on_device_of(x):
        return layer(
            x,
            routing,
            _projection(up, w13, w13_bias, H, group_sizes[0], x),
            _projection(down, w2, w2_bias, intermediate_size, group_sizes[1], x),
            mlp,
            intermediate_size,
            many=many,
        )


class Projection(NamedTuple):
    """One projection's weights of E experts, as the kernels take them."""

    config: tuning.MoeConfig
    tensors: tuple[Tensor, Tensor, Tensor | None]
    """Codes, scales, zeros."""
    bias: Tensor | None
    sizes: tuple[int, int, int, int]
    """ROWS, STEPS, SCALE_ROWS, ZERO_ROWS: an expert's rows, and what a row of each tensor has in its layout."""
    variant: dict[str, Any]
    """What is known when the kernel is compiled."""


def layer(
    x: Tensor,
    routing: Routing,
    up: Projection,
    down: Projection,
    mlp: Mlp,
    intermediate_size: int,
    scales: tuple[Tensor, Tensor] | None = None,
    fp8: torch.dtype | None = None,
    many: tuple[hopper.Weights, hopper.Weights] | None = None,
) -> Tensor:
    """The launches. With ``scales`` x and h are rounded to e4m3 by them, and kept in the dtype ``fp8``.

    ``many``: by the kernels for Hoppers, from these weights. Raises RuntimeError for the router's weight on an input
    that is rounded, which would have to come before rounding."""
    if scales and mlp.apply_router_weight_on_input:  # an op may be called with a kernel's name by hand
        raise RuntimeError("The kernel rounds x to fp8 once, not once for each weight of the router on the input.")
    from inductor_ext.kernels.gpu import moe
    from inductor_ext.kernels.gpu.routing import route_kernel
    from inductor_ext.kernels.gpu.workspace import Sections, counters

    (T, H), I, E = x.shape, intermediate_size, up.tensors[0].shape[0]  # noqa: E741
    k = routing.topk_ids.shape[1]
    pairs, device = T * k, x.device
    out = torch.empty_like(x)
    ids, weights = routing.topk_ids.contiguous(), routing.topk_weights.contiguous()
    BM, pairwise = (up.config.BM, up.config.PAIRWISE) if many is None else (many[0].config.BM, False)
    blocks = pairs if pairwise else min(pairs, pairs // BM + min(E, pairs))
    # float32 up to where its traffic would count; rounded to x's dtype beyond (see MoeKernel.run).
    y_dtype = torch.float32 if pairs <= 4096 else x.dtype
    room = Sections(device)
    h = room.take((pairs if many is None else blocks * BM, I), fp8 or x.dtype)
    y = room.take((pairs, H), y_dtype)
    slots, block_expert, total = (room.take((n,), torch.int32) for n in (blocks * BM, blocks, 1))
    quantised = room.take((T, H) if scales else (0,), fp8 or x.dtype)
    gathered = None if many is None else room.take((blocks * BM, H), x.dtype)
    room.allocate()
    number, expert_map = routing.number, routing.expert_map
    x_scale, h_scale = scales or (None, None)
    if x_scale is not None:
        moe.quantise_kernel[(-(-T * H // 1024),)](x, x_scale, quantised.get(), T * H, BLOCK=1024, num_warps=4)
        x = quantised.get()
    early = many is not None or tuning.early(runtime.arch_of(device), H, I)
    first = {"EARLY": early}
    after = first | ({"launch_pdl": True} if early else {})
    if not pairwise:
        bins, chunk = 1 << E.bit_length(), min(4096, max(128, 1 << (pairs - 1).bit_length()))
        route_kernel[(E,)](
            ids, expert_map, slots.get(), block_expert.get(), total.get(), pairs, number, E,
            BINS=bins, BM=BM, CHUNK=chunk, num_warps=4 if chunk <= 1024 else 8, **first,
        )  # fmt: skip
    if many is not None and gathered is not None:
        blocked = (weights, slots.get(), block_expert.get(), total.get())
        hopper.gather(x, blocked, k, BM, gathered.get())
        hopper.up(many[0], gathered.get(), up.bias, blocked, mlp, scales, h.get())
        hopper.down(many[1], h.get(), down.bias, blocked, mlp, scales, y.get())
    else:
        found = (weights, ids, expert_map, slots.get(), block_expert.get(), total.get())
        per_tile = 1 if mlp.gate_up == "none" else 2
        moe.up_kernel[(-(-I * per_tile // up.config.BN), blocks)](
            x, *up.tensors, up.bias, *found, h.get(),
            number, E, k, H, I, *up.sizes, mlp.alpha, mlp.limit or 0.0, x_scale, h_scale,
            GATE_UP=mlp.gate_up, ACTIVATION=mlp.activation, LIMITED=mlp.limit is not None,
            ON_INPUT=mlp.apply_router_weight_on_input, **up.variant, **(first if pairwise else after),
        )  # fmt: skip
        across = -(-H // down.config.BN)
        arrived = counters(T * across, device) if pairwise else None
        moe.down_kernel[(across, blocks)](
            h.get(), *down.tensors, down.bias, *found, y.get(), out, arrived,
            number, E, k, I, H, *down.sizes, mlp.routed_scaling, h_scale,
            ON_INPUT=mlp.apply_router_weight_on_input, **down.variant, **after,
        )  # fmt: skip
    if not pairwise:
        BN = 1024 if T >= 128 else 256  # enough programs for the device
        moe.add_up_kernel[(T, -(-H // BN))](
            y.get(), out, ids, expert_map, k, H, number, E, mlp.routed_scaling, BN=BN, num_warps=4, **after
        )
    return out


def _projection(
    config: tuning.MoeConfig, packed: Packed, bias: Tensor | None, K: int, group_size: int, x: Tensor
) -> Projection:
    zeros = packed.zeros
    _, down, across, _ = packed.qweight.shape
    return Projection(
        config,
        (packed.qweight, weight.words(packed.scales), None if zeros is None else weight.words(zeros)),
        bias,
        (down * planes.ROWS, across, packed.scales.shape[1], 0 if zeros is None else zeros.shape[1]),
        _variant(config, packed, K, group_size, x),
    )


def _variant(config: tuning.MoeConfig, packed: Packed, K: int, group_size: int, x: Tensor) -> dict[str, Any]:
    return {
        "CODES": "int4",
        "PAIRWISE": config.PAIRWISE,
        "BN": config.BN,
        "BM": config.BM,
        "WIDE": config.BM > 8,
        "STAGES": config.STAGES,
        "num_warps": config.num_warps,
        # Two projections' rounded weights, and h, would be all that is owed in bfloat16, or with rounded zeros.
        **weight.steps(
            config, packed, group_size, x, rounding=x.dtype == torch.float16 and not weight.float_zeros(packed)
        ),
        **weight.meaning(packed, K, group_size, x.device),
    }
