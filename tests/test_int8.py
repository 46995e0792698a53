"""Int8 weights behind the ops: what the reference kernel computes, and of the Triton kernels what can be seen without a
GPU. They have not run on one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import int8
import pytest
import torch
from interpreter import passes
from models import OWED, rel_l2
from offline import DIFFERENT, TARGETS, Recorder, uses_matrix_units
from test_oracle import KIND, MOE, PROBLEM

import inductor_ext.ops  # noqa: F401  registers torch.ops.w4a16
from inductor_ext import oracle
from inductor_ext.formats import PackedInt8
from inductor_ext.kernels import Packed, reference, reference_moe
from inductor_ext.kernels.gpu import experts_int8, linear_int8

LINEAR = replace(PROBLEM, codes="int8")
EXPERTS = replace(MOE, w13=replace(KIND, codes="int8"), w2=replace(KIND, codes="int8"))


def dense(w: PackedInt8) -> torch.Tensor:
    """By the definition, in float64."""
    groups = torch.arange(w.K) // w.group_size
    zeros = 128 if w.zeros is None else w.zeros.double()[:, groups]
    stored = (w.codes.double() - zeros) * w.scales.double()[:, groups]
    return stored if w.order is None else stored[:, w.order.long()]


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("zeros", ["none", "int", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_and_its_gradient(dtype: torch.dtype, zeros: str, order: bool) -> None:
    w = int8.weight(24, 64, 32, zeros, order, dtype)
    x = torch.randn(3, 64).to(dtype).requires_grad_()
    y = torch.ops.w4a16.linear(x, w.codes, w.scales, w.zeros, w.order, None, 24, 32)
    assert rel_l2(y.detach(), x.detach().double() @ dense(w).T) <= OWED[dtype]
    y.sum().backward()
    assert rel_l2(x.grad, dense(w).sum(0).expand(3, -1)) <= OWED[dtype]


@pytest.mark.parametrize("zeros", ["none", "int"])
def test_experts_and_their_gradients(zeros: str) -> None:
    E, H, I = 3, 64, 32  # noqa: E741
    w13, w2 = (int8.weight(E * n, k, 32, zeros, False, torch.float32, n) for n, k in ((2 * I, H), (H, I)))
    packed = [reference_moe.pack(w, E) for w in (w13, w2)]
    x, weights = torch.randn(5, H, requires_grad=True), torch.rand(5, 2)
    ids = torch.rand(5, E).argsort(1)[:, :2]
    tensors = [t for p in packed for t in (p.qweight, p.scales, p.zeros, None)]
    y = torch.ops.w4a16.moe(x, weights, ids, *tensors, None, I, 32, 32)
    a, b = dense(w13).view(E, 2 * I, H), dense(w2).view(E, H, I)
    x64 = x.detach().double().requires_grad_()
    gate, up = torch.einsum("th,tknh->tkn", x64, a[ids]).chunk(2, -1)
    each = torch.einsum("tki,tkhi->tkh", torch.nn.functional.silu(gate) * up, b[ids])
    wanted = (weights.double()[..., None] * each).sum(1)
    assert rel_l2(y.detach(), wanted.detach()) <= 1e-5
    y.sum().backward()
    wanted.sum().backward()
    assert rel_l2(x.grad, x64.grad) <= 1e-5


@pytest.mark.parametrize("problem", [LINEAR, EXPERTS], ids=lambda problem: problem.op)
def test_what_is_chosen_for_them(problem: Any) -> None:
    assert oracle.choose(problem) == oracle.Choice("reference", {})
    on_a_gpu = replace(problem, device="cuda", arch="gfx942")
    assert oracle.choose(on_a_gpu, elsewhere=True) == oracle.Choice("triton_int8", {})
    with pytest.raises(oracle.Required, match="cpu: The kernel takes codes of 4 bits, the weights have 8"):
        oracle.choose(problem, "cpu")
    with pytest.raises(oracle.Required, match="triton_int8: The kernel takes codes of 8 bits, the weights have 4"):
        oracle.choose(PROBLEM if problem.op == "linear" else MOE, "triton_int8")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"device": "cpu"}, "runs on NVIDIA and AMD GPUs, not on cpu"),
        ({"arch": "sm_75"}, "need sm_80 or newer"),
        ({"dtype": torch.float32}, "activations must be float16 or bfloat16"),
        ({"zeros": "float"}, "zeros must be integers"),
        ({"group_size": 16}, "multiple of 32 that divides K=128, not 16"),
    ],
)
def test_what_the_triton_kernels_cannot_do(changed: dict[str, Any], reason: str) -> None:
    on_a_gpu = {"device": "cuda", "arch": "sm_90"}
    assert reason in str(linear_int8.reject(replace(LINEAR, **{**on_a_gpu, **changed})))
    kinds = {name: value for name, value in changed.items() if name in ("zeros", "group_size")}
    w13 = replace(EXPERTS.w13, **kinds)
    rest = {name: value for name, value in changed.items() if name not in kinds}
    moe = replace(EXPERTS, w13=w13, H=128, **{**on_a_gpu, **rest})
    assert reason in str(experts_int8.reject(moe))
    assert experts_int8.reject(replace(EXPERTS, **on_a_gpu)) is None
    assert linear_int8.reject(replace(LINEAR, **on_a_gpu)) is None


def test_codes_of_another_width_are_refused_at_the_door() -> None:
    w = int8.weight(8, 64, 32, "none", False, torch.float32)
    x = torch.randn(2, 64)
    with pytest.raises(RuntimeError, match=r"qweight must be uint8, it is torch\.int32"):
        torch.ops.w4a16.linear(x, w.codes.view(torch.int32), w.scales, None, None, None, 8, 32, "triton_int8")
    for kernel in ("cpu", "triton", "hip"):
        with pytest.raises(RuntimeError):
            torch.ops.w4a16.linear(x, w.codes, w.scales, None, None, None, 8, 32, kernel)
    with pytest.raises(RuntimeError, match="zeros must be int16"):
        torch.ops.w4a16.linear(x, w.codes, w.scales, w.codes[:, :2], None, None, 8, 32)


def test_nothing_is_copied() -> None:
    w = int8.weight(8, 64, 32, "int", True, torch.float16)
    packed = linear_int8.pack(w)
    assert packed == Packed(w.codes, w.scales, w.zeros, w.order) == reference.pack(w)
    assert linear_int8.unpack(packed, 8, 64, 32) == w


def test_the_numbers_hold_in_triton_s_interpreter() -> None:
    passes("test_int8_numbers.py")


@pytest.mark.parametrize(("M", "dtype", "zeros"), [(1, torch.float16, False), (512, torch.bfloat16, True)])
@pytest.mark.parametrize("target", DIFFERENT)
def test_compiled_for_gpus_that_are_not_here(
    monkeypatch: pytest.MonkeyPatch, target: str, M: int, dtype: torch.dtype, zeros: bool
) -> None:
    """Dense; and with zeros, a bias and weights, routed."""
    import inductor_ext.kernels.gpu.int8 as module

    kernel = Recorder(module.int8_kernel)
    monkeypatch.setattr(module, "int8_kernel", kernel)
    N, K, G, E = 4096, 4096, 128, 8

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=of, device="meta")

    x, out = empty(M, K), empty(M, N)
    if zeros:
        packed = Packed(empty(E, N, K, of=torch.uint8), empty(E, N, K // G), empty(E, N, K // G, of=torch.int16), None)
        ids, weights = empty(4096, of=torch.int32), empty(M, of=torch.float32)
        routed = linear_int8.Routed(ids, ids, 1, weights)
        linear_int8.launch(x, packed, empty(E, N), out, G, linear_int8.height(M), routed)
    else:
        packed = Packed(empty(N, K, of=torch.uint8), empty(N, K // G), None, None)
        linear_int8.launch(x, packed, None, out, G, linear_int8.height(M))
    facts = kernel.compile(target)
    assert uses_matrix_units(facts, target, {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]), facts.matrix
    assert facts.spills == 0
    assert 0 < facts.shared <= TARGETS[target].shared
