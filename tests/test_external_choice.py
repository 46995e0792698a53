"""Which of other people's kernels are chosen, and why others are not: by problem, and by what is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import standins
import torch
from test_oracle import KIND, MOE, PROBLEM
from torch import Tensor

import inductor_ext.ops  # noqa: F401  registers torch.ops.w4a16
from inductor_ext import kernels, oracle
from inductor_ext.kernels import Mlp, external
from inductor_ext.kernels.external import flashinfer_moe, marlin, marlin_moe, marlin_ops, xpu_moe
from inductor_ext.passes import W4A16Pass

H100 = {"device": "cuda", "arch": "sm_90"}
B200 = {"device": "cuda", "arch": "sm_100"}
SIZED = replace(MOE, E=4, H=256, I=256, **H100)


@pytest.fixture(autouse=True)
def nothing_is_looked_up_before() -> Iterator[None]:
    cached = (marlin_ops.found, flashinfer_moe.usable, xpu_moe.usable)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


# -- reasons -----------------------------------------------------------------------------------------------------------

KINDS = {
    "float zeros": {"zeros": "float"},
    "zeros": {"zeros": "int"},
    "groups of 16": {"group_size": 16},
    "a channel": {"group_size": 256},
    "other scales": {"scale_dtype": torch.float32},
}


@pytest.mark.parametrize(
    ("kernel", "changes", "reason"),
    [
        ("marlin", {"arch": "gfx942"}, "runs on NVIDIA GPUs, not on cuda (gfx942)"),
        ("marlin", {"arch": "sm_75"}, "needs sm_80 or newer; this is sm_75"),
        ("marlin", {"dtype": torch.float32}, "activations must be float16 or bfloat16"),
        ("marlin", {"w2": "float zeros"}, "zeros must be integers"),
        ("marlin", {"w13": "groups of 16"}, "group size must be 32, 64, 128 or K=256, not 16"),
        ("marlin", {"w13": "other scales"}, "scales must have the activations' dtype"),
        ("marlin", {"I": 96}, "N must be a multiple of 128 and K of 64; they are 192 and 256"),
        ("marlin", {"mlp": Mlp(apply_router_weight_on_input=True)}, "cannot be applied on the input"),
        ("batched_marlin", {}, "takes tokens batched by expert, [E, tokens, H]; they come as [T, H]"),
        ("flashinfer", {}, "runs on sm_100, not on cuda (sm_90)"),
        ("flashinfer", {**B200, "dtype": torch.float16}, "activations must be bfloat16"),
        ("flashinfer", {**B200, "w2": "zeros"}, "must be symmetric: the layout has no zeros"),
        ("flashinfer", {**B200, "w13": "groups of 16"}, "multiple of 32 that divides K=256, not 16"),
        ("flashinfer", {**B200, "w13": "other scales"}, "scales must be bfloat16"),
        ("flashinfer", {**B200, "bias": True}, "must be no bias"),
        ("flashinfer", {**B200, "expert_map": True}, "must be no expert_map"),
        ("flashinfer", {**B200, "mlp": Mlp("gelu")}, "activation must be silu with gate and up as halves"),
        ("flashinfer", {**B200, "I": 128}, "N must be a multiple of 128 and K of 256; they are 256 and 128"),
        ("xpu", {}, "runs on Intel GPUs, not on cuda"),
        ("xpu", {"device": "xpu", "w13": "zeros"}, "must be symmetric: the layout has no zeros"),
        ("xpu", {"device": "xpu", "w2": "groups of 16"}, "multiple of 32 that divides K=256, not 16"),
        ("xpu", {"device": "xpu", "w2": "other scales"}, "scales must have the activations' dtype"),
        ("xpu", {"device": "xpu", "mlp": Mlp("relu")}, "activation must be one of silu (halves), gelu (halves)"),
        ("xpu", {"device": "xpu", "mlp": Mlp("swigluoai", "interleaved")}, "alpha 1.702 and limit 7"),
        ("xpu", {"device": "xpu", "dtype": torch.float32}, "activations must be float16 or bfloat16"),
    ],
)
def test_why_not(kernel: str, changes: dict[str, Any], reason: str) -> None:
    made = {name: replace(KIND, **KINDS[v]) if name in ("w13", "w2") else v for name, v in changes.items()}
    problem = replace(SIZED, **made)
    assert reason in str(oracle.why_not(problem, kernel, elsewhere=True))
    with pytest.raises(oracle.Required) as error:
        oracle.choose(problem, kernel, elsewhere=True)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        ("marlin", SIZED),
        ("marlin", replace(SIZED, w13=replace(KIND, group_size=256), bias=True, expert_map=True)),
        ("batched_marlin", replace(SIZED, batched=True)),
        ("flashinfer", replace(SIZED, **B200)),
        ("xpu", replace(SIZED, device="xpu", arch="xpu", bias=True, expert_map=True)),
        ("marlin", replace(PROBLEM, **H100, order=True, zeros="int", bias=True)),
    ],
)
def test_what_they_can(kernel: str, problem: Any) -> None:
    assert oracle.choose(problem, kernel, elsewhere=True).kernel == kernel


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"N": 96}, "N must be a multiple of 64 and K of 128; they are 96 and 128"),
        ({"group_size": 8}, "group size must be 32, 64, 128 or K=128, not 8"),
        ({"arch": "gfx1100"}, "runs on NVIDIA GPUs"),
        ({"zeros": "float"}, "zeros must be integers"),
    ],
)
def test_why_not_dense_marlin(changes: dict[str, Any], reason: str) -> None:
    assert reason in str(marlin.reject(replace(PROBLEM, **{**H100, **changes})))


def test_ours_come_first_and_theirs_before_the_reference() -> None:
    assert oracle.choose(replace(SIZED, **B200), elsewhere=True).kernel == "triton"
    can = [name for name, reason in oracle.verdicts(replace(SIZED, **B200), elsewhere=True).items() if reason is None]
    assert can == ["triton", "flashinfer", "marlin", "reference"]
    assert oracle.choose(replace(SIZED, device="xpu"), elsewhere=True).kernel == "xpu"
    assert oracle.choose(replace(SIZED, device="xpu")).kernel == "reference"  # without the package
    assert oracle.choose(replace(SIZED, batched=True), "batched_marlin", elsewhere=True)


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [("marlin", replace(PROBLEM, **H100)), ("marlin", SIZED), ("flashinfer", replace(SIZED, **B200))],
)
def test_theirs_are_taken_where_ours_are_not_there(kernel: str, problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there = (kernel, "reference")
    monkeypatch.setattr(kernels, "why_unusable", lambda op, name: None if name in there else "Not here.")
    choice = oracle.choose(problem)
    assert choice.kernel == kernel
    assert choice.passed_over["triton"] == "Not here."
    monkeypatch.setattr(
        kernels, "why_unusable", lambda op, name: "No such op in this build." if name == kernel else None
    )
    with pytest.raises(oracle.Required, match=f"{kernel}: No such op in this build"):
        oracle.choose(problem, kernel)


# -- not installed, not in this build, of another version --------------------------------------------------------------


def test_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    absent = ("vllm", "sgl_kernel", "gptqmodel", "flashinfer", "vllm_xpu_kernels")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    told = "There is no Marlin op: vllm is not installed; sgl_kernel is not installed; gptqmodel is not installed."
    assert marlin.usable() == marlin_moe.usable() == told
    assert flashinfer_moe.usable() == "flashinfer is not installed."
    assert xpu_moe.usable() == "vllm_xpu_kernels is not installed."


def test_libraries_are_loaded_until_one_has_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of vLLM without the newer library has the op in the older one."""
    name, library = "_C::marlin_gemm", torch.library.Library("_C", "FRAGMENT")
    tried = []

    def load(module: str) -> None:
        tried.append(module)
        if module == "vllm._C_stable_libtorch":
            raise ImportError(module)
        library.define(f"marlin_gemm({standins.DENSE[name]}) -> Tensor")

    standins.module(monkeypatch, "vllm")
    monkeypatch.setattr(marlin_ops.importlib, "import_module", load)
    try:
        assert marlin_ops.find(marlin_ops.DENSE, torch.float16) is torch.ops._C.marlin_gemm.default
        assert tried == ["vllm._C_stable_libtorch", "vllm._C"]
    finally:
        library._destroy()


