"""What the compiler made of the AMD kernels, for every architecture: nothing spilled, and no more registers and LDS
than each kernel was designed for. Compiled here, run nowhere."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from hip_lanes import isa, toolchain


@dataclasses.dataclass(frozen=True)
class Budget:
    vgprs: int
    """At most."""
    lds: int
    """Bytes, at most."""
    waves: float
    """A SIMD, at least, where it has 1,536 registers."""
    hot: tuple[str, ...] = ()
    """Instructions that must be in the hot loop, as regular expressions of opcodes."""


BUDGETS = {
    # Rows of x in scalar registers, codes in 128 bits a lane; LDS for what the waves add up alone.
    **{
        rf"(moe_)?gptq_gemm_rdna3_{dtype}_{rows}": Budget(
            vgprs, 2048 * rows + 16, waves, (r"v_(dual_)?dot2\w*", "global_load_b128", r"s_load_b(128|256)")
        )
        for dtype in ("f16", "bf16")
        for rows, vgprs, waves in ((1, 96, 16), (2, 96, 16), (4, 96, 16), (8, 128, 10))
    },
    # 16 columns of codes for each of 2 or 4 products with 16, 32 or 64 rows of x, which are in LDS: six waves a SIMD,
    # four where it has 1,024 registers.
    **{
        rf"wmma_(by_row_)?{dtype}_((16|32|64)_)?{stage}": Budget(
            240, 36 * 1024, 6, (rf"v_wmma_f32_16x16x16_{dtype}", "ds_load_b128", "global_load_b128")
        )
        for dtype in ("f16", "bf16")
        for stage in (32, 64, 128)
    },
    r"route": Budget(vgprs=48, lds=18 * 1024, waves=12),
    r"(activate|combine)_b?f16": Budget(vgprs=48, lds=0, waves=16),
    r"probe": Budget(vgprs=8, lds=0, waves=16, hot=("global_load_b32",)),
}
"""By regular expressions of the kernels' names. Every kernel has exactly one."""


@pytest.fixture(scope="module", params=toolchain.ARCHS)
def compiled(request: pytest.FixtureRequest) -> tuple[str, list[isa.Kernel]]:
    """An architecture, and the kernels that there are for it."""
    compiler = toolchain.find()
    texts = toolchain.in_parallel(lambda source: compiler.assembly(source, request.param), toolchain.sources())
    return request.param, [kernel for text in texts for kernel in isa.kernels(text.read_text())]


def test_nothing_is_spilled(compiled: tuple[str, list[isa.Kernel]]) -> None:
    found = {kernel.name: (kernel.vgpr_spills, kernel.sgpr_spills, kernel.scratch) for kernel in compiled[1]}
    assert not {name: spilled for name, spilled in found.items() if any(spilled)}


def test_every_kernel_keeps_to_its_budget(compiled: tuple[str, list[isa.Kernel]]) -> None:
    arch, kernels = compiled
    over = []
    for kernel in kernels:
        budgets = [budget for name, budget in BUDGETS.items() if re.fullmatch(name, kernel.name)]
        assert len(budgets) == 1, f"{kernel.name} has {len(budgets)} budgets"
        budget = budgets[0]
        lacking = [want for want in budget.hot if not any(re.fullmatch(want, have) for have in kernel.hot.opcodes)]
        enough = kernel.waves(arch) >= budget.waves or arch in isa.SMALL
        if kernel.vgprs > budget.vgprs or kernel.lds > budget.lds or not enough or lacking:
            over.append((kernel.name, kernel.vgprs, kernel.lds, kernel.waves(arch), lacking))
    assert not over


def test_every_budget_is_of_a_kernel() -> None:
    kernels = [name for source in toolchain.sources() for name in _names(source)]
    assert not [name for name in BUDGETS if not any(re.fullmatch(name, kernel) for kernel in kernels)]


def _names(source: Path) -> list[str]:
    return toolchain.kernels(toolchain.find().assembly(source, "gfx1100"))


LOOPS = """
both:                                   ; @both
; %bb.0:
	s_load_b64 s[0:1], s[0:1], 0x0
.LBB0_1:                                ; =>This Loop Header: Depth=1
	global_load_b128 v[0:3], v4, s[0:1]
.LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
	ds_load_b128 v[4:7], v8
	s_waitcnt lgkmcnt(0)
	s_delay_alu instid0(VALU_DEP_1)
	v_wmma_f32_16x16x16_f16 v[8:15], v[0:7], v[0:7], v[8:15]
	v_dual_mov_b32 v1, v2 :: v_dual_dot2acc_f32_f16 v3, v4, v5
	v_add_f32_e32 v0, v1, v2                ; v_dot2 in a comment
	s_cbranch_scc1 .LBB0_3
	s_cbranch_vccnz .LBB0_2
.LBB0_3:
	s_cbranch_execnz .LBB0_1
; %bb.4:
	s_endpgm
.Lfunc_end0:
	.amdgpu_metadata
---
amdhsa.kernels:
  - .args:
      - .offset:         0
        .size:           32
    .group_segment_fixed_size: 40960
    .max_flat_workgroup_size: 192
    .name:           both
    .private_segment_fixed_size: 12
    .sgpr_count:     18
    .sgpr_spill_count: 1
    .vgpr_count:     97
    .vgpr_spill_count: 2
amdhsa.target:   amdgcn-amd-amdhsa--gfx1100
...
"""


def test_instructions_are_counted_in_the_loop_that_multiplies() -> None:
    (kernel,) = isa.kernels(LOOPS)
    assert (kernel.vgprs, kernel.sgprs, kernel.vgpr_spills, kernel.sgpr_spills, kernel.scratch) == (97, 18, 2, 1, 12)
    assert kernel.hot.kinds == {"ds": 1, "wait": 1, "hint": 1, "wmma": 1, "dot2": 1, "valu": 1, "branch": 2}
    assert (kernel.hot.size, kernel.hot.products) == (7, 2)
    assert kernel.hot.opcodes["v_add_f32"] == 1
    (outer,) = (loop for loop in kernel.loops if loop is not kernel.hot)
    assert outer.kinds == {"vmem": 1, "branch": 1}


def test_waves_are_whole_workgroups() -> None:
    """97 registers: 120 of 1,536 or 112 of 1,024 a wave; 40 KB of LDS let three workgroups of six waves into a WGP."""
    (kernel,) = isa.kernels(LOOPS)
    assert kernel.waves("gfx1100") == 3 * 6 / 4
    no_lds = dataclasses.replace(kernel, lds=0)
    assert no_lds.waves("gfx1100") == (12 * 4 // 6) * 6 / 4
    assert no_lds.waves("gfx1102") == (9 * 4 // 6) * 6 / 4
