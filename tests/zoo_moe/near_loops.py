"""Near misses among dense batches and loops: experts that count although they were not chosen, or do not count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_moe.base import either, miss
from zoo_moe.dense import expert, scattered, weighted_input
from zoo_moe.formats import PAIRS, PAIRS_KN
from zoo_moe.loops import of
from zoo_moe.routers import Routing, renormalised, softmax_topk


def dense_on_input(scores_of: Callable[[Any, Tensor, Tensor], Tensor]) -> Any:
    """llama4, with scores [T, E]."""

    def form(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        scores = scores_of(m, ids, weights)
        rows = x.repeat(m.E, 1) * scores.transpose(0, 1).reshape(-1, 1)
        h = m.mlp(lambda name: m.biased(name, rows.view(m.E, -1, m.H) @ m.kn(name), torch.arange(m.E)[:, None]))
        return m.biased("w2", h @ m.kn("w2"), torch.arange(m.E)[:, None]).sum(dim=0)

    return form


def sigmoid_of_zeros(m: Any, ids: Tensor, weights: Tensor) -> Tensor:
    """Of experts that were not chosen too."""
    return scattered(m, ids, weights).sigmoid()


def softmax_of_all(m: Any, ids: Tensor, weights: Tensor) -> Tensor:
    return scattered(m, ids, weights).softmax(-1)


def experts_first(m: Any, ids: Tensor, weights: Tensor) -> Tensor:
    return scattered(m, ids, weights).t().reshape(-1, m.E)


def everything(m: Any, x: Tensor) -> Routing:
    """No top-k: every expert counts."""
    return torch.arange(m.E).expand(x.shape[0], -1), F.linear(x, m.router).softmax(-1)


def soft(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    h = m.mlp(lambda name: torch.einsum("th,eih->tei", x, m.nk(name)))
    return torch.einsum("tei,ehi,te->th", h, m.nk("w2"), weights)


def scattered_late(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Of an expert that is chosen twice, one weight is lost."""
    y = torch.einsum("tei,ehi->teh", m.mlp(lambda name: torch.einsum("th,eih->tei", x, m.nk(name))), m.nk("w2"))
    return torch.einsum("teh,te->th", y, scattered(m, ids, weights).to(y.dtype))


dense: dict[str, Any] = {"route": renormalised, "on_input": True, "format": PAIRS_KN}
miss("miss: dense, sigmoid of zeros", dense_on_input(sigmoid_of_zeros), **dense)
miss("miss: dense, softmax of all", dense_on_input(softmax_of_all), **dense)
miss("miss: dense, scores by experts first", dense_on_input(experts_first), **dense)
miss("miss: dense, weighted input, biases", dense_on_input(scattered), bias=True, **dense)
miss("miss: dense, weights set, ids may repeat", scattered_late, format=PAIRS, repeats=True)
miss("miss: dense, weighted input, ids may repeat", weighted_input, on_input=True, format=PAIRS_KN, repeats=True)
either("dense, every expert, ids sorted", scattered_late, route=softmax_topk, k=8, format=PAIRS)
either("dense, no top-k", soft, route=everything, k=8, format=PAIRS)


def loop(skip: int | None = None, twice: int | None = None, one_relu: int | None = None) -> Any:
    def form(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(m.E):
            of_token = ((ids == e) * weights).sum(dim=1, keepdim=True)
            y = F.relu(expert(m, x, e)) if e == one_relu else expert(m, x, e)
            out = out if e == skip else out + y * of_token
            out = out + y * of_token if e == twice else out
        return out.to(x.dtype)

    return form


def set_not_added(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Of the experts of a token the last one counts."""
    out = torch.zeros_like(x)
    for e in range(m.E):
        token, slot = torch.where(ids == e)
        out[token] = (weights[token, slot, None] * of(m, e, x[token])).to(x.dtype)
    return out


def first_slot_everywhere(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(m.E):
        token, _ = torch.where(ids == e)
        out.index_add_(0, token, (weights[token, 0, None] * of(m, e, x[token])).to(x.dtype))
    return out


small: dict[str, Any] = {"E": 4, "linears": True, "route": softmax_topk}
miss("miss: loop, one expert skipped", loop(skip=2), **small)
miss("miss: loop, one expert twice", loop(twice=1), **small)
miss("miss: loop, one expert with an activation more", loop(one_relu=3), **small)
miss("miss: loop, set in place of added", set_not_added, unbacked=True, **small)
miss("miss: loop, the first slot's weight", first_slot_everywhere, unbacked=True, **small)
