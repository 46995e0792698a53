"""``torch.ops.w4a16.gptq_gemm_rdna3_wmma`` and ``moe_gemm_w4a16``: int4 matmuls on RDNA 3 for many rows, dense and of
routed experts, with the names, layouts and meanings of the field's ops, so that their callers can call them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inductor_ext.ops.linear import LIB
from inductor_ext.ops.rdna3 import Door, no_gradient, refuse_any_gradient

# -- schema ------------------------------------------------------------------------------------------------------------
# As gptq_gemm_rdna3 (rdna3.py), in speed for 16 rows of a or more.
LIB.define(
    "gptq_gemm_rdna3_wmma(Tensor a, Tensor b_q_weight, Tensor b_qzeros, Tensor b_scales, bool use_v2_format) -> Tensor",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
# A [R, K] in float16 or bfloat16; w_packed int32 [E, N, K/8], codes 2 p and 2 p + 1 of a run of 8 along K in bits 4 p
# and 16 + 4 p, whose rows may be further apart than K/8, by an even number of words; w_scale [E, N, K/G] in A's dtype;
# zeros are 8. K and G are multiples of 32, G divides K, N is a multiple of 64. All but w_packed contiguous.
# Blocks of block_m = 32 slots of one expert, as w4a16::moe_align_block_size gives them: block b < num_blocks is of
# expert_ids[b], or, if that is not in 0..E-1, of nobody. A slot s < n_valid_tokens <= R top_k makes row s of C
# [>= n_valid_tokens, N] from row s // top_k of A. Rows below n_valid_tokens that no block of an expert has, those of
# dropped tokens, become zero, since C is cleared up to there first; rows from there on stay as they are.
# Sums are float32, rounded once. The same arguments give the same bits.
LIB.define(
    "moe_gemm_w4a16(Tensor A, Tensor w_packed, Tensor w_scale, Tensor sorted_token_ids, Tensor expert_ids, "
    "Tensor(c!) C, int n_valid_tokens, int top_k, int block_m, int num_blocks) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_DTYPES = (torch.float16, torch.bfloat16)
_LIMIT = 2**32
"""Offsets in bytes are 32 bits wide: of A's rows, and of an expert's."""


def _check_dense(a: Tensor, words: Tensor, zeros: Tensor, scales: Tensor) -> int:
    door = Door("gptq_gemm_rdna3_wmma", a.device)
    N = door.weight(a, words, scales, zeros, ())
    M, K = a.shape
    door.require(2 * M * K < _LIMIT, lambda: f"a must have less than {_LIMIT // 2} elements, it is {list(a.shape)}.")
    return N


def _check_moe(
    A: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    C: Tensor,
    n_valid_tokens: int,
    top_k: int,
    block_m: int,
    num_blocks: int,
) -> None:
    door = Door("moe_gemm_w4a16", A.device)
    door.require(A.dim() == 2, lambda: f"A must be [R, K], it is {list(A.shape)}.")
    door.tensor("A", A, tuple(A.shape), *_DTYPES)
    R, K = A.shape
    door.require(K > 0 and K % 32 == 0, lambda: f"A's K must be a positive multiple of 32, it is {K}.")
    door.require(2 * R * K < _LIMIT, lambda: f"A must have less than {_LIMIT // 2} elements, it is {list(A.shape)}.")
    door.require(w_packed.dim() == 3, lambda: f"w_packed must be [E, N, K/8], it is {list(w_packed.shape)}.")
    door.require(w_scale.dim() == 3, lambda: f"w_scale must be [E, N, K/G], it is {list(w_scale.shape)}.")
    E, N, groups = w_scale.shape
    door.require(E > 0, lambda: f"w_scale must have at least one expert, it is {list(w_scale.shape)}.")
    door.require(N > 0 and N % 64 == 0, lambda: f"w_scale's N must be a positive multiple of 64, it is {N}.")
    door.require(
        groups > 0 and K % (32 * max(groups, 1)) == 0,
        lambda: f"w_scale has {groups} groups for K={K}: the group size must be a multiple of 32 that divides K.",
    )
    door.tensor("w_scale", w_scale, (E, N, groups), A.dtype)
    _check_rows(door, w_packed, (E, N, K // 8))
    door.require(top_k >= 1, lambda: f"top_k must be at least 1, it is {top_k}.")
    door.require(block_m == 32, lambda: f"block_m must be 32, it is {block_m}.")
    door.require(
        0 <= n_valid_tokens <= R * top_k,
        lambda: f"n_valid_tokens must be within 0..{R * top_k}, A's rows times top_k; it is {n_valid_tokens}.",
    )
    door.require(C.dim() == 2, lambda: f"C must be [rows, N], it is {list(C.shape)}.")
    door.require(
        C.shape[0] >= n_valid_tokens, lambda: f"C must have at least {n_valid_tokens} rows, it is {list(C.shape)}."
    )
    door.tensor("C", C, (C.shape[0], N), A.dtype)
    door.tensor("sorted_token_ids", sorted_token_ids, (sorted_token_ids.numel(),), torch.int32)
    door.tensor("expert_ids", expert_ids, (expert_ids.numel(),), torch.int32)
    most = min(expert_ids.numel(), -(-sorted_token_ids.numel() // block_m))
    door.require(
        0 <= num_blocks <= most,
        lambda: (
            f"num_blocks must be within 0..{most}, for {expert_ids.numel()} expert_ids and {sorted_token_ids.numel()}"
            f" sorted_token_ids in blocks of {block_m}; it is {num_blocks}."
        ),
    )


def _check_rows(door: Door, words: Tensor, shape: tuple[int, int, int]) -> None:
    E, N, across = shape
    door.require(
        words.dtype == torch.int32, lambda: f"w_packed must be int32, it is {str(words.dtype).removeprefix('torch.')}."
    )
    door.require(tuple(words.shape) == shape, lambda: f"w_packed must be {list(shape)}, it is {list(words.shape)}.")
    door.require(words.device == door.device, lambda: f"w_packed is on {words.device}, A is on {door.device}.")
    expert, row, word = words.stride()
    door.require(
        word == 1 and row >= across and row % 2 == 0 and (expert == N * row or E == 1),
        lambda: (
            "w_packed must have strides [N r, r, 1] with r an even number of words, at least"
            f" {across}; they are {list(words.stride())}."
        ),
    )
    door.require(4 * N * row < _LIMIT, lambda: f"w_packed must have less than 4 GiB an expert, it has {4 * N * row}.")


# -- fake --------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("w4a16::gptq_gemm_rdna3_wmma", lib=LIB)
def _(a: Tensor, b_q_weight: Tensor, b_qzeros: Tensor, b_scales: Tensor, use_v2_format: bool) -> Tensor:
    return a.new_empty(a.shape[0], _check_dense(a, b_q_weight, b_qzeros, b_scales))


@torch.library.register_fake("w4a16::moe_gemm_w4a16", lib=LIB)
def _(*args: Any) -> None:
    _check_moe(*args)


# -- implementation ----------------------------------------------------------------------------------------------------


def _gemm(a: Tensor, b_q_weight: Tensor, b_qzeros: Tensor, b_scales: Tensor, use_v2_format: bool) -> Tensor:
    from inductor_ext.kernels.hip import dot, wmma

    N = _check_dense(a, b_q_weight, b_qzeros, b_scales)
    Door("gptq_gemm_rdna3_wmma", a.device).on_line(b_q_weight=b_q_weight, b_qzeros=b_qzeros, b_scales=b_scales)
    out = a.new_empty(a.shape[0], N)
    kind = dot.Zeros.NIBBLES if use_v2_format else dot.Zeros.NIBBLES_LESS_ONE
    wmma.gemm(a, b_q_weight, b_scales, b_qzeros, kind, None, out)
    return out


def _moe_gemm(
    A: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    C: Tensor,
    n_valid_tokens: int,
    top_k: int,
    block_m: int,
    num_blocks: int,
) -> None:
    from inductor_ext.kernels.hip import wmma

    _check_moe(
        A, w_packed, w_scale, sorted_token_ids, expert_ids, C, n_valid_tokens, top_k, block_m, num_blocks
    )  # fmt: skip
    refuse_any_gradient("moe_gemm_w4a16", A, C, w_scale)
    Door("moe_gemm_w4a16", A.device).on_line(w_packed=w_packed, w_scale=w_scale, C=C)
    rows = C[:n_valid_tokens].zero_()
    if n_valid_tokens > 0:
        slots = wmma.Slots(sorted_token_ids, expert_ids[:num_blocks], block_m, top_k)
        wmma.routed(A, wmma.Weight(w_packed, w_scale, by_row=True), slots, rows)


LIB.impl("gptq_gemm_rdna3_wmma", _gemm, "CompositeExplicitAutograd")
LIB.impl("moe_gemm_w4a16", _moe_gemm, "CompositeExplicitAutograd")

# -- autograd ----------------------------------------------------------------------------------------------------------


no_gradient("gptq_gemm_rdna3_wmma")

gptq_gemm_rdna3_wmma = torch.ops.w4a16.gptq_gemm_rdna3_wmma.default
moe_gemm_w4a16 = torch.ops.w4a16.moe_gemm_w4a16.default
