"""Every token's own weights, W[ids], and a batched matmul: what is written for decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo_moe.base import Form, case, either


def chosen(m: Any, name: str, ids: Tensor) -> Tensor:
    """[*, N, K], of weights that were all dequantised."""
    return m.nk(name)[ids]


def summed(m: Any, y: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """The tail of transformers: rows [T*k, H], weighted, summed over k."""
    y = y * weights.reshape(-1).unsqueeze(-1)
    return y.view(x.shape[0], m.k, m.H).sum(dim=1).to(x.dtype)


def by_rows(repeat: Callable[[Tensor, int], Tensor], linear: Callable[[Any, str, Tensor, Tensor], Tensor]) -> Form:
    """x repeated to [T*k, H]; linear(m, name, rows, ids [T*k])."""

    def form(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        rows = repeat(x, m.k)
        h = m.mlp(lambda name: m.biased(name, linear(m, name, rows, flat), flat))
        return summed(m, m.biased("w2", linear(m, "w2", h, flat), flat), weights, x)

    return form


def repeated(x: Tensor, k: int) -> Tensor:
    return x.repeat_interleave(k, dim=0)


def expanded(x: Tensor, k: int) -> Tensor:
    return x.unsqueeze(1).expand(-1, k, -1).reshape(-1, x.shape[-1])


def indexed(x: Tensor, k: int) -> Tensor:
    return x[torch.arange(x.shape[0]).unsqueeze(1).expand(-1, k).reshape(-1)]


def column(m: Any, name: str, rows: Tensor, ids: Tensor) -> Tensor:
    return torch.bmm(chosen(m, name, ids), rows.unsqueeze(-1)).squeeze(-1)


def column_of_packed(m: Any, name: str, rows: Tensor, ids: Tensor) -> Tensor:
    return torch.bmm(m.nk(name, ids), rows.unsqueeze(-1)).squeeze(-1)


def row(m: Any, name: str, rows: Tensor, ids: Tensor) -> Tensor:
    return torch.bmm(rows.unsqueeze(1), m.kn(name)[ids]).squeeze(1)


def row_matmul(m: Any, name: str, rows: Tensor, ids: Tensor) -> Tensor:
    return (rows[:, None, :] @ m.nk(name).index_select(0, ids).mT)[:, 0]


def baddbmm(m: Any, name: str, rows: Tensor, ids: Tensor) -> Tensor:
    weight = m.nk(name)[ids]
    zero = torch.zeros(1, 1, 1, dtype=rows.dtype)
    return torch.baddbmm(zero, weight, rows.unsqueeze(-1)).squeeze(-1)


def einsum_rows(m: Any, name: str, rows: Tensor, ids: Tensor) -> Tensor:
    return torch.einsum("sk,snk->sn", rows, m.nk(name, ids))


columns = by_rows(repeated, column)
columns_of_packed = by_rows(repeated, column_of_packed)


def gpt_fast(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    h = m.mlp(lambda name: m.biased(name, torch.einsum("ti,taoi->tao", x, m.nk(name)[ids]), ids))
    y = m.biased("w2", torch.einsum("tao,taio->tai", h, m.nk("w2")[ids]), ids)
    return torch.einsum("tai,ta->ti", y, weights.to(y.dtype))


def gpt_fast_of_packed(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    h = m.mlp(lambda name: torch.einsum("ti, taoi -> tao", x, m.nk(name, ids)))
    y = torch.einsum("tao, taio -> tai", h, m.nk("w2", ids))
    return torch.einsum("tai,ta -> ti", y, weights.to(y.dtype))


def einsum_kn(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The letters and operands the other way round, as gpt-oss has them."""
    h = m.mlp(lambda name: torch.einsum("beck,bk->bec", m.nk(name)[ids], x))
    y = torch.einsum("beck,bek->bec", m.nk("w2")[ids], h)
    return torch.einsum("bec,be->bc", y, weights.to(y.dtype))


def matmul_columns(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    h = m.mlp(lambda name: (m.nk(name)[ids] @ x[:, None, :, None]).squeeze(-1))
    y = torch.matmul(m.nk("w2")[ids], h.unsqueeze(-1)).squeeze(-1)
    return (y * weights.unsqueeze(-1)).sum(dim=-2).to(x.dtype)


def matmul_rows(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    rows = x.unsqueeze(1).unsqueeze(1)
    h = m.mlp(lambda name: torch.matmul(rows, m.kn(name)[ids]).squeeze(-2))
    y = torch.matmul(h.unsqueeze(-2), m.kn("w2")[ids]).squeeze(-2)
    return torch.matmul(weights.unsqueeze(-2).to(y.dtype), y).squeeze(-2)


def weighted_input(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The router's weight on the input, as llama4 has it."""
    rows = (repeated(x, m.k) * weights.reshape(-1, 1)).to(x.dtype)
    flat = ids.reshape(-1)
    h = m.mlp(lambda name: m.biased(name, column(m, name, rows, flat), flat))
    return m.biased("w2", column(m, "w2", h, flat), flat).view(-1, m.k, m.H).sum(1)


def top_1(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """ids and weights [T], without k."""
    h = m.mlp(lambda name: column(m, name, x, ids))
    return (column(m, "w2", h, ids) * weights[:, None]).to(x.dtype)


def slot_by_slot(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for j in range(m.k):
        of_slot = ids[:, j]
        h = m.mlp(lambda name, chosen=of_slot: column_of_packed(m, name, x, chosen))
        out = out + (column_of_packed(m, "w2", h, of_slot) * weights[:, j : j + 1]).to(x.dtype)
    return out


def multiplied_and_summed(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    h = m.mlp(lambda name: (m.nk(name, ids) * x[:, None, None, :]).sum(-1))
    y = (m.nk("w2", ids) * h.unsqueeze(-2)).sum(-1)
    return (y * weights.unsqueeze(-1)).sum(1).to(x.dtype)


case("gather, bmm, as transformers", columns, core=True)
case("gather packed, bmm", columns_of_packed, core=True)
case("gather, bmm, x expanded", by_rows(expanded, column))
case("gather, bmm, x indexed, rows from the left", by_rows(indexed, row))
case("gather, index_select and @", by_rows(repeated, row_matmul))
case("gather, baddbmm", by_rows(expanded, baddbmm))
case("gather packed, einsum over rows", by_rows(repeated, einsum_rows))
case("gather, einsum, as gpt-fast", gpt_fast, core=True)
case("gather packed, einsum, as gpt-fast", gpt_fast_of_packed)
case("gather, einsum, as gpt-oss", einsum_kn)
case("gather, matmul, weight from the left", matmul_columns)
case("gather, matmul, weight from the right", matmul_rows)
case("gather, weighted input", weighted_input, on_input=True)
case("gather, weighted input, biases", weighted_input, on_input=True, bias=True)
case("gather, biases", columns, bias=True)
case("gather, einsum, biases", gpt_fast, bias=True)
case("gather, top-1", columns, k=1)
case("gather, 3 of 6 experts, groups of 16", columns, E=6, k=3, I=48, group=16)
case("gather, 5 of 5 experts", gpt_fast, E=5, k=5, I=16, group=16)
case("gather packed, 2 of 40 experts", columns_of_packed, E=40, I=16, group=16)
case("gather, x is [B, S, H]", columns, batched=True)
either("gather, slot by slot", slot_by_slot)
either("gather, multiplied and summed", multiplied_and_summed)
