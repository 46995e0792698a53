"""Counters of launches that may run at the same time are not the same ones. On a GPU: test_gpu_linear.py."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from inductor_ext.kernels.gpu import workspace

DEVICE = torch.device("cuda", 0)


class Slow(dict[torch.device, Tensor]):
    """Another thread has its turn after each look."""

    def __getitem__(self, device: torch.device) -> Tensor:
        found = super().__getitem__(device)
        time.sleep(0.001)
        return found


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread is a stream, and memory is the CPU's."""

    def chunk(count: int, device: torch.device) -> Tensor:
        return torch.zeros(count, dtype=torch.int32)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=threading.get_ident()))
    monkeypatch.setattr(workspace, "_chunk", chunk)
    monkeypatch.setattr(workspace, "_chunks", [])
    monkeypatch.setattr(workspace, "_rest", Slow())
    monkeypatch.setattr(workspace, "_of_stream", {})


@pytest.mark.usefixtures("without_a_gpu")
def test_threads_that_launch_on_streams_of_their_own_have_counters_of_their_own() -> None:
    threads = 16
    together = threading.Barrier(threads)

    def first_launch(_: int) -> Tensor:
        together.wait()
        return workspace.counters(100, DEVICE)

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(first_launch, range(threads)))
    begins = sorted(t.data_ptr() for t in found)
    assert all(after - before >= 4 * 100 for before, after in itertools.pairwise(begins))


@pytest.mark.usefixtures("without_a_gpu")
def test_a_stream_keeps_its_counters() -> None:
    mine = workspace.counters(100, DEVICE)
    assert workspace.counters(50, DEVICE).data_ptr() == mine.data_ptr()
    more = workspace.counters(1 << 20, DEVICE)
    assert more.numel() >= 1 << 20 and not more.any()
