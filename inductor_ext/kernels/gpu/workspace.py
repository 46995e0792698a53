"""Memory that kernels need besides their arguments: one allocation cut into sections, and counters.

Counters are for kernels whose programs wait for one another: zero before a launch, and zero again after it.

One launch's counters must not be another's that may run at the same time. Launches of one stream follow each other, so
a stream has one set. A launch that is captured into a CUDA graph runs wherever the graph is replayed, so it gets
counters that are nobody else's, for good; a graph never runs beside itself.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_CHUNK = 1 << 18
"""Counters made at once, 1 MiB."""
_OF_A_STREAM = 4096
_ALIGNED = 32
"""A cache line of counters. Triton compiles anew for addresses that are not multiples of 16, during a capture too."""

_chunks: list[Tensor] = []
"""Never freed: a graph holds addresses, which keep nothing alive."""
_rest: dict[torch.device, Tensor] = {}
"""Of the newest chunk, what nobody has yet."""
_of_stream: dict[tuple[torch.device, int], Tensor] = {}


_one_at_a_time = threading.Lock()


def counters(count: int, device: torch.device) -> Tensor:
    """int32 [>= count], zeros, for one launch on the current stream that leaves them zero."""
    with _one_at_a_time:  # threads may launch on streams of their own
        return _counters(count, device)


def _counters(count: int, device: torch.device) -> Tensor:
    if device.type != "cuda":  # Triton's interpreter, which has no streams, or a launch that is only looked at
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        if device in _rest and _rest[device].numel() >= count + _ALIGNED:
            return _take(count, device)
        return torch.zeros(count, dtype=torch.int32, device=device)  # by the graph: outside it nothing can be now
    mine = _of_stream.get((device, torch.cuda.current_stream(device).cuda_stream))
    if mine is None or mine.numel() < count:
        count = max(count, _OF_A_STREAM)
        _keep(count, device)
        mine = _of_stream[device, torch.cuda.current_stream(device).cuda_stream] = _take(count, device)
    _keep(_CHUNK // 4, device)  # for the next capture
    return mine


def _take(count: int, device: torch.device) -> Tensor:
    rest, count = _rest[device], -(-count // _ALIGNED) * _ALIGNED
    _rest[device] = rest[count:]
    return rest[:count]


def _keep(count: int, device: torch.device) -> None:
    """Makes a chunk if there are fewer than about so many counters that nobody has."""
    if device not in _rest or _rest[device].numel() < count + _ALIGNED:
        # On a thread of its own: when torch.compile warms up for CUDA graphs, what this one allocates lies in the
        # graphs' memory, where nothing may stay.
        with ThreadPoolExecutor(1) as thread:
            _rest[device] = thread.submit(_chunk, max(count + _ALIGNED, _CHUNK), device).result()
        _chunks.append(_rest[device])


def _chunk(count: int, device: torch.device) -> Tensor:
    zeros = torch.zeros(count, dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).synchronize()  # any stream may use it
    return zeros


class Section:
    """A tensor within one allocation, once that is made."""

    def __init__(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.start, self.shape, self.dtype = start, shape, dtype
        self.size = math.prod(shape) * dtype.itemsize
        self.whole: Tensor | None = None

    def get(self) -> Tensor:
        assert self.whole is not None
        return self.whole[self.start : self.start + self.size].view(self.dtype).view(self.shape)


class Sections:
    """Several tensors in one allocation."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._end = device, 0
        self._sections: list[Section] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Section:
        section = Section(self._end, shape, dtype)
        self._end += -(-section.size // 256) * 256
        self._sections.append(section)
        return section

    def allocate(self) -> None:
        whole = torch.empty(self._end, dtype=torch.uint8, device=self._device)
        for section in self._sections:
            section.whole = whole
