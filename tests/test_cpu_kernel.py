"""The compiled CPU kernel against float64, on every instruction set that this machine has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from inductor_ext.formats import PackedInt4
from inductor_ext.kernels import Packed, Problem, cpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BOUNDS = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
ROWS = (1, 2, 5, 17, 64, 130)
COLUMNS = (1, 7, 96, 129)

pytestmark = pytest.mark.skipif(cpu.usable() is not None, reason=str(cpu.usable()))
ISAS = [] if cpu.usable() else torch.ops.w4a16_cpu.usable_isas().split(",")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.ops.w4a16_cpu.set_isa(request.param)
    yield request.param
    torch.ops.w4a16_cpu.set_isa(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pack_words(codes: Tensor) -> Tensor:
    shifted = codes.view(codes.shape[0], codes.shape[1] // 8, 8).long() << torch.arange(0, 32, 4)
    return shifted.sum(-1).to(torch.uint32).view(torch.int32)


def run(x: Tensor, packed: Packed, bias: Tensor | None, group_size: int) -> Tensor:
    return cpu.run(x, packed, bias, packed.qweight.shape[0], group_size)


def make(N: int, K: int, G: int, zeros: str = "none", dtype: torch.dtype = torch.bfloat16) -> tuple[Packed, Tensor]:
    """A random weight and its value [N, K] in float64, computed without the package."""
    codes = torch.randint(0, 16, (N, K))
    scales = (torch.rand(N, K // G) * 0.02 + 1e-3).to(dtype)
    z: Tensor | None = None
    if zeros == "int":
        z = torch.randint(0, 17, (N, K // G), dtype=torch.uint8)
    elif zeros != "none":
        z = (torch.rand(N, K // G) * 15).to(dtype if zeros == "float" else torch.float32)
    z64 = torch.full((N, K // G), 8.0).double() if z is None else z.double()
    value = (codes.double().view(N, K // G, G) - z64.unsqueeze(-1)) * scales.double().unsqueeze(-1)
    return Packed(pack_words(codes), scales, z, None), value.view(N, K)


def error(y: Tensor, reference: Tensor) -> float:
    return float((y.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("zeros", ["none", "int", "float"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_close_to_float64(isa: str, dtype: torch.dtype, zeros: str) -> None:
    torch.manual_seed(0)
    shapes = ((8, 72), (8, 512), (32, 96), (32, 1024), (64, 640), (128, 128), (128, 1152), (1024, 1024), (264, 264))
    for j, (G, K) in enumerate(shapes):
        for i, N in enumerate(COLUMNS[j % 2 :: 2]):
            packed, weight = make(N, K, G, zeros, DTYPES[(i + j) % 3])
            bias = (None, torch.randn(N), torch.randn(N).to(dtype))[(i + j) % 3]
            for M in ROWS:
                x = torch.randn(M, K).to(dtype)
                y = run(x, packed, bias, G)
                assert y.dtype == dtype
                assert y.shape == (M, N)
                reference = x.double() @ weight.T + (0 if bias is None else bias.double())
                # One number alone may be the difference of large ones: then the terms, not the sum, count.
                scale = (
                    max(1.0, float((x.double().abs() @ weight.abs().T).norm() / reference.norm()) / 20)
                    if M * N < 8
                    else 1.0
                )
                assert error(y, reference) <= BOUNDS[dtype] * scale, (G, K, N, M)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_of_another_dtype_than_scales(isa: str, dtype: torch.dtype) -> None:
    """As are those that a graph computes: 7.5, or an added shift."""
    torch.manual_seed(0)
    for G, K in ((8, 72), (64, 640), (128, 1152)):
        packed, weight = make(72, K, G, "float32", dtype)
        for M in (1, 6, 40):
            x = torch.randn(M, K).to(dtype)
            assert error(run(x, packed, None, G), x.double() @ weight.T) <= BOUNDS[dtype]


@pytest.mark.parametrize("G", [24, 40, 96, 192])
def test_groups_of_any_multiple_of_eight(isa: str, G: int) -> None:
    torch.manual_seed(G)
    packed, weight = make(33, 3 * 5 * G, G, "int")
    for M in (1, 6, 40):
        for dtype in DTYPES:
            x = torch.randn(M, weight.shape[1]).to(dtype)
            assert error(run(x, packed, None, G), x.double() @ weight.T) <= BOUNDS[dtype]


def test_many_rows_are_done_in_blocks(isa: str) -> None:
    packed, weight = make(40, 640, 32, "int")
    x = torch.randn(523, 640)
    assert error(run(x, packed, None, 32), x.double() @ weight.T) <= BOUNDS[torch.float32]


def test_long_sums_stay_within_the_float32_bound(isa: str) -> None:
    packed, weight = make(48, 14336, 14336)
    for M in (1, 32):
        x = torch.randn(M, 14336)
        assert error(run(x, packed, None, 14336), x.double() @ weight.T) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_does_not_change_a_bit(isa: str, dtype: torch.dtype) -> None:
    packed, _ = make(129, 1152, 128, "int")
    inputs = [torch.randn(M, 1152).to(dtype) for M in (1, 5, 33, 130)]
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append([run(x, packed, None, 128) for x in inputs])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [0x7FC00000, 0x7FFFFFFF, 0x7F800000], ids=["nan", "nan of all ones", "inf"])
def test_a_bad_scale_spoils_its_own_row_only(isa: str, dtype: torch.dtype, bad: int) -> None:
    for G, K in ((8, 72), (32, 160), (128, 256), (24, 72)):
        packed, _ = make(50, K, G, dtype=torch.float32)
        packed.scales.view(torch.int32)[20, 0] = bad
        packed.scales.view(torch.int32)[33, -1] = bad
        for M in (1, 5, 40):
            y = run(torch.randn(M, K).to(dtype), packed, None, G)
            spoilt = ~torch.isfinite(y).all(0)
            assert spoilt.nonzero().flatten().tolist() == [20, 33], (G, K, M)


def test_rounding_matches_torch(isa: str) -> None:
    """One-hot rows of x and scales of 24 bits: the sums are exact, so only the one rounding at the end is seen."""
    K = 64
    codes = torch.randint(0, 16, (21, K))
    scales = torch.randn(21, K // 8) * torch.logspace(-6, 3, 21).unsqueeze(1)
    # Half-way between two bfloat16, or two float16, with code 9.
    codes[:2] = 9
    scales[0] = 1 + torch.arange(1, 16, 2) * 2**-8
    scales[1] = 1 + torch.arange(1, 16, 2) * 2**-11
    packed = Packed(pack_words(codes), scales, None, None)
    exact = (codes.float().view(21, -1, 8) - 8) * scales.unsqueeze(-1)
    for dtype in DTYPES:
        for M in (3, K):
            y = run(torch.eye(M, K).to(dtype), packed, None, 8)
            assert torch.equal(y, exact.view(21, K).T[:M].to(dtype))


def test_act_order(isa: str) -> None:
    packed, stored = make(17, 96, 32, "int")
    order = torch.randperm(96).int()
    for M in (1, 20):
        x = torch.randn(M, 96)
        y = run(x, packed._replace(order=order), None, 32)
        assert error(y, x.double() @ stored[:, order.long()].T) <= BOUNDS[torch.float32]


def test_no_rows_and_no_columns(isa: str) -> None:
    packed, _ = make(7, 64, 32)
    assert run(torch.empty(0, 64), packed, None, 32).shape == (0, 7)
    empty, _ = make(0, 64, 32)
    assert run(torch.randn(3, 64), empty, None, 32).shape == (3, 0)


def test_pack_copies_nothing_and_unpack_gives_it_back() -> None:
    packed, _ = make(5, 64, 32, "int")
    canonical = PackedInt4(packed.qweight, packed.scales, packed.zeros, torch.randperm(64).int())
    there = cpu.pack(canonical)
    back = cpu.unpack(there, 5, 64, 32)
    for name in ("codes", "scales", "zeros", "order"):
        assert getattr(back, name) is getattr(canonical, name)
    assert there.qweight is canonical.codes


X = torch.zeros(2, 64)
CODES = torch.zeros(5, 8, dtype=torch.int32)
SCALES = torch.ones(5, 2)
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "x dtype": ({"x": X.double()}, "x must be bfloat16, float16 or float32; it is Double"),
    "x dims": ({"x": torch.tensor(1.0)}, "x must have at least one dimension; it is a scalar"),
    "x strides": ({"x": torch.zeros(64, 2).T}, r"x must be contiguous; it is not \(shape \[2, 64\]\)"),
    "K": ({"x": X[:, :60].contiguous()}, r"x must have a positive multiple of 8 columns \(K\); its shape is \[2, 60\]"),
    "K = 0": (
        {"x": X[:, :0].contiguous()},
        r"x must have a positive multiple of 8 columns \(K\); its shape is \[2, 0\]",
    ),
    "codes dtype": ({"codes": CODES.long()}, "codes must be int32; it is Long"),
    "codes shape": (
        {"codes": CODES[:, :7].contiguous()},
        r"codes must be \[N, K/8\] = \[5, 8\]; its shape is \[5, 7\]",
    ),
    "codes strides": ({"codes": CODES.T.contiguous().T}, "codes must be contiguous"),
    "scales dtype": ({"scales": SCALES.int()}, "scales must be bfloat16, float16 or float32; it is Int"),
    "scales shape": ({"scales": SCALES[:4]}, r"scales must be \[N, K/group_size\] = \[5, 2\]; its shape is \[4, 2\]"),
    "zeros dtype": ({"zeros": torch.zeros(5, 2).int()}, "zeros must be uint8, bfloat16, float16 or float32; it is Int"),
    "zeros shape": (
        {"zeros": torch.zeros(5, 1)},
        r"zeros must be \[N, K/group_size\] = \[5, 2\]; its shape is \[5, 1\]",
    ),
    "zeros value": ({"zeros": torch.full((5, 2), 17).byte()}, r"zeros of uint8 must be in 0\.\.16; one of them is 17"),
    "bias dtype": ({"bias": torch.zeros(5).half()}, "bias must be of x's dtype or float32; it is Half"),
    "bias shape": ({"bias": torch.zeros(4)}, r"bias must be \[N\] = \[5\]; its shape is \[4\]"),
    "group 0": ({"group_size": 0}, "group_size must be a positive multiple of 8 that divides K = 64; it is 0"),
    "group 12": ({"group_size": 12}, "group_size must be a positive multiple of 8 that divides K = 64; it is 12"),
    "group 24": ({"group_size": 24}, "group_size must be a positive multiple of 8 that divides K = 64; it is 24"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str) -> None:
    change, message = MISTAKES[name]
    right: dict[str, Any] = {"x": X, "codes": CODES, "scales": SCALES, "zeros": None, "bias": None, "group_size": 32}
    torch.ops.w4a16_cpu.linear(**right)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.w4a16_cpu.linear(**(right | change))


def test_an_unknown_instruction_set_is_named() -> None:
    with pytest.raises(RuntimeError, match=r'no instruction set "mmx" on this machine; there are .*portable'):
        torch.ops.w4a16_cpu.set_isa("mmx")


def test_what_is_rejected() -> None:
    good = Problem("linear", "cpu", "x86_64", torch.bfloat16, torch.float16, 64, 64, 32, "int", True, True)
    assert cpu.reject(good) is None

    def reason(**change: Any) -> str:
        return str(cpu.reject(dataclasses.replace(good, **change)))

    assert "moe" in reason(op="moe")
    assert "cuda" in reason(device="cuda")
    assert "float64" in reason(dtype=torch.float64)
    assert "scales" in reason(scale_dtype=torch.float64)
    assert "12" in reason(group_size=12)


def test_an_order_that_is_no_permutation_is_still_defined() -> None:
    """Two logical columns may share a stored one, and another may be unused: as PackedInt4 says."""
    codes = torch.randint(-(2**31), 2**31 - 1, (16, 8), dtype=torch.int32)
    scales, x = torch.rand(16, 2), torch.randn(5, 64)
    for order in (torch.zeros(64, dtype=torch.int32), torch.randint(64, (64,), dtype=torch.int32)):
        expected = x.double() @ PackedInt4(codes, scales, None, order).dequantize(torch.float64).T
        y = run(x, Packed(codes, scales, None, order), None, 32)
        assert (y - expected).norm() <= 2e-6 * expected.norm()
