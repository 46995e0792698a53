"""One packing, bytes along K, and the ways from codes to weights: rounding orders, how scales are kept and spread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.base import Build, Draw, Layer, Made, either, pack, positive


def codes(m: Any) -> Tensor:
    """uint8 [N, K]."""
    return torch.stack((m.packed & 15, m.packed >> 4), dim=-1).view(m.N, m.K)


def wide(m: Any, tensor: Tensor) -> Tensor:
    """[N, K/G] over [N, K/G, G]."""
    return tensor.unsqueeze(-1).expand(-1, -1, m.group)


def rounding(name: str, **fields: Any) -> Callable[[Callable[..., Tensor]], Build]:
    """Registers order(q, z, s) over [N, K/G, G]: q uint8, z in the scales' dtype, s the scales."""

    def register(order: Callable[..., Tensor]) -> Build:
        @positive(name, **fields)
        def build(d: Draw) -> Made:
            def dequant(m: Any) -> Tensor:
                q = codes(m).view(m.N, -1, m.group)
                return order(q, wide(m, m.zeros), wide(m, m.scales)).reshape(m.N, m.K)

            tensors = {"packed": pack(d.codes, 1, torch.uint8), "zeros": d.zeros.to(d.dtype), "scales": d.scales}
            return Layer(d, dequant, **tensors), d.dense(d.zeros)

        return build

    return register


rounding("(q - z) * s", core=True)(lambda q, z, s: (q - z) * s)
rounding("s * (q - z), by name")(lambda q, z, s: torch.mul(s, torch.sub(q, z)))
rounding("q * s - z * s", core=True)(lambda q, z, s: q * s - z * s)
rounding("s * q + (-s * z)")(lambda q, z, s: s * q + (-s * z))
rounding("-(z - q) * s")(lambda q, z, s: -(z - q) * s)
rounding("addcmul(-z * s, q, s)")(lambda q, z, s: torch.addcmul(-z * s, q.to(s.dtype), s))
rounding("torch.sub with alpha")(lambda q, z, s: torch.sub(q * s, z * s, alpha=1))
rounding("in place")(lambda q, z, s: q.to(s.dtype).sub_(z).mul_(s))
rounding("float32, then cast", core=True)(lambda q, z, s: ((q.float() - z.float()) * s.float()).to(s.dtype))
rounding("float32 q * s - z * s, then cast")(
    lambda q, z, s: (q.float() * s.float() - z.float() * s.float()).to(s.dtype)
)
rounding("int16 subtraction")(lambda q, z, s: (q.to(torch.int16) - z.to(torch.int16)).to(s.dtype) * s)
rounding("(q - z) / (1 / s)")(lambda q, z, s: ((q.float() - z.float()) / (1.0 / s.float())).to(s.dtype))


def symmetric(name: str, scales: Callable[[Draw], Tensor], **fields: Any) -> Callable[[Callable[[Any], Tensor]], Build]:
    """Registers dequant(m) for ``m.packed``, the constant zero 8, and ``m.scales`` as ``scales`` stores them."""

    def register(dequant: Callable[[Any], Tensor]) -> Build:
        @positive(name, **fields)
        def build(d: Draw) -> Made:
            return Layer(d, dequant, packed=pack(d.codes, 1, torch.uint8), scales=scales(d)), d.dense()

        return build

    return register


def by_group(d: Draw) -> Tensor:
    return d.scales


@symmetric("scales [N, K/G], repeat_interleave", by_group)
def _(m: Any) -> Tensor:
    return (codes(m).to(m.dtype) - 8) * m.scales.repeat_interleave(m.group, dim=1)


