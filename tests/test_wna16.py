"""The field's oracle: its names over our table, what it selects on devices that are not here, and why not the rest."""

from __future__ import annotations

import enum
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from inductor_ext import devices, oracle
from inductor_ext.kernels import Mlp, MoeProblem, table
from inductor_ext.oracle import wna16
from inductor_ext.oracle.wna16 import MoEConfig, WeightKey, WNA16MoEBackend, select_wna16_moe_backend

CONFIG = MoEConfig(128, 128, 8, 2048, 768, torch.bfloat16)
KEY = WeightKey(4, 128)


def selected(device: str, config: Any = CONFIG, key: WeightKey = KEY) -> WNA16MoEBackend:
    backend, kernel = select_wna16_moe_backend(config, key, device, elsewhere=True)
    assert kernel in wna16.backend_to_kernel_cls(backend)
    return backend


def refused(device: str, backend: str, config: MoEConfig = CONFIG, key: WeightKey = KEY) -> str:
    """Why an explicit choice cannot be honoured."""
    with pytest.raises(oracle.Required) as error:
        select_wna16_moe_backend(replace(config, moe_backend=backend), key, device, elsewhere=True)
    return str(error.value)


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("gfx1100", "RDNA3"),
        ("gfx1151", "RDNA3"),
        ("gfx942", "TRITON"),
        ("gfx950", "TRITON"),
        ("sm_90", "TRITON"),
        ("sm_100", "TRITON"),
        ("xpu", "XPU"),
        ("cpu", "CPU"),
        ("t4", "EMULATION"),
    ],
)
def test_what_is_selected_on_devices_that_are_not_here(device: str, backend: str) -> None:
    assert selected(device) == WNA16MoEBackend(backend)


