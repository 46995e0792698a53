"""When the Triton kernel for `w4a16::linear` is chosen, and with which parameters; what it computes is in
test_dense_numbers.py. On simulated devices."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import interpreter
import pytest
import torch
from offline import TARGETS

import inductor_ext.ops  # noqa: F401  registers the ops
from inductor_ext import oracle
from inductor_ext.formats import PackedInt4
from inductor_ext.kernels import Problem
from inductor_ext.kernels.gpu import experts, linear, measured, runtime, tuning

PROBLEM = Problem("linear", "cuda", "sm_90", torch.bfloat16, torch.float16, 4096, 4096, 128, "int", True, True)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"op": "moe"}, "The kernel computes linear, not moe."),
        ({"device": "cpu"}, "The kernel runs on NVIDIA and AMD GPUs, not on cpu."),
        ({"arch": "sm_75"}, "The kernels need sm_80 or newer, for its bfloat16 instructions; this is sm_75."),
        (
            {"arch": "gfx1030"},
            "The kernels need matrix instructions that gfx1030 does not have: CDNA 2, RDNA 3 or newer.",
        ),
        ({"dtype": torch.float32}, "The activations must be float16 or bfloat16, not torch.float32."),
        ({"scale_dtype": torch.float64}, "The scales must be float16, bfloat16 or float32, not torch.float64."),
        (
            {"group_size": 48, "K": 480},
            "The group size must be K=480, or divide it and be 32, 64 or a multiple of 128; it is 48.",
        ),
        (
            {"group_size": 16},
            "The group size must be K=4096, or divide it and be 32, 64 or a multiple of 128; it is 16.",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_it_cannot_do_is_a_sentence(changed: dict[str, Any], reason: str) -> None:
    assert linear.reject(replace(PROBLEM, **changed)) == reason


@pytest.mark.parametrize("changed", [{}, {"group_size": 48, "K": 48}, {"group_size": 32, "zeros": "float"}], ids=str)
@pytest.mark.parametrize("arch", TARGETS)
def test_what_it_can_do(arch: str, changed: dict[str, Any]) -> None:
    assert linear.reject(replace(PROBLEM, arch=arch, **changed)) is None


def codes_and_scales(K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of 64 rows in one group."""
    return torch.zeros(64, K // 8, dtype=torch.int32), torch.ones(64, 1).half()


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(2, 256), "The Triton kernels take float16 or bfloat16 activations; x is float32."),
        (torch.zeros(2, 256).half(), "The Triton kernels run on NVIDIA and AMD GPUs; x is on cpu."),
    ],
    ids=["float32", "cpu"],
)
def test_an_op_that_is_called_by_hand_says_what_it_cannot_do(x: torch.Tensor, reason: str) -> None:
    weight = PackedInt4(torch.zeros(64, 32, dtype=torch.int32), torch.ones(64, 2).half())
    with pytest.raises(RuntimeError, match=reason):
        torch.ops.w4a16.linear(x, *linear.pack(weight), None, 64, 128, "triton")
    w13, w2 = (
        experts.pack(weight, 1)[:3] for weight in (weight, PackedInt4(*(t.repeat(4, 1) for t in codes_and_scales(32))))
    )
    ids = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=reason):
        torch.ops.w4a16.moe(x, torch.ones(2, 1), ids, *w13, None, *w2, None, None, 32, 128, 32, kernel="triton")


