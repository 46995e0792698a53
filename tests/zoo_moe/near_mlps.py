"""Activations and clamps that are not quite those of the op."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_moe.base import BF16, SWIGLU, Mlp, halves, miss
from zoo_moe.formats import PAIRS_KN
from zoo_moe.gathered import columns
from zoo_moe.grouped import transformers
from zoo_moe.mlps import GPT_OSS, Project, gated, only_gate, ungated


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
