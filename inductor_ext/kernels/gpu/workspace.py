"""Memory that kernels need besides their arguments: one allocation cut into sections, and counters.

Counters are for kernels whose programs wait for one another: zero before a launch, and zero again after it.

One launch's counters must not be another's that may run at the same time. Launches of one stream follow each other, so
a stream has one set. A launch that is captured into a CUDA graph runs wherever the graph is replayed, so it gets
counters that are nobody else's, for good; a graph never runs beside itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHUNK = 1 << 18
"""Counters made at once, 1 MiB."""
_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_pool: dict[torch.device, Tensor] = {}


def counters(count: int, device: torch.device) -> Tensor:
    """int32 [>= count], zeros, for one launch on the current stream that leaves them zero."""
    if torch.cuda.is_current_stream_capturing():
        rest = _pool.get(device)
        if rest is None or rest.numel() < count:  # nothing can be zeroed outside the graph now: the graph does it
            return torch.zeros(count, dtype=torch.int32, device=device)
        _pool[device] = rest[count:]
        return rest[:count]
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    mine = _of_stream.get(key)
    if mine is None or mine.numel() < count:
        mine = _of_stream[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    if device not in _pool or _pool[device].numel() < _CHUNK // 4:
        _pool[device] = torch.zeros(_CHUNK, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()  # once a chunk: a graph on any stream may use it
    return mine


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
