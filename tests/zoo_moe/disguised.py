"""Near misses that a few small inputs do not tell from the op, and some that are the op after all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_moe.base import BF16, SWIGLU, Mlp, either, halves, miss
from zoo_moe.dense import expert, scattered, weighted_input
from zoo_moe.formats import PAIRS, PAIRS_KN
from zoo_moe.gathered import columns, repeated
from zoo_moe.grouped import by_sort, histc, inverse_set, transformers
from zoo_moe.loops import of
from zoo_moe.mlps import GPT_OSS, Project, gated, only_gate, ungated
from zoo_moe.near_misses import gathered
from zoo_moe.routers import Routing, renormalised, softmax_topk

# -- activations that the op does not know -----------------------------------------------------------------------------


def both(act: Callable[[Tensor, Tensor], Tensor], spread: float = 2.0) -> Mlp:
    """act(gate, up), where the op has silu."""

    def forward(project: Project) -> Tensor:
        return act(*project("w13").chunk(2, dim=-1))

    return Mlp("silu", halves, forward, SWIGLU.exact, spread)


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu of another slope": lambda x: x * torch.sigmoid(1.1 * x),
    "gelu by sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "relu squared": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "leaky relu": F.leaky_relu,
    "elu": F.elu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "identity": lambda x: x,
    "the absolute value": torch.abs,
    "softmax": lambda x: x.softmax(-1),
    "silu of the negative": lambda x: F.silu(-x),
    "silu, clamped below at 0": lambda x: F.silu(x).clamp(min=0),
    "silu, shifted": lambda x: F.silu(x) + 0.1,
}
for name, act in UNKNOWN.items():
    miss(f"miss: activation: {name}", columns, mlp=Mlp("silu", halves, gated(act), SWIGLU.exact))
mlp = Mlp("silu", halves, gated(lambda x: F.relu(x).square()), SWIGLU.exact)
miss("miss: activation: relu squared; grouped_mm", transformers, mlp=mlp, dtypes=BF16)
mlp = Mlp("relu", only_gate, ungated(lambda x: F.relu(x).square()), lambda gate, up: F.relu(gate))
miss("miss: no gate, relu squared", columns, mlp=mlp)
miss("miss: both activated", columns, mlp=both(lambda gate, up: F.silu(gate) * F.silu(up)))
miss("miss: gate plus up", columns, mlp=both(lambda gate, up: F.silu(gate) + up))
miss("miss: gate times up squared", columns, mlp=both(lambda gate, up: F.silu(gate) * up * up))
miss("miss: silu of the product", columns, mlp=both(lambda gate, up: F.silu(gate * up)))
miss("miss: gate of the neighbour", columns, mlp=both(lambda gate, up: F.silu(gate.roll(1, -1)) * up))
miss("miss: silu, the gate clamped", columns, mlp=both(lambda gate, up: F.silu(gate.clamp(max=3)) * up))
miss("miss: silu, 1 added to up", columns, mlp=both(lambda gate, up: F.silu(gate) * (up + 1)))


def like_gpt_oss(act: Callable[[Tensor, Tensor], Tensor]) -> Mlp:
    def forward(project: Project) -> Tensor:
        h = project("w13")
        return act(h[..., ::2], h[..., 1::2])

    return Mlp("swigluoai", GPT_OSS.arrange, forward, GPT_OSS.exact, GPT_OSS.spread)


def glu(gate: Tensor, up: Tensor, alpha: float = 1.702) -> Tensor:
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


CLAMPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the gate clamped on both sides": lambda gate, up: glu(gate.clamp(-1, 7), up.clamp(-7, 7)),
    "up clamped above only": lambda gate, up: glu(gate.clamp(max=7), up.clamp(max=7)),
    "two limits": lambda gate, up: glu(gate.clamp(max=7), up.clamp(-5, 5)),
    "only up clamped": lambda gate, up: glu(gate, up.clamp(-7, 7)),
    "only the gate clamped": lambda gate, up: glu(gate.clamp(max=7), up),
    "nothing added to up": lambda gate, up: glu(gate.clamp(max=7), up.clamp(-7, 7) - 1),
    "up clamped after 1 is added": lambda gate, up: glu(gate.clamp(max=7), (up + 1).clamp(-7, 7) - 1),
    "the product clamped": lambda gate, up: glu(gate, up).clamp(-7, 7),
}
for name, act in CLAMPS.items():
    miss(f"miss: gpt-oss, {name}", columns, mlp=like_gpt_oss(act), format=PAIRS_KN)

# -- conditions that only some inputs meet -----------------------------------------------------------------------------


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
    m.register_buffer("limit", torch.full((), 100.0, dtype=m.dtype))


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
reach = {"scale": 8.0, "dtypes": (torch.float32, torch.bfloat16)}
miss("miss: act(h) modulo 100", gathered(h_of=lambda m, h: torch.fmod(h, 100)), **reach)
miss("miss: act(h) plus what is above 100", gathered(h_of=lambda m, h: h + F.relu(h - 100)), **reach)
miss("miss: act(h), at most 100", gathered(h_of=lambda m, h: torch.minimum(h, m.limit)), prepare=limit, **reach)
miss("miss: act(h), hardtanh", gathered(h_of=lambda m, h: F.hardtanh(h, -100, 100)), **reach)
miss("miss: act(h), whole hundreds twice", gathered(h_of=lambda m, h: h + 100 * torch.trunc(h / 100)), **reach)
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

# -- all experts for every token ---------------------------------------------------------------------------------------


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

# -- what may well be the op -------------------------------------------------------------------------------------------


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
