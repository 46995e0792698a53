"""What `torch.ops.w4a16.moe_gptq_gemm_rdna3` computes: on lanes, and on an AMD GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import hip_lanes
import pytest
import torch
import torch.nn.functional as F
from hip_lanes import guarded
from rdna3 import DTYPES, Routed, Weight, drawn, moe_gemm, right

from inductor_ext.kernels.hip import moe as launches

BLOCKS = (1, 2, 4, 8)


@pytest.fixture
def lanes() -> Iterator[hip_lanes.Lanes]:
    with hip_lanes.on("gfx1100") as lanes:
        yield lanes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("together", [False, True], ids=["own rows", "added up"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("T", "weighted", "per_token"), [(1, True, False), (5, False, True), (5, True, False)])
def test_the_numbers_are_right(
    hip_device: torch.device, T: int, weighted: bool, per_token: bool, block: int, together: bool, dtype: torch.dtype
) -> None:
    w = Weight(256, 136, 64, dtype, E=6, seed=block)
    problem = Routed(T, 3, w, block, per_token, together, weighted, seed=T)
    right(problem.run(hip_device), problem.expected(), problem.weight.dtype)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dropped", [False, True], ids=["in blocks of -1", "left out"])
@pytest.mark.parametrize("together", [False, True], ids=["own rows", "added up"])
def test_choices_of_experts_elsewhere_add_exact_zeros(
    hip_device: torch.device, together: bool, dropped: bool, block: int
) -> None:
    w = Weight(512, 72, 128, torch.bfloat16, E=3)
    problem = Routed(6, 4, w, block, together=together, foreign=5, dropped=dropped, seed=1)
    c = problem.run(hip_device)
    right(c, problem.expected(), problem.weight.dtype)
    here = problem.here().view(6, 4).any(1) if together else problem.here()
    assert 0 < here.sum() < len(here)
    assert c[~here].count_nonzero() == 0


@pytest.mark.parametrize("together", [False, True], ids=["own rows", "added up"])
def test_nobody_here_is_nothing_done(hip_device: torch.device, together: bool) -> None:
    problem = Routed(2, 2, Weight(256, 64, 64, torch.float16, E=3), 2, together=together)
    slots, experts, end = problem.routing
    problem.routing = (slots, torch.full_like(experts, -1), end)
    c = drawn(len(problem.empty()), 64, dtype=torch.float16)
    assert torch.equal(problem.run(hip_device, c.clone()), c)


@pytest.mark.parametrize("together", [False, True], ids=["own rows", "added up"])
@pytest.mark.parametrize("K", [256, 2048], ids=["whole", "split"])
def test_what_is_in_c_stays_in_the_sum(hip_device: torch.device, K: int, together: bool) -> None:
    problem = Routed(3, 2, Weight(K, 64, 64, torch.bfloat16, E=4), 2, together=together)
    c = drawn(len(problem.empty()), 64, dtype=torch.bfloat16, seed=5)
    right(problem.run(hip_device, c.clone()), c.double() + problem.expected(), problem.weight.dtype)


@pytest.mark.parametrize("together", [False, True], ids=["own rows", "added up"])
def test_blocks_of_one_need_no_sorting(hip_device: torch.device, together: bool) -> None:
    w = Weight(1024, 64, 32, torch.float16, E=4)
    plain, sorted_ = (Routed(4, 2, w, 1, together=together, foreign=2, inline=inline) for inline in (True, False))
    c = plain.run(hip_device)
    right(c, plain.expected(), plain.weight.dtype)
    assert torch.equal(c, sorted_.run(hip_device))


def test_ids_that_are_nobodys_are_left_alone(hip_device: torch.device) -> None:
    """Experts beyond the weights, slots beyond the last one and below the first."""
    problem = Routed(2, 2, Weight(128, 64, 64, torch.float16, E=2), 1, inline=True)
    _, experts, end = problem.routing
    problem.routing = (torch.tensor([0, 4, -1, 3]).int(), torch.tensor([2, 0, 0, experts[3]]).int(), end)
    c = problem.run(hip_device)
    assert c[:3].count_nonzero() == 0
    right(c[3:], problem.expected()[3:], problem.weight.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "K", "intermediate", "block"),
    [(1, 2048, 768, 1), (4, 256, 512, 2), (16, 256, 768, 4), (64, 128, 64, 8), (256, 64, 32, 8)],
)
def test_a_whole_layer_is_right(
    hip_device: torch.device, M: int, K: int, intermediate: int, block: int, dtype: torch.dtype
) -> None:
    """As in the field: gate and up, the activation, then down with the router's weights, added up by token."""
    up, down = Weight(K, 2 * intermediate, 32, dtype, E=16), Weight(intermediate, K, 32, dtype, E=16, seed=1)
    first = Routed(M, 8, up, block, seed=M, inline=block == 1)
    h = first.run(hip_device)
    right(h, first.expected(), first.weight.dtype)
    gate, value = h.float().chunk(2, 1)
    second = Routed(M, 8, down, block, per_token=False, together=True, weighted=True, seed=M, inline=block == 1)
    second.a = (F.silu(gate) * value).to(dtype)
    right(second.run(hip_device), second.expected(), second.weight.dtype)


