"""Routed experts with int4 weights, and what they compute: told by a slow way in float64."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import pack, rel_l2
from torch import Tensor

import inductor_ext.ops  # noqa: F401  registers torch.ops.w4a16
from inductor_ext import kernels
from inductor_ext.formats import PackedInt4
from inductor_ext.kernels import Mlp, MoeProblem, WeightKind, table

OWED = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""Relative L2 against float64."""
DTYPES = list(OWED)
ZEROS = ("none", "int", "float")
MAP = torch.tensor([1, -1, 0, 3, 2]).int()
"""Of five experts all but the second are here."""
SILU = Mlp()
MLPS = {
    "silu": SILU,
    "silu interleaved": Mlp(gate_up="interleaved"),
    "silu without a gate": Mlp(gate_up="none"),
    "gelu": Mlp("gelu"),
    "gelu_tanh interleaved": Mlp("gelu_tanh", "interleaved"),
    "gelu_tanh without a gate": Mlp("gelu_tanh", "none"),
    "relu": Mlp("relu"),
    "relu without a gate": Mlp("relu", "none"),
    "swigluoai interleaved": Mlp("swigluoai", "interleaved", limit=0.5),
    "swigluoai": Mlp("swigluoai", alpha=1.25),
    "weight on the input": Mlp(apply_router_weight_on_input=True),
    "scaled": Mlp(routed_scaling=2.5),
}


def _named(name: str) -> Any:
    reason = kernels.why_unusable("moe", name)
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))


KERNELS = [_named(name) for name in table.priority("moe", "cpu")]
"""Of the CPU. The Triton kernels' tests are in test_gpu_experts.py, test_moe_numbers.py and test_gpu_moe.py."""

on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA or ROCm device, and this machine has none"
)


