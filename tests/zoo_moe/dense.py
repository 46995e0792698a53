"""All experts for every token: the router's weights, scattered over the experts, are zero where it did not choose."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_moe.base import Form, case
from zoo_moe.formats import PAIRS, PAIRS_KN
from zoo_moe.routers import Routing, renormalised, softmax_topk

# -- weights over all experts ------------------------------------------------------------------------------------------


def scattered(m: Any, ids: Tensor, weights: Tensor) -> Tensor:
    """[T, E]; right because top-k chooses no expert twice."""
    return torch.zeros(ids.shape[0], m.E, dtype=weights.dtype).scatter_(1, ids, weights)


def scatter_added(m: Any, ids: Tensor, weights: Tensor) -> Tensor:
    return weights.new_zeros(ids.shape[0], m.E).scatter_add(1, ids, weights)


def one_hot(m: Any, ids: Tensor, weights: Tensor) -> Tensor:
    return (F.one_hot(ids, m.E) * weights.unsqueeze(-1)).sum(dim=1)


def one_hot_einsum(m: Any, ids: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("tke,tk->te", F.one_hot(ids, m.E).to(weights.dtype), weights)


# -- batches over experts ----------------------------------------------------------------------------------------------


def llama4(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """x is repeated for every expert, and weighted: with zero where the router did not choose."""
    scores = torch.full((x.shape[0], m.E), float("-inf"), dtype=x.dtype).scatter_(1, ids, weights)
    scores = torch.sigmoid(scores.float()).to(x.dtype)
    rows = x.repeat(m.E, 1) * scores.transpose(0, 1).reshape(-1, 1)
    h = m.mlp(lambda name: torch.bmm(rows.view(m.E, -1, m.H), m.kn(name)))
    y = torch.bmm(h, m.kn("w2")).view(-1, m.H)
    return y.reshape(m.E, -1, m.H).sum(dim=0)


def raw_topk(m: Any, x: Tensor) -> Routing:
    values, ids = torch.topk(F.linear(x, m.router), m.k, dim=1)
    return ids, values


def weighted_input(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    scores = scatter_added(m, ids, weights).to(x.dtype)
    rows = x.unsqueeze(0) * scores.t().unsqueeze(-1)
    h = m.mlp(lambda name: rows @ m.kn(name))
    return (h @ m.kn("w2")).sum(0)


def einsum(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    scores = scattered(m, ids, weights)
    h = m.mlp(lambda name: m.biased(name, torch.einsum("th,ehi->tei", x, m.kn(name))))
    y = m.biased("w2", torch.einsum("tei,eih->teh", h, m.kn("w2")))
    return torch.einsum("teh,te->th", y, scores.to(y.dtype))


def bmm_expanded(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """gpt-oss, when it does not train."""
    rows = x.unsqueeze(0).expand(m.E, -1, -1)

    def project(name: str, rows: Tensor) -> Tensor:
        return m.biased(name, torch.bmm(rows, m.kn(name)), torch.arange(m.E).unsqueeze(1))

    y = project("w2", m.mlp(lambda name: project(name, rows)))
    scores = one_hot(m, ids, weights).transpose(0, 1)
    return (y * scores.unsqueeze(-1)).sum(dim=0).to(x.dtype)


def matmul_broadcast(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    h = m.mlp(lambda name: torch.matmul(x, m.nk(name).mT))
    y = torch.matmul(h, m.nk("w2").mT)
    return torch.einsum("eth,te->th", y, one_hot_einsum(m, ids, weights).to(y.dtype))


def gathered_after(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Every expert's result, of which the chosen ones are picked."""
    h = m.mlp(lambda name: torch.einsum("th,eih->tei", x, m.nk(name)))
    y = torch.einsum("tei,ehi->teh", h, m.nk("w2"))
    y = y.gather(1, ids.unsqueeze(-1).expand(-1, -1, m.H))
    return (y * weights.unsqueeze(-1)).sum(1).to(x.dtype)


# -- loops over experts ------------------------------------------------------------------------------------------------


def expert(m: Any, x: Tensor, e: int) -> Tensor:
    """One of the 3-D weights."""
    h = m.mlp(lambda name: F.linear(x, m.nk(name)[e]))
    return F.linear(h, m.nk("w2")[e])


def loop(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    scores = scattered(m, ids, weights)
    out = torch.zeros_like(x)
    for e in range(m.E):
        out = out + (expert(m, x, e) * scores[:, e : e + 1]).to(x.dtype)
    return out


def loop_dequantised_once(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    all_of = {name: m.nk(name).unbind(0) for name in m.fields}
    out = None
    for e in range(m.E):
        h = m.mlp(lambda name, e=e: x @ all_of[name][e].t())
        y = (h @ all_of["w2"][e].t()) * torch.where(ids == e, weights, 0).sum(dim=-1, keepdim=True)
        out = y if out is None else out + y
    return out.to(x.dtype)


def loop_stacked(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    y = torch.stack([expert(m, x, e) for e in range(m.E)], dim=1)
    return torch.bmm(one_hot(m, ids, weights).unsqueeze(1).to(y.dtype), y).squeeze(1)


def loop_of_modules(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Every expert is a module with tensors of its own, as in a checkpoint."""
    scores = scattered(m, ids, weights.to(x.dtype))
    out = torch.zeros_like(x)
    for e, of_expert in enumerate(m.experts):
        h = m.mlp(lambda name, of_expert=of_expert: of_expert.biased(name, F.linear(x, of_expert.nk(name))))
        y = of_expert.biased("w2", F.linear(h, of_expert.nk("w2")))
        out += y * scores[:, e, None]
    return out


def loop_of_masks(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, of_expert in enumerate(m.experts):
        h = m.mlp(lambda name, of_expert=of_expert: F.linear(x, of_expert.nk(name)))
        of_token = ((ids == e) * weights).sum(dim=1, keepdim=True)
        out = torch.add(out, (F.linear(h, of_expert.nk("w2")) * of_token).to(x.dtype))
    return out


BATCHES: dict[str, Form] = {
    "einsum": einsum,
    "bmm, x expanded": bmm_expanded,
    "matmul, broadcast": matmul_broadcast,
    "the chosen gathered after": gathered_after,
}
LOOPS: dict[str, Form] = {
    "W[e]": loop,
    "dequantised once, unbound": loop_dequantised_once,
    "stacked": loop_stacked,
}
for name, form in BATCHES.items():
    case(f"dense, {name}", form, route=softmax_topk, format=PAIRS_KN if form is bmm_expanded else PAIRS)
for format in (PAIRS, PAIRS_KN):
    case(
        f"dense, llama4, {format.name}",
        llama4,
        route=raw_topk,
        exact_weights=lambda v: torch.sigmoid(v.float()).to(v.dtype),
        on_input=True,
        k=1 if format is PAIRS else 2,
        format=format,
        core=format is PAIRS_KN,
    )
case("dense, weighted input, scores by scatter_add", weighted_input, route=renormalised, on_input=True, format=PAIRS_KN)
case("dense, einsum, biases", einsum, route=renormalised, bias=True)
for name, form in LOOPS.items():
    case(f"dense loop, {name}", form, route=softmax_topk, E=4, core=name == "W[e]")
case("dense loop, modules", loop_of_modules, route=softmax_topk, E=4, separate=True, core=True)
case("dense loop, modules, biases", loop_of_modules, route=softmax_topk, E=4, separate=True, bias=True)
case("dense loop, modules, masks, ids are inputs", loop_of_masks, E=5, k=3, separate=True)