def test_the_field_s_names_are_the_oracle_s() -> None:
    for name in oracle.__all__:
        assert getattr(oracle, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'unheard_of'"):
        _ = oracle.unheard_of


def test_priorities_of_a_device() -> None:
    assert [b.value for b in wna16.get_priority_backends("cpu")] == ["CPU", "EMULATION"]
    assert [b.value for b in wna16.get_priority_backends("gfx1100")][:2] == ["RDNA3", "TRITON"]
    assert wna16.get_priority_backends(devices.named("t4"))[-1] == WNA16MoEBackend.EMULATION


def test_every_backend_is_one_of_the_field_s_names() -> None:
    for backend in WNA16MoEBackend:
        found = [kernel.NAME for kernel in wna16.backend_to_kernel_cls(backend)]
        assert found == [row.name for row in table.rows("moe").values() if row.backend == backend.value]


def test_an_explicit_choice_is_honoured_whatever_its_priority() -> None:
    assert selected("gfx1100", replace(CONFIG, moe_backend="triton")) == WNA16MoEBackend.TRITON
    assert selected("h100", replace(CONFIG, moe_backend="emulation")) == WNA16MoEBackend.EMULATION


def test_an_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no WNA16 MoE backend 'marlyn'; moe_backend may be auto, rdna3, .*emulation"):
        selected("h100", replace(CONFIG, moe_backend="marlyn"))


def test_aiter_is_for_other_weights() -> None:
    assert "takes MXFP4 weights" in refused("mi355x", "aiter_w4a8")


def test_nothing_left_tells_every_reason() -> None:
    with pytest.raises(oracle.NoKernel) as error:
        selected("gfx1100", key=replace(KEY, desc_act=True))
    for name in table.priority("moe", "cuda"):
        assert f"{name}: The experts' columns are stored permuted (act-order)" in str(error.value)


@pytest.mark.parametrize(
    ("device", "backend", "changes", "key", "reason"),
    [
        ("h100", "rdna3", {}, {}, "runs on AMD GPUs, not on cuda (sm_90)"),
        ("gfx1151", "rdna3_wmma", {}, {"symmetric": False}, "must be symmetric: the layout has no zeros"),
        ("gfx1201", "rdna3_wmma", {}, {}, "needs the WMMA of RDNA 3 (gfx11); this is gfx1201"),
        ("h100", "marlin", {}, {"group_size": 16}, "group size must be 32, 64, 128 or K=2048, not 16"),
        ("mi300x", "marlin", {}, {}, "runs on NVIDIA GPUs, not on cuda (gfx942)"),
        ("b200", "flashinfer_trtllm", {}, {"symmetric": False}, "must be symmetric: the layout has no zeros"),
        ("b200", "flashinfer_trtllm", {"has_bias": True}, {}, "must be no bias"),
        ("xpu", "xpu", {}, {"symmetric": False}, "must be symmetric: the layout has no zeros"),
        ("h100", "batched_marlin", {}, {}, "takes tokens batched by expert"),
        ("h100", "marlin", {}, {"bits": 8}, "takes codes of 4 bits, the weights have 8"),
        ("h100", "cpu", {}, {"bits": 8}, "takes codes of 4 bits, the weights have 8"),
        ("mi300x", "rdna3", {}, {}, "needs the WMMA of RDNA 3 (gfx11); this is gfx942"),
        ("gfx1100", "rdna3", {}, {"scale_dtype": torch.float16}, "scales must have the activations' dtype"),
        ("gfx1100", "rdna3", {"in_dtype": torch.float32}, {}, "activations must be float16 or bfloat16"),
        ("gfx1100", "rdna3", {}, {"group_size": 16}, "group size must be a multiple of 32"),
        ("gfx1030", "triton", {}, {}, "need matrix instructions that gfx1030 does not have"),
        ("t4", "triton", {}, {}, "need sm_80 or newer"),
        ("cpu", "triton", {}, {}, "runs on NVIDIA and AMD GPUs, not on cpu"),
        ("h100", "cpu", {}, {}, "runs on the CPU, not on cuda"),
        ("h100", "triton", {}, {"desc_act": True}, "act-order"),
    ],
)
def test_why_a_backend_cannot(
    device: str, backend: str, changes: dict[str, Any], key: dict[str, Any], reason: str
) -> None:
    assert reason in refused(device, backend, replace(CONFIG, **changes), replace(KEY, **key))


def test_batched_tokens_are_for_the_batched_backend() -> None:
    batched = replace(CONFIG, moe_parallel_config=SimpleNamespace(use_batched_activation_format=True))
    assert "batched by expert" in refused("h100", "triton", batched)
    assert selected("h100", batched) == WNA16MoEBackend.BATCHED_MARLIN
    with pytest.raises(oracle.NoKernel, match="batched_marlin: The kernel runs on NVIDIA GPUs"):
        selected("mi300x", batched)


def test_eight_bits() -> None:
    key = WeightKey(8, 128)
    assert selected("h100", key=key) == WNA16MoEBackend.TRITON
    assert selected("cpu", key=key) == WNA16MoEBackend.EMULATION
    assert wna16.get_priority_backends("mi300x", bits=8) == [WNA16MoEBackend.TRITON, WNA16MoEBackend.EMULATION]


def test_the_problem_of_a_layer() -> None:
    config = MoEConfig(64, 16, 4, 1024, 512, torch.float16, "swigluoai", has_bias=True)
    problem = wna16.moe_problem(config, WeightKey(4, -1, symmetric=False), devices.named("mi300x"))
    assert (problem.device, problem.arch, problem.E, problem.top_k) == ("cuda", "gfx942", 16, 4)
    assert (problem.w13.group_size, problem.w2.group_size, problem.w13.zeros) == (1024, 512, "int")
    assert problem.mlp == Mlp("swigluoai", "interleaved", limit=7.0)
    assert problem.bias and problem.expert_map and not problem.batched
    assert isinstance(problem, MoeProblem)


def test_the_field_s_own_config_will_do() -> None:
    """It has more attributes, and its activation is an enum's member."""

    class Activation(enum.Enum):
        SILU = "silu"

    parallel = SimpleNamespace(use_batched_activation_format=False, ep_size=1)
    own = SimpleNamespace(**{**vars(CONFIG), "activation": Activation.SILU, "moe_parallel_config": parallel}, ep_rank=0)
    assert selected("h100", own) == WNA16MoEBackend.TRITON


def test_keys_of_no_kind() -> None:
    with pytest.raises(ValueError, match="bits must be 4 or 8, not 2"):
        WeightKey(2, 128)
    with pytest.raises(ValueError, match="group_size must be positive, or -1 for one scale a channel; it is 0"):
        WeightKey(4, 0)


def test_an_activation_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of silu, .*, not 'relu2'"):
        selected("h100", replace(CONFIG, activation="relu2"))


def test_by_default_the_device_that_is_here() -> None:
    backend, kernel = select_wna16_moe_backend(replace(CONFIG, in_dtype=torch.float32), KEY)
    here = devices.here()
    assert kernel.NAME in table.priority("moe", here.type)
    assert backend in wna16.get_priority_backends(here)
