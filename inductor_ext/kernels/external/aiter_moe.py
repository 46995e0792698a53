"""AITER's ``moe_gemm_a8w4`` for routed experts with MXFP4 weights and fp8 activations, on gfx950, from whichever aiter
is installed.

The router has chosen before: what AITER's own ``routing`` would make of logits is made of the choices here, so that the
router's weights are taken as they are, whether or not they were normalised again.

AITER's arguments ``unpadded_N`` and ``unpadded_K`` are left alone: they count only for blocks of 16 rows, and once
broke the addresses of swizzled scales. Instead weights are filled up with zeros when they are packed. Products with
them are zero, and so is what SWIGLUOAI makes of rows without weights and bias, so nothing has to be cut off between the
projections.

AITER rounds act(h) to fp8 by a plain cast, which saturates on gfx950 in the versions of Triton that we support.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inductor_ext.formats import MXFP4_GROUP, PackedMxfp4
from inductor_ext.fp8 import to_fp8
from inductor_ext.kernels import Expected, Layout, Mlp, MoeProblem, Packed, Routing
from inductor_ext.kernels.gpu.planes import filled
from inductor_ext.kernels.rows import rows

NAME = "aiter"
CHECKS_WEIGHTS = False

_PATHS = ("aiter.ops.triton.moe.", "aiter.ops.triton.")
"""Where its modules are, and where they were."""
_NEEDED = (
    *("x", "w", "x_scales", "w_scales", "x_static_scale", "quant_static_scale", "bias", "routing_data", "gather_indx"),
    *("scatter_indx", "gammas", "swizzle_mx_scale", "out_dtype", "apply_swiglu", "alpha", "limit"),
)
_N, _K = 1024, 512
"""What weights are filled up to. The swizzle takes 32 rows and 256 columns; the kernel takes up to 512 columns at once,
and reads the scales of all of them. Rows are twice that, since the pairs of rows of w13 are the columns of w2."""
_PAIRS_IN_FLOAT32 = 8192
"""So many results are kept in float32 until they are added up; of more the traffic would count (see MoeKernel.run)."""


# -- what is installed -------------------------------------------------------------------------------------------------


class Aiter(NamedTuple):
    gemm: Callable[..., Tensor]
    routing: Any
    """The module with RoutingData and ExptData, and in older ones GatherIndx and ScatterIndx."""


@functools.cache
def bound() -> Aiter | str:
    """The installed functions, or why they cannot be had, as a sentence."""
    if importlib.util.find_spec("aiter") is None:
        return "The package aiter is not installed."
    told = []
    for path in _PATHS:
        try:
            gemm = importlib.import_module(f"{path}moe_op_gemm_a8w4").moe_gemm_a8w4
            routing = importlib.import_module(f"{path}moe_routing.routing")
        except Exception as error:  # aiter compiles and asks the driver as it is imported
            told.append(f"{path}moe_op_gemm_a8w4: {type(error).__name__}: {error}")
            continue
        missing = [name for name in _NEEDED if name not in inspect.signature(gemm).parameters]
        if missing:
            return f"The installed aiter's moe_gemm_a8w4 has no {', '.join(missing)}."
        return Aiter(gemm, routing)
    return f"The installed aiter's moe_gemm_a8w4 does not load: {'; '.join(told)}."


def usable() -> str | None:
    if torch.version.hip is None:
        return "AITER is for AMD GPUs, and this torch is not built for them."
    found = bound()
    return found if isinstance(found, str) else None


def reject(problem: MoeProblem) -> str | None:
    if problem.op != "moe_mxfp4" or not problem.fp8:
        return "AITER's kernel is for MXFP4 weights with fp8 activations (W4A8)."
    if problem.device != "cuda" or problem.arch != "gfx950":
        return f"The scales are swizzled for gfx950; this is {problem.arch or problem.device}."
    if problem.dtype != torch.bfloat16:
        return f"AITER takes and gives bfloat16, not {problem.dtype}."
    if (reason := _why_not(problem.mlp)) is not None:
        return reason
    if problem.expert_map:
        return "AITER ignores expert_map: it would compute what is other devices' to compute."
    if problem.E >= 1 << 16:
        return f"AITER's map of blocks has 16 bits for an expert; there are {problem.E}."
    return None


def _why_not(mlp: Mlp) -> str | None:
    if (mlp.activation, mlp.gate_up) != ("swigluoai", "interleaved"):
        return f"AITER computes swigluoai of interleaved gates and ups, not {mlp.activation} ({mlp.gate_up})."
    if mlp.limit is None:
        return "AITER's swigluoai always clamps; there is no limit."
    if mlp.apply_router_weight_on_input:
        return "AITER would multiply by the router's weight after the activation, not before W13."
    return None


# -- layout ------------------------------------------------------------------------------------------------------------
#
# qweight  uint8 [E, Np, Kp/2]: as in the checkpoint, filled up with zeros; AITER gets the transpose [E, Kp/2, Np].
# scales   uint8 [E, Np/32, Kp]: of row n = 32 s + 16 a + r and group g = 8 c + 4 b + d, the byte at [s] and
#          (((4 c + d) 16 + r) 2 + b) 2 + a; AITER gets the transpose.


def pack(weight: PackedMxfp4, experts: int) -> Packed:
    codes, scales = (t.unflatten(0, (experts, -1)) for t in (weight.codes, weight.scales))
    N, K = codes.shape[1], weight.K
    down, across = filled(N, _N) - N, filled(K, _K)
    codes = F.pad(codes, (0, (across - K) // 2, 0, down)).contiguous()
    scales = F.pad(scales, (0, across // MXFP4_GROUP - scales.shape[2], 0, down))
    stripes = scales.view(experts, -1, 2, 16, across // 256, 2, 4).permute(0, 1, 4, 6, 3, 5, 2)
    return Packed(codes, stripes.reshape(experts, -1, across), None, None)


def unpack(packed: Packed, N: int, K: int, group_size: int) -> PackedMxfp4:
    experts, stripes, across = packed.scales.shape
    scales = packed.scales.view(experts, stripes, across // 256, 4, 16, 2, 2).permute(0, 1, 6, 4, 2, 5, 3)
    scales = scales.reshape(experts, stripes * 32, -1)[:, :N, : -(-K // MXFP4_GROUP)]
    return PackedMxfp4(packed.qweight[:, :N, : K // 2].flatten(0, 1), scales.flatten(0, 1))


def layout(packed: Packed, E: int, N: int, K: int, group_size: int) -> Layout:
    if K % 2:
        raise ValueError(f"K must be even, it is {K}.")
    tall, across = filled(N, _N), filled(K, _K)
    absent = Expected((0,), (torch.uint8,))
    qweight, scales = (E, tall, across // 2), (E, tall // 32, across)
    return Layout(Expected(qweight, (torch.uint8,)), Expected(scales, (torch.uint8,)), absent, absent)


# -- run ---------------------------------------------------------------------------------------------------------------


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
    aiter = bound()
    if isinstance(aiter, str):
        raise RuntimeError(aiter)
    if input_scales is None or x.dtype != torch.bfloat16:
        raise RuntimeError(f"AITER's kernel takes bfloat16 and the scales of fp8; x is {x.dtype}.")
    if (reason := _why_not(mlp)) is not None:  # an op may be called with a kernel's name by hand, too
        raise RuntimeError(reason)
    (T, H), E = x.shape, w13.qweight.shape[0]
    if T == 0:
        return torch.empty_like(x)
    s1, s2 = input_scales
    chosen = _chosen(aiter.routing, routing, E)
    quantised = F.pad(to_fp8(x, s1).view(torch.uint8), (0, 2 * w13.qweight.shape[2] - H))
    h = aiter.gemm(
        quantised.view(torch.float8_e4m3fn),
        w13.qweight.transpose(1, 2),
        None,
        w13.scales.transpose(1, 2),
        x_static_scale=s1,
        quant_static_scale=s2,
        bias=_bias(w13_bias, w13),
        routing_data=chosen.data,
        gather_indx=chosen.gather,
        swizzle_mx_scale="CDNA4_SCALE",
        out_dtype=torch.float8_e4m3fn,
        apply_swiglu=True,
        alpha=mlp.alpha,
        limit=mlp.limit,
    )
    y = aiter.gemm(
        h,
        w2.qweight.transpose(1, 2),
        None,
        w2.scales.transpose(1, 2),
        x_static_scale=s2,
        bias=_bias(w2_bias, w2),
        routing_data=chosen.data,
        scatter_indx=chosen.scatter,
        gammas=chosen.weights,
        swizzle_mx_scale="CDNA4_SCALE",
        out_dtype=torch.float32 if routing.topk_ids.numel() <= _PAIRS_IN_FLOAT32 else x.dtype,
    )
    return (y[:, :H] * mlp.routed_scaling).masked_fill(chosen.nobody, 0).to(x.dtype)


def _bias(bias: Tensor | None, weight: Packed) -> Tensor | None:
    """float32 [E, Np]"""
    return None if bias is None else F.pad(bias.float(), (0, weight.qweight.shape[1] - bias.shape[1]))


class _Chosen(NamedTuple):
    data: Any
    gather: Any
    """The pairs (token k + choice) in the order of the experts."""
    scatter: Any
    """Where in that order each pair is."""
    weights: Tensor
    """float32 [pairs] in that order."""
    nobody: Tensor
    """bool [T, 1]: no choice of the token is anybody's."""


