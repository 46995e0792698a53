"""Routed experts with one thing off: a rewrite would give another result, or compute twice what stays in the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_moe.base import BF16, Form, miss
from zoo_moe.formats import INT8, PAIRS
from zoo_moe.grouped import (
    by_sort,
    elsewhere_masked,
    histc,
    index_added,
    inverse_set,
    one_hot,
    tokens_of,
    transformers,
    weighted_and_back,
    weighted_then,
)

# -- grouped_mm --------------------------------------------------------------------------------------------------------


def grouped(
    *,
    sort: Any = by_sort,
    ends: Any = lambda m, ids, ordered: histc(ids, ordered, m.E),
    down_ends: Any = None,
    tokens: Any = lambda perm, k, T: tokens_of(perm, k),
    weight: Any = lambda m, name: m.kn(name),
    after: Any = lambda m, rows, ordered: rows,
    finish: Any = weighted_and_back,
) -> Form:
    """transformers' spelling, but for what is given."""

    def form(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        ordered, perm = sort(flat)
        offs = ends(m, flat, ordered)
        rows = x[tokens(perm, m.k, x.shape[0])]
        h = m.mlp(lambda name: torch._grouped_mm(rows, weight(m, name), offs=offs))
        offs = offs if down_ends is None else down_ends(m, flat, ordered)
        rows = after(m, torch._grouped_mm(h, weight(m, "w2"), offs=offs), ordered)
        return finish(m, x, rows, perm, weights)

    return form


def four_more(ordered: Tensor) -> Tensor:
    """What is compared is written to after its name was."""
    ids = ordered.clone()
    ids.add_(4)
    return ids


def off_by_one(m: Any, ids: Tensor, ordered: Tensor) -> Tensor:
    return (histc(ids, ordered, m.E) + 1).clamp(max=ids.shape[0])


def of_others(m: Any, ids: Tensor, ordered: Tensor) -> Tensor:
    return one_hot(m.E - 1 - ids, ordered, m.E)


def weights_as_they_come(m: Any, x: Tensor, rows: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    """The rows are sorted, the weights are not."""
    return inverse_set(rows * weights.reshape(-1, 1), perm).view(-1, m.k, m.H).sum(1)


def set_in_place_of_added(m: Any, x: Tensor, rows: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    rows = rows * weights.reshape(-1)[perm].unsqueeze(-1)
    return torch.zeros_like(x).index_copy(0, perm // m.k, rows)


def the_largest(m: Any, x: Tensor, rows: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    rows = rows * weights.reshape(-1)[perm].unsqueeze(-1)
    tokens = (perm // m.k).unsqueeze(-1).expand(-1, m.H)
    return torch.zeros_like(x).scatter_reduce(0, tokens, rows, "amax", include_self=False)


def added_to_other_tokens(m: Any, x: Tensor, rows: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    rows = rows * weights.reshape(-1)[perm].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, perm % x.shape[0], rows)


def own_bias(m: Any, rows: Tensor, ordered: Tensor) -> Tensor:
    """Of the expert behind."""
    return rows + m.w2_bias[(ordered + 1) % m.E]


def transposed_square(m: Any, name: str) -> Tensor:
    """w13 is square, and read with its rows for its columns: its groups are not along K."""
    return m.nk(name) if name == "w13" else m.kn(name)


GROUPED: dict[str, Form] = {
    "perm in place of its inverse": grouped(finish=weighted_then(lambda rows, perm: rows[perm])),
    "not put back": grouped(finish=weighted_then(lambda rows, perm: rows)),
    "offsets off by one": grouped(ends=off_by_one),
    "offsets of other ids": grouped(ends=of_others),
    "the second's offsets of other ids": grouped(down_ends=of_others),
    "not sorted": grouped(sort=lambda ids: (ids, torch.arange(ids.shape[0]))),
    "sorted downwards": grouped(sort=lambda ids: torch.sort(ids, descending=True)),
    "tokens perm % k": grouped(tokens=lambda perm, k, T: perm % k),
    "tokens perm % T": grouped(tokens=lambda perm, k, T: perm % T),
    "tokens perm // (k + 1)": grouped(tokens=lambda perm, k, T: perm // (k + 1)),
    "weights as they come": grouped(finish=weights_as_they_come),
    "set in place of added": grouped(finish=set_in_place_of_added),
    "the largest of k": grouped(finish=the_largest),
    "added to other tokens": grouped(finish=added_to_other_tokens),
    "w13 transposed": grouped(weight=transposed_square),
}
for name, form in GROUPED.items():
    core = name in ("perm in place of its inverse", "offsets off by one")
    miss(f"miss: grouped_mm, {name}", form, dtypes=BF16, core=core)
MASKED: dict[str, Form] = {
    "some experts' tokens": elsewhere_masked(lambda m, ordered, perm: ordered >= m.E // 2),
    "tokens from the 8th on": elsewhere_masked(lambda m, ordered, perm: perm >= m.E),
    "some experts' tokens, counted from 4": elsewhere_masked(lambda m, ordered, perm: ordered.clone().add_(4) >= m.E),
    "some experts' tokens, by a write": elsewhere_masked(lambda m, ordered, perm: four_more(ordered) >= m.E),
}
for name, form in MASKED.items():
    miss(f"miss: grouped_mm, masked: {name}", form, dtypes=BF16)
miss("miss: grouped_mm, biases of other experts", grouped(after=own_bias), dtypes=BF16, bias=True)

# -- gather ------------------------------------------------------------------------------------------------------------


def gathered(
    *,
    x_of: Any = lambda m, x, name: x,
    ids_of: Any = lambda m, ids, name: ids,
    weight: Any = lambda m, x, name: m.nk(name),
    h_of: Any = lambda m, h: h,
    y_of: Any = lambda m, y, x, ids: y,
    combine: Any = lambda m, y, weights, x: (y * weights.unsqueeze(-1)).sum(dim=1),
) -> Form:
    """W[ids] @ x, but for what is given: rows h [T, k, I] and y [T, k, H]."""

    def form(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        def project(name: str, rows: Tensor) -> Tensor:
            chosen = ids_of(m, ids, name)
            y = torch.matmul(weight(m, x, name)[chosen], rows.unsqueeze(-1)).squeeze(-1)
            return m.biased(name, y, chosen)

        h = m.mlp(lambda name: project(name, x_of(m, x, name).unsqueeze(1)))
        return combine(m, y_of(m, project("w2", h_of(m, h)), x, ids), weights, x)

    return form


def only(of: str, change: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor, str], Tensor]:
    """Changes what the weight of this name sees."""
    return lambda m, value, name: change(m, value) if name == of else value


def wrong_axis(m: Any, y: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    return (y * weights.unsqueeze(-1)).reshape(m.k, -1, m.H).sum(dim=0)


def rms(m: Any, y: Tensor, *others: Tensor) -> Tensor:
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)


def signs_in_turn(m: Any, y: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    y = y * weights.unsqueeze(-1)
    return y[:, 0] - y[:, 1]


def with_noise(m: Any, y: Tensor, *others: Tensor) -> Tensor:
    return y + 1e-3 * torch.randn_like(y)


def one_column_set(m: Any, h: Tensor) -> Tensor:
    h[..., 3] = 0
    return h


def fake_int8(m: Any, h: Tensor) -> Tensor:
    return torch.round(h * 4).clamp(-128, 127).to(torch.int8).to(h.dtype) / 4


def fake_float8(m: Any, h: Tensor) -> Tensor:
    return h.to(torch.float8_e4m3fn).to(h.dtype)


def times_an_activation(m: Any, x: Tensor, name: str) -> Tensor:
    """A scale of every expert that depends on x."""
    return m.nk(name) * torch.sigmoid(x.mean(0) @ m.router.T)[:, None, None]


def x_written_to(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Under another name, after w13 has read it."""
    x = x * 1.5
    other = x.to(x.dtype)

    def write(m: Any, h: Tensor) -> Tensor:
        other.add_(1)
        return h

    return gathered(h_of=write)(m, x, ids, weights)


def weights_written_to(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    weights = weights / weights.sum(-1, keepdim=True)
    other = weights.contiguous()

    def write(m: Any, y: Tensor, weights: Tensor, x: Tensor) -> Tensor:
        y = y * weights.unsqueeze(-1)
        other.mul_(2)
        return y.sum(1)

    return gathered(combine=write)(m, x, ids, weights)


GATHERED: dict[str, Form] = {
    "x written to under another name": x_written_to,
    "weights written to under another name": weights_written_to,
    "weight applied twice": gathered(combine=lambda m, y, w, x: (y * w.unsqueeze(-1) * w.unsqueeze(-1)).sum(1)),
    "not weighted": gathered(combine=lambda m, y, w, x: y.sum(1) + 0 * w.sum()),
    "summed over the wrong axis": gathered(combine=wrong_axis),
    "the largest of k": gathered(combine=lambda m, y, w, x: (y * w.unsqueeze(-1)).amax(1)),
    "the product of k": gathered(combine=lambda m, y, w, x: (y * w.unsqueeze(-1)).prod(1)),
    "signs in turn": gathered(combine=signs_in_turn),
    "softmax over k": gathered(y_of=lambda m, y, x, ids: y.softmax(1)),
    "softmax over H": gathered(y_of=lambda m, y, x, ids: y.softmax(-1)),
    "rms norm before the sum": gathered(y_of=rms),
    "layer norm before the sum": gathered(y_of=lambda m, y, x, ids: F.layer_norm(y, (m.H,))),
    "rms norm of act(h)": gathered(h_of=rms),
    "residual inside the sum": gathered(y_of=lambda m, y, x, ids: y + x.unsqueeze(1)),
    "y times x": gathered(y_of=lambda m, y, x, ids: y * x.unsqueeze(1)),
    "y rolled": gathered(y_of=lambda m, y, x, ids: y.roll(1, -1)),
    "act(h) flipped": gathered(h_of=lambda m, h: h.flip(-1)),
    "act(h) cumulated": gathered(h_of=lambda m, h: h.cumsum(-1)),
    "act(h) rolled over k": gathered(h_of=lambda m, h: h.roll(1, 1)),
    "one column of act(h) set": gathered(h_of=one_column_set),
    "act(h) through int8": gathered(h_of=fake_int8),
    "act(h) through float8": gathered(h_of=fake_float8),
    "act(h) rounded": gathered(h_of=lambda m, h: torch.round(h * 4) / 4),
    "ids shifted for w2": gathered(ids_of=only("w2", lambda m, ids: (ids + 1) % m.E)),
    "ids shifted for w13": gathered(ids_of=only("w13", lambda m, ids: (ids + 1) % m.E)),
    "slots swapped for w2": gathered(ids_of=only("w2", lambda m, ids: ids.flip(-1))),
    "ids of other tokens for w2": gathered(ids_of=only("w2", lambda m, ids: ids.roll(1, 0))),
    "w2 of expert 0": gathered(ids_of=only("w2", lambda m, ids: torch.zeros_like(ids))),
    "w13 transposed": gathered(weight=lambda m, x, name: m.kn(name) if name == "w13" else m.nk(name)),
    "w2 averaged over experts": gathered(
        weight=lambda m, x, name: m.nk(name) if name == "w13" else m.nk(name).mean(0).expand(m.E, -1, -1)
    ),
    "weights times an activation": gathered(weight=times_an_activation),
    "weights with softmax": gathered(weight=lambda m, x, name: m.nk(name).softmax(-1)),
}
for name, form in GATHERED.items():
    miss(f"miss: gather, {name}", form, core=name in ("weight applied twice", "ids shifted for w2"))
miss("miss: gather, noise", gathered(y_of=with_noise), differs=False)
miss(
    "miss: gather, dropout",
    gathered(y_of=lambda m, y, x, ids: F.dropout(y, 0.5, training=m.training)),
    core=True,
)

# -- others need what would be fused -----------------------------------------------------------------------------------


def second_user(pick: Callable[[Any, Tensor, Tensor], Tensor], of: str) -> Form:
    """Returns an intermediate as well."""

    def form(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        seen = {}

        def keep(name: str, value: Tensor) -> Tensor:
            seen[name] = value
            return value

        spelled = gathered(
            weight=lambda m, x, name: keep(name, m.nk(name)),
            h_of=lambda m, h: keep("h", h),
            y_of=lambda m, y, x, ids: keep("y", y),
        )
        out = spelled(m, x, ids, weights)
        return out, pick(m, seen[of], ids)

    return form


def sorted_rows_too(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
    flat = ids.reshape(-1)
    ordered, perm = by_sort(flat)
    rows = x[perm // m.k]
    ends = histc(flat, ordered, m.E)
    h = m.mlp(lambda name: torch._grouped_mm(rows, m.kn(name), offs=ends))
    y = torch._grouped_mm(h, m.kn("w2"), offs=ends)
    return index_added(m, x, y, perm, weights), y


miss("miss: second user, the sorted result", sorted_rows_too, dtypes=BF16, differs=False)
miss("miss: second user, act(h)", second_user(lambda m, h, ids: h, "h"), differs=False, core=True)
miss("miss: second user, y", second_user(lambda m, y, ids: y.abs().mean(), "y"), differs=False)
miss("miss: second user, the weights", second_user(lambda m, w, ids: w.square().mean((1, 2)), "w2"), differs=False)
miss("miss: second user, the chosen weights", second_user(lambda m, w, ids: w[ids][..., 0], "w13"), differs=False)

# -- the stored tensors ------------------------------------------------------------------------------------------------


def trained(m: Any) -> None:
    m.w2_scale = nn.Parameter(m.w2_scale)


def beyond_4_bits(m: Any) -> None:
    m.w13_codes[5, 2, 3] = 9


def masked(m: Any) -> None:
    mask = torch.ones_like(m.nk("w13"))
    mask[-2:, :, 7:27] = 0
    m.register_buffer("mask", mask)


def columns_scaled(m: Any, x: Tensor, name: str) -> Tensor:
    weight = m.nk(name)
    return weight * torch.linspace(0.5, 1.5, weight.shape[-1]).to(m.dtype)


miss("miss: scales that are trained", gathered(), prepare=trained, differs=False, core=True)
miss("miss: scales that are trained; grouped_mm", transformers, prepare=trained, differs=False, dtypes=BF16)
miss("miss: one code of one expert beyond 4 bits", gathered(), prepare=beyond_4_bits, format=INT8)
miss("miss: columns scaled", gathered(weight=columns_scaled), format=PAIRS)
miss(
    "miss: columns of some experts masked",
    gathered(weight=lambda m, x, name: m.nk(name) * m.mask if name == "w13" else m.nk(name)),
    prepare=masked,
)
