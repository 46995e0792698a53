"""torch._grouped_mm: tokens sorted by expert, a matmul for each run of them, and back into their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_moe.base import BF16, Form, case

Offsets = Callable[[Tensor, Tensor, int], Tensor]
"""(ids [S], sorted ids [S], E) -> int32 [E]: where each expert's run ends."""
Back = Callable[[Tensor, Tensor], Tensor]
"""(rows [S, H] sorted by expert, perm [S]) -> the rows as they were before sorting."""
Finish = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(module, x [T, H], rows [S, H] sorted by expert, perm [S], weights [T, k]) -> [T, H]."""

# -- where the runs end ------------------------------------------------------------------------------------------------


def histc(ids: Tensor, ordered: Tensor, E: int) -> Tensor:
    return torch.cumsum(torch.histc(ordered.float(), bins=E, min=0, max=E - 1), dim=0, dtype=torch.int32)


def bincount(ids: Tensor, ordered: Tensor, E: int) -> Tensor:
    """By hand: Dynamo holds no torch.bincount in a graph by default."""
    counts = torch.zeros(E, dtype=torch.int64).scatter_add(0, ids.long(), torch.ones_like(ids, dtype=torch.int64))
    return counts.cumsum(0).to(torch.int32)


def one_hot(ids: Tensor, ordered: Tensor, E: int) -> Tensor:
    return F.one_hot(ids, E).sum(dim=0).cumsum(dim=0).int()


def searchsorted(ids: Tensor, ordered: Tensor, E: int) -> Tensor:
    return torch.searchsorted(ordered, torch.arange(E), right=True).to(torch.int32)


def compared(ids: Tensor, ordered: Tensor, E: int) -> Tensor:
    return (ids.unsqueeze(0) <= torch.arange(E).unsqueeze(1)).sum(dim=1, dtype=torch.int32)


def counted(ids: Tensor, ordered: Tensor, E: int) -> Tensor:
    return torch.zeros(E, dtype=torch.int64).scatter_add_(0, ids, torch.ones_like(ids)).cumsum(0).to(torch.int32)


# -- sorting, and back -------------------------------------------------------------------------------------------------


def by_sort(ids: Tensor) -> tuple[Tensor, Tensor]:
    ordered, perm = torch.sort(ids)
    return ordered, perm


def by_argsort(ids: Tensor) -> tuple[Tensor, Tensor]:
    perm = torch.argsort(ids, stable=True)
    return ids[perm], perm


def by_sort_of_int32(ids: Tensor) -> tuple[Tensor, Tensor]:
    ordered, perm = ids.to(torch.int32).sort(dim=0, stable=True)
    return ordered, perm


def inverse_set(rows: Tensor, perm: Tensor) -> Tensor:
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.size(0))
    return rows[inverse]


def inverse_argsort(rows: Tensor, perm: Tensor) -> Tensor:
    return rows[torch.argsort(perm)]


def inverse_scattered(rows: Tensor, perm: Tensor) -> Tensor:
    inverse = torch.empty_like(perm).scatter_(0, perm, torch.arange(perm.shape[0], dtype=perm.dtype))
    return rows.index_select(0, inverse)


def rows_set(rows: Tensor, perm: Tensor) -> Tensor:
    out = torch.empty_like(rows)
    out[perm] = rows
    return out


def rows_copied(rows: Tensor, perm: Tensor) -> Tensor:
    return torch.zeros_like(rows).index_copy(0, perm, rows)


def rows_scattered(rows: Tensor, perm: Tensor) -> Tensor:
    return torch.zeros_like(rows).scatter(0, perm.unsqueeze(-1).expand_as(rows), rows)


# -- weighting and summing ---------------------------------------------------------------------------------------------


def weighted_then(back: Back) -> Finish:
    def finish(m: Any, x: Tensor, rows: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
        rows = back(rows * weights.reshape(-1)[perm].unsqueeze(-1), perm)
        return rows.view(x.shape[0], m.k, m.H).sum(dim=1).to(x.dtype)

    return finish


def then_weighted(back: Back) -> Finish:
    def finish(m: Any, x: Tensor, rows: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
        rows = back(rows, perm).view(*weights.shape, -1)
        return (rows * weights[:, :, None]).sum(1).to(x.dtype)

    return finish


def then_weighted_by_einsum(m: Any, x: Tensor, rows: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    rows = inverse_argsort(rows, perm).reshape(-1, m.k, m.H)
    return torch.einsum("tkh,tk->th", rows, weights.to(rows.dtype))


def then_weighted_by_bmm(m: Any, x: Tensor, rows: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    """As torchtitan's later versions do: in float32."""
    rows = rows_copied(rows, perm).view(-1, m.k, m.H)
    return torch.bmm(weights.float().unsqueeze(1), rows.float()).squeeze(1).to(x.dtype)


