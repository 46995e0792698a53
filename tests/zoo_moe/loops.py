"""One expert after another, each with the tokens that chose it: as models were written before they were compiled.

Dynamo captures these in one graph only with capture_dynamic_output_shape_ops.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_moe.base import case, either
from zoo_moe.routers import renormalised


def of(m: Any, e: int, x: Tensor) -> Tensor:
    """Expert e, of modules or of 3-D weights."""
    if m.case.separate:
        own = m.experts[e]
        h = m.mlp(lambda name: own.biased(name, F.linear(x, own.nk(name))))
        return own.biased("w2", F.linear(h, own.nk("w2")))
    h = m.mlp(lambda name: F.linear(x, m.nk(name)[e]))
    return F.linear(h, m.nk("w2")[e])


def one_hot_where(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """transformers 4: mixtral, qwen2_moe, qwen3_moe."""
    out = torch.zeros_like(x)
    mask = F.one_hot(ids, num_classes=m.E).permute(2, 1, 0)
    for e in range(m.E):
        slot, token = torch.where(mask[e])
        rows = x[None, token].reshape(-1, m.H)
        y = of(m, e, rows) * weights[token, slot, None]
        out.index_add_(0, token, y.to(x.dtype))
    return out


def where_added(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """mistral's own code."""
    out = torch.zeros_like(x)
    for e in range(m.E):
        token, slot = torch.where(ids == e)
        out[token] += (weights[token, slot, None] * of(m, e, x[token])).to(x.dtype)
    return out


def nonzero_scattered(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(m.E):
        token, slot = (ids == e).nonzero(as_tuple=True)
        y = of(m, e, x.index_select(0, token)) * weights[token, slot].unsqueeze(-1)
        out = out.scatter_add(0, token.unsqueeze(-1).expand(-1, m.H), y.to(x.dtype))
    return out


small = {"E": 4, "unbacked": True}
case("loop, torch.where, index_add_, modules", one_hot_where, route=renormalised, separate=True, core=True, **small)
case("loop, torch.where, index_add_, W[e]", one_hot_where, route=renormalised, **small)
case("loop, torch.where, index_add_, biases", one_hot_where, separate=True, bias=True, **small)
either("loop, torch.where, += of an index", where_added, route=renormalised, separate=True, **small)
case("loop, nonzero, scatter_add", nonzero_scattered, route=renormalised, separate=True, **small)
