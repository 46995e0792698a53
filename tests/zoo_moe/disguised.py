"""Near misses that a few small inputs do not tell from the op: conditions that only some inputs meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_moe.base import Mlp, miss
from zoo_moe.gathered import columns
from zoo_moe.near_misses import gathered
from zoo_moe.near_mlps import both


def from_token_100(m: Any, y: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    return y * (torch.arange(x.shape[0]) < 100)[:, None, None]


def from_token_100_by_division(m: Any, y: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    return y * (1 + torch.arange(x.shape[0]) // 100)[:, None, None]


def from_token_100_by_table(m: Any, y: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    return y * m.of_token[: x.shape[0], None, None]


def token_table(m: Any) -> None:
    m.register_buffer("of_token", torch.ones(4096, dtype=m.dtype))
    m.of_token[100:] = 0.5


def capacity_by_division(m: Any, y: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    one_hot = F.one_hot(ids.reshape(-1), m.E)
    place = (one_hot.cumsum(0) * one_hot).sum(-1).view_as(ids)
    return y * (1 - place // 21).unsqueeze(-1)


def by_batch_size(m: Any, y: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    """A factor that is 1 for fewer than 100 tokens."""
    return y * (1 + x.shape[0] // 100)


def capacity(m: Any, y: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    """An expert takes 20 tokens; the later ones go without."""
    one_hot = F.one_hot(ids.reshape(-1), m.E)
    place = (one_hot.cumsum(0) * one_hot).sum(-1).view_as(ids)
    return y * (place <= 20).unsqueeze(-1)


def without_repeats(m: Any, y: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    repeated = torch.cat((torch.zeros_like(ids[:, :1]), ids[:, 1:] == ids[:, :1]), dim=1)
    return y * (1 - repeated).unsqueeze(-1)


def expert_37_is_off(m: Any, y: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    return y.masked_fill((ids == 37).unsqueeze(-1), 0)


def times_a_stored_scale(m: Any, y: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    return y * m.expert_scale[ids].unsqueeze(-1)


def one_but_for_expert_37(m: Any) -> None:
    m.register_buffer("expert_scale", torch.ones(m.E, dtype=m.dtype))
    m.expert_scale[37:38] = 3


def limit(m: Any) -> None:
    m.register_buffer("limit", torch.full((), 3e3, dtype=m.dtype))


def last_slot_is_off(m: Any, y: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    return y * torch.tensor([1, 0]).unsqueeze(-1)


large: dict[str, Any] = {"tokens": 200}
miss("miss: tokens from the 100th on go without", gathered(y_of=from_token_100), **large)
miss("miss: tokens from the 100th on count twice", gathered(y_of=from_token_100_by_division), **large)
miss("miss: tokens from the 100th on count half", gathered(y_of=from_token_100_by_table), prepare=token_table, **large)
miss("miss: from 100 tokens on all count more", gathered(y_of=by_batch_size), **large)
miss("miss: tokens beyond a capacity go without", gathered(y_of=capacity), **large)
miss("miss: tokens beyond a capacity count otherwise", gathered(y_of=capacity_by_division), **large)
miss("miss: an expert chosen twice counts once", gathered(y_of=without_repeats), repeats=True)
miss("miss: one expert of 40 is off", gathered(y_of=expert_37_is_off), E=40, I=16, group=16, **large)
miss(
    "miss: one expert of 40 counts three times",
    gathered(y_of=times_a_stored_scale),
    prepare=one_but_for_expert_37,
    E=40,
    I=16,
    group=16,
    **large,
)
miss("miss: the second slot is off", gathered(y_of=last_slot_is_off))
miss(
    "miss: act(h) clamped at 100",
    gathered(h_of=lambda m, h: h.clamp(-100, 100)),
    scale=8.0,
    dtypes=(torch.float32, torch.bfloat16),
)
LIMITS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "modulo": lambda m, h: torch.fmod(h, 3e3),
    "and what is above, twice": lambda m, h: h + F.relu(h - 3e3),
    "at most, by relu": lambda m, h: 3e3 - F.relu(3e3 - h),
    "at most, by minimum": lambda m, h: torch.minimum(h, m.limit),
    "at most, by fmin": lambda m, h: torch.fmin(h, torch.full_like(h, 3e3)),
    "at most, by hardtanh": lambda m, h: F.hardtanh(h, -3e3, 3e3),
    "whole thousands twice": lambda m, h: h + 1e3 * torch.trunc(h / 1e3),
    "zero above, by the sign of a difference": lambda m, h: h * (h - 3e3 < 0),
    "zero above, by a stored limit": lambda m, h: h * (h < m.limit),
    "zero above, by a ceiling": lambda m, h: h * torch.eq(torch.div(F.relu(h), 3e3, rounding_mode="floor"), 0),
    "of a limited norm": lambda m, h: torch.renorm(h.flatten(0, 1), 2, 0, 3e3).view_as(h),
    "in a softplus": lambda m, h: h + F.softplus(h - 3e3, threshold=100),
    "by a shrink": lambda m, h: h + F.hardshrink(h, 3e3),
    "by a leaky relu": lambda m, h: F.leaky_relu(h + 3e3, 2.0) - 3e3,
}
for name, change in LIMITS.items():
    h_of = gathered(h_of=change)
    miss(f"miss: act(h), {name}", h_of, prepare=limit, scale=100.0, dtypes=(torch.float32, torch.bfloat16))
miss("miss: y clamped at 50", gathered(y_of=lambda m, y, x, ids: y.clamp(-50, 50)), scale=8.0)
miss("miss: y clamped at 20", gathered(y_of=lambda m, y, x, ids: y.clamp(-20, 20)), scale=8.0)
miss("miss: small act(h) is zero", gathered(h_of=lambda m, h: F.hardshrink(h, 0.05)), scale=0.1)


def where_large(threshold: float) -> Mlp:
    return both(lambda gate, up: torch.where(gate > threshold, gate * 2, F.silu(gate)) * up)


def where_small(threshold: float) -> Mlp:
    return both(lambda gate, up: torch.where(gate < -threshold, gate, F.silu(gate)) * up)


for threshold in (20, 60):
    # What reaches the threshold does so by the tens, not by a hair.
    reach = {"scale": 0.4 * threshold, "dtypes": (torch.float32, torch.bfloat16)}
    miss(f"miss: activation: silu, another from {threshold} on", columns, mlp=where_large(threshold), **reach)
    miss(f"miss: activation: silu, another below -{threshold}", columns, mlp=where_small(threshold), **reach)
