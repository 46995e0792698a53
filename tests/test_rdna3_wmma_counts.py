"""The hot loops of the WMMA kernels leave more of the time to WMMA than those of the field's, in fewer instructions.

A WMMA of 16 x 16 x 16 holds its SIMD for 32 clocks, as AMD's table of matrix instructions has it; every other vector
instruction is taken for one clock, a dual pair too, and all others for none. Counted, not measured.
"""

from __future__ import annotations

import pytest
from hip_lanes import isa, toolchain

MACS = 16**3
CLOCKS = 32
"""Of a WMMA."""
THEIRS = {"w13": (4.13, 0.636), "w2": (5.74, 0.606), "dense": (7.5, 0.68)}
"""Instructions for 1,000 multiply-adds of launched rows, and WMMA's share of the clocks: the field's kernels, compiled
by LLVM 22 for gfx1100 and executed in an emulator of the instructions."""
AT_MOST = {
    # As the field's: zeros are 8. Both of its tile families are this one here.
    "wmma_by_row_{}_128": ("w13", 3.0, 0.79),
    "wmma_by_row_{}_64": ("w2", 3.4, 0.77),
    "wmma_by_row_{}_32": ("w2", 4.2, 0.74),
    # With the instructions that other zeros need, which are skipped where there are none.
    "wmma_{}_32_128": ("w13", 3.45, 0.76),
    "wmma_{}_32_64": ("w2", 4.4, 0.71),
    "wmma_{}_64_128": ("dense", 2.7, 0.84),
    "wmma_{}_64_64": ("dense", 3.5, 0.80),
    "wmma_{}_64_32": ("dense", 5.0, 0.73),
}
"""By kernel: what it is compared with, and our own bounds."""


@pytest.mark.parametrize("arch", ["gfx1100", "gfx1102", "gfx1151"])
def test_more_of_the_time_is_wmma_s_than_in_the_field_s(arch: str) -> None:
    text = toolchain.find().assembly(toolchain.HERE / "wmma.hip", arch).read_text()
    hot = {kernel.name: kernel.hot.kinds for kernel in isa.kernels(text)}
    for pattern, (like, most, least) in AT_MOST.items():
        for dtype in ("f16", "bf16"):
            kinds = hot[pattern.format(dtype)]
            wmmas = kinds["wmma"]
            instructions = kinds.total() / (wmmas * MACS / 1000)  # hints too
            share = CLOCKS * wmmas / (CLOCKS * wmmas + kinds["valu"] + kinds["dot2"])
            told = f"{pattern.format(dtype)} on {arch}: {instructions:.2f} instructions, {share:.3f} of the peak"
            assert instructions <= most and share >= least, told
            assert instructions <= THEIRS[like][0] and share > THEIRS[like][1], told
