"""Stands in for the package aiter: modules with its names, classes and arguments, whose `moe_gemm_a8w4` checks what it
is given as its kernel would read it, position by position, and computes it in float32."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from mxfp4_problems import e2m1, e4m3
from torch import Tensor


@dataclass
class ExptData:
    hist: Tensor
    token_offs_raw: Tensor
    token_offs_pad: Tensor
    block_pid_map: Tensor


@dataclass
class RoutingData:
    block_m: int
    gate_scal: Tensor
    expt_hist: Tensor
    n_expts_tot: int
    n_expts_act: int
    expt_data: ExptData | None = None


@dataclass
class Indices:
    """GatherIndx and ScatterIndx, as they were."""

    src_indx: Tensor
    dst_indx: Tensor


OLD = (
    *("x", "w", "x_scales", "w_scales", "x_static_scale", "quant_static_scale", "bias", "routing_data", "gather_indx"),
    *("scatter_indx", "gammas", "swizzle_mx_scale", "out_dtype", "apply_swiglu", "alpha", "limit", "unpadded_N"),
    "unpadded_K",
)
NEW = (*OLD[:-2], "swiglu_add_residual", "preshuffled", *OLD[-2:], "out_mx_quant", "residual", "backend")
PATHS = {"aiter.ops.triton.moe": NEW, "aiter.ops.triton": OLD}
"""Where the modules are, and were, and the arguments there."""


class Standin:
    """Installed as the package aiter; keeps what `moe_gemm_a8w4` was called with."""

    def __init__(self, path: str, monkeypatch: pytest.MonkeyPatch, without: str = "") -> None:
        self.old = PATHS[path] is OLD
        self.calls: list[dict[str, Any]] = []
        parts = path.split(".")
        for count in range(1, len(parts) + 1):
            self._module(".".join(parts[:count]), monkeypatch)
        gemm = self._module(f"{path}.moe_op_gemm_a8w4", monkeypatch)
        self._module(f"{path}.moe_routing", monkeypatch)
        routing = self._module(f"{path}.moe_routing.routing", monkeypatch)
        routing.RoutingData, routing.ExptData = RoutingData, ExptData
        if self.old:
            routing.GatherIndx = routing.ScatterIndx = Indices
        names = [name for name in PATHS[path] if name != without]
        gemm.moe_gemm_a8w4 = self._gemm(names)

    def _module(self, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
        module = ModuleType(name)
        module.__path__ = []
        module.__spec__ = importlib_spec(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    def _gemm(self, names: list[str]) -> Any:
        required = ("x", "w", "x_scales", "w_scales")
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature(
            [
                inspect.Parameter(n, kind, default=inspect.Parameter.empty if n in required else DEFAULTS.get(n))
                for n in names
            ]
        )

        def moe_gemm_a8w4(*args: Any, **named: Any) -> Tensor:
            bound = signature.bind(*args, **named)
            bound.apply_defaults()
            self.calls.append(dict(bound.arguments))
            return compute(self.old, **bound.arguments)

        moe_gemm_a8w4.__signature__ = signature  # type: ignore[attr-defined]
        return moe_gemm_a8w4


DEFAULTS = {
    "out_dtype": torch.bfloat16,
    "apply_swiglu": False,
    "alpha": 1.0,
    "limit": 1.0,
    "swiglu_add_residual": True,
    "preshuffled": False,
    "out_mx_quant": False,
}


def importlib_spec(name: str) -> Any:
    from importlib.machinery import ModuleSpec

    return ModuleSpec(name, None, is_package=True)


def compute(old: bool, **given: Any) -> Tensor:
    x, w, scales, data = given["x"], given["w"], given["w_scales"], given["routing_data"]
    check_weights(x, w, scales, given)
    order, place, rows = check_routing(old, x, data, given)
    E, _, N = w.shape
    swiglu = given["apply_swiglu"]
    y = torch.full((len(order), N // 2 if swiglu else N), torch.nan)
    one = lambda name: 1.0 if given[name] is None else scalar(given[name])  # noqa: E731
    offs, hist = data.expt_data.token_offs_raw.tolist(), data.expt_data.hist.tolist()
    for word in data.expt_data.block_pid_map.tolist():
        if word == -1:
            continue
        e, block = word & 0xFFFF, word >> 16
        first = block * data.block_m
        assert e < E and first < hist[e], "a block has rows of its expert"
        at = torch.arange(offs[e] + first, offs[e] + min(first + data.block_m, hist[e]))
        acc = x[rows[at]].float() @ dense(w, scales, e).t() * one("x_static_scale")
        acc = acc if given["bias"] is None else acc + given["bias"][e]
        if swiglu:
            gate, up = acc[:, ::2].clamp(max=given["limit"]), acc[:, 1::2].clamp(-given["limit"], given["limit"])
            acc = gate * torch.sigmoid(given["alpha"] * gate) * (up + 1)
        y[at] = acc if given["gammas"] is None else acc * given["gammas"][at, None]
    if given["quant_static_scale"] is not None:
        assert given["out_dtype"] == torch.float8_e4m3fn
        y = e4m3((y / one("quant_static_scale")).double()).float()
    y = y.to(given["out_dtype"])
    if place is None:
        return y
    return y.float()[place.view(-1, data.n_expts_act)].sum(1).to(given["out_dtype"])


def scalar(t: Tensor) -> float:
    assert t.dtype == torch.float32 and t.numel() == 1
    return float(t)


def check_weights(x: Tensor, w: Tensor, scales: Tensor, given: dict[str, Any]) -> None:
    """As the kernel for gfx950 asks for them."""
    E, half, N = w.shape
    K = x.shape[1]
    assert x.dtype == torch.float8_e4m3fn and x.dim() == 2 and x.is_contiguous()
    assert w.dtype == torch.uint8 and 2 * half == K
    assert w.stride(1) == 1 and w.stride(2) >= half and w.stride(0) >= N * w.stride(2)
    assert given["x_scales"] is None, "one scale for all of x"
    assert given["swizzle_mx_scale"] == "CDNA4_SCALE"
    assert N % 32 == 0 and K % 512 == 0, "the swizzle, and the kernel's longest step"
    assert scales.dtype == torch.uint8 and scales.shape == (E, K, N // 32)
    assert scales.stride(1) == 1 and scales.stride(2) == K and scales.stride(0) == N // 32 * K
    bias = given["bias"]
    assert bias is None or (bias.dtype == torch.float32 and bias.shape == (E, N) and bias.stride(1) == 1)
    assert given["unpadded_N"] is None and given["unpadded_K"] is None
    assert given.get("swiglu_add_residual", True) and not given.get("preshuffled")
    assert given.get("residual") is None and given.get("backend") is None and not given.get("out_mx_quant")


def dense(w: Tensor, scales: Tensor, e: int) -> Tensor:
    """float32 [N, K], the scales out of their swizzle byte by byte."""
    _, half, N = w.shape
    codes = w[e].t().int()
    values = e2m1(torch.stack((codes & 15, codes >> 4), -1).flatten(1)).float()
    n, g = torch.arange(N)[:, None], torch.arange(2 * half // 32)[None, :]
    s, a, r, c, b, d = n // 32, n // 16 % 2, n % 16, g // 8, g // 4 % 2, g % 4
    byte = scales[e].t()[s, (((c * 4 + d) * 16 + r) * 2 + b) * 2 + a]
    return values * (2.0 ** (byte.double() - 127)).float().repeat_interleave(32, 1)


def check_routing(
    old: bool, x: Tensor, data: RoutingData, given: dict[str, Any]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The order of the pairs, where each is in it, and the row of x that each position reads."""
    gather, scatter, expt = given["gather_indx"], given["scatter_indx"], data.expt_data
    assert expt is not None and data.block_m in (16, 32, 64, 128)
    if old:
        for indices in (gather, scatter):
            assert indices is None or isinstance(indices, Indices)
        order = None if gather is None else gather.src_indx
        place = None if scatter is None else scatter.src_indx
        for indices in filter(None, (gather, scatter)):
            assert torch.equal(indices.dst_indx[indices.src_indx.long()], torch.arange(len(indices.src_indx)).int())
    else:
        order, place = gather, scatter
    pairs = len(order if order is not None else place)
    for t in (order, place):
        assert t is None or (t.dtype == torch.int32 and torch.equal(t.sort().values, torch.arange(pairs).int()))
    assert pairs == (x.shape[0] * data.n_expts_act if order is not None else x.shape[0])
    E, hist = data.n_expts_tot, expt.hist
    for t, count in ((hist, E), (expt.token_offs_raw, E + 1), (expt.token_offs_pad, E + 1)):
        assert t.dtype == torch.int32 and t.shape == (count,)
    blocks = (hist + data.block_m - 1) // data.block_m
    assert int(hist.sum()) == pairs
    assert torch.equal(expt.token_offs_raw[1:], hist.cumsum(0).int()) and expt.token_offs_raw[0] == 0
    assert torch.equal(expt.token_offs_pad[1:], blocks.cumsum(0).int()) and expt.token_offs_pad[0] == 0
    most = pairs if pairs <= E else -(-(pairs - E + 1) // data.block_m) + E - 1
    words = [(block << 16) | e for e in range(E) for block in range(int(blocks[e]))]
    assert expt.block_pid_map.dtype == torch.int32
    assert expt.block_pid_map.tolist() == words + [-1] * (most - len(words))
    gammas = given["gammas"]
    assert gammas is None or (gammas.dtype == torch.float32 and gammas.shape == (pairs,) and gammas.is_contiguous())
    rows = torch.arange(pairs) if order is None else order.long() // data.n_expts_act
    return torch.arange(pairs), None if place is None else place.long(), rows
