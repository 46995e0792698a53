"""When the Triton kernels for MXFP4 experts are chosen, with which parameters, their layout, the op's door to it, and
what their inline assembly makes of every word; what they compute is in test_mxfp4_numbers.py."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mxfp4_problems import GPT_OSS, Mxfp4Experts, e2m1
from offline import TARGETS
from torch import Tensor
from torch._subclasses import FakeTensorMode

from inductor_ext import oracle
from inductor_ext.formats import PackedMxfp4
from inductor_ext.kernels import MoeProblem, WeightKind
from inductor_ext.kernels.gpu import fp4, fp4_planes, mxfp4, mxfp4_scaled, tuning

KIND = WeightKind(torch.uint8, 32, "none", "mxfp4")
PROBLEM = MoeProblem(
    "cuda", "sm_90", torch.bfloat16, E=32, top_k=4, H=2880, I=2880, w13=KIND, w2=KIND, mlp=GPT_OSS, bias=True,
    expert_map=True, op="moe_mxfp4",
)  # fmt: skip
ON_INPUT = replace(GPT_OSS, apply_router_weight_on_input=True)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"op": "moe"}, "The kernel computes moe_mxfp4, not moe."),
        ({"device": "cpu"}, "The kernel runs on NVIDIA and AMD GPUs, not on cpu."),
        ({"arch": "sm_75"}, "The kernels need sm_80 or newer, for its bfloat16 instructions; this is sm_75."),
        ({"dtype": torch.float32}, "The activations must be float16 or bfloat16, not torch.float32."),
        (
            {"mlp": replace(GPT_OSS, activation="tanh")},
            "The activation must be one of silu, gelu, gelu_tanh, relu, swigluoai, not tanh.",
        ),
        (
            {"mlp": replace(GPT_OSS, gate_up="thirds")},
            "The layout of gate and up must be one of halves, interleaved, none, not thirds.",
        ),
        (
            {"mlp": ON_INPUT, "fp8": True},
            "The kernel rounds x to fp8 once, not once for each weight of the router on the input.",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_they_cannot_do_is_a_sentence(changed: dict[str, Any], reason: str) -> None:
    assert mxfp4.reject(replace(PROBLEM, mlp=ON_INPUT)) is None
    for kernel in (mxfp4, mxfp4_scaled):
        assert kernel.reject(replace(PROBLEM, **changed)) == reason


@pytest.mark.parametrize("arch", TARGETS)
def test_they_come_before_the_reference_kernel_on_a_gpu(arch: str) -> None:
    problem = replace(PROBLEM, arch=arch)
    chosen = oracle.choose(problem, elsewhere=True)
    assert chosen.kernel == ("dot_scaled" if arch == "gfx950" else "triton")
    if arch != "gfx950":
        wanted = f"The kernel is for gfx950, whose matrix units take MXFP4; this is {arch}."
        assert chosen.passed_over["dot_scaled"] == wanted
    assert oracle.choose(replace(problem, dtype=torch.float32), elsewhere=True).kernel == "reference"


@pytest.mark.parametrize("arch", [*TARGETS, "sm_75", "sm_120", "gfx90a"])
def test_every_number_of_pairs_gets_parameters_that_run(arch: str) -> None:
    for E in (1, 8, 32, 128):
        for pairs in (*range(1, 600), *range(600, 32768, 97), 32768):
            for both in (tuning.mxfp4(pairs, E, arch), tuning.mxfp4_scaled(pairs, E, arch)):
                up, down = both
                told = f"{pairs} pairs of {E} experts: {both}"
                assert (up.BM, up.PAIRWISE) == (down.BM, down.PAIRWISE), f"the blocks are the same: {told}"
                assert up.BN >= 64, f"gates and ups of 32 outputs at the least: {told}"
                for config in both:
                    assert (16 if tuning.is_amd(arch) else 8) <= config.BM, told
                    assert config.num_warps * 64 <= config.BN * config.BM, told


# -- the layout --------------------------------------------------------------------------------------------------------


def drawn(E: int, N: int, K: int, largest: int, seed: int) -> PackedMxfp4:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (E * N, K // 2), generator=random).to(torch.uint8)
    return PackedMxfp4(codes, torch.randint(largest + 1, (E * N, -(-K // 32)), generator=random).to(torch.uint8))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3), st.sampled_from([1, 40, 64, 70]), st.integers(1, 200), st.sampled_from([128, 255]))
def test_experts_come_back_as_they_were(E: int, N: int, half: int, largest: int) -> None:
    """And are as the op's door wants them; scales above 128 too."""
    w = drawn(E, N, 2 * half, largest, seed=half)
    packed = mxfp4.pack(w, E)
    back = mxfp4.unpack(packed, N, w.K, 32)
    assert torch.equal(back.codes, w.codes) and torch.equal(back.scales, w.scales)
    for t, wanted in zip(packed[:2], mxfp4.layout(packed, E, N, w.K, 32), strict=False):
        assert tuple(t.shape) == wanted.shape and t.dtype in wanted.dtypes and t.is_contiguous()
    if largest == 128:
        assert packed.scales.dtype == torch.uint8