@dataclasses.dataclass
class Experts:
    """Experts made up from numbers that do not repeat, and what they compute, in float64 and without the package."""

    E: int = 4
    H: int = 64
    I: int = 32  # noqa: E741
    G: tuple[int, int] = (32, 16)
    dtype: torch.dtype = torch.float32
    scale_dtype: torch.dtype | None = None
    zeros: str = "none"
    bias: bool = False
    mlp: Mlp = SILU
    expert_map: Tensor | None = None
    kernel: str = "reference"
    device: str = "cpu"

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.E * self.H + self.I)
        rows = self.I if self.mlp.gate_up == "none" else 2 * self.I
        problem = self.problem()
        module = kernels.load_moe(self.kernel)
        if (reason := module.reject(problem)) is not None:
            pytest.skip(f"{self.kernel}: {reason}")
        self.tensors: dict[str, Tensor | None] = {}
        self.dense: dict[str, Tensor] = {}
        for name, N, K, G in (("w13", rows, self.H, self.G[0]), ("w2", self.H, self.I, self.G[1])):
            weight, self.dense[name] = self._weight(self.E * N, K, G)
            packed = module.pack(weight, self.E)
            self.tensors |= {f"{name}_{field}": getattr(packed, field) for field in ("qweight", "scales", "zeros")}
            self.tensors[f"{name}_bias"] = self.drawn(self.E, N) if self.bias else None
            self.dense[name] = self.dense[name].view(self.E, N, K).to(self.device)
        self.tensors["expert_map"] = self.expert_map
        self.tensors = {name: None if t is None else t.to(self.device) for name, t in self.tensors.items()}

    def _weight(self, N: int, K: int, G: int) -> tuple[PackedInt4, Tensor]:
        scale_dtype = self.scale_dtype or self.dtype
        codes = torch.randint(16, (N, K), generator=self.random)
        scales = (torch.randn(N, K // G, generator=self.random) / K**0.5 / 4).to(scale_dtype)
        zero: Tensor | None = None
        if self.zeros == "int":
            zero = torch.randint(17, (N, K // G), generator=self.random).to(torch.uint8)
        elif self.zeros != "none":
            zero_dtype = scale_dtype if self.zeros == "float" else torch.float32
            zero = (torch.rand(N, K // G, generator=self.random) * 15).to(zero_dtype)
        groups = torch.arange(K) // G
        z64 = torch.full((N, K), 8.0).double() if zero is None else zero.double()[:, groups]
        return PackedInt4(pack(codes, 1), scales, zero), (codes - z64) * scales.double()[:, groups]

    def problem(self) -> MoeProblem:
        zeros = "float" if self.zeros == "float32" else self.zeros
        w13, w2 = (WeightKind(self.scale_dtype or self.dtype, G, zeros) for G in self.G)
        sizes = {"E": self.E, "top_k": 2, "H": self.H, "I": self.I}
        device = "cpu" if self.kernel in table.priority("moe", "cpu") else "cuda"  # which the CPU may stand in for
        arch = "gfx1100" if self.kernel in ("hip", "rdna3_wmma") else ""
        return MoeProblem(
            device, arch, self.dtype, **sizes, w13=w13, w2=w2, mlp=self.mlp, bias=self.bias, expert_map=self.mapped
        )

    @property
    def mapped(self) -> bool:
        return self.expert_map is not None

    def drawn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(self.device, self.dtype)

    def routed(self, T: int, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
        """x, topk_weights and topk_ids of T tokens."""
        known = self.E if self.expert_map is None else len(self.expert_map)
        ids = torch.rand(T, known, generator=self.random).argsort(1)[:, :k]
        weights = torch.rand(T, k, generator=self.random).to(self.device, self.dtype)
        return self.drawn(T, self.H), weights, ids.to(self.device)

    def on_the_gpu(self) -> Experts:
        """The same, with its tensors there."""
        other = copy.copy(self)
        other.tensors = {name: None if t is None else t.cuda() for name, t in self.tensors.items()}
        return other

    def settings(self) -> dict[str, Any]:
        known = -1 if self.expert_map is None else len(self.expert_map)
        own = {"intermediate_size": self.I, "w13_group_size": self.G[0], "w2_group_size": self.G[1]}
        return {**own, **dataclasses.asdict(self.mlp), "global_num_experts": known, "kernel": self.kernel}

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        y: Tensor = torch.ops.w4a16.moe(x, weights, ids, *self.in_order(), **self.settings())
        return y

    def in_order(self) -> list[Tensor | None]:
        fields = [f"{w}_{field}" for w in ("w13", "w2") for field in ("qweight", "scales", "zeros", "bias")]
        return [self.tensors[name] for name in (*fields, "expert_map")]

    def expected(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Choice by choice, in float64; autograd goes through it."""
        parts = [t.split(64) for t in (x, weights, ids)]  # of many tokens, to need less memory
        return torch.cat([self._expected(*tokens) for tokens in zip(*parts, strict=True)])

    def _expected(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        known = self.E if self.expert_map is None else len(self.expert_map)
        rows = ids.long().where((ids >= 0) & (ids < known), -1)
        if self.expert_map is not None:
            rows = self.expert_map.to(rows)[rows.clamp(min=0)].where(rows >= 0, -1)
        here, e = (rows >= 0)[..., None], rows.clamp(min=0)
        w = weights.double()[..., None].where(here, 0)
        on_input = self.mlp.apply_router_weight_on_input
        u = x.double()[:, None] * (w if on_input else torch.ones_like(w))
        h = torch.einsum("tkh,tkrh->tkr", u, self.dense["w13"][e])
        h = h if self.tensors["w13_bias"] is None else h + self.tensors["w13_bias"].double()[e]
        y = torch.einsum("tki,tkhi->tkh", self._act(h), self.dense["w2"][e])
        y = y if self.tensors["w2_bias"] is None else y + self.tensors["w2_bias"].double()[e]
        return self.mlp.routed_scaling * (y if on_input else y * w).where(here, 0).sum(1)

    def _act(self, h: Tensor) -> Tensor:
        mlp = self.mlp
        if mlp.gate_up == "none":
            gate, up = h, torch.ones_like(h)
        elif mlp.gate_up == "halves":
            gate, up = h[..., : self.I], h[..., self.I :]
        else:
            gate, up = h[..., 0::2], h[..., 1::2]
        if mlp.activation == "swigluoai":
            if mlp.limit is not None:
                gate, up = gate.clamp(max=mlp.limit), up.clamp(min=-mlp.limit, max=mlp.limit)
            return (up + 1) * gate * torch.sigmoid(gate * mlp.alpha)
        acts = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh")}
        return acts[mlp.activation](gate) * up


def right(experts: Experts, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """What the op gives, which is as near to float64 as its dtype allows."""
    y, wanted = experts(x, weights, ids), experts.expected(x, weights, ids)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    assert torch.equal(y, wanted.to(y.dtype)) or rel_l2(y, wanted) <= OWED[x.dtype]
    return y


def exact(experts: Experts, x: Tensor, weights: Tensor, ids: Tensor) -> None:
    """The op is right, and gives the same bits again."""
    y = right(experts, x, weights, ids)
    assert torch.equal(experts(x, weights, ids), y)
