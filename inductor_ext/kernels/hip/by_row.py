"""The WMMA kernel for ``w4a16::moe`` on RDNA 3 that reads weights by row, as the field's ``moe_gemm_w4a16`` does: for
callers that have them so, or ask for the field's backend.

    qweight  int32 [E, N, K/8 or more]: codes 2 p and 2 p + 1 of 8 neighbours along K in bits 4 p and 16 + 4 p; what a
             row has more is not read (``wmma.by_row``)
    scales   [E, N, K/G], in the activations' dtype

Kernel "hip" does the same from another layout, with zeros, and in less time for few tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_ext import devices
from inductor_ext.formats import PackedInt
from inductor_ext.kernels import Expected, Layout, Mlp, MoeProblem, Packed, Routing
from inductor_ext.kernels.hip import dot, experts, linear, runtime, wmma
from inductor_ext.layouts import wmma as by_row
from inductor_ext.layouts.experts import parted

NAME = "rdna3_wmma"
CHECKS_WEIGHTS = False

_HEIGHT = 32

usable = runtime.why_unusable


def reject(problem: MoeProblem) -> str | None:
    if (reason := experts.reject(problem)) is not None:
        return reason
    rows = problem.I * (1 if problem.mlp.gate_up == "none" else 2)
    for weight, N in ((problem.w13, rows), (problem.w2, problem.H)):
        if weight.zeros != "none":
            return "The weights must be symmetric: the layout has no zeros."
        if N % by_row.ROWS != 0:
            return f"N must be a multiple of {by_row.ROWS}, not {N}."
    return None


def pack(weight: PackedInt, experts: int) -> Packed:
    packed = by_row.pack(parted(weight, experts), devices.of(weight.codes.device).arch)
    words = packed.words
    whole = words.as_strided((*words.shape[:2], words.stride(1)), words.stride())
    return Packed(whole, packed.scales.contiguous(), None, None)


def unpack(packed: Packed, N: int, K: int, group_size: int) -> PackedInt:
    return by_row.unpack(_weight(packed, K, None)).joined()


def layout(packed: Packed, E: int, N: int, K: int, group_size: int) -> Layout:
    if (reason := linear.why_not(N, K, group_size)) is not None:
        raise ValueError(reason)
    if N % by_row.ROWS != 0:
        raise ValueError(f"N must be a multiple of {by_row.ROWS}, it is {N}.")
    if packed.zeros is not None:
        raise ValueError("zeros must be None: the layout has a place for none.")
    wide = packed.qweight.shape[2] if packed.qweight.dim() == 3 else 0
    across = wide if wide >= K // 8 and wide % 2 == 0 else K // 8
    groups = Expected((E, N, K // group_size), tuple(dot.NAMES))
    return Layout(Expected((E, N, across), (torch.int32,)), groups, groups, Expected((K,), (torch.int32,)))


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
    experts.require(x, routing, w13, w2, intermediate_size)
    if routing.topk_ids.numel() == 0:
        return torch.zeros_like(x)
    routing = experts.contiguous(routing)
    first, second = _weight(w13, x.shape[1], w13_bias), _weight(w2, intermediate_size, w2_bias)
    return experts.many(x, routing, first, second, mlp, intermediate_size, _HEIGHT)


def _weight(packed: Packed, K: int, bias: Tensor | None) -> wmma.Weight:
    return wmma.Weight(packed.qweight[..., : K // 8], packed.scales, bias=bias, by_row=True)