@pytest.mark.parametrize(("largest", "dtype"), [(0, torch.uint8), (128, torch.uint8), (129, torch.float32)], ids=str)
def test_one_scale_that_no_factor_can_be_makes_all_of_them_floats(largest: int, dtype: torch.dtype) -> None:
    """2**126 times the scale is a bfloat16 up to 128; its bits for 129 would be those of infinity."""
    w = drawn(2, 40, 96, 0, seed=0)
    w.scales[7, 1] = largest
    assert mxfp4.pack(w, 2).scales.dtype == dtype


def test_where_a_code_and_a_scale_are() -> None:
    w = drawn(2, 100, 300, 128, seed=0)
    packed, codes = mxfp4.pack(w, 2), w.stored_codes().view(2, 100, 300)
    scales = w.scales.view(2, 100, 10)
    for e, n, k in ((0, 0, 0), (1, 99, 299), (0, 63, 31), (1, 64, 32), (1, 70, 200), (0, 5, 127), (0, 5, 128)):
        step, plane, j = k // 128, k % 128 // 32, k % 32
        word = int(packed.qweight[e, n // 64, step, n % 64 * 32 + j])
        bits, sign = fp4_planes.BITS[plane]
        assert (word >> bits & 7) | (word >> sign & 1) << 3 == codes[e, n, k]
        assert packed.scales[e, step, n, plane] == scales[e, n, k // 32]


# -- the decoding ------------------------------------------------------------------------------------------------------


def halves(t: Tensor, dtype: torch.dtype) -> Tensor:
    """int64 [n] words as float64 [n, 2]."""
    return torch.stack((t & 0xFFFF, t >> 16), 1).to(torch.int16).view(dtype).double()


def words(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse."""
    low, high = (t.to(torch.float32).to(dtype).view(torch.int16).long() & 0xFFFF).unbind(1)
    return low | high << 16


def executed(text: str, registers: dict[str, Tensor]) -> dict[str, Tensor]:
    """What PTX leaves in registers of 32 bits, each an int64 tensor here."""

    def value(name: str) -> Tensor:
        return registers[name] if name in registers else torch.tensor(int(name, 0))

    for line in re.findall(r"[^;{}\n]+(?=;)", text):
        op, _, rest = line.strip().partition(" ")
        if op == ".reg":
            continue
        to, *given = (part.strip() for part in rest.split(","))
        a, *more = (value(name) for name in given)
        if op in ("fma.rn.bf16x2", "fma.rn.f16x2"):
            dtype = torch.bfloat16 if "bf16" in op else torch.float16
            product, factor, term = (halves(t, dtype) for t in torch.broadcast_tensors(a, *more))
            result = words(product * factor + term, dtype)
        elif op == "prmt.b32":
            result = sum(((a | more[0] << 32) >> (8 * (int(more[1]) >> 4 * i & 7)) & 0xFF) << 8 * i for i in range(4))
        else:
            results = {
                "mov.b32": lambda a: a,
                "shl.b32": lambda a, b: a << b,
                "shr.b32": lambda a, b: a >> b,
                "and.b32": lambda a, b: a & b,
                "add.u32": lambda a, b: a + b,
                "lop3.b32": lambda a, b, c, table: (a & b) | c if table == 0xEA else None,
            }
            result = results[op](a, *more) & 0xFFFFFFFF
        registers[to] = result
    return registers


EVERY = torch.arange(1 << 16)
TWO = EVERY | EVERY.roll(12345) << 16
"""Every word beside another one."""


def planes(word: Tensor) -> list[Tensor]:
    """Of two words the values in each plane, float64 [n, 2]."""
    both = torch.stack((word & 0xFFFF, word >> 16), 1)
    return [e2m1(both >> bits & 7 | (both >> sign & 1) << 3) for bits, sign in fp4_planes.BITS]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_word_is_decoded_exactly(dtype: torch.dtype) -> None:
    """Signs of zeros too."""
    text = fp4.FLOAT16 if dtype == torch.float16 else fp4.BFLOAT16
    found = executed(text, {"$4": TWO})
    for plane, wanted in enumerate(planes(TWO)):
        assert torch.equal(found[f"${plane}"], words(wanted, dtype))


def test_every_scale_makes_exact_weights() -> None:
    """From 2**-127, with which half a code is less than bfloat16's least normal number, to 2."""
    every = torch.arange(129)
    scales = sum(every.roll(7 * p) << 8 * p for p in range(4))
    factors = executed(fp4.FACTORS, {"$4": scales})
    codes = torch.arange(1 << 16)[:: 257 // 2]
    registers = {"$4": (codes | codes.roll(5) << 16).repeat(129)}
    for p, name in enumerate(("$5", "$7", "$9", "$11")):
        registers[name] = factors[f"${p}"].repeat_interleave(len(codes))
    found = executed(fp4.SCALED, dict(registers))
    for p, wanted in enumerate(planes(registers["$4"])):
        exact = wanted * (2.0 ** (every.roll(7 * p).double() - 127)).repeat_interleave(len(codes))[:, None]
        assert torch.equal(halves(found[f"${p}"], torch.bfloat16), exact)


# -- the door ----------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "codes as stored": (
        {"w13_qweight": torch.zeros(4, 128, 48, dtype=torch.uint8)},
        "w13_qweight must be int16, it is torch.uint8",
    ),
    "tiles": (
        {"w2_qweight": torch.zeros(4, 1, 1, 2048, dtype=torch.int16)},
        r"w2_qweight must be \[4, 2, 1, 2048\], it is int16 \[4, 1, 1, 2048\]",
    ),
    "scales as stored": (
        {"w13_scales": torch.zeros(4, 128, 3, dtype=torch.uint8)},
        r"w13_scales must be \[4, 1, 128, 4\], it is uint8 \[4, 128, 3\]",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str) -> None:
    change, message = MISTAKES[name]
    experts = Mxfp4Experts(dtype=torch.float16, kernel="triton")
    x, topk_weights, topk_ids = experts.routed(3)
    _, settings = experts.arguments()
    right = {"x": x, "topk_weights": topk_weights, "topk_ids": topk_ids, **experts.tensors, **settings}
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert torch.ops.w4a16.moe_mxfp4(**right).shape == (3, 96)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.w4a16.moe_mxfp4(**right | change)


def test_the_gradient_reads_the_layout() -> None:
    ours, reference = (Mxfp4Experts(3, 96, 40, torch.float16, kernel=kernel) for kernel in ("triton", "reference"))
    x, weights, ids = ours.routed(5)
    found, wanted = (
        torch.ops.w4a16.moe_mxfp4_grad(x.neg(), x, weights, ids, *tensors, **settings)
        for tensors, settings in (ours.arguments(), reference.arguments())
    )
    assert all(torch.equal(own, other) for own, other in zip(found, wanted, strict=True))


def test_the_numbers_hold_in_triton_s_interpreter() -> None:
    interpreter.passes("test_mxfp4_numbers.py")
