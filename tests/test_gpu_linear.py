"""The Triton kernels behind `w4a16::linear` on a GPU: right for every number of rows, the same bits every time, safe
with several streams and CUDA graphs, and what the backend chooses there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dense import ZEROS, Layer, activations, dense, expected, weight
from models import OWED, Calls, recompiles, rel_l2
from torch import Tensor, nn

import inductor_ext
import inductor_ext.ops
from inductor_ext.kernels import Packed
from inductor_ext.kernels.gpu import linear, runtime, tuning, workspace
from inductor_ext.kernels.gpu.decode import launch as decode
from inductor_ext.kernels.gpu.hopper import launch as hopper

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA or ROCm device, and this machine has none"
)

DTYPES = (torch.float16, torch.bfloat16)
SPLIT = (256, 4096, 128)
"""N, K, G: few tiles and many steps, so that programs share a tile when there are few rows."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def no_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has launched nothing yet, and with small chunks."""
    monkeypatch.setattr(workspace, "_CHUNK", 1 << 13)
    monkeypatch.setattr(workspace, "_chunks", [])
    monkeypatch.setattr(workspace, "_rest", {})
    monkeypatch.setattr(workspace, "_of_stream", {})


def poison() -> None:
    """Leaves NaN in the memory that the next small tensors get: what a kernel forgets to write shows it."""
    for _ in range(4):
        torch.full((1 << 20,), float("nan"), device="cuda")
    for size in (1 << 9, 1 << 12, 1 << 15, 1 << 17):
        torch.full((size,), float("nan"), device="cuda")


def splits(M: int) -> int:
    N, K, _ = SPLIT
    device = torch.device("cuda", torch.cuda.current_device())
    return tuning.dense(M, N, K, runtime.arch_of(device), runtime.processors(device), plain=False).SPLITS


