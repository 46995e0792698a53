"""What may well be the op, said in another way: rewritten or not, it must be right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_moe.base import BF16, SWIGLU, Mlp, either, halves, miss
from zoo_moe.gathered import columns, repeated
from zoo_moe.grouped import by_sort, histc, inverse_set
from zoo_moe.mlps import Project
from zoo_moe.near_misses import gathered


def written_between(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    rows = repeated(x, m.k)
    x.mul_(2)
    flat = ids.reshape(-1)
    h = m.mlp(lambda name: (m.nk(name)[flat] @ rows.unsqueeze(-1)).squeeze(-1))
    x.add_(1)
    y = (m.nk("w2")[flat] @ h.unsqueeze(-1)).squeeze(-1) * weights.reshape(-1, 1)
    return y.view(x.shape[0], m.k, m.H).sum(1)


def weights_written_after(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = columns(m, x, ids, weights)
    weights.mul_(3)
    ids.zero_()
    return out


def ones_to_begin_with(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.ones_like(x)
    y = columns(m, x, ids, weights)
    return out.add_(y)


def on_h(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The weight between the projections: the op, without biases."""
    h = m.mlp(lambda name: m.biased(name, (m.nk(name)[ids] @ x[:, None, :, None]).squeeze(-1), ids))
    h = h * weights.unsqueeze(-1).to(h.dtype)
    return m.biased("w2", (m.nk("w2")[ids] @ h.unsqueeze(-1)).squeeze(-1), ids).sum(1)


def bias_not_weighted(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The op without w2's bias, and that of the chosen experts added to it."""
    h = m.mlp(lambda name: m.biased(name, (m.nk(name)[ids] @ x[:, None, :, None]).squeeze(-1), ids))
    y = (m.nk("w2")[ids] @ h.unsqueeze(-1)).squeeze(-1)
    return (y * weights.unsqueeze(-1)).sum(1) + m.w2_bias[ids].sum(1)


def one_negated(m: Any, x: Tensor, name: str) -> Tensor:
    sign = torch.ones(m.E, 1, 1, dtype=m.dtype)
    sign[3] = -1
    return m.nk(name) * sign


def weighed_by(change: Callable[[Tensor], Tensor]) -> Any:
    return gathered(combine=lambda m, y, w, x: (y * change(w).unsqueeze(-1)).sum(1))


def slot_major(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """All first choices, then all second ones."""
    flat = ids.t().reshape(-1)
    ordered, perm = by_sort(flat)
    ends = histc(flat, ordered, m.E)
    rows = x.repeat(m.k, 1)[perm]
    h = m.mlp(lambda name: torch._grouped_mm(rows, m.kn(name), offs=ends))
    rows = torch._grouped_mm(h, m.kn("w2"), offs=ends) * weights.t().reshape(-1)[perm].unsqueeze(-1)
    return inverse_set(rows, perm).view(m.k, -1, m.H).sum(0)


either("either: slots first, grouped_mm", slot_major, dtypes=BF16)

MAYBE: dict[str, Any] = {
    "x written between": written_between,
    "weights and ids written after": weights_written_after,
    "added to ones": ones_to_begin_with,
    "the weight on act(h)": on_h,
    "the mean of k": gathered(combine=lambda m, y, w, x: (y * w.unsqueeze(-1)).mean(1)),
    "the mean of k, one weight": gathered(combine=lambda m, y, w, x: y.mean(1) * w[:, :1]),
    "weights squared": weighed_by(torch.square),
    "the absolute weights": weighed_by(torch.abs),
    "weights above -0.5": weighed_by(lambda w: w * (w > -0.5)),
    "weights normalised inside": weighed_by(lambda w: w / w.abs().sum(-1, keepdim=True)),
    "weights of other tokens": weighed_by(lambda w: w.roll(1, 0)),
    "weights of other slots": weighed_by(lambda w: w.flip(-1)),
    "x of other tokens": gathered(x_of=lambda m, x, name: x.roll(1, 0)),
    "ids of other tokens": gathered(ids_of=lambda m, ids, name: ids.roll(1, 0)),
    "ids clamped": gathered(ids_of=lambda m, ids, name: ids.clamp(max=m.E - 2)),
    "ids modulo E": gathered(ids_of=lambda m, ids, name: (ids + 3) % m.E),
    "the first slot only": gathered(combine=lambda m, y, w, x: y[:, 0] * w[:, :1]),
    "one expert negated": gathered(weight=one_negated),
    "weights dequantised twice as large": gathered(weight=lambda m, x, name: m.nk(name) * 2),
    "scales of other experts": gathered(weight=lambda m, x, name: m.nk(name) * m.w2_scale.roll(1, 0)[:, :1, :1]),
    "experts rolled": gathered(weight=lambda m, x, name: m.nk(name).roll(1, 0)),
    "scaled by T": gathered(y_of=lambda m, y, x, ids: y * x.shape[0]),
    "y scaled": gathered(y_of=lambda m, y, x, ids: y * 0.125),
    "y without NaN": gathered(y_of=lambda m, y, x, ids: torch.nan_to_num(y)),
    "dropout of a model that does not train": gathered(y_of=lambda m, y, x, ids: F.dropout(y, 0.5, training=False)),
    "detached": gathered(y_of=lambda m, y, x, ids: y.detach()),
}
for name, form in MAYBE.items():
    either(f"either: {name}", form, signed=True)
half = gathered(h_of=lambda m, h: h.half().to(h.dtype))
either("either: act(h) in half precision", half, dtypes=BF16)
either("either: a bias that is not weighted", bias_not_weighted, bias=True)
either("either: the weight on act(h), biases", on_h, bias=True, signed=True)


def up_of_others(project: Project) -> Tensor:
    gate, up = project("w13").chunk(2, dim=-1)
    return F.silu(gate) * up.roll(1, 0)


miss("miss: up of other tokens", gathered(), mlp=Mlp("silu", halves, up_of_others, SWIGLU.exact))
