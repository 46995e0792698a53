"""What an expert computes between its projections: where gate and up are, and the activations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_moe.base import BF16, SWIGLU, Mlp, Weight, case, halves, rows
from zoo_moe.dense import bmm_expanded
from zoo_moe.formats import PAIRS_KN
from zoo_moe.gathered import columns, columns_of_packed, gpt_fast
from zoo_moe.grouped import transformers
from zoo_moe.routers import topk_softmax

Project = Callable[[str], Tensor]

# -- where gate and up are ---------------------------------------------------------------------------------------------


def up_first(gate: Weight, up: Weight) -> dict[str, Weight]:
    return {"w13": rows(up, gate)}


def interleaved(gate: Weight, up: Weight) -> dict[str, Weight]:
    return {"w13": rows(gate, up, interleaved=True)}


def up_interleaved(gate: Weight, up: Weight) -> dict[str, Weight]:
    return {"w13": rows(up, gate, interleaved=True)}


def separate(gate: Weight, up: Weight) -> dict[str, Weight]:
    return {"w1": gate, "w3": up}


def only_gate(gate: Weight, up: Weight) -> dict[str, Weight]:
    return {"w1": gate}


def second_activated(project: Project) -> Tensor:
    up, gate = project("w13").split(project("w13").shape[-1] // 2, dim=-1)
    return up * F.silu(gate)


def by_slices(project: Project) -> Tensor:
    h = project("w13")
    return F.silu(h[..., ::2]) * h[..., 1::2]


def by_unbind(project: Project) -> Tensor:
    gate, up = project("w13").unflatten(-1, (-1, 2)).unbind(-1)
    return F.silu(gate) * up


def odd_activated(project: Project) -> Tensor:
    h = project("w13")
    return F.silu(h[..., 1::2]) * h[..., 0::2]


def two_weights(project: Project) -> Tensor:
    return F.silu(project("w1")) * project("w3")


LAYOUTS = {
    "up first": Mlp("silu", up_first, second_activated, SWIGLU.exact),
    "interleaved, slices": Mlp("silu", interleaved, by_slices, SWIGLU.exact),
    "interleaved, unbind": Mlp("silu", interleaved, by_unbind, SWIGLU.exact),
    "interleaved, up first": Mlp("silu", up_interleaved, odd_activated, SWIGLU.exact),
    "two weights": Mlp("silu", separate, two_weights, SWIGLU.exact),
}
for name, mlp in LAYOUTS.items():
    case(f"layout: {name}; gather", columns, mlp=mlp)
case("layout: interleaved; grouped_mm", transformers, mlp=LAYOUTS["interleaved, slices"], dtypes=BF16)
case("layout: two weights; grouped_mm", transformers, mlp=LAYOUTS["two weights"], dtypes=BF16, core=True)
case("layout: two weights; gather packed, gpt-fast", gpt_fast, mlp=LAYOUTS["two weights"])
case("layout: interleaved, biases", columns, mlp=LAYOUTS["interleaved, unbind"], bias=True)
case("layout: two weights, biases", columns, mlp=LAYOUTS["two weights"], bias=True)

# -- activations -------------------------------------------------------------------------------------------------------


def gated(act: Callable[[Tensor], Tensor]) -> Callable[[Project], Tensor]:
    def forward(project: Project) -> Tensor:
        gate, up = project("w13").chunk(2, dim=-1)
        return act(gate) * up

    return forward


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def by_erf(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def by_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "F.gelu": ("gelu", F.gelu),
    "F.gelu tanh": ("gelu_tanh", gelu_tanh),
    "F.relu": ("relu", F.relu),
    "x * sigmoid(x)": ("silu", lambda x: x * torch.sigmoid(x)),
    "x / (1 + exp(-x))": ("silu", lambda x: x / (1 + torch.exp(-x))),
    "nn.SiLU": ("silu", torch.nn.SiLU()),
    "gelu by erf": ("gelu", by_erf),
    "gelu by tanh": ("gelu_tanh", by_tanh),
    "clamp(min=0)": ("relu", lambda x: x.clamp(min=0)),
    "silu in float32": ("silu", lambda x: F.silu(x.float()).to(x.dtype)),
}
EXACT = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "relu": F.relu}


def of_gate(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda gate, up: EXACT[name](gate) * up


for spelling, (name, act) in ACTIVATIONS.items():
    # The spellings of one function differ by roundings of bfloat16, which are no business of the recogniser's tests.
    case(f"activation: {spelling}", columns, mlp=Mlp(name, halves, gated(act), of_gate(name)))
case(
    "activation: F.gelu; grouped_mm", transformers, mlp=Mlp("gelu", halves, gated(F.gelu), of_gate("gelu")), dtypes=BF16
)


def ungated(act: Callable[[Tensor], Tensor]) -> Callable[[Project], Tensor]:
    return lambda project: act(project("w1"))


for name, act in EXACT.items():
    mlp = Mlp(name, only_gate, ungated(act), lambda gate, up, act=act: act(gate))
    case(f"no gate: {name}", columns_of_packed, mlp=mlp, bias=name == "relu", core=name == "gelu")
mlp = Mlp("relu", only_gate, ungated(F.relu), lambda gate, up: F.relu(gate))
case("no gate: grouped_mm", transformers, mlp=mlp, dtypes=BF16)

# -- as gpt-oss has it -------------------------------------------------------------------------------------------------


def swigluoai(project: Project, limit: float | None = 7.0) -> Tensor:
    h = project("w13")
    gate, up = h[..., ::2], h[..., 1::2]
    if limit is not None:
        gate = gate.clamp(min=None, max=limit)
        up = up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def exact_swigluoai(gate: Tensor, up: Tensor, limit: float = 7.0, alpha: float = 1.702) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def swigluoai_halves(project: Project) -> Tensor:
    gate, up = project("w13").chunk(2, dim=-1)
    gate = torch.clamp(gate, max=3.5)
    up = torch.clamp(up, min=-3.5, max=3.5)
    return torch.sigmoid(gate * 1.5) * gate * (up + 1)


# Gates and ups reach beyond the limit.
GPT_OSS = Mlp("swigluoai", interleaved, swigluoai, exact_swigluoai, spread=5.0)
UNLIMITED = dataclasses.replace(
    GPT_OSS,
    forward=lambda project: swigluoai(project, None),
    exact=lambda gate, up: exact_swigluoai(gate, up, math.inf),
)
HALVES = Mlp("swigluoai", halves, swigluoai_halves, lambda gate, up: exact_swigluoai(gate, up, 3.5, 1.5), spread=4.0)

as_gpt_oss: dict[str, Any] = {"mlp": GPT_OSS, "format": PAIRS_KN, "bias": True, "route": topk_softmax}
case("gpt-oss: gather", columns, **as_gpt_oss)
case("gpt-oss: grouped_mm", transformers, dtypes=BF16, core=True, **as_gpt_oss)
case("gpt-oss: dense", bmm_expanded, **as_gpt_oss)
case("gpt-oss: other limit and alpha, halves", columns, mlp=HALVES)
case("gpt-oss: no limit", columns, mlp=UNLIMITED)