@pytest.mark.parametrize(
    ("M", "N", "K", "block"), [(1, 1536, 2048, 8), (4, 1024, 2048, 1), (4, 2048, 512, 4), (16, 256, 2048, 2)]
)
def test_the_field_s_shapes_are_right(hip_device: torch.device, M: int, N: int, K: int, block: int) -> None:
    w = Weight(K, N, 32, torch.bfloat16, E=16)
    problem = Routed(M, 8, w, block, per_token=False, together=True, weighted=True)
    right(problem.run(hip_device), problem.expected(), problem.weight.dtype)


# -- determinism, memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [False, True], ids=["own rows", "added up"])
@pytest.mark.parametrize("block", [1, 4])
def test_the_order_of_blocks_and_lanes_changes_no_bit(lanes: hip_lanes.Lanes, block: int, together: bool) -> None:
    w = Weight(1024, 136, 32, torch.float16, E=4)
    problem = Routed(3, 3, w, block, together=together, weighted=True)
    results = []
    for seed in range(5):
        lanes.seed(1000 * seed)
        results.append(problem.run(torch.device("cpu")))
    assert lanes.launches()[0].grid[1] > 1, "k is not split: the order of blocks could not matter"
    assert all(torch.equal(results[0], c) for c in results)


@pytest.mark.parametrize("together", [False, True], ids=["own rows", "added up"])
def test_counters_are_zero_again(lanes: hip_lanes.Lanes, monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
    held = torch.zeros(4096, dtype=torch.int32)
    monkeypatch.setattr(launches, "counters", lambda count, device: held[:count])
    problem = Routed(3, 3, Weight(1024, 264, 32, torch.float16, E=4), 2, together=together, foreign=2)
    first, second = problem.run(torch.device("cpu")), problem.run(torch.device("cpu"))
    assert lanes.launches()[0].grid[1] > 1
    assert held.count_nonzero() == 0
    assert torch.equal(first, second)


@pytest.mark.parametrize("end", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("together", [False, True], ids=["own rows", "added up"])
@pytest.mark.parametrize("block", [1, 8])
def test_nothing_beside_the_tensors_is_touched(lanes: hip_lanes.Lanes, block: int, together: bool, end: bool) -> None:
    problem = Routed(3, 2, Weight(512, 72, 32, torch.float16, E=3), block, together=together, weighted=True, foreign=1)
    args = problem.arguments(problem.empty())
    args = {name: guarded(t, end) if isinstance(t, torch.Tensor) else t for name, t in args.items()}
    moe_gemm(**args)
    right(args["c"], problem.expected(), problem.weight.dtype)
