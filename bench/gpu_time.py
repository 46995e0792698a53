"""How the GPU benchmarks time: CUDA graphs of calls, whose launches from Python do not count, replayed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from inductor_ext import devices, oracle, preview

DEVICE = "cuda"
CALLS = 10
"""In a graph of short calls, at least."""

Call = Callable[[], Any]


def kernel_here(problem: str) -> str:
    """The kernel that is chosen on this device for one of preview.problems."""
    here = devices.of(torch.device(DEVICE, torch.cuda.current_device()))
    return oracle.choose(preview.problems(here)[problem]).kernel


class Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    calls: int
    kept: Sequence[Call]
    """A graph holds addresses; what the calls read must live as long."""


def recorded(calls: Sequence[Call], long: bool = False) -> Recorded:
    """A graph of calls; of all of them as many times over as makes CALLS, unless they are long."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    times = 1 if long else -(-CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            for call in calls:
                call()
    graph.replay()
    torch.cuda.synchronize()
    return Recorded(graph, times * len(calls), calls)


def seconds(recorded: Recorded) -> float:
    """Of a call."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    recorded.graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / recorded.calls


def medians(ways: dict[str, Recorded], rounds: int) -> dict[str, float]:
    """Seconds of a call, for each way; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds(way))
    return {name: statistics.median(found) for name, found in times.items()}


def copy_rate() -> float:
    """Bytes a second, read and written, of 1 GiB that goes through a kernel; and the clocks are up after it."""
    source = torch.zeros(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    copy = recorded([lambda: torch.neg(source, out=target)])  # a copy would be the copy engine's, which is slower
    until = time.monotonic() + 1
    while time.monotonic() < until:
        seconds(copy)
    return 2 * source.nbytes / statistics.median(seconds(copy) for _ in range(9))


def about() -> dict[str, str]:
    """The device and the versions."""
    import triton

    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
