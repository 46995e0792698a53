"""Stand-ins for other people's packages: their signatures, every argument checked, and what they compute told by
readers of their layouts that know nothing of ours."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layouts import by_lanes, of_result
from torch import Tensor

from inductor_ext.layouts.marlin import Marlin

UINT4, UINT4B8 = 1125899906843648, 1125899907892224
"""vLLM's scalar_types.uint4.id and uint4b8.id."""


def whole(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert tuple(t.shape) == shape and t.dtype == dtype and t.is_contiguous(), (t.shape, t.dtype, t.stride(), shape)


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """An installed module, and the packages that it is in."""
    for i in range(name.count(".") + 1):
        path = ".".join(name.split(".")[: i + 1])
        if path not in sys.modules or path == name:
            made = ModuleType(path)
            made.__spec__ = importlib.machinery.ModuleSpec(path, None, is_package=True)
            made.__path__ = []
            monkeypatch.setitem(sys.modules, path, made)
    vars(sys.modules[name]).update(contents)


# -- Marlin ------------------------------------------------------------------------------------------------------------

DENSE = {
    "_C::marlin_gemm": "Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none, Tensor b_scales,"
    " Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none, Tensor? g_idx_or_none, Tensor? perm_or_none,"
    " Tensor workspace, int b_type_id, SymInt size_m, SymInt size_n, SymInt size_k, bool is_k_full,"
    " bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float",
    "gptqmodel_marlin_fp16::gptq_marlin_gemm_fp16": "Tensor a, Tensor? c, Tensor b_q_weight, Tensor? b_bias,"
    " Tensor b_scales, Tensor? global_scale, Tensor? b_zeros, Tensor? g_idx, Tensor? perm, Tensor workspace,"
    " int b_q_type_id, int size_m, int size_n, int size_k, bool is_k_full=True, bool use_atomic_add=False,"
    " bool use_fp32_reduce=False, bool is_zp_float=False, bool use_packed_prefill=False,"
    " int packed_prefill_config=0",
}
EXPERTS = {
    "_moe_C::moe_wna16_marlin_gemm": "Tensor! a, Tensor? c_or_none, Tensor! b_q_weight, Tensor? b_bias_or_none,"
    " Tensor! b_scales, Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none, Tensor? g_idx_or_none,"
    " Tensor? perm_or_none, Tensor! workspace, Tensor sorted_token_ids, Tensor! expert_ids,"
    " Tensor! num_tokens_past_padded, Tensor! topk_weights, int moe_block_size, int top_k, bool mul_topk_weights,"
    " int b_type_id, int size_m, int size_n, int size_k, bool is_full_k, bool use_atomic_add, bool use_fp32_reduce,"
    " bool is_zp_float, int thread_k, int thread_n, int blocks_per_sm",
    "sgl_kernel::moe_wna16_marlin_gemm": "Tensor! a, Tensor? c_or_none, Tensor! b_q_weight, Tensor? b_bias_or_none,"
    " Tensor! b_scales, Tensor? global_scale, Tensor? b_zeros_or_none, Tensor? g_idx_or_none, Tensor? perm_or_none,"
    " Tensor! workspace, Tensor sorted_token_ids, Tensor! expert_ids, Tensor! num_tokens_past_padded,"
    " Tensor! topk_weights, int moe_block_size, int top_k, bool mul_topk_weights, bool is_ep, int b_q_type_id,"
    " int size_m, int size_n, int size_k, bool is_k_full, bool use_atomic_add, bool use_fp32_reduce,"
    " bool is_zp_float",
}
"""Their schemas."""
_ORDINARY = {
    "a_scales": None, "global_scale": None, "g_idx": None, "perm": None, "is_k_full": True, "is_ep": False,
    "use_atomic_add": False, "use_fp32_reduce": True, "is_zp_float": False, "thread_k": -1, "thread_n": -1,
    "blocks_per_sm": -1, "use_packed_prefill": False, "packed_prefill_config": 0,
}  # fmt: skip
"""What an ordinary call has, by the names without their endings."""


@contextmanager
def op(name: str, arguments: str, compute: Any) -> Iterator[None]:
    """An op of this schema, which gets its arguments by their plain names."""
    namespace, short = name.split("::")
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(f"{short}({arguments}) -> Tensor")
    names = [a.name for a in getattr(getattr(torch.ops, namespace), short).default._schema.arguments]

    def called(*given: Any, **named: Any) -> Tensor:
        every = dict(zip(names, given, strict=False)) | named
        plain = {name.replace("_or_none", "").replace("is_full_k", "is_k_full"): v for name, v in every.items()}
        for name, value in _ORDINARY.items():
            assert plain.pop(name, value) == value, name
        y: Tensor = compute(**plain)
        return y

    library.impl(short, called, "CompositeExplicitAutograd")
    try:
        yield
    finally:
        library._destroy()


def marlin_weight(
    b_q_weight: Tensor, b_scales: Tensor, b_zeros: Tensor | None, kind: int, size_n: int, size_k: int
) -> Tensor:
    """float64 [E, N, K], read by lanes."""
    E, groups = b_q_weight.shape[0], b_scales.shape[1]
    whole(b_q_weight, (E, size_k // 16, 2 * size_n), torch.int32)
    assert b_scales.shape == (E, groups, size_n) and b_scales.is_contiguous() and size_k % groups == 0
    assert kind == (UINT4B8 if b_zeros is None else UINT4)
    if b_zeros is not None:
        whole(b_zeros, (E, groups, size_n // 8), torch.int32)
    none = b_q_weight.new_empty(E, 0)
    packed = Marlin(b_q_weight, b_scales, b_zeros, none, none, None)
    return torch.tensor([by_lanes(packed, e) for e in range(E)], dtype=torch.float64)


def _locks(workspace: Tensor) -> None:
    assert workspace.dtype == torch.int32 and workspace.numel() >= 128 and not workspace.any()


def marlin_gemm(
    a: Tensor, c: Tensor | None, b_q_weight: Tensor, b_bias: Tensor | None, b_scales: Tensor, b_zeros: Tensor | None,
    workspace: Tensor, size_m: int, size_n: int, size_k: int, b_type_id: int = 0, b_q_type_id: int = 0,
) -> Tensor:  # fmt: skip
    assert c is None
    whole(a, (size_m, size_k), b_scales.dtype)
    _locks(workspace)
    zeros = None if b_zeros is None else b_zeros[None]
    w = marlin_weight(b_q_weight[None], b_scales[None], zeros, b_type_id or b_q_type_id, size_n, size_k)[0]
    y = a.double() @ w.T
    if b_bias is not None:
        whole(b_bias, (size_n,), a.dtype)
        y += torch.tensor(of_result(b_bias.tolist()), dtype=torch.float64)
    return y.to(a.dtype)


def moe_wna16_marlin_gemm(
    a: Tensor, c: Tensor, b_q_weight: Tensor, b_bias: Tensor | None, b_scales: Tensor, b_zeros: Tensor | None,
    workspace: Tensor, sorted_token_ids: Tensor, expert_ids: Tensor, num_tokens_past_padded: Tensor,
    topk_weights: Tensor, moe_block_size: int, top_k: int, mul_topk_weights: bool, size_m: int, size_n: int,
    size_k: int, b_type_id: int = 0, b_q_type_id: int = 0,
) -> Tensor:  # fmt: skip
    whole(a, (size_m, size_k), b_scales.dtype)
    slots = size_m * top_k
    whole(c, (slots, size_n), a.dtype)
    _locks(workspace)
    assert moe_block_size in (8, 16, 32, 48, 64)
    assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous() and topk_weights.numel() == slots
    end = int(num_tokens_past_padded)
    assert end % moe_block_size == 0 and end <= sorted_token_ids.numel()
    assert sorted_token_ids.dtype == expert_ids.dtype == num_tokens_past_padded.dtype == torch.int32
    w = marlin_weight(b_q_weight, b_scales, b_zeros, b_type_id or b_q_type_id, size_n, size_k)
    for block in range(end // moe_block_size):
        e = int(expert_ids[block])
        for slot in sorted_token_ids[block * moe_block_size :][:moe_block_size].tolist():
            if slot < slots and e >= 0:
                y = w[e] @ a[slot // top_k].double()
                if b_bias is not None:
                    y += torch.tensor(of_result(b_bias[e].tolist()), dtype=torch.float64)
                c[slot] = (y * topk_weights.view(-1)[slot] if mul_topk_weights else y).to(a.dtype)
    return c


# -- FlashInfer --------------------------------------------------------------------------------------------------------


def mxint4_weight(weights: Tensor, scales: Tensor, gated: bool) -> Tensor:
    """float64 [E, N, K]: by the kernel's rows, blocks of 128 bytes and tiles of scales."""
    E, across, N, _ = weights.shape
    K = 256 * across
    whole(weights, (E, across, N, 128), torch.uint8)
    whole(scales, (E, N, K // 32), torch.bfloat16)
    row, k = torch.arange(N), torch.arange(K)
    n = row // 32 * 32 + 4 * (row % 8) + row % 32 // 8
    if gated:
        n = n // 2 + torch.where(n % 2 == 0, N // 2, 0)
    byte = weights[:, (k // 256)[None, :], row[:, None], (k % 256 // 2)[None, :]].int()
    nibble = (byte >> (4 * (k % 2)).int()) & 15
    signed = (nibble - 16 * (nibble > 7).int()).double()
    g = (k // 32)[None, :]
    r = row[:, None]
    at = (r // 128 * (K // 128) + g // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + g % 4
    w = torch.empty(E, N, K, dtype=torch.float64)
    w[:, n] = signed * scales.view(E, -1)[:, at].double()
    return w


def trtllm_mxint4_block_scale_routed_moe(
    topk_ids: Tensor,
    hidden_states: Tensor,
    gemm1_weights: Tensor,
    gemm1_weights_scale: Tensor,
    gemm1_alpha: Tensor | None,
    gemm1_beta: Tensor | None,
    gemm1_clamp_limit: Tensor | None,
    gemm2_weights: Tensor,
    gemm2_weights_scale: Tensor,
    num_experts: int,
    top_k: int,
    n_group: int | None,
    topk_group: int | None,
    intermediate_size: int,
    local_expert_offset: int,
    local_num_experts: int,
    routed_scaling_factor: float | None,
    routing_method_type: int = 0,
    do_finalize: bool = True,
    enable_pdl: bool | None = None,
    gemm1_lora_delta: Tensor | None = None,
    output: Tensor | None = None,
    tune_max_num_tokens: int = 8192,
) -> list[Tensor]:
    T, H = hidden_states.shape
    whole(hidden_states, (T, H), torch.bfloat16)
    whole(topk_ids, (T, top_k), torch.int32)
    assert (gemm1_alpha, gemm1_beta, gemm1_clamp_limit, n_group, topk_group, routed_scaling_factor) == (None,) * 6
    assert (local_expert_offset, local_num_experts, routing_method_type) == (0, num_experts, 1)
    assert do_finalize and output is None and gemm1_lora_delta is None
    w13, w2 = (
        mxint4_weight(gemm1_weights, gemm1_weights_scale, True),
        mxint4_weight(gemm2_weights, gemm2_weights_scale, False),
    )
    assert w13.shape == (num_experts, 2 * intermediate_size, H) and w2.shape == (num_experts, H, intermediate_size)
    ids = topk_ids >> 16
    assert int(ids.min()) >= 0 and int(ids.max()) < num_experts
    weights = (topk_ids & 0xFFFF).to(torch.int16).view(torch.bfloat16)
    gate, up = torch.einsum("th,tknh->tkn", hidden_states.double(), w13[ids.long()]).chunk(2, -1)
    y = torch.einsum("tki,tkhi->tkh", F.silu(gate) * up, w2[ids.long()])
    return [(weights.double()[..., None] * y).sum(1).bfloat16()]


# -- vllm_xpu_kernels --------------------------------------------------------------------------------------------------


def xpu_fused_moe(
    hidden_states: Tensor, w13: Tensor, w13_scales: Tensor, w13_bias: Tensor | None, w2: Tensor, w2_scales: Tensor,
    w2_bias: Tensor | None, topk_weights: Tensor, topk_ids: Tensor, n_experts_per_token: int, activation: str,
    num_experts: int, ep_rank: int = 0, ep_size: int = 1, expert_map: Tensor | None = None,
    output: Tensor | None = None, is_fp8: bool = False, is_int4: bool = False, is_mxfp4: bool = False,
) -> Tensor:  # fmt: skip
    """The callee changes codes that are not marked, as it does."""
    T, H = hidden_states.shape
    E, k = num_experts, n_experts_per_token
    assert is_int4 and not is_fp8 and not is_mxfp4 and output is None and (ep_rank, ep_size) == (0, 1)
    if not hasattr(w13, "xpu_fused_moe"):
        w13.data, w2.data = w13 ^ 0x88, w2 ^ 0x88
        w13.xpu_fused_moe = True  # type: ignore[attr-defined]
    whole(hidden_states, (T, H), w13_scales.dtype)
    whole(topk_weights, (T, k), torch.float32)
    assert topk_ids.shape == (T, k) and topk_ids.dtype in (torch.int32, torch.int64) and expert_map is not None
    assert expert_map.dtype == torch.int32 and int(topk_ids.min()) >= 0 and int(topk_ids.max()) < expert_map.numel()

    def dense(words: Tensor, scales: Tensor) -> Tensor:
        assert words.dtype == torch.uint8 and words.is_contiguous() and scales.is_contiguous()
        K = 2 * words.shape[2]
        nibble = torch.stack((words & 15, words >> 4), -1).flatten(2).int()
        signed = (nibble - 16 * (nibble > 7).int()).double()
        return signed * scales.double().repeat_interleave(K // scales.shape[2], 2)

    a, b = dense(w13, w13_scales), dense(w2, w2_scales)
    assert a.shape[0] == b.shape[0] == E and a.shape[2] == H == b.shape[1] and 2 * b.shape[2] == a.shape[1]
    out = torch.zeros(T, H, dtype=torch.float64)
    for t in range(T):
        for j in range(k):
            e = int(expert_map[topk_ids[t, j]])
            if e >= 0:
                h = a[e] @ hidden_states[t].double() + (0 if w13_bias is None else w13_bias[e].double())
                if activation == "swigluoai":
                    gate, up = h[::2].clamp(max=7.0), h[1::2].clamp(-7.0, 7.0)
                    act = (up + 1) * gate * torch.sigmoid(1.702 * gate)
                else:
                    gate, up = h.chunk(2)
                    act = {"silu": F.silu, "gelu": F.gelu}[activation](gate) * up
                y = b[e] @ act + (0 if w2_bias is None else w2_bias[e].double())
                out[t] += topk_weights[t, j].double() * y
    return out.to(hidden_states.dtype)
