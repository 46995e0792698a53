"""The Triton kernels, compiled for GPUs that are not here: they use the matrix units, spill nothing, fit into shared
memory and load weights 128 bits at a time."""

from __future__ import annotations

import offline
import pytest
from offline import uses_matrix_units

from inductor_ext.kernels.gpu import field_gemm


def field(target: str, dtype: str, tile: field_gemm.Tile, zeros: bool = True) -> offline.Facts:
    pointers = {"a": f"*{dtype}", "b_q": "*i32", "scales": f"*{dtype}", "out": f"*{dtype}"}
    numbers = dict.fromkeys(("M", "words", "K", "group_size", "zp_bias"), "i32")
    constexprs = {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK}
    if zeros:
        pointers["qzeros"] = "*i32"
    else:
        constexprs["qzeros"] = None
    return offline.compile(field_gemm.field_gemm, pointers | numbers, constexprs, target, tile.warps, tile.stages)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("M", [1, 64, 1000])
@pytest.mark.parametrize("target", offline.TARGETS)
def test_the_field_s_gemm(target: str, M: int, dtype: str) -> None:
    facts = field(target, dtype, field_gemm.tile(target, M, K=4096, group_size=128))
    assert uses_matrix_units(facts, target, dtype), facts.matrix
    assert facts.spills == 0
    assert 0 < facts.shared <= offline.TARGETS[target].shared
    assert facts.load_bytes("tl.load(b_q") == {16}
    assert facts.load_bytes("tl.load(a ") == {16}


@pytest.mark.parametrize("target", offline.TARGETS)
def test_the_field_s_gemm_with_groups_of_32_and_one_zero(target: str) -> None:
    """The smallest tile is cut to half the columns there, so a thread has two words of the weight and not four."""
    facts = field(target, "fp16", field_gemm.tile(target, M=1, K=4096, group_size=32), zeros=False)
    assert uses_matrix_units(facts, target, "fp16"), facts.matrix
    assert facts.spills == 0
    assert facts.load_bytes("tl.load(b_q") == {8}
    assert facts.load_bytes("tl.load(qzeros") == set()


# A tile far too large for a warp.
@pytest.mark.parametrize("target", ["gfx1100", "sm_90"])
def test_a_bad_kernel_would_be_seen(target: str) -> None:
    facts = field(target, "fp16", field_gemm.Tile(128, 64, 32, 1, 2))
    assert facts.spills > 0
    assert not uses_matrix_units(facts, target, "bf16")
