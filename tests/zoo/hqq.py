"""HQQ: bytes whose high nibbles are the first half of the rows of the grouped matrix [N*K/G, G]; scales [N*K/G, 1].

Zeros are floats, [N*K/G, 1]. And the other formats with float zeros, which are added after scaling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.base import Draw, Layer, Made, either, linear, pack, positive


def float_zeros(d: Draw) -> Tensor:
    """[N, K/G]: off the grid of integers, some of them beyond 0..15."""
    return (torch.rand(d.N, d.K // d.group, generator=d.generator) * 18 - 1.5).to(d.dtype)


def packed_rows(d: Draw) -> Tensor:
    first, second = d.codes.view(-1, d.group).chunk(2)
    return (first * 16 + second).to(torch.uint8)


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    step = packed.shape[0]
    out = torch.empty([2 * step, packed.shape[1]], dtype=dtype)
    out[:step] = (packed & 0b11110000) >> 4
    out[step:] = packed & 0b00001111
    return out


def times_t(m: Any, x: Tensor, w: Tensor) -> Tensor:
    y = torch.matmul(x, w.t())
    if m.bias is not None:
        y += m.bias
    return y


@positive("hqq axis 1, meta in a dict", core=True)
def _(d: Draw) -> Made:
    """As the library has it: W_q is a parameter, scale and zero are in a plain dict."""

    def dequant(m: Any) -> Tensor:
        w = unpack(m.W_q, m.meta["compute_dtype"])
        return ((w - m.meta["zero"]) * m.meta["scale"]).reshape(m.meta["shape"])

    zeros = float_zeros(d)
    layer = Layer(d, dequant, matmul=times_t)
    layer.W_q = torch.nn.Parameter(packed_rows(d), requires_grad=False)
    layer.meta = {
        "compute_dtype": d.dtype,
        "shape": (d.N, d.K),
        "zero": zeros.view(-1, 1),
        "scale": d.scales.view(-1, 1),
    }
    return layer, d.dense(zeros)


@positive("hqq axis 1, buffers")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        return ((unpack(m.W_q, m.dtype) - m.zero) * m.scale).reshape(m.N, m.K)

    zeros = float_zeros(d)
    layer = Layer(d, dequant, matmul=times_t, W_q=packed_rows(d), zero=zeros.view(-1, 1), scale=d.scales.view(-1, 1))
    return layer, d.dense(zeros)


@positive("hqq axis 1, bias added in place")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        return ((unpack(m.W_q, m.dtype) - m.zero) * m.scale).reshape(m.N, m.K)

    zeros = float_zeros(d)
    tensors = {"W_q": packed_rows(d), "zero": zeros.view(-1, 1), "scale": d.scales.view(-1, 1)}
    return Layer(d, dequant, matmul=times_t, bias=d.floats(d.N), **tensors), d.dense(zeros)


@positive("hqq axis 1, rounded zeros")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        return ((unpack(m.W_q, torch.uint8) - m.zero) * m.scale).reshape(m.N, m.K)

    tensors = {"zero": d.zeros.view(-1, 1).to(d.dtype), "scale": d.scales.view(-1, 1)}
    return Layer(d, dequant, matmul=times_t, W_q=packed_rows(d), **tensors), d.dense(d.zeros)


@positive("hqq one group a row")
def _(d: Draw) -> Made:
    d = Draw.channelwise(d)

    def dequant(m: Any) -> Tensor:
        return ((unpack(m.W_q, m.dtype) - m.zero) * m.scale).reshape(m.N, m.K)

    zeros = float_zeros(d)
    layer = Layer(d, dequant, matmul=times_t, W_q=packed_rows(d), zero=zeros.view(-1, 1), scale=d.scales.view(-1, 1))
    return layer, d.dense(zeros)


def codes(m: Any) -> Tensor:
    return torch.stack((m.packed & 15, m.packed >> 4), dim=-1).view(m.N, -1, m.group)


@positive("float zeros added after scaling: (q - 8) * s + b", core=True)
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        w = (codes(m).to(m.dtype) - 8) * m.scales.unsqueeze(-1) + m.shift.unsqueeze(-1)
        return w.view(m.N, m.K)

    b = d.floats(*d.scales.shape)
    layer = Layer(d, dequant, packed=pack(d.codes, 1, torch.uint8), scales=d.scales, shift=b)
    return layer, d.dense() + b.double().repeat_interleave(d.group, 1)


@either("tinygemm: scale and float zero of a group side by side")
def _(d: Draw) -> Made:

    def dequant(m: Any) -> Tensor:
        scale, zero = m.scales_and_zeros.unbind(-1)
        w = (codes(m).to(m.dtype) - 8) * scale.unsqueeze(-1) + zero.unsqueeze(-1)
        return w.view(m.N, m.K)

    b = d.floats(*d.scales.shape)
    packed = pack(d.codes, 1, torch.uint8)
    layer = Layer(d, dequant, packed=packed, scales_and_zeros=torch.stack((d.scales, b), dim=-1))
    return layer, d.dense() + b.double().repeat_interleave(d.group, 1)


@positive("float zeros added after scaling: q * s + b")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        return (codes(m) * m.scales.unsqueeze(-1) + m.shift.unsqueeze(-1)).view(m.N, m.K)

    b = d.floats(*d.scales.shape)
    layer = Layer(d, dequant, packed=pack(d.codes, 1, torch.uint8), scales=d.scales, shift=b)
    return layer, d.dense(0) + b.double().repeat_interleave(d.group, 1)


@positive("float zeros subtracted after scaling: s * q - shift")
def _(d: Draw) -> Made:
    """As quanto has it, with its shift = zero * scale."""

    def dequant(m: Any) -> Tensor:
        step = m.packed.shape[0]
        q = torch.empty((2 * step, m.packed.shape[1]), dtype=torch.uint8)
        q[:step], q[step:] = m.packed & 15, m.packed >> 4
        return (m.scale * q - m.shift).view(m.N, m.K)

    shift = d.floats(d.N * d.K // d.group, 1)
    low, high = d.codes.view(-1, d.group).chunk(2)
    packed = (low + high * 16).to(torch.uint8)
    layer = Layer(d, dequant, matmul=linear, packed=packed, scale=d.scales.view(-1, 1), shift=shift)
    return layer, d.dense(0) - shift.double().view(d.N, -1).repeat_interleave(d.group, 1)


@positive("float minimum: q * s + min, in addcmul")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        q = codes(m).to(m.dtype)
        return torch.addcmul(m.minimum.unsqueeze(-1), q, m.scales.unsqueeze(-1)).view(m.N, m.K)

    b = d.floats(*d.scales.shape)
    layer = Layer(d, dequant, packed=pack(d.codes, 1, torch.uint8), scales=d.scales, minimum=b)
    return layer, d.dense(0) + b.double().repeat_interleave(d.group, 1)
