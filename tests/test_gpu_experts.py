"""When the Triton kernels for `w4a16::moe` are chosen, with which parameters, their layout and the op's door to it, on
simulated devices; what they compute is in test_moe_numbers.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import interpreter
import pytest
import torch
from dense import ZEROS, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_problems import Experts
from offline import TARGETS
from torch._subclasses import FakeTensorMode

from inductor_ext import oracle
from inductor_ext.formats import PackedInt4
from inductor_ext.kernels import Mlp, MoeProblem, WeightKind
from inductor_ext.kernels.gpu import experts, planes, tuning

KIND = WeightKind(torch.bfloat16, 128, "int")
PROBLEM = MoeProblem(
    "cuda", "sm_90", torch.bfloat16, E=8, top_k=2, H=512, I=256, w13=KIND, w2=KIND, mlp=Mlp(), bias=True,
    expert_map=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"op": "linear"}, "The kernel computes moe, not linear."),
        ({"arch": "sm_75"}, "The kernels need sm_80 or newer, for its bfloat16 instructions; this is sm_75."),
        ({"device": "cpu"}, "The kernel runs on NVIDIA and AMD GPUs, not on cpu."),
        ({"dtype": torch.float32}, "The activations must be float16 or bfloat16, not torch.float32."),
        (
            {"w2": replace(KIND, scale_dtype=torch.float64)},
            "The scales must be float16, bfloat16 or float32, not torch.float64.",
        ),
        (
            {"w13": replace(KIND, group_size=16)},
            "The group size must be K=512, or divide it and be 32, 64 or a multiple of 128; it is 16.",
        ),
        (
            {"w2": replace(KIND, group_size=8)},
            "The group size must be K=256, or divide it and be 32, 64 or a multiple of 128; it is 8.",
        ),
        ({"mlp": Mlp("tanh")}, "The activation must be one of silu, gelu, gelu_tanh, relu, swigluoai, not tanh."),
        (
            {"mlp": Mlp(gate_up="thirds")},
            "The layout of gate and up must be one of halves, interleaved, none, not thirds.",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_it_cannot_do_is_a_sentence(changed: dict[str, Any], reason: str) -> None:
    assert experts.reject(replace(PROBLEM, **changed)) == reason


@pytest.mark.parametrize("arch", TARGETS)
def test_it_comes_before_the_reference_kernel_on_a_gpu(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "usable", lambda: None)
    problem = replace(PROBLEM, arch=arch)
    chosen = oracle.choose(problem)
    assert (chosen.kernel, list(chosen.passed_over)) == ("triton", ["hip"])
    passed_over = oracle.choose(replace(problem, dtype=torch.float32))
    assert passed_over.kernel == "reference"
    assert "float16 or bfloat16" in passed_over.passed_over["triton"]


@pytest.mark.parametrize("arch", [*TARGETS, "sm_75", "sm_120", "gfx90a"])
def test_every_number_of_pairs_gets_parameters_that_run(arch: str) -> None:
    for E, H, I in ((128, 2048, 768), (8, 4096, 14336), (1, 8, 8), (256, 7168, 2048)):  # noqa: E741
        for pairs in (*range(1, 600), *range(600, 32768, 97), 32768):
            both = up, down = tuning.moe(pairs, E, H, I, arch)
            told = f"{pairs} pairs of {E} experts: {both}"
            assert (up.BM, up.PAIRWISE) == (down.BM, down.PAIRWISE), f"the blocks are the same: {told}"
            assert up.BN >= 64, f"gates and ups of 32 outputs at the least: {told}"
            for config in both:
                assert planes.ROWS % config.BN == 0 or config.BN % planes.ROWS == 0, told
                assert (16 if tuning.is_amd(arch) else 8) <= config.BM, told
                assert config.num_warps * 64 <= config.BN * config.BM, told


def test_blocks_grow_with_the_tokens() -> None:
    """Few tokens: each pair by itself. Many: blocks that fill the matrix unit."""
    sizes = [tuning.moe(pairs, 128, 2048, 768, "sm_90")[0] for pairs in (8, 32, 33, 128, 2048, 32768)]
    assert [config.PAIRWISE for config in sizes] == [True, True, False, False, False, False]
    assert [config.BM for config in sizes] == sorted(config.BM for config in sizes)


# -- the layout --------------------------------------------------------------------------------------------------------


@st.composite
def weights(draw: st.DrawFn) -> tuple[PackedInt4, int]:
    """The rows of some experts, and how many experts."""
    E, N = draw(st.integers(1, 4)), draw(st.sampled_from([1, 40, 64, 70, 128]))
    G = draw(st.sampled_from([32, 64, 128]))
    scales = draw(st.sampled_from(planes.SCALES))
    K = G * draw(st.integers(1, 600 // G))
    return weight(E * N, K, G, draw(st.sampled_from(ZEROS)), scales, seed=draw(st.integers(0, 99)), device="cpu"), E


@settings(deadline=None, max_examples=60)
@given(weights())
def test_experts_come_back_as_they_were(given: tuple[PackedInt4, int]) -> None:
    w, E = given
    back = experts.unpack(experts.pack(w, E), w.N // E, w.K, w.group_size)
    for name in ("codes", "scales", "zeros"):
        was, now = getattr(w, name), getattr(back, name)
        assert (was is None) == (now is None)
        assert was is None or (torch.equal(was, now) and was.dtype == now.dtype), name


@settings(deadline=None, max_examples=60)
@given(weights())
def test_each_expert_is_as_a_dense_layer_s_weight(given: tuple[PackedInt4, int]) -> None:
    """And as the op's door wants it."""
    w, E = given
    N = w.N // E
    packed = experts.pack(w, E)
    for e in range(E):
        rows = slice(e * N, (e + 1) * N)
        one = planes.pack(PackedInt4(w.codes[rows], w.scales[rows], None if w.zeros is None else w.zeros[rows]))
        for whole, own in zip(packed, one, strict=True):
            assert (whole is None) == (own is None)
            assert whole is None or torch.equal(whole[e], own)
    for t, wanted in zip(packed, experts.layout(packed, E, N, w.K, w.group_size), strict=True):
        assert t is None or (tuple(t.shape) == wanted.shape and t.dtype in wanted.dtypes and t.is_contiguous())


