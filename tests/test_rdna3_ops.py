"""`torch.ops.w4a16.gptq_gemm_rdna3` and `moe_gptq_gemm_rdna3` as ops: what they refuse, what tracing sees. What they
compute is in test_rdna3_dense.py and test_rdna3_moe.py."""

from __future__ import annotations

from typing import Any

import hip_lanes
import pytest
import torch
from rdna3 import DTYPES, Routed, Weight, drawn, gemm, moe_gemm
from torch import Tensor
from torch._subclasses import FakeTensorMode

import inductor_ext.ops


def dense(M: int = 3, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    w = Weight(128, 16, 64, dtype)
    return {
        "a": drawn(M, 128, dtype=dtype),
        "b_q_weight": w.words,
        "b_qzeros": w.zeros,
        "b_scales": w.scales,
        "use_v2_format": False,
    }


def routed(**kinds: Any) -> dict[str, Any]:
    problem = Routed(3, 2, Weight(128, 16, 64, torch.float16, E=4), 2, **kinds)
    return problem.arguments(problem.empty())


def test_the_signatures_are_the_field_s() -> None:
    assert str(inductor_ext.ops.gptq_gemm_rdna3._schema) == (
        "w4a16::gptq_gemm_rdna3(Tensor a, Tensor b_q_weight, Tensor b_qzeros, Tensor b_scales, bool use_v2_format)"
        " -> Tensor"
    )
    assert str(inductor_ext.ops.moe_gptq_gemm_rdna3._schema) == (
        "w4a16::moe_gptq_gemm_rdna3(Tensor a, Tensor(c!) c, Tensor b_q_weight, Tensor b_scales, Tensor b_qzeros, Tensor"
        " topk_weights, Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_padded, int top_k, int"
        " block_size_m, bool mul_topk_weight, int output_topk=0) -> ()"
    )


# -- refused -----------------------------------------------------------------------------------------------------------

INTS = torch.zeros(16, 16, dtype=torch.int32)


def refused(op: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"{op._qualified_op_name}: {message}"):
        op(**arguments)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=message):
        op(**arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": torch.zeros(3, 128)}, "a must be float16 or bfloat16, it is float32"),
        ({"a": torch.zeros(128).half()}, r"a must have two dimensions, it is \[128\]"),
        ({"a": torch.zeros(128, 3).half().t()}, r"a must be contiguous, it has strides \[1, 3\]"),
        ({"a": torch.zeros(3, 120).half()}, "a's K must be a positive multiple of 32, it is 120"),
        ({"a": torch.zeros(3, 0).half()}, "a's K must be a positive multiple of 32, it is 0"),
        ({"a": torch.zeros(3, 64).half()}, r"b_q_weight must be \[8, 16\], it is \[16, 16\]"),
        ({"b_q_weight": INTS.flatten()}, r"b_q_weight must be \[K/8, N\], it is \[256\]"),
        ({"b_q_weight": INTS.long()}, "b_q_weight must be int32, it is int64"),
        ({"b_q_weight": INTS.t()}, r"b_q_weight must be contiguous, it has strides \[1, 16\]"),
        ({"b_q_weight": INTS[:, :12].contiguous()}, "b_q_weight's N must be a positive multiple of 8, it is 12"),
        ({"b_q_weight": INTS[:, :8].contiguous()}, r"b_scales must be \[2, 8\], it is \[2, 16\]"),
        ({"b_scales": torch.zeros(2, 16).bfloat16()}, "b_scales must be float16, it is bfloat16"),
        ({"b_scales": torch.zeros(8, 16).half()}, "b_scales has 8 groups for K=128: the group size must be a multiple"),
        ({"b_scales": torch.zeros(3, 16).half()}, "b_scales has 3 groups for K=128: the group size must be a multiple"),
        ({"b_scales": torch.zeros(0, 16).half()}, "b_scales has 0 groups for K=128"),
        ({"b_scales": torch.zeros(16).half()}, r"b_scales must be \[K/G, N\], it is \[16\]"),
        ({"b_qzeros": torch.zeros(2, 16).int()}, r"b_qzeros must be \[2, 2\], it is \[2, 16\]"),
        ({"b_qzeros": torch.zeros(2, 2).half()}, "b_qzeros must be int32, it is float16"),
        ({"b_qzeros": torch.zeros(2, 2, device="meta").int()}, "b_qzeros is on meta, a is on cpu"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_mistake_is_named(changed: dict[str, Any], message: str) -> None:
    refused(gemm, dense() | changed, message)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": torch.zeros(3, 64).half()}, r"b_q_weight must be \[4, 8, 16\], it is \[4, 16, 16\]"),
        ({"b_q_weight": INTS}, r"b_q_weight must be \[E, K/8, N\], it is \[16, 16\]"),
        ({"b_scales": torch.zeros(3, 2, 16).half()}, r"b_scales must be \[4, 2, 16\], it is \[3, 2, 16\]"),
        ({"b_qzeros": torch.zeros(4, 2, 16).int()}, r"b_qzeros must be \[4, 2, 2\], it is \[4, 2, 16\]"),
        ({"c": torch.zeros(6, 16)}, "c must be float16, it is float32"),
        ({"c": torch.zeros(3, 16).half()}, r"c must be \[6, 16\], it is \[3, 16\]"),
        ({"c": torch.zeros(16, 6).half().t()}, "c must be contiguous"),
        ({"output_topk": 2}, r"c must be \[3, 16\], it is \[6, 16\]"),
        ({"output_topk": 4}, "output_topk must be 0 or divide a's rows times top_k, 6; it is 4"),
        ({"output_topk": -1}, "output_topk must be 0 or divide a's rows times top_k, 6; it is -1"),
        ({"top_k": 0}, "top_k must be at least 1, it is 0"),
        ({"block_size_m": 16}, "block_size_m must be 1, 2, 4 or 8, it is 16"),
        ({"topk_weights": torch.zeros(6).half()}, "topk_weights must be float32, it is float16"),
        ({"topk_weights": torch.zeros(4)}, "topk_weights must have 6 elements or none, it has 4"),
        ({"sorted_token_ids": torch.zeros(6).long()}, "sorted_token_ids must be int32, it is int64"),
        ({"sorted_token_ids": INTS}, r"sorted_token_ids must be \[slots\], it is \[16, 16\]"),
        ({"expert_ids": torch.zeros(1).int()}, "expert_ids must have an element for each of 5 blocks"),
        ({"expert_ids": torch.zeros(8, device="meta").int()}, "expert_ids is on meta, a is on cpu"),
        ({"num_tokens_post_padded": torch.zeros(()).int()}, r"num_tokens_post_padded must be \[1\], it is \[\]"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_mistake_with_experts_is_named(changed: dict[str, Any], message: str) -> None:
    refused(moe_gemm, routed() | changed, message)


def test_weights_off_a_line_are_refused_and_activations_are_not() -> None:
    def off(t: Tensor) -> Tensor:
        return torch.cat((t.new_zeros(2), t.flatten()))[2:].view(t.shape)

    with hip_lanes.on("gfx1100"):
        good = gemm(**dense())
        assert torch.equal(gemm(**dense() | {"a": off(dense()["a"])}), good)
        for op, arguments, name in (
            (gemm, dense(), "b_q_weight"),
            (gemm, dense(), "b_scales"),
            (moe_gemm, routed(), "c"),
        ):
            with pytest.raises(RuntimeError, match=f"{name} must begin at an address that is a multiple of 16"):
                op(**arguments | {name: off(arguments[name])})


def test_there_is_no_gradient_and_it_says_so() -> None:
    with hip_lanes.on("gfx1100"):
        y = gemm(**dense() | {"a": drawn(3, 128, dtype=torch.float16).requires_grad_()})
    with pytest.raises(NotImplementedError, match="has no gradient, as in the field"):
        y.sum().backward()
    for name in ("a", "c"):
        with hip_lanes.on("gfx1100"), pytest.raises(NotImplementedError, match="moe_gptq_gemm_rdna3 has no gradient"):
            moe_gemm(**routed() | {name: routed()[name].clone().requires_grad_()})


def test_an_arch_without_the_kernels_is_told() -> None:
    with hip_lanes.on("gfx942"), pytest.raises(RuntimeError, match="gfx942"):
        gemm(**dense())


# -- traced ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 3])
def test_opcheck_dense(M: int, dtype: torch.dtype) -> None:
    with hip_lanes.on("gfx1100"):
        torch.library.opcheck(gemm.default, tuple(dense(M, dtype).values()))


@pytest.mark.parametrize("together", [False, True])
def test_opcheck_experts(together: bool) -> None:
    with hip_lanes.on("gfx1100"):
        torch.library.opcheck(moe_gemm.default, tuple(routed(together=together).values()))
