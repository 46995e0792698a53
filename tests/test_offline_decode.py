"""The kernels for one row of x as they are launched, compiled for NVIDIA GPUs that are not here: wide copies, operands
in registers, nothing spilled. What they compute is tested on a GPU (test_gpu_linear.py, test_gpu_moe.py)."""

from __future__ import annotations

import re

import pytest
import torch
from offline import TARGETS, Recorder
from test_offline_dense import K, N, packed

from inductor_ext.formats import PackedInt4
from inductor_ext.kernels.gpu import linear, runtime
from inductor_ext.kernels.gpu.decode import dense, launch

NVIDIA = [target for target in TARGETS if target.startswith("sm_")]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(runtime, "processors", lambda device: 132)
    monkeypatch.setattr(runtime, "require", lambda x: None)
    return monkeypatch


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize(
    ("dtype", "G", "zeros"),
    [(torch.float16, 128, False), (torch.bfloat16, 32, True), (torch.float16, 64, True), (torch.bfloat16, K, False)],
    ids=str,
)
def test_linears(on: pytest.MonkeyPatch, target: str, dtype: torch.dtype, G: int, zeros: bool) -> None:
    on.setattr(runtime, "arch_of", lambda device: target)
    kernel = Recorder(dense.linear_kernel)
    on.setattr(dense, "linear_kernel", kernel)
    linear.run(torch.empty(1, K, dtype=dtype, device="meta"), packed(G, zeros, dtype), None, N, G)
    facts, given = kernel.compile(target), kernel.given
    assert facts.matrix and all("mma.sync" in instruction for instruction in facts.matrix)
    assert facts.spills == 0
    assert 0 < facts.shared <= TARGETS[target].shared // 4, "four programs share a processor"
    # The warps' sums meet in memory of their own: copies that are still on their way must not land in it.
    kinds, per = 2 if zeros else 1, {32: 4, 64: 2, 0: 1, 128: 1}[given["G"]]
    words = kinds * per
    tile = 256 * 2 + 16 * 256 // 2 + 16 * 4 * words
    assert facts.shared >= given["WARPS"] * (given["STAGES"] * tile + 16 * 8 * 4)
    # A thread's share of a step: 16 bytes of x, four times 16 of codes, and words of scales and zeros, of which there
    # are 16 for a warp. Nothing passes through a register on the way.
    copied = [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\S* \[[^\]]*\], \[[^\]]*\], (\w+)", facts.assembly)]
    fetches = given["STAGES"]  # those before the loop, and the one in it
    runs, single = 5 * fetches, kinds * max(1, per // 2) * fetches
    assert (copied.count(16), copied.count(4), len(copied)) == (runs, single, runs + single)
    # Sums of x, which zeros need, are of four steps at once.
    assert facts.assembly.count("ld.global.v4") == (4 * given["CHUNKS"] if zeros else 0)
    # Warps wait for each other twice a step: for what has come, and before it is overwritten.
    _, loop, _ = facts.assembly.split("cp.async.wait_group")
    assert loop.count("bar.sync") == 2, "and not between copies"


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "arch", "taken"),
    [
        (1, 4096, torch.float16, "sm_90", True),
        (1, 4096, torch.float16, "sm_80", True),
        (2, 4096, torch.float16, "sm_90", False),
        (1, 264, torch.float16, "sm_90", False),  # a row of x that is no multiple of 32 bytes
        (1, 4096, torch.float32, "sm_90", False),  # scales that are no pairs
        (1, 4096, torch.float16, "gfx942", False),
        (1, 1 << 17, torch.float16, "sm_90", True),
    ],
)
def test_what_they_take(
    on: pytest.MonkeyPatch, rows: int, columns: int, dtype: torch.dtype, arch: str, taken: bool
) -> None:
    on.setattr(runtime, "arch_of", lambda device: arch)
    x = torch.empty(rows, columns, dtype=torch.float16, device="meta")
    assert launch.can(packed(128, False, dtype), x) is taken


@pytest.mark.parametrize(
    ("zeros", "taken"),
    [(torch.uint8, True), (torch.float16, True), (torch.bfloat16, True), (torch.float32, False)],
)
def test_zeros_come_in_pairs_too(on: pytest.MonkeyPatch, zeros: torch.dtype, taken: bool) -> None:
    """Those that a graph computes are float32, whatever the scales are."""
    on.setattr(runtime, "arch_of", lambda device: "sm_90")
    codes, scales = torch.zeros(64, 32, dtype=torch.int32), torch.zeros(64, 2, dtype=torch.float16)
    weight = linear.pack(PackedInt4(codes, scales, scales.to(zeros)))
    assert launch.can(weight, torch.empty(1, 256, dtype=torch.float16)) is taken


def test_sums_of_a_very_long_row_are_left_to_the_other_kernel(on: pytest.MonkeyPatch) -> None:
    """They would not all fit into shared memory."""
    on.setattr(runtime, "arch_of", lambda device: "sm_90")
    for columns, taken in ((1 << 16, True), ((1 << 16) + 256, False)):
        x = torch.empty(1, columns, dtype=torch.float16, device="meta")
        assert launch.can(packed(128, True, torch.float16), x) is taken
    assert launch.can(packed(128, False, torch.float16), x)


@pytest.mark.parametrize("target", NVIDIA)
def test_sums_of_a_long_row_fit(on: pytest.MonkeyPatch, target: str) -> None:
    """Of the longest row, in the smallest groups."""
    on.setattr(runtime, "arch_of", lambda device: target)
    kernel = Recorder(dense.linear_kernel)
    on.setattr(dense, "linear_kernel", kernel)
    codes, numbers = torch.empty(64, 1 << 13, dtype=torch.int32, device="meta"), (64, 1 << 11)
    scales = torch.empty(numbers, dtype=torch.float16, device="meta")
    weight = linear.pack(PackedInt4(codes, scales, torch.empty(numbers, dtype=torch.uint8, device="meta")))
    linear.run(torch.empty(1, 1 << 16, dtype=torch.float16, device="meta"), weight, None, 64, 32)
    facts = kernel.compile(target)
    assert facts.spills == 0
    assert facts.shared <= 99 * 1024, "what a program has on sm_86"


@pytest.mark.parametrize(("of_x", "of_codes", "taken"), [(0, 0, True), (8, 0, True), (1, 0, False), (0, 1, False)])
def test_what_is_at_an_odd_address_is_left_to_the_other_kernel(
    on: pytest.MonkeyPatch, of_x: int, of_codes: int, taken: bool
) -> None:
    on.setattr(runtime, "arch_of", lambda device: "sm_90")
    weight = linear.pack(PackedInt4(torch.zeros(64, 32, dtype=torch.int32), torch.zeros(64, 2, dtype=torch.float16)))
    room = torch.empty(weight.qweight.numel() + 16, dtype=torch.int16)
    codes = room[of_codes:][: weight.qweight.numel()].view(weight.qweight.shape)
    x = torch.empty(272, dtype=torch.float16)[of_x:][:256].view(1, 256)
    assert launch.can(weight._replace(qweight=codes), x) is taken
