"""Routed experts with MXFP4 weights, and what they compute: told by a slow way in float64, without the package."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import rel_l2
from moe_problems import OWED
from torch import Tensor

import inductor_ext.ops  # noqa: F401  registers torch.ops.w4a16
from inductor_ext import kernels
from inductor_ext.formats import PackedMxfp4
from inductor_ext.kernels import Mlp, MoeProblem, WeightKind, table

GPT_OSS = Mlp("swigluoai", "interleaved", limit=7.0)
SIZES = ((4, 1024, 3072, 128, 4), (300, 400, 800, 8, 4), (16, 400, 500, 32, 2), (16, 512, 512, 32, 2))
SIZES = (*SIZES, (1000, 704, 800, 8, 2), (32, 500, 600, 64, 4))
"""(T, 2 I, H, E, top_k): of the field's tests of this op, all but the largest, (32, 6144, 3072, 128, 4)."""


def _named(name: str) -> Any:
    reason = kernels.why_unusable("moe_mxfp4", name)
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))


KERNELS = [_named(name) for name in table.priority("moe_mxfp4", "cpu")]
"""Of the CPU."""


def e2m1(codes: Tensor) -> Tensor:
    """float64: a sign, two bits of exponent (bias 1, 0 is subnormal), one of mantissa."""
    sign, exponent, mantissa = 1 - 2 * (codes >> 3).double(), (codes >> 1 & 3).double(), (codes & 1).double()
    return sign * torch.where(exponent == 0, mantissa / 2, 2 ** (exponent - 1) * (1 + mantissa / 2))


def e4m3(x: Tensor) -> Tensor:
    """float64: the nearest of the values of fp8, ties to the even code, saturating; NaN stays NaN."""
    codes = torch.arange(127)
    exponent, mantissa = (codes >> 3).double(), (codes & 7).double()
    values = torch.where(exponent == 0, mantissa * 2**-9, 2 ** (exponent - 7) * (1 + mantissa / 8))
    at = torch.searchsorted(values, x.abs().nan_to_num(0).clamp(max=448)).clamp(max=126)
    low, high = (at - 1).clamp(min=0), at
    below, above = x.abs() - values[low], values[high] - x.abs()
    nearer = torch.where((above < below) | ((above == below) & (high % 2 == 0)), high, low)
    nearer = torch.where(x.abs() >= 448, 126, nearer)
    return torch.where(x.isnan(), x, values[nearer].copysign(x))