def _chosen(module: Any, routing: Routing, E: int) -> _Chosen:
    """What AITER's routing gives, without waiting for a GPU. It has no choices of nobody: they go to another expert of
    the same token, with no weight."""
    ids = rows(routing, E)
    T, k = ids.shape
    somebody = ids >= 0
    first = ids.gather(1, somebody.int().argmax(1, keepdim=True)).clamp(min=0)
    flat = ids.where(somebody, first).flatten()
    gather = flat.argsort(stable=True)
    scatter = gather.argsort()
    weights = routing.topk_weights.float().where(somebody, 0).flatten()[gather]
    blocks = 16
    while blocks < min(T * k // E, 128):
        blocks *= 2
    data = _data(module, flat, weights, E, k, blocks)
    gather, scatter = gather.int(), scatter.int()
    nobody = ~somebody.any(1, keepdim=True)
    if hasattr(module, "GatherIndx"):  # until indices became plain tensors
        return _Chosen(data, module.GatherIndx(gather, scatter), module.ScatterIndx(scatter, gather), weights, nobody)
    return _Chosen(data, gather, scatter, weights, nobody)


def _data(module: Any, experts: Tensor, weights: Tensor, E: int, k: int, block_m: int) -> Any:
    """RoutingData: how many pairs each expert has, where its pairs and its blocks begin, and of each block its number
    among its expert's in the upper 16 bits and the expert in the lower; -1 where there is no block."""
    pairs = len(experts)
    count = torch.zeros(E, dtype=torch.int32, device=experts.device)
    count.scatter_add_(0, experts.long(), torch.ones_like(experts))
    begins = F.pad(count.cumsum(0), (1, 0)).int()
    blocks = F.pad(((count + block_m - 1) // block_m).cumsum(0), (1, 0)).int()
    most = pairs if pairs <= E else -(-(pairs - E + 1) // block_m) + E - 1
    block = torch.arange(most, dtype=torch.int32, device=experts.device)
    expert = torch.searchsorted(blocks[1:], block, right=True, out_int32=True).clamp(max=E - 1)
    word = ((block - blocks[expert]) << 16) | expert
    where = word.where(block < blocks[-1], -1)
    return module.RoutingData(block_m, weights, count, E, k, module.ExptData(count, begins, blocks, where))
