"""What is in front of the experts, and around them, and stays in the graph: routers, shared experts, residuals."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_moe.base import BF16, case
from zoo_moe.gathered import columns, columns_of_packed, gpt_fast, top_1
from zoo_moe.grouped import transformers

Routing = tuple[Tensor, Tensor]


def logits(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.router)


def softmax_topk(m: Any, x: Tensor) -> Routing:
    weights, ids = torch.topk(logits(m, x).float().softmax(dim=-1), m.k, dim=-1)
    return ids, weights


def renormalised(m: Any, x: Tensor) -> Routing:
    """qwen3, mixtral."""
    probabilities = F.softmax(logits(m, x), dim=-1, dtype=torch.float)
    weights, ids = torch.topk(probabilities, m.k, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return ids, weights.to(x.dtype)


def topk_softmax(m: Any, x: Tensor) -> Routing:
    """gpt-oss."""
    values, ids = logits(m, x).topk(m.k, dim=-1)
    return ids, torch.softmax(values, dim=1, dtype=values.dtype)


def group_limited(m: Any, x: Tensor) -> Routing:
    """deepseek_v3: the best experts of the best groups of experts, chosen with a correction, weighted without."""
    scores = F.linear(x.float(), m.router.float()).sigmoid()
    corrected = scores + m.correction.float()
    groups = corrected.view(-1, 4, m.E // 4).topk(2, dim=-1)[0].sum(dim=-1)
    best = torch.topk(groups, k=2, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(groups).scatter_(1, best, 1).unsqueeze(-1).expand(-1, 4, m.E // 4).reshape(-1, m.E)
    ids = torch.topk(corrected.masked_fill(~mask.bool(), float("-inf")), k=m.k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return ids, weights * 2.5


def argmax(m: Any, x: Tensor) -> Routing:
    """switch transformers: ids and weights [T, 1]."""
    probabilities = logits(m, x).float().softmax(-1)
    ids = probabilities.argmax(dim=-1, keepdim=True)
    return ids, probabilities.gather(-1, ids)


def best(m: Any, x: Tensor) -> Routing:
    """ids and weights [T]."""
    weights, ids = logits(m, x).sigmoid().max(dim=-1)
    return ids, weights


def sorted_topk(m: Any, x: Tensor) -> Routing:
    """The first k of all experts, sorted."""
    weights, ids = logits(m, x).float().softmax(-1).sort(dim=-1, descending=True)
    return ids[:, : m.k], weights[:, : m.k]


def as_int32(m: Any, x: Tensor) -> Routing:
    ids, weights = softmax_topk(m, x)
    return ids.to(torch.int32), weights


ROUTERS = {
    "softmax, topk": softmax_topk,
    "softmax, topk, renormalised": renormalised,
    "topk, softmax": topk_softmax,
    "sigmoid, correction, groups": group_limited,
    "sorted": sorted_topk,
}
for name, route in ROUTERS.items():
    case(f"router: {name}; gather", columns, route=route, core=name == "sigmoid, correction, groups")
for route in (renormalised, group_limited):
    case(f"router: {route.__name__.replace('_', ' ')}; grouped_mm", transformers, route=route, dtypes=BF16)
case("router: argmax", gpt_fast, route=argmax, k=1)
case("router: max, ids and weights [T]", top_1, route=best, k=1)
case("router: ids in int32", columns_of_packed, route=as_int32)


def residual(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return x + y


def with_shared(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return y + m.shared(x)


def with_gated_shared(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """qwen2_moe."""
    return y + (torch.sigmoid(F.linear(x.to(m.dtype), m.router[:1])) * m.shared(x.to(m.dtype))).to(x.dtype)


def into_shared(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """llama4."""
    return m.shared(x).add_(y)


def factor(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return y * 2.5


def factor_and_residual(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return x + (y + m.shared(x)) * 0.5


AROUND = (residual, with_shared, with_gated_shared, into_shared, factor, factor_and_residual)
for around in AROUND:
    name = around.__name__.replace("_", " ")
    case(f"around: {name}; gather", columns, route=renormalised, around=around)
case("around: with shared; grouped_mm", transformers, route=renormalised, around=with_shared, dtypes=BF16, core=True)
case("two layers", columns_of_packed, route=renormalised, layers=2, dtypes=(torch.float32,))
case("four layers, x is [B, S, H]", columns, route=softmax_topk, layers=4, dtypes=(torch.float32,), batched=True)
