"""The hot loops of the dot2 kernels take fewer instructions than those of the field's, which do the same."""

from __future__ import annotations

import pytest
from hip_lanes import isa, toolchain

THEIRS = {"bf16": {1: 204, 2: 113, 4: 82, 8: 64}, "f16": {1: 72, 2: 56, 4: 36, 8: 42}}
"""Instructions for 1,000 multiply-adds of the field's fused MoE kernel, by rows: compiled by clang 19 for gfx1100 and
executed in an emulator of the instructions."""
AT_MOST = {"bf16": {1: 70, 2: 50, 4: 34, 8: 30}, "f16": THEIRS["f16"]}


@pytest.mark.parametrize("source", ["dense.hip", "moe.hip"])
@pytest.mark.parametrize("arch", ["gfx1100", "gfx1102", "gfx1151"])
def test_a_step_takes_fewer_instructions_than_the_field_s(arch: str, source: str) -> None:
    text = toolchain.find().assembly(toolchain.HERE / source, arch).read_text()
    kernels = isa.kernels(text)
    assert len(kernels) == 8
    for kernel in kernels:
        *_, dtype, rows = kernel.name.split("_")
        thousands = int(rows) * 32 * 128 / 1000  # a step of 32 values of k, 128 columns
        loops = [loop for loop in kernel.loops if loop.products >= 2 * int(rows)]
        assert len(loops) == 3, "a loop for each kind of zeros"
        for loop in loops:
            each = loop.kinds.total() / thousands  # hints too
            assert each <= AT_MOST[dtype][int(rows)] <= THEIRS[dtype][int(rows)], (kernel.name, each)