def index_added(m: Any, x: Tensor, rows: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    rows = rows.float() * weights.flatten()[perm, None]
    out = torch.zeros(x.shape, dtype=torch.float32)
    out.index_add_(0, perm // m.k, rows)
    return out.to(x.dtype)


def scatter_added(m: Any, x: Tensor, rows: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    rows = rows * weights.view(-1, 1).gather(0, perm[:, None])
    tokens = (perm // m.k).unsqueeze(-1).expand(-1, m.H)
    return torch.zeros_like(x).scatter_add(0, tokens, rows.to(x.dtype))


# -- the form ----------------------------------------------------------------------------------------------------------


def tokens_of(perm: Tensor, k: int) -> Tensor:
    return perm // k


def tokens_divided(perm: Tensor, k: int) -> Tensor:
    return torch.div(perm, k, rounding_mode="floor")


def tokens_listed(perm: Tensor, k: int) -> Tensor:
    return torch.arange(perm.shape[0] // k).repeat_interleave(k)[perm]


def grouped(
    offsets: Offsets,
    finish: Finish,
    sort: Callable[[Tensor], tuple[Tensor, Tensor]] = by_sort,
    tokens: Callable[[Tensor, int], Tensor] = tokens_of,
    mm: Any = torch._grouped_mm,
) -> Form:
    def form(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        ordered, perm = sort(flat)
        ends = offsets(flat, ordered, m.E)
        rows = x[tokens(perm, m.k)]

        def project(name: str, rows: Tensor) -> Tensor:
            return m.biased(name, mm(rows, m.kn(name), offs=ends), ordered)

        rows = project("w2", m.mlp(lambda name: project(name, rows)))
        return finish(m, x, rows, perm, weights)

    return form


def weighted_first(m: Any, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """torchtitan: the router's weight on the input, the results added into ``out``."""
    flat = ids.view(-1)
    counts = torch.histc(flat.float(), bins=m.E, min=0, max=m.E)
    perm = torch.argsort(flat, stable=True)
    tokens = perm // m.k
    rows = (x[tokens].float() * weights.view(-1)[perm].reshape(-1, 1)).to(x.dtype)
    ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
    h = m.mlp(lambda name: torch._grouped_mm(rows, m.nk(name).transpose(-2, -1), offs=ends))
    rows = torch._grouped_mm(h, m.nk("w2").transpose(-2, -1), offs=ends).type_as(x)
    return out.scatter_add(0, tokens.reshape(-1, 1).expand(-1, m.H), rows)


def torchtitan(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return weighted_first(m, x, ids, weights, torch.zeros_like(x))


def torchtitan_into_shared(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return weighted_first(m, x, ids, weights, m.shared(x))


def gathered_by_expanding(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The rows are repeated before they are sorted, and w is multiplied in between."""
    flat = ids.flatten()
    perm = flat.argsort(stable=True)
    rows = x.unsqueeze(1).expand(-1, m.k, -1).reshape(-1, m.H)[perm]
    ends = bincount(flat, flat, m.E)
    h = m.mlp(lambda name: F.grouped_mm(rows, m.kn(name), offs=ends))
    rows = F.grouped_mm(h, m.kn("w2"), offs=ends)
    return then_weighted(rows_set)(m, x, rows, perm, weights)


weighted_and_back = weighted_then(inverse_set)
transformers = grouped(histc, weighted_and_back)


def elsewhere_masked(elsewhere: Callable[[Any, Tensor, Tensor], Tensor]) -> Form:
    """transformers 5.17 masks the tokens of experts that are on another device, of which there are none here."""

    def form(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        ordered, perm = torch.sort(ids.reshape(-1))
        rows = x[perm // m.k]
        offs = histc(ordered, ordered, m.E)
        mask = elsewhere(m, ordered, perm).unsqueeze(-1)
        ordered.clamp_(max=m.E - 1)
        rows.masked_fill_(mask, 0.0)
        h = m.mlp(lambda name: torch._grouped_mm(rows, m.kn(name), offs=offs).masked_fill(mask, 0.0))
        rows = torch._grouped_mm(h, m.kn("w2"), offs=offs).masked_fill(mask, 0.0)
        return weighted_and_back(m, x, rows, perm, weights)

    return form


def elsewhere_masked_by_keywords(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    ordered, perm = torch.sort(input=ids.reshape(-1))
    rows = x[perm // m.k]
    offs = histc(ordered, ordered, m.E)
    mask = torch.unsqueeze(input=ordered >= m.E, dim=-1)
    h = m.mlp(lambda name: torch._grouped_mm(rows, m.kn(name), offs=offs).masked_fill(mask=mask, value=0.0))
    rows = torch.masked_fill(input=torch._grouped_mm(h, m.kn("w2"), offs=offs), mask=mask, value=0.0)
    return weighted_and_back(m, x, rows, perm, weights)


F_GROUPED_MM = F.grouped_mm

SPELLINGS: dict[str, Form] = {
    "as transformers": transformers,
    "F.grouped_mm, bincount, argsort of perm": grouped(
        bincount, weighted_then(inverse_argsort), by_argsort, mm=F_GROUPED_MM
    ),
    "one_hot.sum, a scattered inverse, weighted after": grouped(one_hot, then_weighted(inverse_scattered), by_argsort),
    "searchsorted, rows set": grouped(searchsorted, weighted_then(rows_set), tokens=tokens_divided),
    "offsets by comparing, rows copied": grouped(compared, then_weighted(rows_copied), tokens=tokens_listed),
    "offsets by scatter_add, rows scattered": grouped(counted, weighted_then(rows_scattered)),
    "ids sorted as int32": grouped(one_hot, weighted_then(inverse_argsort), by_sort_of_int32),
    "weighted by einsum": grouped(histc, then_weighted_by_einsum),
    "weighted by bmm in float32": grouped(bincount, then_weighted_by_bmm, by_argsort),
    "index_add_ in float32": grouped(histc, index_added),
    "scatter_add": grouped(searchsorted, scatter_added, mm=F_GROUPED_MM),
    "x repeated before it is sorted": gathered_by_expanding,
    "tokens of experts elsewhere masked": elsewhere_masked(lambda m, ordered, perm: ordered >= m.E),
    "tokens of experts elsewhere masked, by keywords": elsewhere_masked_by_keywords,
    "tokens of experts elsewhere masked, as int32": elsewhere_masked(lambda m, ordered, perm: ordered.int() > m.E - 1),
}

for name, form in SPELLINGS.items():
    case(f"grouped_mm, {name}", form, dtypes=BF16, core=name in ("as transformers", "index_add_ in float32"))
case("grouped_mm, torchtitan: weighted before", torchtitan, dtypes=BF16, on_input=True, core=True)
case(
    "grouped_mm, torchtitan: into the shared expert's result",
    torchtitan_into_shared,
    dtypes=BF16,
    on_input=True,
    exact_around=lambda m, x, y: y + m.shared(x),
)
case("grouped_mm, top-1", transformers, dtypes=BF16, k=1)
case("grouped_mm, 3 of 6 experts, groups of 16", transformers, dtypes=BF16, E=6, k=3, I=48, group=16)
case("grouped_mm, every expert", grouped(bincount, scatter_added), dtypes=BF16, E=3, k=3)
case("grouped_mm, with biases", transformers, dtypes=BF16, bias=True)
case("grouped_mm, x is [B, S, H]", transformers, dtypes=BF16, batched=True)
