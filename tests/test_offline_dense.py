"""The Triton kernels behind `w4a16::linear` as they are launched, compiled for GPUs that are not here: they use the
matrix units, spill nothing, fit into shared memory and load weights 128 bits at a time."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from offline import DIFFERENT, KB, TARGETS, TWINS, Facts, Recorder, serialized, uses_matrix_units

from inductor_ext.formats import PackedInt4
from inductor_ext.kernels import Packed
from inductor_ext.kernels.gpu import dense, dequantise, linear, runtime, tuning

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
N = K = 4096


def packed(G: int, zeros: bool | str, dtype: torch.dtype) -> Packed:
    """A weight of this size that takes no memory. ``zeros`` are integers, or "float"."""

    def empty(columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(N, columns, dtype=dtype, device="meta")

    stored = empty(K // G, dtype if zeros == "float" else torch.uint8) if zeros else None
    return linear.pack(PackedInt4(empty(K // 8, torch.int32), empty(K // G, dtype), stored))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Any:
    fn = dense.linear_kernel

    def compiled(
        target: str,
        M: int,
        dtype: torch.dtype,
        G: int = 128,
        zeros: bool | str = False,
        config: tuning.Config | None = None,
    ) -> Facts:
        kernel = Recorder(fn)
        monkeypatch.setattr(dense, "linear_kernel", kernel)
        monkeypatch.setattr(runtime, "arch_of", lambda device: target)
        x, out = (torch.empty(M, columns, dtype=dtype, device="meta") for columns in (K, N))
        config = config or tuning.dense(M, N, K, target, 132, plain=not zeros and G == 128)
        linear.launch(config, x, packed(G, zeros, dtype), None, G, out)
        return kernel.compile(target)

    return compiled


def check(facts: Facts, target: str, dtype: torch.dtype) -> None:
    assert uses_matrix_units(facts, target, NAMES[dtype]), facts.matrix
    assert facts.spills == 0
    assert 0 < facts.shared <= TARGETS[target].shared
    assert facts.load_bytes("tl.load(w ") == {16}


@pytest.mark.parametrize("M", [1, 16, 64, 256])
@pytest.mark.parametrize("target", DIFFERENT)
def test_every_number_of_rows(compiled: Any, target: str, M: int) -> None:
    facts = compiled(target, M, torch.float16)
    check(facts, target, torch.float16)
    assert facts.load_bytes("tl.load(x ") == {16}
    if target == "sm_90" and M >= 16:
        assert all("wgmma" in instruction for instruction in facts.matrix)


@pytest.mark.parametrize(("M", "G"), [(16, 128), (64, 64)])
@pytest.mark.parametrize("target", DIFFERENT)
def test_bfloat16_with_zeros(compiled: Any, target: str, M: int, G: int) -> None:
    check(compiled(target, M, torch.bfloat16, G, zeros=True), target, torch.bfloat16)


@pytest.mark.parametrize(
    ("target", "dtype", "M", "G"),
    [
        ("sm_80", torch.float16, 16, 128),
        ("sm_80", torch.bfloat16, 64, 32),
        ("sm_90", torch.bfloat16, 16, 128),
        ("sm_90", torch.float16, 32, 64),
        ("sm_90", torch.float16, 64, 32),
        ("sm_100", torch.float16, 32, 128),
        ("sm_100", torch.bfloat16, 256, 128),
    ],
    ids=str,
)
def test_float_zeros_come_off_without_another_matmul(
    compiled: Any, target: str, dtype: torch.dtype, M: int, G: int
) -> None:
    facts, plain = compiled(target, M, dtype, G, zeros="float"), compiled(target, M, dtype, G, zeros=True)
    check(facts, target, dtype)
    assert matmuls(facts) == matmuls(plain)
    assert target != "sm_90" or not serialized(facts)


def matmuls(facts: Facts) -> int:
    return len(re.findall(r"^\s*(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", facts.assembly, re.MULTILINE))


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_tall_tiles_of_a_large_weight(compiled: Any, target: str) -> None:
    config = tuning.dense(32, 28672, 4096, target, 132, plain=True)
    assert config.BN == 128
    assert tuning.dense(32, 28672, 4096, target, 132, plain=False).BN == 64
    facts = compiled(target, 32, torch.bfloat16, config=config)
    check(facts, target, torch.bfloat16)
    assert facts.shared <= TARGETS["sm_90"].shared // 2 - KB, "two programs share a Hopper's processor"


@pytest.mark.parametrize("G", [32, 64])
@pytest.mark.parametrize("M", [5, 16, 32])
@pytest.mark.parametrize("target", [target for target in DIFFERENT if target.startswith("sm_")])
def test_few_rows_of_small_groups(compiled: Any, target: str, M: int, G: int) -> None:
    """Of groups of 32 both halves of a tile go through the matrix unit together."""
    check(compiled(target, M, torch.float16, G, zeros=M == 16), target, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", DIFFERENT)
def test_dequantised_once(monkeypatch: pytest.MonkeyPatch, target: str, dtype: torch.dtype) -> None:
    kernel = Recorder(dequantise.dequantise_kernel)
    monkeypatch.setattr(dequantise, "dequantise_kernel", kernel)
    monkeypatch.setattr(runtime, "arch_of", lambda device: target)
    linear.dequantise(packed(128, True, dtype), N, K, 128, dtype)
    facts = kernel.compile(target)
    assert facts.spills == 0
    assert facts.load_bytes("tl.load(row_pointers") == {16}


@pytest.mark.parametrize("target", TWINS)
def test_twins_are_treated_alike(target: str) -> None:
    for M in (1, 16, 64, 256):
        assert tuning.dense(M, N, K, target, 40, True) == tuning.dense(M, N, K, TWINS[target], 40, True)
