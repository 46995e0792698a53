"""``torch.ops.w4a16.gptq_gemm_rdna3`` and ``moe_gptq_gemm_rdna3``: int4 matmuls on RDNA, dense and of routed experts,
with the names, layouts and meanings of vLLM's ops, so that their callers can call them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inductor_ext.ops.linear import LIB

# -- schema ------------------------------------------------------------------------------------------------------------
# Weights [K, N], contiguous: words int32 [K/8, N], codes 2 p and 2 p + 1 of a run of 8 along K in bits 4 p and 16 + 4 p
# (EXLLAMA in formats.py); scales [K/G, N] in a's dtype, float16 or bfloat16; zeros int32 [K/G, N/8], nibbles in order,
# holding zero - 1, or the zero itself with use_v2_format. K and G are multiples of 32, G divides K, N is one of 8.
# Sums are float32, rounded once. The same arguments give the same bits.
#
# a [M, K] -> a new [M, N] in a's dtype.
LIB.define(
    "gptq_gemm_rdna3(Tensor a, Tensor b_q_weight, Tensor b_qzeros, Tensor b_scales, bool use_v2_format) -> Tensor",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
# Weights of E experts, E in front of each tensor; zeros are stored less one. A slot s < R top_k is a choice of an
# expert: it multiplies row s // top_k of a [R, K] and, with mul_topk_weight, that by topk_weights[s] (float32
# [R top_k], or empty: ones), and is added to row s of c [R top_k, N], or, if output_topk is not 0, to row
# s // output_topk of c [R top_k / output_topk, N]. sorted_token_ids, expert_ids, num_tokens_post_padded: blocks of
# block_size_m (1, 2, 4, 8) slots of one expert as w4a16::moe_align_block_size gives them; what belongs to no slot or no
# expert adds nothing.
LIB.define(
    "moe_gptq_gemm_rdna3(Tensor a, Tensor(c!) c, Tensor b_q_weight, Tensor b_scales, Tensor b_qzeros, "
    "Tensor topk_weights, Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_padded, int top_k, "
    "int block_size_m, bool mul_topk_weight, int output_topk=0) -> ()",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)

_DTYPES = (torch.float16, torch.bfloat16)
_HEIGHTS = (1, 2, 4, 8)
_LIMIT = 2**31
"""Offsets in bytes are 32 bits wide: of rows of a, and of the columns of a weight."""


class Door:
    """Checks of one op. They raise RuntimeError naming the argument, what it was and what is allowed."""

    def __init__(self, op: str, device: torch.device) -> None:
        self.op, self.device = op, device

    def require(self, ok: Any, message: Callable[[], str]) -> None:
        if ok is not True:  # a plain True costs nothing; False raises and a SymBool becomes a guard
            torch._check(ok, lambda: f"w4a16::{self.op}: {message()}")

    def tensor(self, name: str, t: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        allowed = " or ".join(map(_name, dtypes))
        self.require(t.dtype in dtypes, lambda: f"{name} must be {allowed}, it is {_name(t.dtype)}.")
        self.require(tuple(t.shape) == shape, lambda: f"{name} must be {list(shape)}, it is {list(t.shape)}.")
        self.require(t.device == self.device, lambda: f"{name} is on {t.device}, a is on {self.device}.")
        self.require(t.is_contiguous(), lambda: f"{name} must be contiguous, it has strides {list(t.stride())}.")

    def dimensions(self, name: str, t: Tensor, of: str) -> None:
        self.require(t.dim() == of.count(",") + 1, lambda: f"{name} must be {of}, it is {list(t.shape)}.")

    def on_line(self, **tensors: Tensor) -> None:
        """Of tensors that are not to be copied."""
        for name, t in tensors.items():
            if t.data_ptr() % 16 != 0:
                self.require(False, functools.partial(_off_line, name))

    def weight(self, a: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, experts: tuple[int, ...]) -> int:
        """N of a weight, or of those of so many experts."""
        lead = "E, " if experts else ""
        self.require(a.dim() == 2, lambda: f"a must have two dimensions, it is {list(a.shape)}.")
        self.tensor("a", a, tuple(a.shape), *_DTYPES)
        K = a.shape[1]
        self.require(K > 0 and K % 32 == 0, lambda: f"a's K must be a positive multiple of 32, it is {K}.")
        self.dimensions("b_q_weight", words, f"[{lead}K/8, N]")
        self.dimensions("b_scales", scales, f"[{lead}K/G, N]")
        N, groups = words.shape[-1], scales.shape[-2]
        self.require(N > 0 and N % 8 == 0, lambda: f"b_q_weight's N must be a positive multiple of 8, it is {N}.")
        self.require(
            groups > 0 and K % (32 * max(groups, 1)) == 0,
            lambda: f"b_scales has {groups} groups for K={K}: the group size must be a multiple of 32 that divides K.",
        )
        self.require(N < _LIMIT // 32, lambda: f"b_q_weight's N must be less than {_LIMIT // 32}, it is {N}.")
        self.tensor("b_q_weight", words, (*experts, K // 8, N), torch.int32)
        self.tensor("b_scales", scales, (*experts, groups, N), a.dtype)
        self.tensor("b_qzeros", zeros, (*experts, groups, N // 8), torch.int32)
        return N


def _check_dense(a: Tensor, words: Tensor, zeros: Tensor, scales: Tensor) -> int:
    return Door("gptq_gemm_rdna3", a.device).weight(a, words, scales, zeros, ())


def _check_moe(
    a: Tensor,
    c: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    topk_weights: Tensor,
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    top_k: int,
    block_size_m: int,
    mul_topk_weight: bool,
    output_topk: int = 0,
) -> None:
    door = Door("moe_gptq_gemm_rdna3", a.device)
    N = door.weight(a, words, scales, zeros, (words.shape[0],))
    rows, K = a.shape
    door.require(rows * K < _LIMIT, lambda: f"a must have less than {_LIMIT} elements, it is {list(a.shape)}.")
    door.require(top_k >= 1, lambda: f"top_k must be at least 1, it is {top_k}.")
    door.require(block_size_m in _HEIGHTS, lambda: f"block_size_m must be 1, 2, 4 or 8, it is {block_size_m}.")
    slots = rows * top_k
    door.require(
        output_topk == 0 or (output_topk > 0 and slots % output_topk == 0),
        lambda: f"output_topk must be 0 or divide a's rows times top_k, {slots}; it is {output_topk}.",
    )
    door.tensor("c", c, (slots // max(output_topk, 1), N), a.dtype)
    given = topk_weights.numel()
    door.require(given in (0, slots), lambda: f"topk_weights must have {slots} elements or none, it has {given}.")
    door.tensor("topk_weights", topk_weights, tuple(topk_weights.shape), torch.float32)
    door.dimensions("sorted_token_ids", sorted_token_ids, "[slots]")
    door.dimensions("expert_ids", expert_ids, "[blocks]")
    door.tensor("sorted_token_ids", sorted_token_ids, tuple(sorted_token_ids.shape), torch.int32)
    door.tensor("expert_ids", expert_ids, tuple(expert_ids.shape), torch.int32)
    blocks, experts = sorted_token_ids.shape[0] // block_size_m, expert_ids.shape[0]
    door.require(
        experts >= blocks,
        lambda: f"expert_ids must have an element for each of {blocks} blocks of sorted_token_ids, it has {experts}.",
    )
    door.tensor("num_tokens_post_padded", num_tokens_post_padded, (1,), torch.int32)


def _off_line(name: str) -> str:
    return f"{name} must begin at an address that is a multiple of 16; a clone does."


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- fake --------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("w4a16::gptq_gemm_rdna3", lib=LIB)
def _(a: Tensor, b_q_weight: Tensor, b_qzeros: Tensor, b_scales: Tensor, use_v2_format: bool) -> Tensor:
    return a.new_empty(a.shape[0], _check_dense(a, b_q_weight, b_qzeros, b_scales))


@torch.library.register_fake("w4a16::moe_gptq_gemm_rdna3", lib=LIB)
def _(*args: Any) -> None:
    _check_moe(*args)


# -- implementation ----------------------------------------------------------------------------------------------------


def _gemm(a: Tensor, b_q_weight: Tensor, b_qzeros: Tensor, b_scales: Tensor, use_v2_format: bool) -> Tensor:
    from inductor_ext.kernels.hip import dense, dot

    N = _check_dense(a, b_q_weight, b_qzeros, b_scales)
    Door("gptq_gemm_rdna3", a.device).on_line(b_q_weight=b_q_weight, b_qzeros=b_qzeros, b_scales=b_scales)
    out = a.new_empty(a.shape[0], N)
    kind = dot.Zeros.NIBBLES if use_v2_format else dot.Zeros.NIBBLES_LESS_ONE
    dense.gemm(a, b_q_weight, b_scales, b_qzeros, kind, None, out)
    return out


def _moe_gemm(
    a: Tensor,
    c: Tensor,
    b_q_weight: Tensor,
    b_scales: Tensor,
    b_qzeros: Tensor,
    topk_weights: Tensor,
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    top_k: int,
    block_size_m: int,
    mul_topk_weight: bool,
    output_topk: int = 0,
) -> None:
    from inductor_ext.kernels.hip import dot, moe

    _check_moe(
        a, c, b_q_weight, b_scales, b_qzeros, topk_weights, sorted_token_ids, expert_ids, num_tokens_post_padded,
        top_k, block_size_m, mul_topk_weight, output_topk,
    )  # fmt: skip
    refuse_any_gradient("moe_gptq_gemm_rdna3", a, c, b_scales, topk_weights)
    Door("moe_gptq_gemm_rdna3", a.device).on_line(b_q_weight=b_q_weight, b_qzeros=b_qzeros, b_scales=b_scales, c=c)
    moe.gemm(
        a, b_q_weight, b_scales, b_qzeros, dot.Zeros.NIBBLES_LESS_ONE, sorted_token_ids, expert_ids,
        num_tokens_post_padded, topk_weights if mul_topk_weight and topk_weights.numel() else None, c, block_size_m,
        top_k, max(output_topk, 1),
    )  # fmt: skip


LIB.impl("gptq_gemm_rdna3", _gemm, "CompositeExplicitAutograd")
LIB.impl("moe_gptq_gemm_rdna3", _moe_gemm, "CompositeExplicitAutograd")

# -- autograd ----------------------------------------------------------------------------------------------------------


def no_gradient(op: str) -> None:
    """Without this PyTorch would warn and go on with no gradient."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(f"w4a16::{op} has no gradient, as in the field; torch.ops.w4a16.linear has one.")

    torch.library.register_autograd(f"w4a16::{op}", backward, lib=LIB)


def refuse_any_gradient(op: str, *tensors: Tensor) -> None:
    """The same for an op that writes into an argument, where the result would have none without a word."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise NotImplementedError(
            f"w4a16::{op} has no gradient, as in the field; torch.ops.w4a16.moe has one. Call it under torch.no_grad()."
        )


no_gradient("gptq_gemm_rdna3")

gptq_gemm_rdna3 = torch.ops.w4a16.gptq_gemm_rdna3.default
moe_gptq_gemm_rdna3 = torch.ops.w4a16.moe_gptq_gemm_rdna3.default
