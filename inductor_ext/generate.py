"""Greedy generation through a compiled forward, every token timed: for `python -m inductor_ext run` and the demo."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Generated:
    """tokens: int64 [1, prompt + new]. seconds: of each new token; the first two have compiling in them."""

    tokens: Tensor
    seconds: tuple[float, ...]

    @property
    def seconds_per_token(self) -> float | None:
        """The median once everything is compiled; None if there were fewer than three tokens."""
        return statistics.median(self.seconds[2:]) if len(self.seconds) > 2 else None


def greedy(
    model: Any,
    input_ids: Tensor,
    new_tokens: int,
    *,
    backend: str | None = "w4a16",
    options: Mapping[str, Any] | None = None,
) -> Generated:
    """Continues the prompt `input_ids`, int64 [1, T], by the `new_tokens` most likely tokens, or until the model ends.

    model: a transformers model. backend, options: as for torch.compile; None runs the model as it is.
    The key-value cache has a fixed size, so that one graph serves every token after the prompt.
    """
    clock = _Clock()
    padding = model.generation_config.pad_token_id
    with _compiled_forward(model, backend, options):
        tokens = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0 if padding is None else padding,
            cache_implementation="static",
            disable_compile=True,  # transformers would compile with a backend of its own choice
            streamer=clock,
        )
    return Generated(tokens, clock.seconds())


@contextlib.contextmanager
def _compiled_forward(model: Any, backend: str | None, options: Mapping[str, Any] | None) -> Iterator[None]:
    # generate() calls the model it belongs to, so a compiled wrapper around the model would be passed by.
    if backend is None:
        yield
        return
    model.forward = torch.compile(model.forward, backend=backend, options=dict(options) if options else None)
    try:
        yield
    finally:
        del model.forward


class _Clock:
    """A transformers streamer that notes when the prompt and every new token are handed out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Part of the protocol; nothing is left to do."""

    def seconds(self) -> tuple[float, ...]:
        return tuple(after - before for before, after in zip(self.times, self.times[1:], strict=False))