# -- the door ----------------------------------------------------------------------------------------------------------

MADE = Experts(E=3, H=320, I=96, G=(64, 32), dtype=torch.float16, zeros="int", kernel="triton")
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "codes as stored": (
        {"w13_qweight": torch.zeros(3, 192, 40, dtype=torch.int32)},
        "w13_qweight must be int16, it is torch.int32",
    ),
    "tiles": (
        {"w2_qweight": torch.zeros(3, 4, 1, 4096, dtype=torch.int16)},
        r"w2_qweight must be \[3, 5, 1, 4096\], it is int16 \[3, 4, 1, 4096\]",
    ),
    "scales as stored": (
        {"w13_scales": torch.ones(3, 192, 5).half()},
        r"w13_scales must be \[3, 4, 192, 2\], it is float16 \[3, 192, 5\]",
    ),
    "zeros of one expert": (
        {"w2_zeros": torch.zeros(4, 320, 2, dtype=torch.int16)},
        r"w2_zeros must be \[3, 4, 320, 2\], it is int16 \[4, 320, 2\]",
    ),
    "bytes for zeros": (
        {"w13_zeros": torch.zeros(3, 4, 192, 2, dtype=torch.uint8)},
        "w13_zeros must be int16 or float16 or bfloat16 or float32, it is torch.uint8",
    ),
    "group": (
        {"w13_group_size": 40},
        "w13: The group size must be K=320, or divide it and be 32, 64 or a multiple of 128; it is 40",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str) -> None:
    """Without a GPU too, as when a graph is captured."""
    change, message = MISTAKES[name]
    x, topk_weights, topk_ids = MADE.routed(3)
    right = {"x": x, "topk_weights": topk_weights, "topk_ids": topk_ids, **MADE.tensors, **MADE.settings()}
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert torch.ops.w4a16.moe(**right).shape == (3, 320)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.w4a16.moe(**right | change)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.w4a16.moe(**right | change)


@pytest.mark.parametrize("zeros", ZEROS)
def test_the_gradient_reads_the_layout(zeros: str) -> None:
    given: dict[str, Any] = {"E": 3, "H": 96, "I": 40, "G": (32, 40), "dtype": torch.float16, "zeros": zeros}
    ours, reference = (Experts(**given, kernel=kernel) for kernel in ("triton", "reference"))
    x, weights, ids = ours.routed(5)
    found, wanted = (
        torch.ops.w4a16.moe_grad(x.neg(), x, weights, ids, *made.in_order(), **made.settings())
        for made in (ours, reference)
    )
    assert all(torch.equal(own, other) for own, other in zip(found, wanted, strict=True))


def test_the_numbers_hold_in_triton_s_interpreter() -> None:
    interpreter.passes("test_moe_numbers.py")