def test_builds_without_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.module(monkeypatch, "vllm._C")
    standins.module(monkeypatch, "flashinfer.fused_moe")
    standins.module(monkeypatch, "vllm_xpu_kernels.fused_moe_interface")
    assert "vllm has no op _C::marlin_gemm" in marlin_ops.find(marlin_ops.DENSE, torch.float16)
    assert "flashinfer.fused_moe has no trtllm_mxint4_block_scale_routed_moe" in str(flashinfer_moe._op())
    assert "has no xpu_fused_moe" in str(xpu_moe._op())


def test_versions_with_other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    older = (
        "Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor b_scales, Tensor? b_zeros_or_none, Tensor workspace,"
    )
    older += " int b_q_type, SymInt size_m, SymInt size_n, SymInt size_k"
    source = (marlin_ops.Source("vllm", (), "_C::gptq_marlin_gemm"),)
    with standins.op("_C::gptq_marlin_gemm", older, standins.marlin_gemm):
        assert "takes no bias" in marlin_ops.find(source, torch.float16)
    with standins.op("_C::gptq_marlin_gemm", older + ", Tensor? b_bias, bool has_zp", standins.marlin_gemm):
        assert "wants has_zp, which is not known here" in marlin_ops.find(source, torch.float16)
        with pytest.raises(RuntimeError, match="wants has_zp"):
            marlin_ops.call(source, {"a": torch.zeros(1).half()})

    def changed(hidden_states: Tensor, w13: Tensor, layout: str) -> None: ...

    standins.module(monkeypatch, "vllm_xpu_kernels.fused_moe_interface", xpu_fused_moe=changed)
    assert "other arguments than are known here: activation, expert_map, is_int4, layout" in str(xpu_moe._op())
    monkeypatch.setenv("VLLM_XPU_GROUPED_GEMM_BACKEND", "onednn")
    assert "is onednn, which takes codes that are not signed" in str(xpu_moe._op())
    standins.module(monkeypatch, "flashinfer.fused_moe", trtllm_mxint4_block_scale_routed_moe=changed)
    assert "other arguments than are known here: gemm1_alpha" in str(flashinfer_moe._op())


def test_cached_graphs_know_what_was_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that calls another package's kernel is no good where that is gone."""
    without = W4A16Pass().uuid()
    external.installed.cache_clear()
    standins.module(monkeypatch, "flashinfer.fused_moe")
    assert external.installed() and W4A16Pass().uuid() != without
    external.installed.cache_clear()