@dataclasses.dataclass
class Mxfp4Experts:
    """Experts made up from numbers that do not repeat. ``input_scales`` makes them W4A8."""

    E: int = 4
    H: int = 96
    I: int = 64  # noqa: E741
    dtype: torch.dtype = torch.float32
    bias: bool = True
    mlp: Mlp = GPT_OSS
    expert_map: Tensor | None = None
    input_scales: tuple[float, float] | None = None
    kernel: str = "reference"
    device: str = "cpu"

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.E * self.H + self.I)
        module = kernels.load_mxfp4(self.kernel)
        if (reason := module.reject(self.problem())) is not None:
            pytest.skip(f"{self.kernel}: {reason}")
        rows = self.I if self.mlp.gate_up == "none" else 2 * self.I
        self.tensors: dict[str, Tensor | None] = {}
        self.weights: dict[str, tuple[Tensor, Tensor]] = {}
        for name, N, K in (("w13", rows, self.H), ("w2", self.H, self.I)):
            codes = torch.randint(256, (self.E * N, K // 2), generator=self.random, dtype=torch.uint8)
            near = 125 - round(K.bit_length() / 2)
            scales = torch.randint(near - 2, near + 3, (self.E * N, -(-K // 32)), generator=self.random)
            scales = scales.to(torch.uint8)
            self.weights[name] = codes.view(self.E, N, -1), scales.view(self.E, N, -1)
            packed = module.pack(PackedMxfp4(codes.to(self.device), scales.to(self.device)), self.E)
            self.tensors |= {f"{name}_qweight": packed.qweight, f"{name}_scales": packed.scales}
            self.tensors[f"{name}_bias"] = self.drawn(self.E, N) if self.bias else None
        self.tensors["expert_map"] = None if self.expert_map is None else self.expert_map.to(self.device)

    def dense(self, name: str, expert: int) -> Tensor:
        """float64 [N, K]"""
        codes, scales = (t[expert].int() for t in self.weights[name])
        values = e2m1(torch.stack((codes & 15, codes >> 4), -1).flatten(1))
        return values * (2.0 ** (scales.double() - 127))[:, torch.arange(values.shape[1]) // 32]

    def problem(self) -> MoeProblem:
        kind = WeightKind(torch.uint8, 32, "none", "mxfp4")
        device = "cpu" if self.kernel in table.priority("moe_mxfp4", "cpu") else "cuda"
        sizes = {"E": self.E, "top_k": 2, "H": self.H, "I": self.I}
        how = {"w13": kind, "w2": kind, "mlp": self.mlp, "bias": self.bias, "expert_map": self.expert_map is not None}
        return MoeProblem(device, "", self.dtype, **sizes, **how, op="moe_mxfp4", fp8=self.input_scales is not None)

    def drawn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(self.device, self.dtype)

    def routed(self, T: int, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
        """x, topk_weights and topk_ids of T tokens; the weights are a softmax over the chosen, as gpt-oss has them."""
        known = self.E if self.expert_map is None else len(self.expert_map)
        logits = torch.randn(T, known, generator=self.random)
        chosen = logits.topk(k)
        return self.drawn(T, self.H), chosen.values.softmax(1).to(self.device), chosen.indices.to(self.device)

    def arguments(self) -> tuple[list[Tensor | None], dict[str, Any]]:
        """What both ops take after x, weights and ids."""
        fields = [f"{w}_{field}" for w in ("w13", "w2") for field in ("qweight", "scales", "bias")]
        tensors = [self.tensors[name] for name in (*fields, "expert_map")]
        if self.input_scales is not None:
            tensors += [torch.tensor(scale, device=self.device) for scale in self.input_scales]
        known = -1 if self.expert_map is None else len(self.expert_map)
        settings = {"intermediate_size": self.I, **dataclasses.asdict(self.mlp)}
        return tensors, {**settings, "global_num_experts": known, "kernel": self.kernel}

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        tensors, settings = self.arguments()
        op = torch.ops.w4a16.moe_mxfp4 if self.input_scales is None else torch.ops.w4a16.moe_gemm_a8w4
        y: Tensor = op(x, weights, ids, *tensors, **settings)
        return y

    def expected(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Expert by expert, in float64; autograd goes through it, but for fp8. Only x / scale is rounded to float32
        before it is rounded to fp8, as the op says that it does."""
        x, weights, ids = x.cpu().double(), weights.cpu().double(), ids.cpu()
        known = self.E if self.expert_map is None else len(self.expert_map)
        rows = torch.arange(known) if self.expert_map is None else self.expert_map.cpu().long()
        rows = rows[ids.clamp(min=0)].where(ids >= 0, -1)
        s1, s2 = self.input_scales or (None, None)
        out = torch.zeros_like(x)
        on_input = self.mlp.apply_router_weight_on_input
        for e in rows.unique().tolist():
            t, j = (rows == e).nonzero(as_tuple=True)
            if e < 0:
                continue
            w = weights[t, j, None]
            h = self._times("w13", e, x[t] * w if on_input else x[t], s1)
            y = self._times("w2", e, self._act(h), s2)
            out = out.index_add(0, t, y if on_input else y * w)
        return self.mlp.routed_scaling * out

    def _times(self, name: str, e: int, x: Tensor, scale: float | None) -> Tensor:
        if scale is not None:
            scale = float(torch.tensor(scale))
            x = scale * e4m3((x / scale).float().double())
        y, bias = x @ self.dense(name, e).t(), self.tensors[f"{name}_bias"]
        return y if bias is None else y + bias[e].cpu().double()

    def _act(self, h: Tensor) -> Tensor:
        mlp = self.mlp
        if mlp.gate_up == "none":
            gate, up = h, torch.ones_like(h)
        else:
            gate, up = h.chunk(2, dim=1) if mlp.gate_up == "halves" else (h[:, ::2], h[:, 1::2])
        if mlp.activation == "swigluoai":
            if mlp.limit is not None:
                gate, up = gate.clamp(max=mlp.limit), up.clamp(-mlp.limit, mlp.limit)
            return (up + 1) * gate * torch.sigmoid(mlp.alpha * gate)
        acts = {"silu": F.silu, "relu": F.relu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh")}
        return acts[mlp.activation](gate) * up


def exact(experts: Mxfp4Experts, x: Tensor, weights: Tensor, ids: Tensor) -> float:
    """The op is as near to float64 as its dtype allows, and gives the same bits again; returns how near."""
    y, wanted = experts(x, weights, ids), experts.expected(x, weights, ids)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    near = rel_l2(y.cpu(), wanted)
    # In W4A8 a value between two of fp8 may fall either way, by the last bit of a float32 sum.
    assert near <= (OWED[x.dtype] if experts.input_scales is None else 4e-3)
    assert torch.equal(experts(x, weights, ids), y)
    return near
