"""What `torch.ops.w4a16.gptq_gemm_rdna3` and the kernel "hip" of w4a16::linear compute: on lanes, and on an AMD GPU
where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import dense
import hip_lanes
import pytest
import torch
from hip_lanes import guarded
from rdna3 import DTYPES, Weight, cancelling, drawn, gemm, right

import inductor_ext.ops
from inductor_ext.kernels import Packed
from inductor_ext.kernels.hip import dense as launches
from inductor_ext.kernels.hip import linear

SHAPES = [(1, 128, 128, 128), (2, 256, 256, 128), (8, 256, 512, 64), (16, 512, 256, 128), (32, 512, 512, 64)]


@pytest.fixture
def lanes() -> Iterator[hip_lanes.Lanes]:
    with hip_lanes.on("gfx1100") as lanes:
        yield lanes


# -- the field's op ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v2", [False, True], ids=["stored less one", "stored"])
@pytest.mark.parametrize(("M", "K", "N", "G"), [*SHAPES, (1, 6656, 136, 32), (3, 96, 8, 96), (5, 6656, 8, 6656)])
def test_the_numbers_are_right(
    hip_device: torch.device, M: int, K: int, N: int, G: int, v2: bool, dtype: torch.dtype
) -> None:
    w, x = Weight(K, N, G, dtype, v2=v2, seed=M + N), drawn(M, K, dtype=dtype)
    y = gemm(*(t.to(hip_device) for t in (x, w.words, w.zeros, w.scales)), v2)
    right(y, x.double() @ w.dense(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_far_from_zero_cost_no_digits(hip_device: torch.device, dtype: torch.dtype) -> None:
    """Their sum is large against the result, and the zero comes off by it."""
    w, x = Weight(2048, 136, 2048, dtype, seed=7), drawn(4, 2048, dtype=dtype, mean=50.0)
    y = gemm(*(t.to(hip_device) for t in (x, w.words, w.zeros, w.scales)), False)
    right(y, x.double() @ w.dense(), dtype)


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize(("K", "G"), [(1536, 96), (1504, 32), (1536, 1536)])
def test_any_split_of_k_is_right(
    hip_device: torch.device, monkeypatch: pytest.MonkeyPatch, K: int, G: int, splits: int
) -> None:
    """Waves begin within a group, have several steps, none, or one less than others."""
    each = -(-K // 32 // splits)
    monkeypatch.setattr(launches.dot, "splits", lambda tiles, K, device: (splits, each))
    w, x = Weight(K, 136, G, torch.bfloat16), drawn(2, K, dtype=torch.bfloat16)
    y = gemm(*(t.to(hip_device) for t in (x, w.words, w.zeros, w.scales)), False)
    right(y, x.double() @ w.dense(), torch.bfloat16)


def test_no_rows_are_no_launch(lanes: hip_lanes.Lanes) -> None:
    w = Weight(128, 128, 32, torch.float16)
    assert gemm(drawn(0, 128, dtype=torch.float16), w.words, w.zeros, w.scales, False).shape == (0, 128)
    assert lanes.launches() == []


# -- w4a16::linear -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zeros", ["none", "int"])
@pytest.mark.parametrize(
    ("M", "N", "K", "G", "order", "bias"),
    [
        (1, 257, 512, 64, False, True),  # N is odd
        (2, 5, 256, 32, True, False),
        (4, 132, 192, 96, False, True),  # groups of an odd number of steps
        (7, 64, 6656, 128, True, True),
        (19, 96, 256, 256, False, True),  # rows in tiles, the last one not full
    ],
)
def test_linear_is_right(
    hip_device: torch.device, M: int, N: int, K: int, G: int, order: bool, bias: bool, zeros: str, dtype: torch.dtype
) -> None:
    weight = dense.weight(N, K, G, zeros, dtype, order, seed=M, device=str(hip_device))
    x = dense.activations(M, K, dtype, seed=M, device=str(hip_device))
    b = drawn(N, dtype=dtype, seed=M).to(hip_device) if bias else None
    y = inductor_ext.ops.linear(x.view(M, 1, K), *linear.pack(weight), b, N, G, "hip").view(M, N)
    right(y, dense.expected(x, weight, b).cpu(), dtype)


@pytest.mark.parametrize("zeros", ["none", "int"])
@pytest.mark.parametrize("order", [False, True])
def test_packing_loses_nothing(zeros: str, order: bool) -> None:
    weight = dense.weight(37, 256, 32, zeros, torch.bfloat16, order, device="cpu")
    packed = linear.pack(weight)
    back = linear.unpack(packed, 37, 256, 32)
    assert all(
        a is b is None or torch.equal(a, b) for a, b in zip(vars(weight).values(), vars(back).values(), strict=True)
    )
    for t, expected in zip(packed, linear.layout(packed, 37, 256, 32), strict=True):
        assert t is None or (tuple(t.shape) == expected.shape and t.dtype in expected.dtypes)


# -- determinism, memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [1, 3])
def test_the_order_of_blocks_and_lanes_changes_no_bit(lanes: hip_lanes.Lanes, M: int) -> None:
    w = Weight(1536, 264, 64, torch.float16)
    x = cancelling(w, M)
    results = []
    for seed in range(5):
        lanes.seed(1000 * seed)
        results.append(gemm(x, w.words, w.zeros, w.scales, False))
    assert lanes.launches()[0].grid[1] > 1, "k is not split: the order of blocks could not matter"
    assert all(torch.equal(results[0], y) for y in results)


def test_counters_are_zero_again(lanes: hip_lanes.Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    held = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(launches, "counters", lambda count, device: held[:count])
    w, x = Weight(1024, 264, 64, torch.bfloat16), drawn(2, 1024, dtype=torch.bfloat16)
    first, second = (gemm(x, w.words, w.zeros, w.scales, False) for _ in range(2))
    assert lanes.launches()[0].grid[1] > 1
    assert held.count_nonzero() == 0
    assert torch.equal(first, second)


@pytest.mark.parametrize("end", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "K", "zeros"), [(1, 37, 512, "int"), (3, 133, 256, "none"), (8, 136, 1024, "int")])
def test_nothing_beside_the_tensors_is_touched(
    lanes: hip_lanes.Lanes, M: int, N: int, K: int, zeros: str, dtype: torch.dtype, end: bool
) -> None:
    weight = dense.weight(N, K, 64, zeros, dtype, device="cpu")
    packed = Packed(*(None if t is None else guarded(t, end) for t in linear.pack(weight)))
    x, bias = guarded(drawn(M, K, dtype=dtype), end), guarded(drawn(N, dtype=dtype), end)
    out = guarded(torch.full((M, N), float("nan"), dtype=dtype), end)
    kind = launches.dot.Zeros.EIGHT if packed.zeros is None else launches.dot.Zeros.BYTES
    launches.gemm(x, packed.qweight, packed.scales, packed.zeros, kind, bias, out)
    right(out, dense.expected(x, weight, bias), dtype)


def test_a_guard_stops_a_kernel_that_goes_too_far(lanes: hip_lanes.Lanes) -> None:
    w, x = Weight(256, 128, 64, torch.float16), drawn(2, 256, dtype=torch.float16)
    short = guarded(w.words)[1:]
    with pytest.raises(RuntimeError, match="memory that is not there was read or written"):
        launches.gemm(x, short, w.scales, w.zeros, launches.dot.Zeros.NIBBLES, None, torch.empty(2, 128).half())


def test_one_row_keeps_a_large_gpu_busy(lanes: hip_lanes.Lanes) -> None:
    """4096 x 4096 and one row: at least two blocks of eight waves for each of 96 compute units."""
    tiles = 4096 // 128
    splits, _ = launches.dot.splits(tiles, 4096, torch.device("cpu"))
    assert tiles * splits >= 192
