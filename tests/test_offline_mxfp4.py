"""The Triton kernels behind `w4a16::moe_mxfp4` and `moe_gemm_a8w4` as they are launched for gpt-oss, compiled for GPUs
that are not here: they use matrix units, spill nothing, fit into shared memory and load codes 128 bits at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mxfp4_problems import GPT_OSS
from offline import DIFFERENT, TARGETS, TWINS, Facts, Recorder, uses_matrix_units

from inductor_ext.kernels import Packed, Routing
from inductor_ext.kernels.gpu import moe, mxfp4, mxfp4_scaled, routing, runtime, tuning
from inductor_ext.kernels.gpu.hopper import launch

E, K, H, I = 32, 4, 2880, 2880  # noqa: E741


def packed(kernel: Any, N: int, K: int, floats: bool) -> Packed:
    """Experts of this size that take no memory, all of their scales in e8m0 or some too large for that."""
    steps = -(-K // 128)
    planes = torch.empty(E, N // 64, steps, 2048, dtype=torch.int16, device="meta")
    by_plane = torch.empty(E, steps, N, 4, dtype=torch.uint8, device="meta")
    by_group = torch.empty(E, steps * 4, N, device="meta")
    if kernel is mxfp4:
        return Packed(planes, by_group if floats else by_plane, None, None)
    pairs, scales = (torch.empty(E, N, K // n, dtype=torch.uint8, device="meta") for n in (2, 32))
    return Packed(pairs, scales, None, None)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a call launches on a target: the kernels by their names."""

    def launched(
        kernel: Any,
        target: str,
        T: int,
        dtype: torch.dtype = torch.bfloat16,
        fp8: bool = False,
        floats: bool = False,
    ) -> dict[str, Recorder]:
        names = {"up_kernel": moe, "down_kernel": moe, "add_up_kernel": moe, "quantise_kernel": moe}
        found = {}
        for name, module in {**names, "route_kernel": routing}.items():
            fn = getattr(module, name)
            found[name] = Recorder(fn.fn if isinstance(fn, Recorder) else fn)
            monkeypatch.setattr(module, name, found[name])
        monkeypatch.setattr(runtime, "arch_of", lambda device: target)
        monkeypatch.setattr(runtime, "require", lambda x: None)
        monkeypatch.setattr(launch, "can_fp4", lambda *given: False)  # test_offline_hopper.py has those

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        chosen = Routing(empty(T, K), empty(T, K, dtype=torch.int64), None, E)
        w13, w2, biases = packed(kernel, 2 * I, H, floats), packed(kernel, H, I, floats), (empty(E, 2 * I), empty(E, H))
        scales = (empty(1), empty(1)) if fp8 else None
        kernel.run(empty(T, H, dtype=dtype), chosen, w13, w2, *biases, GPT_OSS, I, scales)
        return {name: recorder for name, recorder in found.items() if recorder.given}

    return launched


def check(facts: Facts, target: str) -> None:
    assert facts.spills == 0
    assert 0 < facts.shared <= TARGETS[target].shared
    assert facts.load_bytes("tl.load(w ") == {16}


@pytest.mark.parametrize(
    ("target", "T"), [*((target, 256) for target in DIFFERENT), ("gfx942", 1), ("sm_90", 1), ("sm_90", 4096)]
)
def test_codes_that_are_decoded_in_the_loop(launched: Any, target: str, T: int) -> None:
    kernels = launched(mxfp4, target, T)
    assert set(kernels) == {"up_kernel", "down_kernel"} | ({"add_up_kernel", "route_kernel"} if T > 2 else set())
    up, down = tuning.mxfp4(T * K, E, target)
    for name in ("up_kernel", "down_kernel") if up != down or T == 1 else ("up_kernel",):  # mostly the same loop
        facts = kernels[name].compile(target)
        check(facts, target)
        assert uses_matrix_units(facts, target, "bf16"), facts.matrix


@pytest.mark.parametrize("target", ["gfx1100", "sm_90"])
def test_float16_and_activations_in_fp8(launched: Any, target: str) -> None:
    kernels = launched(mxfp4, target, 256, torch.float16, fp8=True)
    facts = kernels["up_kernel"].compile(target)
    check(facts, target)
    assert uses_matrix_units(facts, target, "fp16"), facts.matrix
    assert kernels["quantise_kernel"].compile(target).spills == 0


def test_scales_beyond_a_factor(launched: Any) -> None:
    facts = launched(mxfp4, "sm_90", 256, floats=True)["up_kernel"].compile("sm_90")
    check(facts, "sm_90")
    assert uses_matrix_units(facts, "sm_90", "bf16"), facts.matrix


@pytest.mark.parametrize("T", [1, 4096])
def test_gfx950_multiplies_fp8_by_mxfp4_itself(launched: Any, T: int) -> None:
    kernels = launched(mxfp4_scaled, "gfx950", T, fp8=True)
    for name in ("up_kernel", "down_kernel"):
        facts = kernels[name].compile("gfx950")
        check(facts, "gfx950")
        assert all(instruction.startswith("v_mfma_scale_f32_") for instruction in facts.matrix), facts.matrix
        assert all(instruction.endswith("_f8f6f4") for instruction in facts.matrix), facts.matrix
    assert kernels["quantise_kernel"].compile("gfx950").spills == 0


def test_gfx950_decodes_mxfp4_for_bfloat16(launched: Any) -> None:
    kernels = launched(mxfp4_scaled, "gfx950", 4096)
    for name in ("up_kernel", "down_kernel"):
        facts = kernels[name].compile("gfx950")
        check(facts, "gfx950")
        assert uses_matrix_units(facts, "gfx950", "bf16"), facts.matrix


@pytest.mark.parametrize("target", TWINS)
def test_twins_are_treated_alike(target: str) -> None:
    for pairs in (4, 64, 1024, 16384):
        assert tuning.mxfp4(pairs, E, target) == tuning.mxfp4(pairs, E, TWINS[target])
