"""The Triton kernels behind `w4a16::moe` as they are launched, compiled for GPUs that are not here: they use the matrix
units, spill nothing, fit into shared memory and load weights 128 bits at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from offline import DIFFERENT, TARGETS, TWINS, Facts, Recorder, uses_matrix_units

from inductor_ext.formats import PackedInt4
from inductor_ext.kernels import Mlp, Packed, Routing
from inductor_ext.kernels.gpu import experts, moe, routing, runtime, tuning
from inductor_ext.kernels.gpu.hopper import launch

E, K, H, I = 128, 8, 2048, 768  # noqa: E741
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def packed(N: int, K: int, G: int, zeros: bool, dtype: torch.dtype) -> Packed:
    """Experts of this size that take no memory."""

    def empty(columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(E * N, columns, dtype=dtype, device="meta")

    stored = empty(K // G, torch.uint8) if zeros else None
    return experts.pack(PackedInt4(empty(K // 8, torch.int32), empty(K // G, dtype), stored), E)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a call launches on a target: the kernels by their names."""

    def launched(target: str, pairs: int, dtype: torch.dtype, G: int = 128, zeros: bool = False) -> dict[str, Recorder]:
        names = {"up_kernel": moe, "down_kernel": moe, "add_up_kernel": moe, "route_kernel": routing}
        found = {}
        for name, module in names.items():
            fn = getattr(module, name)
            found[name] = Recorder(fn.fn if isinstance(fn, Recorder) else fn)
            monkeypatch.setattr(module, name, found[name])
        monkeypatch.setattr(runtime, "arch_of", lambda device: target)
        monkeypatch.setattr(runtime, "require", lambda x: None)
        monkeypatch.setattr(launch, "can", lambda packed, x: False)  # test_offline_hopper.py has those
        T = pairs // K
        x = torch.empty(T, H, dtype=dtype, device="meta")
        chosen = Routing(*(torch.empty(T, K, dtype=d, device="meta") for d in (torch.float32, torch.int64)), None, E)
        w13, w2 = packed(2 * I, H, G, zeros, dtype), packed(H, I, G, zeros, dtype)
        experts.run(x, chosen, w13, w2, None, None, Mlp(), I, (G, G))
        return {name: recorder for name, recorder in found.items() if recorder.given}

    return launched


def check(facts: Facts, target: str, dtype: torch.dtype) -> None:
    assert uses_matrix_units(facts, target, NAMES[dtype]), facts.matrix
    assert facts.spills == 0
    assert 0 < facts.shared <= TARGETS[target].shared
    assert facts.load_bytes("tl.load(w ") == {16}


@pytest.mark.parametrize("pairs", [8, 64, 2048, 32768])
@pytest.mark.parametrize("G", [32, 128])
@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_weights_with_float_zeros_are_never_rounded(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, G: int, pairs: int
) -> None:
    """Two projections' would be more than is owed."""
    monkeypatch.setattr(runtime, "arch_of", lambda device: "sm_90")
    x = torch.empty(1, H, dtype=dtype, device="meta")
    for config in tuning.moe(pairs, E, H, I, "sm_90"):
        with_zeros = packed(H, I, G, True, dtype)
        assert with_zeros.zeros is not None
        floats = with_zeros._replace(zeros=with_zeros.zeros.view(dtype))
        assert experts._variant(config, floats, I, G, x)["ROUNDED"] is False


@pytest.mark.parametrize(
    ("pairs", "dtype"),
    [(8, torch.float16), (128, torch.bfloat16), (2048, torch.float16), (32768, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("target", DIFFERENT)
def test_any_number_of_tokens(launched: Any, target: str, pairs: int, dtype: torch.dtype) -> None:
    kernels = launched(target, pairs, dtype)
    assert set(kernels) == {"up_kernel", "down_kernel"} | ({"add_up_kernel", "route_kernel"} if pairs > 32 else set())
    check(kernels["up_kernel"].compile(target), target, dtype)
    up, down = tuning.moe(pairs, E, H, I, target)
    if up != down or up.PAIRWISE:  # otherwise it is the same loop
        check(kernels["down_kernel"].compile(target), target, dtype)


@pytest.mark.parametrize("target", DIFFERENT)
def test_zeros_and_smaller_groups(launched: Any, target: str) -> None:
    check(launched(target, 2048, torch.bfloat16, 32, zeros=True)["up_kernel"].compile(target), target, torch.bfloat16)


@pytest.mark.parametrize("target", DIFFERENT)
def test_routing_and_adding_up(launched: Any, target: str) -> None:
    kernels = launched(target, 32768, torch.bfloat16)
    for name in ("route_kernel", "add_up_kernel"):
        facts = kernels[name].compile(target)
        assert facts.spills == 0
        assert facts.shared <= TARGETS[target].shared


@pytest.mark.parametrize("target", TWINS)
def test_twins_are_treated_alike(target: str) -> None:
    for pairs in (8, 128, 2048, 32768):
        assert tuning.moe(pairs, E, H, I, target) == tuning.moe(pairs, E, H, I, TWINS[target])


@pytest.mark.parametrize(("target", "early"), [("sm_90", True), ("sm_100", True), ("sm_80", False), ("gfx942", False)])
@pytest.mark.parametrize("pairs", [8, 128])
def test_kernels_after_the_first_start_early(launched: Any, target: str, early: bool, pairs: int) -> None:
    """And wait for those before them, first of all; the first one is launched when all else has ended."""
    kernels = launched(target, pairs, torch.bfloat16)
    first = "up_kernel" if pairs == 8 else "route_kernel"
    for name, kernel in kernels.items():
        assert kernel.given.get("launch_pdl", False) is (early and name != first), name
        text = kernel.compile(target).assembly
        waits, starts = (text.count(f"griddepcontrol.{what}") for what in ("wait;", "launch_dependents;"))
        assert (waits, starts) == ((1, 1) if early else (0, 0)), name
        if early:
            before = text[: text.index("griddepcontrol.wait;")]
            assert "ld.global" not in before and "st.global" not in before and "cp.async" not in before, name


def test_long_programs_do_not_start_early() -> None:
    for arch, H, I, early in (("sm_90", 2048, 768, True), ("sm_90", 4096, 768, False), ("sm_90", 2048, 14336, False)):  # noqa: E741
        assert tuning.early(arch, H, I) is early