def call(M: int, seed: int = 0) -> Callable[[], Tensor]:
    """y = x @ W^T for the SPLIT weight, which is another for another seed."""
    N, K, G = SPLIT
    packed, x = linear.pack(weight(N, K, G, "int", seed=seed)), activations(M, K, torch.float16, seed)
    return lambda: linear.run(x, packed, None, N, G)


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    return graph, y


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [1, 3, 16, 17, 33, 64, 129, 257, 1000])
@pytest.mark.parametrize("zeros", [*ZEROS, "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_rows(dtype: torch.dtype, zeros: str, M: int) -> None:
    shapes = [(200, 1152, G) for G in (32, 64, 128, 384, 1152)] + [(768, 1024, 128)]
    for N, K, G in shapes:
        w = weight(N, K, G, zeros, dtype if M % 2 else torch.float16, order=M in (3, 129), seed=M)
        x = activations(M, K, dtype)
        bias = torch.randn(N, device="cuda", dtype=dtype) if M in (1, 16, 1000) else None
        packed = linear.pack(w)
        poison()
        y = torch.ops.w4a16.linear(x, *packed, bias, N, G, "triton")
        assert (y.shape, y.dtype) == ((M, N), dtype)
        assert rel_l2(y, expected(x, w, bias)) <= OWED[dtype], (N, K, G)


@pytest.mark.parametrize("M", [1, 16, 64, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_of_real_size(dtype: torch.dtype, M: int) -> None:
    w, x = weight(6144, 4096, 128, "int", dtype), activations(M, 4096, dtype)
    y = torch.ops.w4a16.linear(x, *linear.pack(w), None, 6144, 128, "triton")
    assert rel_l2(y, expected(x, w)) <= OWED[dtype]


@pytest.mark.parametrize("G", [32, 128])
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forty_rows_of_long_ones(dtype: torch.dtype, zeros: str, G: int) -> None:
    """On a Hopper by its own kernel, which otherwise begins at 65."""
    w, x = weight(4096, 8192, G, zeros, dtype), activations(40, 8192, dtype)
    y = torch.ops.w4a16.linear(x, *linear.pack(w), None, 4096, G, "triton")
    assert rel_l2(y, expected(x, w)) <= OWED[dtype]


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("BM", [32, 64, 128])
@pytest.mark.parametrize("BN", [128, 192, 256])
def test_blocks_of_every_size_on_a_hopper(BN: int, BM: int, splits: int) -> None:
    N, K, M = 520, 1152, 150
    for dtype, zeros, G in itertools.product(DTYPES, ZEROS, (32, 128)):
        w, x = weight(N, K, G, zeros, dtype), activations(M, K, dtype)
        packed, bias = linear.pack(w), torch.randn(N, device="cuda", dtype=dtype)
        if not hopper.can(packed, x):
            pytest.skip("the kernel runs on a Hopper with a recent Triton")
        poison()
        out = torch.empty(M, N, dtype=dtype, device="cuda")
        hopper.dense(tuning.Hopper(BN, BM, splits, 4), x, packed, bias, G, out)
        assert rel_l2(out, expected(x, w, bias)) <= OWED[dtype], (dtype, zeros, G)


@pytest.mark.parametrize("order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_the_activations(dtype: torch.dtype, order: bool) -> None:
    w = weight(200, 1152, 128, "int", dtype, order)
    x = activations(17, 1152, dtype).clone().requires_grad_()
    grad = activations(17, 200, dtype, seed=1)
    torch.ops.w4a16.linear(x, *linear.pack(w), None, 200, 128, "triton").backward(grad)
    assert x.grad is not None
    assert rel_l2(x.grad, grad.double() @ dense(w)) <= OWED[dtype]


def test_more_rows_than_32_bits_can_address() -> None:
    """So many rows are dequantised for, so the fused kernel is launched here by itself."""
    rows, (N, K) = 2**31 // 4096 + 40, (64, 4096)
    w, last = weight(N, K, 128), activations(40, K, torch.float16)
    x = torch.zeros(rows, K, dtype=torch.float16, device="cuda")
    x[-40:] = last
    out = torch.empty(rows, N, dtype=torch.float16, device="cuda")
    config = tuning.dense(rows, N, K, runtime.arch_of(x.device), runtime.processors(x.device), plain=True)
    linear.launch(config, x, linear.pack(w), None, 128, out)
    assert rel_l2(out[-40:], expected(last, w)) <= OWED[torch.float16]


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [1, 16, 33, 129])
def test_a_hundred_times_the_same_bits(M: int) -> None:
    assert splits(M) > 1
    run = call(M)
    first = run()
    for _ in range(100):
        assert torch.equal(run(), first)


@pytest.mark.parametrize(("N", "K", "G"), [(28672, 4096, 128), (9040, 14336, 64), (10000, 1040, 1040)])
@pytest.mark.parametrize("zeros", ZEROS)
def test_one_row_through_programs_that_go_on(zeros: str, N: int, K: int, G: int) -> None:
    """More rows of W than there are programs for: each has several runs of them, whose copies overlap."""
    w, x = weight(N, K, G, zeros), activations(1, K, torch.float16)
    packed = linear.pack(w)
    poison()
    first = linear.run(x, packed, None, N, G)
    assert rel_l2(first, expected(x, w)) <= OWED[torch.float16]
    for _ in range(100):
        assert torch.equal(linear.run(x, packed, None, N, G), first)


def test_streams_at_once_do_not_disturb_each_other() -> None:
    assert splits(2) > 1
    runs = [call(M, seed) for seed, M in enumerate((2, 1, 16, 2))]
    wanted = [run() for run in runs]
    streams = [torch.cuda.Stream() for _ in runs]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[] for _ in runs]
    for _ in range(50):
        for run, stream, result in zip(runs, streams, results, strict=True):
            with torch.cuda.stream(stream):
                result.append(run())
    torch.cuda.synchronize()
    for y, result in zip(wanted, results, strict=True):
        assert all(torch.equal(y, other) for other in result)


# -- CUDA graphs -------------------------------------------------------------------------------------------------------


def test_graphs_replay_on_several_streams_beside_eager_calls() -> None:
    runs = [call(M, seed) for seed, M in enumerate((2, 1, 16, 64))]
    wanted = [run() for run in runs]
    graphs = [captured(run) for run in runs]
    streams = [torch.cuda.Stream() for _ in runs]
    torch.cuda.synchronize()
    for _ in range(20):
        for _, replayed in graphs:
            replayed.fill_(float("nan"))
        torch.cuda.synchronize()
        eager = []
        for (graph, _), stream, run in zip(graphs, streams, runs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
            eager.append(run())
        torch.cuda.synchronize()
        for y, (_, replayed), other in zip(wanted, graphs, eager, strict=True):
            assert torch.equal(replayed, y)
            assert torch.equal(other, y)


def test_a_graph_whose_first_launch_is_its_capture() -> None:
    """It has no counters to take: the graph zeroes its own."""
    run = call(2)
    y = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace, "_rest", {})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = run()
    for _ in range(3):
        replayed.fill_(float("nan"))
        graph.replay()
        assert torch.equal(replayed, y)


@pytest.mark.usefixtures("no_counters")
def test_a_graph_keeps_its_counters_when_new_ones_are_made() -> None:
    run = call(2)
    y = run()
    graph, replayed = captured(run)
    (device,) = workspace._rest
    workspace._take(workspace._rest[device].numel() - workspace._ALIGNED, device)
    workspace._of_stream.clear()  # no stream has a part of the first chunk now, only the graph
    run()
    assert len(workspace._chunks) == 2
    others = [torch.full((1 << 13,), 7, dtype=torch.int32, device="cuda") for _ in range(1000)]
    replayed.fill_(float("nan"))
    graph.replay()
    assert torch.equal(replayed, y)
    assert all(bool((other == 7).all()) for other in others[::100])


@pytest.mark.usefixtures("no_counters")
def test_counters_are_one_launch_s_own() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    taken = [workspace.counters(3, device)]
    assert workspace.counters(3, device) is taken[0]
    with torch.cuda.stream(torch.cuda.Stream()):
        taken.append(workspace.counters(3, device))
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        taken += [workspace.counters(3, device), workspace.counters(3, device)]
        torch.empty(1, device=device)
    spans = sorted((t.data_ptr(), t.data_ptr() + 4 * t.numel()) for t in taken)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert all(start % 16 == 0 for start, _ in spans)


# -- no surprises ------------------------------------------------------------------------------------------------------


def variant(M: int, N: int, K: int, G: int, packed: Packed, x: Tensor) -> object:
    """What is compiled for M rows, and not again for others."""
    if decode.can(packed, x[:M]):
        return "one row"
    count = runtime.processors(x.device)
    if hopper.can(packed, x) and (many := tuning.hopper(M, N, K, count, plain=True)) is not None:
        return many
    config = tuning.dense(M, N, K, runtime.arch_of(x.device), count, plain=True)
    return config, config.BM >= M


def test_another_number_of_rows_compiles_nothing() -> None:
    """One kernel for each set of parameters, whatever M is a multiple of."""
    import triton

    N, K, G = 192, 768, 256
    packed, x = linear.pack(weight(N, K, G)), activations(447, K, torch.float16)
    compiled: list[Any] = []
    hook = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **what: compiled.append(what)
    try:
        variants = set()
        for M in (*range(1, 150), 160, 192, 256, 257, 300, 447):
            variants.add(variant(M, N, K, G, packed, x))
            linear.run(x[:M], packed, None, N, G)
        assert len(compiled) <= len(variants)
        before = len(compiled)
        for G in (640, 896):  # which no other test has, so that the hook is known to work
            linear.run(activations(1, 2 * G, torch.float16), linear.pack(weight(N, 2 * G, G)), None, N, G)
        assert len(compiled) == before + 2
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_the_current_one() -> None:
    N, K, G = SPLIT
    w, x = weight(N, K, G, device="cuda:1"), activations(1, K, torch.float16, device="cuda:1")
    assert rel_l2(linear.run(x, linear.pack(w), None, N, G), expected(x, w)) <= OWED[torch.float16]


# -- through torch.compile ---------------------------------------------------------------------------------------------


def two_layers(dtype: torch.dtype) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A model whose layers both share tiles among programs at few rows, and what it gives."""
    first, second = weight(2048, 2048, 128, scale_dtype=dtype), weight(256, 2048, 128, scale_dtype=dtype, seed=1)
    return nn.Sequential(Layer(first), Layer(second)), lambda x: expected(expected(x, first).to(dtype), second)


@pytest.mark.usefixtures("no_counters")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_a_compiled_model_runs_on_the_kernel(mode: str, dtype: torch.dtype, calls: Calls) -> None:
    """With CUDA graphs the counters are first made while torch.compile warms up for them."""
    model, wanted = two_layers(dtype)
    compiled = torch.compile(model, backend="w4a16", mode=mode)
    with torch.no_grad():
        for M in (1, 3, 3, 3, 3):
            x = activations(M, 2048, dtype, seed=M)
            torch.compiler.cudagraph_mark_step_begin()
            assert rel_l2(compiled(x).clone(), wanted(x)) <= 2 * OWED[dtype]
    assert set(calls.ran) == {"triton"}


def test_the_report_names_the_kernel() -> None:
    model, _ = two_layers(torch.float16)
    report = inductor_ext.explain(model, activations(3, 2048, torch.float16))
    assert [r.kernel for r in report.rewritten] == ["triton", "triton"]


def test_one_graph_for_all_numbers_of_rows(calls: Calls) -> None:
    """Fused, and dequantised once: what depends on M is decided inside the op."""
    model, wanted = two_layers(torch.float16)
    compiled = torch.compile(model, backend="w4a16", dynamic=True)
    with torch.no_grad():
        for M in (5, 17, 64, 300, 500):
            x = activations(M, 2048, torch.float16, seed=M)
            assert rel_l2(compiled(x), wanted(x)) <= 2 * OWED[torch.float16]
    assert recompiles() == 1
    assert set(calls.ran) == {"triton"}


def test_a_gradient_through_a_compiled_model() -> None:
    model, _ = two_layers(torch.float16)
    x = activations(5, 2048, torch.float16).clone().requires_grad_()
    compiled = torch.compile(model, backend="w4a16")
    (grad,) = torch.autograd.grad(compiled(x).float().sum(), x)
    (wanted,) = torch.autograd.grad(model(x).float().sum(), x)
    assert rel_l2(grad, wanted) <= 4 * OWED[torch.float16]