@symmetric("scales [N, K/G], torch.repeat_interleave with a tensor of repeats", by_group)
def _(m: Any) -> Tensor:
    repeats = torch.full((m.K // m.group,), m.group)
    return (codes(m).to(m.dtype) - 8) * torch.repeat_interleave(m.scales, repeats, dim=1, output_size=m.K)


@symmetric("scales [N, K/G], unsqueeze, expand, reshape", by_group)
def _(m: Any) -> Tensor:
    return (codes(m).to(m.dtype) - 8) * wide(m, m.scales).reshape(m.N, m.K)


@symmetric("scales [N, K/G], gathered by an index made in the graph", by_group)
def _(m: Any) -> Tensor:
    return (codes(m).to(m.dtype) - 8) * m.scales[:, torch.arange(m.K) // m.group]


@symmetric("scales [N, K/G], torch.gather", by_group)
def _(m: Any) -> Tensor:
    index = (torch.arange(m.K) // m.group).expand(m.N, -1)
    return (codes(m).to(m.dtype) - 8) * torch.gather(m.scales, 1, index)


@symmetric("scales [N, K/G], torch.kron", by_group)
def _(m: Any) -> Tensor:
    return (codes(m).to(m.dtype) - 8) * torch.kron(m.scales, torch.ones(1, m.group, dtype=m.dtype))


@symmetric("scales [K/G, N]", lambda d: d.scales.T)
def _(m: Any) -> Tensor:
    q = codes(m).view(m.N, -1, m.group).to(m.dtype) - 8
    return (q * m.scales.t()[:, :, None]).view(m.N, m.K)


@symmetric("scales [K/G, N], broadcast over a permuted weight", lambda d: d.scales.T)
def _(m: Any) -> Tensor:
    q = codes(m).view(m.N, -1, m.group).permute(1, 2, 0).to(m.dtype) - 8
    return (q * m.scales[:, None, :]).permute(2, 0, 1).reshape(m.N, m.K)


@symmetric("scales [N, K/G, 1]", lambda d: d.scales.unsqueeze(-1))
def _(m: Any) -> Tensor:
    return ((codes(m).view(m.N, -1, m.group).to(m.dtype) - 8) * m.scales).flatten(1)


@symmetric("scales [N * K/G, 1]", lambda d: d.scales.view(-1, 1))
def _(m: Any) -> Tensor:
    return ((codes(m).view(-1, m.group).to(m.dtype) - 8) * m.scales).view(m.N, m.K)


@symmetric("scales flat", lambda d: d.scales.view(-1))
def _(m: Any) -> Tensor:
    return torch.einsum("gk,g->gk", codes(m).view(-1, m.group).to(m.dtype) - 8, m.scales).view(m.N, m.K)


@positive("scales [N, 1]")
def _(d: Draw) -> Made:
    d = Draw.channelwise(d)
    packed = pack(d.codes, 1, torch.uint8)
    return Layer(d, lambda m: (codes(m).to(m.dtype) - 8) * m.scales, packed=packed, scales=d.scales), d.dense()


@positive("scales [N], one a row")
def _(d: Draw) -> Made:
    d = Draw.channelwise(d)
    packed = pack(d.codes, 1, torch.uint8)
    layer = Layer(d, lambda m: (codes(m).to(m.dtype) - 8) * m.scales[:, None], packed=packed, scales=d.scales.view(-1))
    return layer, d.dense()


@positive("one scale for the whole weight, a tensor")
def _(d: Draw) -> Made:
    scale = d.scales[:1, :1].clone()
    packed = pack(d.codes, 1, torch.uint8)
    layer = Layer(d, lambda m: (codes(m).to(m.dtype) - 8) * m.scale, packed=packed, scale=scale.view(()))
    return layer, d.dense(scales=scale.expand_as(d.scales))


@either("one scale for the whole weight, a number")
def _(d: Draw) -> Made:
    packed = pack(d.codes, 1, torch.uint8)
    layer = Layer(d, lambda m: (codes(m).to(m.dtype) - 8) * 0.03125, packed=packed)
    return layer, d.dense(scales=torch.full_like(d.scales, 0.03125))


@positive("float32 scales, weight cast to the activation's dtype", core=True)
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        return (
            ((codes(m).view(m.N, -1, m.group) - m.zeros.unsqueeze(-1)) * m.scales.unsqueeze(-1))
            .view(m.N, m.K)
            .to(m.dtype)
        )

    scales = d.floats(*d.scales.shape, dtype=torch.float32)
    layer = Layer(d, dequant, packed=pack(d.codes, 1, torch.uint8), zeros=d.zeros.to(torch.int8), scales=scales)
    return layer, d.dense(d.zeros, scales=scales)


@positive("float16 scales, weight cast to the activation's dtype")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        q = (codes(m).to(torch.int8) - 8).view(m.N, -1, m.group)
        return (q * m.scales.unsqueeze(-1)).view(m.N, m.K).to(m.dtype)

    scales = d.floats(*d.scales.shape, dtype=torch.float16)
    return Layer(d, dequant, packed=pack(d.codes, 1, torch.uint8), scales=scales), d.dense(scales=scales)


@either("scales and zeros in one tensor")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        scales, zeros = m.qparams[..., :1], m.qparams[..., 1:]
        return ((codes(m).view(m.N, -1, m.group) - zeros) * scales).view(m.N, m.K)

    qparams = torch.stack((d.scales, d.zeros.to(d.dtype)), dim=-1)
    return Layer(d, dequant, packed=pack(d.codes, 1, torch.uint8), qparams=qparams), d.dense(d.zeros)


@positive("zero is one stored integer for the whole weight")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        return ((codes(m).to(torch.int8) - m.zero).view(m.N, -1, m.group) * m.scales.unsqueeze(-1)).view(m.N, m.K)

    zero = torch.tensor(5, dtype=torch.int8)
    return Layer(d, dequant, packed=pack(d.codes, 1, torch.uint8), zero=zero, scales=d.scales), d.dense(5)


@either("constant zero 7.5")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        return ((codes(m).view(m.N, -1, m.group).to(m.dtype) - 7.5) * m.scales.unsqueeze(-1)).view(m.N, m.K)

    layer = Layer(d, dequant, packed=pack(d.codes, 1, torch.uint8), scales=d.scales)
    return layer, d.dense(torch.full(d.scales.shape, 7.5))


@positive("no zero: codes 0..15 times scale")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        return (codes(m).view(m.N, -1, m.group) * m.scales.unsqueeze(-1)).view(m.N, m.K)

    return Layer(d, dequant, packed=pack(d.codes, 1, torch.uint8), scales=d.scales), d.dense(0)


@either("zeros differ between groups by constants in the graph")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        zero = torch.where(torch.arange(m.K // m.group) == 0, 7, 8)
        return ((codes(m).view(m.N, -1, m.group) - zero[:, None]) * m.scales.unsqueeze(-1)).view(m.N, m.K)

    zeros = torch.full_like(d.zeros, 8)
    zeros[:, 0] = 7
    return Layer(d, dequant, packed=pack(d.codes, 1, torch.uint8), scales=d.scales), d.dense(zeros)


@either("scales stored as logarithms")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        return ((codes(m).view(m.N, -1, m.group).to(m.dtype) - 8) * m.logs.exp().unsqueeze(-1)).view(m.N, m.K)

    logs = d.scales.abs().log()
    layer = Layer(d, dequant, packed=pack(d.codes, 1, torch.uint8), logs=logs)
    return layer, d.dense(scales=logs.double().exp())


@either("rows gathered by a stored index")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        return ((codes(m).view(m.N, -1, m.group).to(m.dtype) - 8) * m.scales.unsqueeze(-1)).view(m.N, m.K)[m.rows]

    rows = torch.randperm(d.N, generator=d.generator)
    return Layer(d, dequant, packed=pack(d.codes, 1, torch.uint8), scales=d.scales, rows=rows), d.dense()[rows]


@either("some rows set to 0")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        w = ((codes(m).view(m.N, -1, m.group).to(m.dtype) - 8) * m.scales.unsqueeze(-1)).view(m.N, m.K)
        w[:4] = 0
        return w

    dense = d.dense()
    dense[:4] = 0
    return Layer(d, dequant, packed=pack(d.codes, 1, torch.uint8), scales=d.scales), dense


@either("columns rolled")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        w = ((codes(m).view(m.N, -1, m.group).to(m.dtype) - 8) * m.scales.unsqueeze(-1)).view(m.N, m.K)
        return w.roll(3, dims=1)

    return Layer(d, dequant, packed=pack(d.codes, 1, torch.uint8), scales=d.scales), d.dense().roll(3, dims=1)
