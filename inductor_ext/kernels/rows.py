"""Routing as rows of the weights, for kernels that are given ids already checked and mapped."""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_ext.kernels import Routing


def rows(routing: Routing, E: int) -> Tensor:
    """topk_ids as rows of E weights, int32 and contiguous; negative where there is nothing to do.

    Raises RuntimeError for an id that there is not, and for a row that there is not; not on a GPU, which would have to
    wait for the values: there such a choice contributes nothing.
    """
    found = _within("topk_ids", routing.topk_ids, routing.number)
    if routing.expert_map is not None:
        mapped = routing.expert_map[found.clamp(min=0)].where(found >= 0, -1)
        found = _within("expert_map", mapped, E)
    return found.int().contiguous()


def _within(name: str, values: Tensor, end: int) -> Tensor:
    if values.device.type != "cpu":
        return values.where((values >= 0) & (values < end), -1)
    if values.numel():
        low, high = (int(v) for v in values.aminmax())
        wrong = low if low < -1 else high
        torch._check(
            low >= -1 and high < end,
            lambda: f"w4a16::moe: {name} must be -1 or 0..{end - 1}, there is {wrong} in it.",
        )
    return values
