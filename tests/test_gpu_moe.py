"""The Triton kernels behind `w4a16::moe` on a GPU: right for every number of tokens and any routing, the same bits
every time, safe with several streams and CUDA graphs, and what the backend chooses there. More of their numbers are in
test_moe_numbers.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import Calls, recompiles, rel_l2
from moe_problems import MAP, MLPS, OWED, Experts, exact
from torch import Tensor
from zoo_moe.blocks import FAMILIES, made, output, settled

import inductor_ext
from inductor_ext.kernels.gpu import experts as kernel
from inductor_ext.kernels.gpu import runtime, tuning

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA or ROCm device, and this machine has none"
)

DTYPES = (torch.float16, torch.bfloat16)
TOKENS = (1, 2, 7, 33, 64, 257, 1025)
SIZES = (
    (16, 2, 256, 128, (128, 64)),
    (4, 2, 264, 72, (264, 72)),
    (64, 8, 256, 128, (64, 128)),
    (3, 3, 320, 96, (32, 32)),
)
"""E, k, H, I, G."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def on_the_gpu(E: int, H: int, I: int, G: tuple[int, int], **changed: Any) -> Experts:  # noqa: E741
    return Experts(E, H, I, G, **{"dtype": torch.float16, **changed}, kernel="triton", device="cuda")


def ordinary(dtype: torch.dtype = torch.float16, **changed: Any) -> Experts:
    """16 experts: one token, or four, go pair by pair; 33 are sorted into small blocks and 257 into large ones, by the
    kernels for Hoppers there."""
    return on_the_gpu(16, 256, 128, (128, 64), dtype=dtype, **changed)


