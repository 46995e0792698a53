"""`torch.ops.w4a16.gptq_gemm_rdna3_wmma` and `moe_gemm_w4a16` as ops: what they refuse, what tracing sees. What they
compute is in test_rdna3_wmma.py."""

from __future__ import annotations

from typing import Any

import hip_lanes
import pytest
import torch
from rdna3 import DTYPES, Weight, drawn
from rdna3_wmma import Routed, moe_gemm
from test_rdna3_ops import refused

import inductor_ext.ops  # noqa: F401  registers torch.ops.w4a16

gemm = torch.ops.w4a16.gptq_gemm_rdna3_wmma


def dense(M: int = 20, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    w = Weight(128, 16, 64, dtype)
    a = drawn(M, 128, dtype=dtype)
    return {"a": a, "b_q_weight": w.words, "b_qzeros": w.zeros, "b_scales": w.scales, "use_v2_format": False}


def routed(T: int = 3, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    return Routed(4, 128, 64, 2, T, G=32, dtype=dtype).arguments()


def test_the_signatures_are_the_field_s() -> None:
    assert str(gemm.default._schema) == (
        "w4a16::gptq_gemm_rdna3_wmma(Tensor a, Tensor b_q_weight, Tensor b_qzeros, Tensor b_scales, bool use_v2_format)"
        " -> Tensor"
    )
    assert str(moe_gemm.default._schema) == (
        "w4a16::moe_gemm_w4a16(Tensor A, Tensor w_packed, Tensor w_scale, Tensor sorted_token_ids, Tensor expert_ids,"
        " Tensor(c!) C, int n_valid_tokens, int top_k, int block_m, int num_blocks) -> ()"
    )


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": torch.zeros(3, 120).half()}, "a's K must be a positive multiple of 32, it is 120"),
        ({"b_q_weight": torch.zeros(8, 16).int()}, r"b_q_weight must be \[16, 16\], it is \[8, 16\]"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_mistake_is_named(changed: dict[str, Any], message: str) -> None:
    refused(gemm, dense() | changed, message)


WORDS = torch.zeros(4, 64, 16, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"A": torch.zeros(3, 128)}, "A must be float16 or bfloat16, it is float32"),
        ({"A": torch.zeros(128).half()}, r"A must be \[R, K\], it is \[128\]"),
        ({"A": torch.zeros(128, 3).half().t()}, r"A must be contiguous, it has strides \[1, 3\]"),
        ({"A": torch.zeros(3, 120).half()}, "A's K must be a positive multiple of 32, it is 120"),
        ({"w_packed": WORDS[0]}, r"w_packed must be \[E, N, K/8\], it is \[64, 16\]"),
        ({"w_packed": WORDS.long()}, "w_packed must be int32, it is int64"),
        ({"w_packed": WORDS[:3]}, r"w_packed must be \[4, 64, 16\], it is \[3, 64, 16\]"),
        ({"w_packed": WORDS.transpose(0, 2).contiguous().transpose(0, 2)}, "w_packed must have strides"),
        (
            {"w_packed": torch.zeros(4, 64, 17).int()[..., :16]},
            r"w_packed must have strides .*with r an even number of words, at least 16",
        ),
        ({"w_packed": torch.zeros(4, 66, 16).int()[:, :64]}, "w_packed must have strides"),
        ({"w_packed": WORDS.to("meta")}, "w_packed is on meta, A is on cpu"),
        ({"w_scale": torch.zeros(4, 64).half()}, r"w_scale must be \[E, N, K/G\], it is \[4, 64\]"),
        ({"w_scale": torch.zeros(4, 64, 4)}, "w_scale must be float16, it is float32"),
        ({"w_scale": torch.zeros(4, 32, 4).half()}, "w_scale's N must be a positive multiple of 64, it is 32"),
        (
            {"w_scale": torch.zeros(4, 64, 3).half()},
            "w_scale has 3 groups for K=128: the group size must be a multiple",
        ),
        ({"w_scale": torch.zeros(4, 64, 0).half()}, "w_scale has 0 groups for K=128"),
        ({"sorted_token_ids": torch.zeros(128).long()}, "sorted_token_ids must be int32, it is int64"),
        ({"sorted_token_ids": torch.zeros(4, 32).int()}, r"sorted_token_ids must be \[128\], it is \[4, 32\]"),
        ({"expert_ids": torch.zeros(8).int()[::2]}, r"expert_ids must be contiguous, it has strides \[2\]"),
        ({"C": torch.zeros(9, 64).bfloat16()}, "C must be float16, it is bfloat16"),
        ({"C": torch.zeros(9, 128).half()}, r"C must be \[9, 64\], it is \[9, 128\]"),
        ({"C": torch.zeros(5, 64).half()}, r"C must have at least 6 rows, it is \[5, 64\]"),
        ({"n_valid_tokens": 7}, "n_valid_tokens must be within 0..6, A's rows times top_k; it is 7"),
        ({"n_valid_tokens": -1}, "n_valid_tokens must be within 0..6"),
        ({"top_k": 0}, "top_k must be at least 1, it is 0"),
        ({"block_m": 16}, "block_m must be 32, it is 16"),
        ({"block_m": 64}, "block_m must be 32, it is 64"),
        ({"num_blocks": -1}, r"num_blocks must be within 0\.\..*; it is -1"),
        ({"num_blocks": 100}, r"num_blocks must be within 0\.\..*; it is 100"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_mistake_with_experts_is_named(changed: dict[str, Any], message: str) -> None:
    refused(moe_gemm, routed() | changed, message)


def test_an_arch_without_wmma_kernels_is_told() -> None:
    for arch in ("gfx1200", "gfx1201"):
        with hip_lanes.on(arch):
            for op, arguments in ((gemm, dense()), (moe_gemm, routed())):
                with pytest.raises(RuntimeError, match=f"There is no kernel wmma_.* for {arch}"):
                    op(**arguments)


def test_there_is_no_gradient_and_it_says_so() -> None:
    with hip_lanes.on("gfx1100"):
        y = gemm(**dense() | {"a": drawn(20, 128, dtype=torch.float16).requires_grad_()})
    with pytest.raises(NotImplementedError, match="has no gradient, as in the field"):
        y.sum().backward()


# -- traced ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_dense(dtype: torch.dtype) -> None:
    with hip_lanes.on("gfx1100"):
        torch.library.opcheck(gemm.default, tuple(dense(dtype=dtype).values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_experts(dtype: torch.dtype) -> None:
    arguments = routed(dtype=dtype) | {"C": torch.zeros(9, 64, dtype=dtype)}
    with hip_lanes.on("gfx1100"):
        torch.library.opcheck(moe_gemm.default, tuple(arguments.values()))
