"""What the Triton kernels behind `w4a16::linear` compute: on a GPU, or with TRITON_INTERPRET=1 on the CPU, as
test_gpu_choice.py runs this file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from dense import ZEROS, activations, dense, expected, weight
from interpreter import DEVICE, DTYPES, INTERPRETED, needs_a_device, thinned
from models import OWED, rel_l2
from torch import Tensor

import inductor_ext.ops  # noqa: F401  registers torch.ops.w4a16
from inductor_ext.kernels.gpu import codes, linear, runtime
from inductor_ext.kernels.gpu.codes import four_planes, four_planes_less
from inductor_ext.kernels.gpu.tuning import Config

pytestmark = needs_a_device

PLAIN = Config(BN=64, BM=16, WIDTH=64, WIDE=False, SPLITS=1, ROUNDED=False, STAGES=2, num_warps=4)
WIDE = dataclasses.replace(PLAIN, WIDE=True, SPLITS=2)
HALF = dataclasses.replace(PLAIN, WIDTH=32, SPLITS=3)
WIDE_HALF = dataclasses.replace(WIDE, WIDTH=32, SPLITS=1)
SHORT = dataclasses.replace(PLAIN, BN=32, BM=8, SPLITS=4)  # for few rows
ROUNDED = dataclasses.replace(WIDE, WIDTH=32, ROUNDED=True)  # for many rows
VARIANTS = {"plain": PLAIN, "wide": WIDE, "half": HALF, "wide half": WIDE_HALF, "short": SHORT, "rounded": ROUNDED}
SIZES = {32: 416, 64: 448, 128: 640, 256: 512, 384: 768, 0: 328}
"""Group size -> K; 0 is one group. Most are no whole number of tiles."""
CASES = thinned(SIZES, ZEROS, VARIANTS)


def launched(
    config: Config, M: int, N: int, K: int, G: int, zeros: str, dtype: torch.dtype, scale_dtype: torch.dtype
) -> float:
    """What the fused kernel with these parameters is off by, for a weight with a bias."""
    w, x = weight(N, K, G, zeros, scale_dtype), activations(M, K, dtype)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    out = torch.full((M, N), float("nan"), dtype=dtype, device=DEVICE)
    linear.launch(config, x, linear.pack(w), bias, G, out)
    return rel_l2(out, expected(x, w, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("G", "zeros", "variant"), CASES)
def test_every_variant(G: int, zeros: str, variant: str, dtype: torch.dtype) -> None:
    """All groups and zeros with each."""
    K = SIZES[G]
    assert launched(VARIANTS[variant], 5, 70, K, G or K, zeros, dtype, dtype) <= OWED[dtype]


@triton.jit
def every_code(out, sample, PTX: tl.constexpr, LESS_8: tl.constexpr):
    """out [17, 65536, 4]: the codes of each word less each zero, in sample's dtype, as float32."""
    zero = tl.program_id(0)
    words = tl.program_id(1) * 1024 + tl.arange(0, 1024)
    w = words.to(tl.int16)
    dtype: tl.constexpr = sample.dtype.element_ty
    if LESS_8:
        a, b, c, d = four_planes(w, dtype, PTX)
    else:
        z = tl.zeros((1024,), tl.int32) + zero
        a, b, c, d = four_planes_less(w, z, z, z, z, dtype, PTX)
    first = out + (zero * 65536 + words) * 4
    tl.store(first, a.to(tl.float32))
    tl.store(first + 1, b.to(tl.float32))
    tl.store(first + 2, c.to(tl.float32))
    tl.store(first + 3, d.to(tl.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("less_8", [False, True])
def test_every_code_less_every_zero_is_exact(less_8: bool, dtype: torch.dtype) -> None:
    PTX = DEVICE == "cuda" and runtime.arch_of(torch.device(DEVICE, 0)).startswith("sm_")
    zeros = torch.tensor([8] if less_8 else range(17), device=DEVICE)
    out = torch.empty(len(zeros), 65536, 4, device=DEVICE)
    every_code[(len(zeros), 64)](out, torch.empty(1, dtype=dtype, device=DEVICE), PTX=PTX, LESS_8=less_8)
    nibbles = (torch.arange(65536, device=DEVICE)[:, None] >> torch.arange(0, 16, 4, device=DEVICE)) & 15
    assert torch.equal(out, (nibbles[None] - zeros[:, None, None]).float())


@triton.jit
def every_offset(out):
    """out [3, 32]: what is added for zeros 0..31, as float32."""
    z = tl.arange(0, 32)
    tl.store(out + z, codes._less_1024(z).to(tl.float32))
    tl.store(out + 32 + z, codes._less_64(z).to(tl.float32))
    tl.store(out + 64 + z, codes._less_128(z).to(tl.float32))


def test_offsets_are_the_numbers_that_their_bits_say() -> None:
    out = torch.empty(3, 32, device=DEVICE)
    every_offset[(1,)](out)
    assert torch.equal(out, -torch.tensor([1024.0, 64, 128], device=DEVICE)[:, None] - torch.arange(32, device=DEVICE))


_ON_HALVES: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "min": torch.fmin,
    "max": torch.fmax,
    "fma": lambda a, b, c: a * b + c,
}


class Ptx:
    """The few instructions of the assembly that unpacks codes, for 32-bit registers of many threads, on the CPU."""

    def __init__(self, dtype: torch.dtype, registers: dict[str, Tensor]) -> None:
        self.dtype, self.registers = dtype, registers

    def run(self, text: str) -> None:
        for line in text.strip(" {}\n").splitlines():
            called, rest = line.rstrip(";").split(" ", 1)
            into, *given = (word.strip() for word in rest.split(","))
            if called != ".reg":
                a, *others = (self.registers[g] if g in self.registers else torch.tensor([int(g, 0)]) for g in given)
                self.registers[into] = self.do(called, a, *others)

    def do(self, called: str, a: Tensor, *others: Tensor) -> Tensor:
        if called == "mov.b32":
            return a
        if called == "shr.b32":
            return a >> others[0]
        if called == "lop3.b32":
            assert others[2] == 0xEA
            return (a & others[0]) | others[1]
        if called == "sub.s32":
            return a - others[0]
        name, _, lanes = called.replace(".rn", "").partition(".")
        assert lanes == {torch.float16: "f16x2", torch.bfloat16: "bf16x2"}[self.dtype]
        y = _ON_HALVES[name](*(self.halves(t) for t in (a, *others)))
        low, high = (half.to(self.dtype).view(torch.int16).long() & 0xFFFF for half in y)
        return low | high << 16

    def halves(self, t: Tensor) -> Tensor:
        """[2, threads]: float64, the low half first."""
        return torch.stack([(t >> s & 0xFFFF).to(torch.uint16).view(self.dtype).double() for s in (0, 16)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("less_8", [False, True])
def test_the_assembly_unpacks_every_word_exactly(less_8: bool, dtype: torch.dtype) -> None:
    """CI has no GPU that would run it."""
    half = dtype == torch.float16
    plain, fixed = (
        (codes._ASM_FLOAT16, codes._FLOAT16_LESS_8) if half else (codes._ASM_BFLOAT16, codes._BFLOAT16_LESS_8)
    )
    words = torch.arange(65536)
    wanted = words[:, None] >> torch.arange(0, 16, 4) & 15
    for zero in (8,) if less_8 else range(17):
        offsets = torch.tensor([-1024.0, -64, -1024, -64] if half else [-128.0] * 4) - zero
        bits = offsets.to(dtype).view(torch.int16).long() & 0xFFFF
        registers = {} if less_8 else {f"${5 + i}": (b | b << 16)[None] for i, b in enumerate(bits)}
        ptx = Ptx(dtype, registers | {"$4": words | words.flip(0) << 16})
        ptx.run((fixed if less_8 else plain).value)
        for i in range(4):
            low, high = ptx.halves(ptx.registers[f"${i}"])
            assert torch.equal(low, wanted[:, i].double() - zero)
            assert torch.equal(high, wanted.flip(0)[:, i].double() - zero)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_assembly_takes_zeros_apart(dtype: torch.dtype) -> None:
    """All of the dtype: what is whole of them is 0 to 16, and the rest makes a weight right that was made with that."""
    bits = torch.arange(65536)
    zeros = bits.to(torch.uint16).view(dtype).double()
    scales = 0.01 * torch.rand(65536, generator=torch.Generator().manual_seed(0)).to(dtype) + 0.001
    pair = scales.view(torch.int16).long() & 0xFFFF
    ptx = Ptx(dtype, {"$2": bits | bits.flip(0) << 16, "$3": pair | pair.flip(0) << 16})
    ptx.run((codes._APART_FLOAT16 if dtype == torch.float16 else codes._APART_BFLOAT16).value)
    for shift, reorder in ((0, lambda t: t), (16, lambda t: t.flip(0))):
        whole = reorder(ptx.registers["$0"] >> shift & 0xFFFF)
        rest = reorder(ptx.halves(ptx.registers["$1"])[shift // 16])
        assert torch.equal(whole[:7], torch.zeros(7, dtype=torch.int64))
        inside = (zeros >= 0) & (zeros <= 16)
        assert torch.equal(whole[inside], zeros[inside].round().long())
        assert bool(((whole >= 0) & (whole <= 16)).all())
        wanted = (whole - zeros) * scales.double()
        some = zeros.isfinite() & (wanted.abs() < 6e4) & (wanted.abs() > 1e-4)
        assert bool(((rest - wanted).abs()[some] <= torch.finfo(dtype).eps * wanted.abs()[some]).all())
        assert not bool(rest[~zeros.isfinite()].isfinite().any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("G", "zeros"), [(32, "none"), (32, "int"), (32, "float"), (64, "float"), (128, "float")])
@pytest.mark.parametrize("variant", ["plain", "wide half", "short"])
def test_groups_whose_sums_are_scaled(
    variant: str, G: int, zeros: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on AMD GPUs, where weights are not scaled."""
    monkeypatch.setattr("inductor_ext.kernels.gpu.weight.steps", lambda *given: {"WIDTH": 32, "ROUNDED": False})
    assert launched(VARIANTS[variant], 5, 70, SIZES[G], G, zeros, dtype, dtype) <= OWED[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("zeros", ["none", "float"])
def test_scales_and_zeros_of_another_dtype(zeros: str, scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    assert launched(WIDE, 3, 40, 320, 64, zeros, dtype, scale_dtype) <= OWED[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["wide", "wide half", "short", "rounded"])
@pytest.mark.parametrize("G", [32, 64, 128, 0])
def test_zeros_of_another_dtype_than_scales(G: int, variant: str, dtype: torch.dtype) -> None:
    """As are those that a graph computes: 7.5, or an added shift."""
    K = SIZES[G]
    assert launched(VARIANTS[variant], 5, 70, K, G or K, "float32", dtype, dtype) <= OWED[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scales_too_small_for_the_activations_dtype(scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """They are not rounded to it, whatever the variant says: float16 would lose them."""
    w, x = weight(40, 320, 64, "int", scale_dtype), activations(3, 320, dtype)
    w.scales.mul_(1e-5)
    out = torch.empty(3, 40, dtype=dtype, device=DEVICE)
    linear.launch(ROUNDED, x * 1000, linear.pack(w), None, 64, out)
    assert rel_l2(out, expected(x * 1000, w)) <= 2 * OWED[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [8, 9, 33])
def test_rows_that_fill_their_tiles_or_not(M: int, dtype: torch.dtype) -> None:
    assert launched(SHORT, M, 70, 256, 128, "int", dtype, dtype) <= OWED[dtype]


def test_many_tiles_along_n_are_taken_in_bands() -> None:
    """18 tiles, a band and a rest, and several along M: each is computed."""
    assert launched(PLAIN, 17, 17 * 64 + 1, 32, 32, "none", torch.float16, torch.float16) <= OWED[torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zeros", [*ZEROS, "float32"])
@pytest.mark.parametrize("G", SIZES)
def test_dequantised_once(G: int, zeros: str, dtype: torch.dtype) -> None:
    """Each element within one rounding of float32's result."""
    K = SIZES[G]
    w = weight(70, K, G or K, zeros, dtype)
    y = linear.dequantise(linear.pack(w), 70, K, G or K, dtype)
    assert (y.shape, y.dtype) == ((70, K), dtype)
    assert rel_l2(y, dense(w).to(dtype)) <= OWED[dtype] / 100


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("M", [1, 12, 40, 100, 460])
def test_the_op_at_any_number_of_rows(M: int, order: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(runtime, "processors", lambda device: 4)
    w, x = weight(70, 512, 64, "int", dtype, order), activations(M, 512, dtype)
    y = torch.ops.w4a16.linear(x, *linear.pack(w), None, 70, 64, "triton")
    assert (y.shape, y.dtype) == ((M, 70), dtype)
    assert rel_l2(y, expected(x, w)) <= OWED[dtype]


@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3)], ids=str)
def test_batches_and_no_rows(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(runtime, "processors", lambda device: 4)
    w = weight(70, 256, 64)
    x = activations(6, 256, torch.float16)[: torch.Size(shape).numel()].view(*shape, 256)
    y = torch.ops.w4a16.linear(x, *linear.pack(w), None, 70, 64, "triton")
    assert y.shape == (*shape, 70)
    assert y.numel() == 0 or rel_l2(y, expected(x, w)) <= OWED[torch.float16]


def test_infinity_in_a_row_stays_in_its_row() -> None:
    w, x = weight(70, 320, 64, "int"), activations(5, 320, torch.float16).clone()
    x[2, 7] = float("inf")
    out = torch.empty(5, 70, dtype=torch.float16, device=DEVICE)
    linear.launch(WIDE, x, linear.pack(w), None, 64, out)
    assert torch.isfinite(out).all(1).tolist() == [True, True, False, True, True]
