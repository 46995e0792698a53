"""What `torch.ops.w4a16.gptq_gemm_rdna3_wmma` and `moe_gemm_w4a16` compute: on lanes, and on an AMD GPU where there is
one."""

from __future__ import annotations

import hip_lanes
import pytest
import torch
from hip_lanes import guarded
from rdna3 import DTYPES, Weight, cancelling, drawn, right
from rdna3_wmma import Routed

import inductor_ext.ops  # noqa: F401  registers torch.ops.w4a16
from inductor_ext.kernels.hip import wmma

gemm = torch.ops.w4a16.gptq_gemm_rdna3_wmma

# -- dense -------------------------------------------------------------------------------------------------------------

SHAPES = [(16, 512, 256, 128), (32, 512, 512, 64), (64, 512, 256, 128), (130, 512, 256, 128)]
ODD = [(1, 32, 8, 32), (17, 96, 136, 96), (65, 160, 264, 160), (16, 6656, 72, 32), (20, 6656, 8, 6656)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v2", [False, True], ids=["stored less one", "stored"])
@pytest.mark.parametrize(("M", "K", "N", "G"), [*SHAPES, *ODD])
def test_the_numbers_are_right(
    hip_device: torch.device, M: int, K: int, N: int, G: int, v2: bool, dtype: torch.dtype
) -> None:
    w, x = Weight(K, N, G, dtype, v2=v2, seed=M + N), drawn(M, K, dtype=dtype)
    y = gemm(*(t.to(hip_device) for t in (x, w.words, w.zeros, w.scales)), v2)
    right(y, x.double() @ w.dense(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_far_from_zero_cost_no_digits(hip_device: torch.device, dtype: torch.dtype) -> None:
    """Their sum is large against the result, and the zero comes off by it."""
    w, x = Weight(2048, 136, 2048, dtype, seed=7), drawn(20, 2048, dtype=dtype, mean=50.0)
    y = gemm(*(t.to(hip_device) for t in (x, w.words, w.zeros, w.scales)), False)
    right(y, x.double() @ w.dense(), dtype)


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize(("K", "G"), [(1536, 96), (1504, 32), (1536, 1536), (1536, 384)])
def test_any_split_of_k_is_right(
    hip_device: torch.device, monkeypatch: pytest.MonkeyPatch, K: int, G: int, splits: int
) -> None:
    """Splits begin within a group, and the last one is shorter."""

    def split(tiles: int, stages: int) -> tuple[int, int]:
        each = -(-stages // splits)
        return -(-stages // each), each

    monkeypatch.setattr(wmma, "_split", split)
    w, x = Weight(K, 136, G, torch.bfloat16), drawn(33, K, dtype=torch.bfloat16)
    y = gemm(*(t.to(hip_device) for t in (x, w.words, w.zeros, w.scales)), False)
    right(y, x.double() @ w.dense(), torch.bfloat16)


@pytest.mark.parametrize("M", [16, 20, 70])
def test_the_order_of_lanes_and_blocks_changes_no_bit(M: int) -> None:
    w = Weight(1536, 136, 64, torch.float16)
    x = cancelling(w, M)
    with hip_lanes.on("gfx1151") as lanes:
        lanes.seed(1)
        first = gemm(x, w.words, w.zeros, w.scales, False)
        assert lanes.launches()[-1].grid[2] > 1, "k is split"
        for seed in range(2, 8):
            lanes.seed(seed)
            assert torch.equal(gemm(x, w.words, w.zeros, w.scales, False), first)


@pytest.mark.parametrize("end", [True, False], ids=["behind", "before"])
@pytest.mark.parametrize(("M", "K", "N", "G"), [(17, 96, 136, 32), (64, 256, 264, 128), (16, 32, 8, 32)])
def test_nothing_is_read_beside_the_tensors(M: int, K: int, N: int, G: int, end: bool) -> None:
    w, x = Weight(K, N, G, torch.float16), drawn(M, K, dtype=torch.float16)
    with hip_lanes.on("gfx1100"):
        y = gemm(*(guarded(t, end) for t in (x, w.words, w.zeros, w.scales)), True)
    w.v2 = True
    right(y, x.double() @ w.dense(), torch.float16)


# -- routed experts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("K", "N", "top_k"), [(2048, 1024, 8), (1024, 512, 8), (512, 2048, 1)])
def test_the_field_s_shapes(hip_device: torch.device, K: int, N: int, top_k: int, dtype: torch.dtype) -> None:
    """With fewer of its 256 experts and 994 tokens, which take a minute on lanes."""
    problem = Routed(10, K, N, top_k, T=5 if top_k > 1 else 40, dtype=dtype)
    right(problem.run(hip_device), problem.expected(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ["gfx1100", "gfx1151"])
@pytest.mark.parametrize(
    ("K", "N", "G"), [(2048, 64, 128), (512, 192, 64), (96, 320, 32), (160, 64, 160), (32, 64, 32)]
)
def test_other_shapes_groups_and_strides(
    hip_device: torch.device, K: int, N: int, G: int, arch: str, dtype: torch.dtype
) -> None:
    problem = Routed(4, K, N, 3, T=33, G=G, dtype=dtype, arch=arch)
    right(problem.run(hip_device), problem.expected(), dtype)


def test_rows_of_1024_bytes_lie_further_apart_on_gfx1151() -> None:
    apart = [
        wmma.by_row(Routed(1, K, 64, 1, T=1, G=32).weight, 1, arch).words.stride(1) - K // 8
        for arch in ("gfx1100", "gfx1151")
        for K in (1024, 2048, 3072, 4096)
    ]
    assert apart == [0, 0, 0, 0, 0, 32, 0, 32]


@pytest.mark.parametrize("drop", [False, True], ids=["kept", "dropped"])
def test_rows_of_foreign_experts_are_zero(hip_device: torch.device, drop: bool) -> None:
    there = torch.tensor([1, -1, 0, -1, 2]).int()
    problem = Routed(3, 256, 128, 2, T=40, expert_map=there, drop=drop)
    y, wanted = problem.run(hip_device), problem.expected()
    nobody = (wanted == 0).all(1)
    assert nobody.any() and not y[nobody].any()
    right(y, wanted, torch.bfloat16)


ROUTINGS = {
    "one token": torch.tensor([[2, 0]]),
    "one hot expert": torch.tensor([[1, 3]]).repeat(70, 1),
    "empty experts": torch.tensor([[4, 0], [0, 4]]).repeat(9, 1),
    "nobody's choices": torch.tensor([[-1, 2], [3, -1], [-1, -1], [5, 0]]),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_routings(hip_device: torch.device, name: str) -> None:
    ids = ROUTINGS[name]
    problem = Routed(5, 128, 64, 2, T=len(ids), ids=ids.where(ids < 5, -1).int())
    right(problem.run(hip_device), problem.expected(), torch.bfloat16)


def test_blocks_that_are_not_launched_leave_zeros(hip_device: torch.device) -> None:
    problem = Routed(4, 128, 64, 2, T=50)
    left = problem.routing[0][:64]
    y, wanted = problem.run(hip_device, num_blocks=2), problem.expected()
    made = torch.zeros(100, dtype=torch.bool)
    made[left[left < 100].long()] = True
    wanted[~made] = 0
    right(y, wanted, torch.bfloat16)


def test_no_bit_depends_on_the_order_of_lanes() -> None:
    problem = Routed(3, 256, 128, 2, T=40, dtype=torch.float16)
    with hip_lanes.on("gfx1100") as lanes:
        lanes.seed(1)
        first = problem.run()
        for seed in range(2, 6):
            lanes.seed(seed)
            assert torch.equal(problem.run(), first)


def test_experts_that_are_not_there_are_not_read() -> None:
    problem = Routed(3, 128, 64, 2, T=20)
    problem.routing[1][0] = 3
    problem.routing[1][1] = -(2**31)
    packed = wmma.by_row(problem.weight, 3, "gfx1100")
    words, scales = guarded(packed.words), guarded(packed.scales)
    with hip_lanes.on("gfx1100"):
        y = problem.run(w_packed=words, w_scale=scales, A=guarded(problem.A))
    gone = problem.routing[0][:64]
    assert not y[gone[gone < 40].long()].any()