def test_it_comes_before_the_reference_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "usable", lambda: None)
    choice = oracle.choose(PROBLEM)
    assert choice.kernel == "triton"
    assert set(choice.passed_over) == {"hip"}
    passed_over = oracle.choose(replace(PROBLEM, dtype=torch.float32))
    assert passed_over.kernel == "reference"
    assert "float16 or bfloat16" in passed_over.passed_over["triton"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_a_forced_kernel_is_an_error() -> None:
    with pytest.raises(oracle.NoKernel, match="triton: There is no GPU that torch can use"):
        oracle.choose(PROBLEM, forced="triton")


SHAPES = ((6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (200, 1152), (64, 12544), (64, 256), (1, 8))


@pytest.mark.parametrize("processors", [20, 132, 304])
@pytest.mark.parametrize("arch", [*TARGETS, "sm_75", "gfx90a"])
def test_every_shape_gets_parameters_that_run(arch: str, processors: int) -> None:
    for N, K in SHAPES:
        rows, steps = -(-N // 64) * 64, -(-K // 256)
        for M in (*range(1, 600), *range(600, 4097, 61), 4096):
            config = tuning.dense(M, N, K, arch, processors, plain=M % 2 == 0)
            told = f"{M} x {N} x {K}: {config}"
            assert rows % config.BN == 0, told
            assert (config.SPLITS - 1) * -(-steps // config.SPLITS) < steps, f"a part without steps: {told}"
            assert (16 if tuning.is_amd(arch) else 8) <= config.BM, told
            assert config.num_warps in (2, 4, 8), told
            assert config.num_warps * 64 <= config.BN * config.BM, told


def test_what_was_measured_is_taken_before_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """For up to as many rows, down to those of the entry before, on the device that it was measured on."""
    own = tuning.Config(64, 64, 64, WIDE=True, SPLITS=3, ROUNDED=False, STAGES=2, num_warps=4)
    many = tuning.Hopper(128, 64, 2, 5)
    layer = {"64": asdict(own), "128": asdict(many)}
    monkeypatch.setattr(measured, "table", lambda: {measured.key("sm_90", 132): {"dense": {"6144x4096": layer}}})
    measured._dense.cache_clear()
    try:
        for M, wanted in ((32, None), (33, own), (64, own), (65, many), (128, many), (129, None), (4096, None)):
            assert measured.dense(M, 6144, 4096, "sm_90", 132) == wanted
        for N, K, arch, processors in (
            (6144, 2048, "sm_90", 132),
            (6144, 4096, "sm_90", 114),
            (6144, 4096, "sm_100", 132),
        ):
            assert measured.dense(64, N, K, arch, processors) is None
    finally:
        measured._dense.cache_clear()


def test_a_layer_is_multiplied_as_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not where the parameters are for another kind of weight, or of a kernel that cannot run here."""
    own = tuning.Config(64, 64, 64, WIDE=True, SPLITS=1, ROUNDED=False, STAGES=2, num_warps=4)
    found: list[tuning.Config | tuning.Hopper] = [own]
    monkeypatch.setattr(measured, "dense", lambda *cell: found[0])
    monkeypatch.setattr(runtime, "arch_of", lambda device: "sm_80")
    monkeypatch.setattr(runtime, "processors", lambda device: 108)
    x = torch.empty(33, 256, dtype=torch.float16)
    codes, scales = torch.zeros(64, 32, dtype=torch.int32), torch.zeros(64, 8, dtype=torch.float16)

    def chosen(groups: int, zeros: torch.dtype | None = None) -> tuning.Config | tuning.Hopper | None:
        given = PackedInt4(codes, scales[:, :groups], None if zeros is None else scales[:, :groups].to(zeros))
        return linear.chosen(x, linear.pack(given), 64, 256 // groups)

    assert chosen(2) is own
    assert chosen(1) is own
    rule = tuning.dense(33, 64, 256, "sm_80", 108, plain=False)
    assert chosen(8) == chosen(4) == chosen(2, torch.uint8) == chosen(2, torch.float16) == rule != own
    found[0] = tuning.Hopper(128, 64, 1, 4)
    assert chosen(2) == rule


def test_the_table_has_parameters_that_run() -> None:
    assert measured.table()
    for device in measured.table().values():
        assert {"device", "torch", "triton", "date"} <= set(device["measured"])
        for layer, by_rows in device["dense"].items():
            N, K = map(int, layer.split("x"))
            for rows, given in by_rows.items():
                assert int(rows) in measured.ROWS
                config = measured.dense(int(rows), N, K, "sm_90", 132)
                assert config is not None and asdict(config) == given
                steps = -(-K // 256)
                assert (config.SPLITS - 1) * -(-steps // config.SPLITS) < steps
                assert -(-N // 64) * 64 % config.BN == 0 or isinstance(config, tuning.Hopper)


def test_tiles_that_leave_rows_out_are_refused() -> None:
    codes, scales = torch.zeros(200, 32, dtype=torch.int32), torch.zeros(200, 2, dtype=torch.float16)
    x, out = torch.zeros(16, 256, dtype=torch.float16), torch.zeros(16, 200, dtype=torch.float16)
    config = tuning.Config(128, 16, 64, WIDE=True, SPLITS=1, ROUNDED=False, STAGES=3, num_warps=8)
    for N in (130, 192):  # three tiles of 64 rows
        weight = linear.pack(PackedInt4(codes[:N], scales[:N], None))
        with pytest.raises(ValueError, match="BN must divide the weight's 192 rows; 128 does not"):
            linear.launch(config, x, weight, None, 128, out[:, :N])


def test_many_rows_are_split_less() -> None:
    """Splitting costs memory traffic; it is for where programs are few."""
    for N, K in SHAPES:
        splits = [tuning.dense(M, N, K, "sm_90", 132, True).SPLITS for M in (128, 256, 1024, 4096)]
        assert splits == sorted(splits, reverse=True)
    assert tuning.dense(4096, 6144, 4096, "sm_90", 132, True).SPLITS == 1
    assert tuning.dense(1, 6144, 4096, "sm_90", 132, True).SPLITS > 1


def test_the_numbers_hold_in_triton_s_interpreter() -> None:
    interpreter.passes("test_dense_numbers.py")