def poison() -> None:
    """Leaves NaN in the memory that the next tensors get: what a kernel forgets to write shows it."""
    for size in (1 << 26, 1 << 20, 1 << 20, 1 << 20, 1 << 17, 1 << 15, 1 << 12, 1 << 9):
        torch.full((size // 4,), float("nan"), device="cuda")


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize("zeros", ["none", "int", "float"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_tokens(dtype: torch.dtype, zeros: str, T: int) -> None:
    for E, k, H, I, G in SIZES:  # noqa: E741
        experts = on_the_gpu(E, H, I, G, dtype=dtype, zeros=zeros, bias=T % 2 == 0)
        routed = experts.routed(T, k)
        poison()
        exact(experts, *routed)


@pytest.mark.parametrize("T", [1, 33, 257, 513])
@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation(dtype: torch.dtype, mlp: str, T: int) -> None:
    experts = ordinary(dtype, zeros="int", bias=True, mlp=MLPS[mlp])
    routed = experts.routed(T)
    poison()
    exact(experts, *routed)


@pytest.mark.parametrize("T", [36, 80, 160, 400])
@pytest.mark.parametrize("mlp", ["silu", "swigluoai"])
@pytest.mark.parametrize("zeros", ["none", "int", "float"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_every_size(dtype: torch.dtype, zeros: str, mlp: str, T: int) -> None:
    """Of the kernels for Hoppers: 16, 32, 64 and 128 rows."""
    for H, G in ((384, (128, 64)), (320, (32, 32))):
        experts = on_the_gpu(8, H, 192, G, dtype=dtype, zeros=zeros, bias=True, mlp=MLPS[mlp])
        routed = experts.routed(T, 2)
        poison()
        exact(experts, *routed)


@pytest.mark.parametrize("T", [1, 64, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_of_real_size(dtype: torch.dtype, T: int) -> None:
    """The most are so many that what a choice gives is rounded before it is added up; some of them are looked at."""
    experts = on_the_gpu(16, 2048, 768, (128, 128), dtype=dtype)
    x, weights, ids = experts.routed(T, 8)
    y = experts(x, weights, ids)
    for few in torch.arange(T, device="cuda").split(16)[:: max(1, T // 64)]:
        assert rel_l2(y[few], experts.expected(x[few], weights[few], ids[few])) <= OWED[dtype]


# -- routing -----------------------------------------------------------------------------------------------------------


def zipf(T: int, k: int, E: int) -> Tensor:
    chances = 1 / torch.arange(1, E + 1).double()
    return torch.multinomial(chances.expand(T, E), k, generator=torch.Generator().manual_seed(1))


ROUTINGS = {
    "all tokens to one expert": torch.full((1000, 1), 5),
    "one token an expert": torch.arange(16)[:, None],
    "most experts empty": torch.tensor([[1, 6]]).expand(300, 2),
    "an expert repeated in a row": torch.tensor([[3, 3, 3], [0, 7, 0], [1, 1, 2]]).repeat(50, 1),
    "a few experts have nearly all": zipf(1025, 4, 16),
    "some chosen by nobody": torch.tensor([[-1, 2], [4, -1], [-1, -1], [0, 1]]).repeat(40, 1),
    "ids that there are not": torch.tensor([[16, 2], [4, 2**40], [-7, 3], [0, 1]]).repeat(40, 1),
    "nothing chosen": torch.full((300, 2), -1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing_extremes(routing: str, dtype: torch.dtype) -> None:
    """The first tokens of each too, which go pair by pair. What nobody computes has no weight."""
    experts = ordinary(dtype, bias=True)
    for ids in (ROUTINGS[routing].cuda(), ROUTINGS[routing][:3].cuda()):
        x, weights, _ = experts.routed(*ids.shape)
        weights[(ids < 0) | (ids >= 16)] = float("nan")
        poison()
        exact(experts, x, weights, ids)


@pytest.mark.parametrize("T", [2, 500])
def test_experts_that_are_elsewhere(T: int) -> None:
    experts = on_the_gpu(4, 256, 128, (128, 64), expert_map=MAP)
    x, weights, ids = experts.routed(T, 3)
    weights[MAP.cuda()[ids] < 0] = float("nan")
    exact(experts, x, weights, ids)


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 4, 33, 257, 1025])
def test_a_hundred_times_the_same_bits(T: int) -> None:
    experts = ordinary()
    routed = experts.routed(T)
    first = experts(*routed)
    for _ in range(100):
        assert torch.equal(experts(*routed), first)


def test_streams_at_once_do_not_disturb_each_other() -> None:
    experts = ordinary()
    routed = [experts.routed(T) for T in (1, 4, 1, 257)]
    assert kinds(experts, routed) == [True, True, True, False]
    wanted = [experts(*given) for given in routed]
    streams = [torch.cuda.Stream() for _ in routed]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[] for _ in routed]
    for _ in range(50):
        for given, stream, result in zip(routed, streams, results, strict=True):
            with torch.cuda.stream(stream):
                result.append(experts(*given))
    torch.cuda.synchronize()
    for y, result in zip(wanted, results, strict=True):
        assert all(torch.equal(y, other) for other in result)


def kinds(experts: Experts, routed: list[tuple[Tensor, ...]]) -> list[bool]:
    """Which of the calls go pair by pair."""
    arch = runtime.arch_of(torch.device("cuda", torch.cuda.current_device()))
    return [tuning.moe(ids.numel(), experts.E, experts.H, experts.I, arch)[0].PAIRWISE for *_, ids in routed]


# -- CUDA graphs -------------------------------------------------------------------------------------------------------


def captured(experts: Experts, held: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    experts(*held)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = experts(*held)
    return graph, y


@pytest.mark.parametrize("T", [1, 33, 257])
def test_a_graph_is_right_for_other_tokens_and_routings(T: int) -> None:
    """Nothing of the routing is decided when the graph is captured."""
    experts = ordinary(bias=True)
    routings = [experts.routed(T) for _ in range(4)]
    x, weights, ids = experts.routed(T)
    routings += [(x, weights, torch.full_like(ids, 3)), (x, weights, torch.full_like(ids, -1))]
    held = [t.clone() for t in routings[0]]
    graph, y = captured(experts, held)
    for given in routings:
        for mine, new in zip(held, given, strict=True):
            mine.copy_(new)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, experts(*given))


def test_graphs_replay_on_several_streams_beside_eager_calls() -> None:
    experts = ordinary()
    routed = [list(experts.routed(T)) for T in (1, 1, 4, 64)]
    wanted = [experts(*given) for given in routed]
    graphs = [captured(experts, given) for given in routed]
    streams = [torch.cuda.Stream() for _ in routed]
    for _ in range(20):
        for _, replayed in graphs:
            replayed.fill_(float("nan"))
        torch.cuda.synchronize()
        eager = []
        for (graph, _), stream, given in zip(graphs, streams, routed, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
            eager.append(experts(*given))
        torch.cuda.synchronize()
        for y, (_, replayed), other in zip(wanted, graphs, eager, strict=True):
            assert torch.equal(replayed, y)
            assert torch.equal(other, y)


# -- no surprises ------------------------------------------------------------------------------------------------------


def test_another_number_of_tokens_compiles_nothing() -> None:
    """But for blocks of another size, and what the pairs are sorted by."""
    import triton

    experts = on_the_gpu(8, 192, 64, (192, 64))
    compiled: list[Any] = []
    hook = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **what: compiled.append(what)
    try:
        for T in (1, 5, 25, 36, 50, 65, 100, 129, 193, 257, 385, 513, 1025):
            experts(*experts.routed(T))
        before = len(compiled)
        assert before > 0
        for T in (*range(1, 70), 100, 128, 200, 300, 384, 400, 512, 600, 1024, 2000):
            experts(*experts.routed(T))
        assert len(compiled) == before
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_the_current_one() -> None:
    experts = Experts(4, 256, 128, (128, 64), torch.float16, kernel="triton", device="cuda:1")
    for T in (2, 100):
        exact(experts, *experts.routed(T))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mlp", ["silu", "weight on the input", "swigluoai interleaved"])
def test_gradients_of_x_and_the_weights(mlp: str, dtype: torch.dtype) -> None:
    experts = ordinary(dtype, bias=True, mlp=MLPS[mlp])
    x, weights, ids = experts.routed(12, 3)
    ids[2, 1], ids[3], ids[4, 1] = -1, -1, ids[4, 0]
    leaves = x.requires_grad_(), weights.requires_grad_()
    grad = experts.drawn(12, 256)
    found = torch.autograd.grad(experts(*leaves, ids), leaves, grad)
    wanted = torch.autograd.grad(experts.expected(*leaves, ids), leaves, grad.double())
    for own, other in zip(found, wanted, strict=True):
        assert rel_l2(own, other) <= OWED[dtype]


# -- through torch.compile ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize(
    ("name", "implementation"), [(f.name, i) for f in FAMILIES.values() for i in f.implementations]
)
def test_a_compiled_block_runs_on_the_kernel(name: str, implementation: str, mode: str, calls: Calls) -> None:
    """A router, routed experts and a shared one; the router's choices differ with every call."""
    if implementation:
        pytest.importorskip("transformers")
    with torch.no_grad():
        block, reference = made(FAMILIES[name], implementation, torch.bfloat16)
        x = settled(block, reference, torch.bfloat16, 64).view(-1, 64)
        wanted = output(reference, x.float().unsqueeze(0))[0]
        compiled = torch.compile(block.cuda(), backend="w4a16", mode=mode)
        for start in (0, 8, 16, 24, 32):
            torch.compiler.cudagraph_mark_step_begin()
            y = output(compiled, x[start : start + 8].cuda().bfloat16().unsqueeze(0)).clone()[0]
            assert (
                rel_l2(y.cpu(), wanted[start : start + 8]) <= 3 * OWED[torch.bfloat16]
            )  # the router and the shared expert round too
    assert set(calls.ran) == {"triton"}


def test_the_report_names_the_kernel() -> None:
    with torch.no_grad():
        block, _ = made(FAMILIES["gpt_fast"], "", torch.float16)
        report = inductor_ext.explain(block.cuda(), torch.randn(1, 5, 64, device="cuda", dtype=torch.float16))
    assert [(r.op, r.kernel) for r in report.rewritten] == [("w4a16::moe", "triton")]


def test_one_graph_for_all_numbers_of_tokens(calls: Calls) -> None:
    """Pair by pair, and sorted: what depends on T is decided inside the op."""
    experts = ordinary()
    compiled = torch.compile(lambda x, w, ids: experts(x * 2, w, ids) + 1, fullgraph=True, dynamic=True)
    for T in (7, 2, 64, 257, 513):
        x, weights, ids = experts.routed(T)
        assert rel_l2(compiled(x, weights, ids), experts.expected(x * 2, weights, ids) + 1) <= OWED[torch.float16]
    assert recompiles() == 1
    assert set(calls.ran) == {"triton"}


def test_packing_on_the_device_is_as_on_the_cpu() -> None:
    experts = Experts(4, 256, 72, (128, 72), torch.float16, zeros="int", kernel="triton")
    weight, _ = experts._weight(4 * 144, 256, 128)
    assert weight.zeros is not None
    there = kernel.pack(type(weight)(weight.codes.cuda(), weight.scales.cuda(), weight.zeros.cuda()), 4)
    for own, other in zip(there, kernel.pack(weight, 4), strict=True):
        assert (own is None) == (other is None)
        assert own is None or torch.equal(own.cpu(), other)
