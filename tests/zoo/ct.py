"""compressed-tensors: int32 words along K, low bits first, [N, K/8]; scales [N, K/G].

Zeros, if there are any, are packed along N: [N/8, K/G].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.base import Draw, Layer, Made, pack, positive


def by_bytes(words: Tensor, rows: int, columns: int) -> Tensor:
    """As in version 0.20: int8 [rows, columns], the code minus 8."""
    nibbles = words.contiguous().view(torch.uint8)
    values = torch.stack((nibbles & 15, nibbles >> 4), dim=-1).view(torch.int8)
    return values.view(rows, -1)[:, :columns] - 8


def by_shifts(words: Tensor, rows: int, columns: int) -> Tensor:
    values = (words.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    return values.reshape(rows, columns).to(torch.int8) - 8


def by_columns(words: Tensor, rows: int, columns: int) -> Tensor:
    """As in version 0.13: one strided write a nibble."""
    values = torch.zeros((rows, columns), dtype=torch.int32)
    for i in range(8):
        values[:, i::8] = (words >> (4 * i)) & 15
    return (values - 8).to(torch.int8)


Unpack = Callable[[Tensor, int, int], Tensor]
UNPACK: dict[str, Unpack] = {"bytes": by_bytes, "shifts": by_shifts, "strided writes": by_columns}


def affine(m: Any, q: Tensor, zeros: Tensor | None) -> Tensor:
    grouped = q.unflatten(-1, (m.K // m.group, m.group))
    value = grouped.to(m.scale.dtype)
    if zeros is not None:
        value = value - zeros.unsqueeze(-1).to(m.scale.dtype)
    return (value * m.scale.unsqueeze(-1)).flatten(start_dim=-2).to(m.dtype)


def zeros_of(m: Any, unpack: Unpack) -> Tensor:
    """int8 [N, K/G], the zero minus 8, from words along N."""
    return unpack(m.weight_zero_point.transpose(0, 1), m.K // m.group, m.N).transpose(0, 1)


def symmetric(d: Draw, unpack: Unpack = by_bytes, channelwise: bool = False) -> Made:
    d = Draw.channelwise(d) if channelwise else d

    def dequant(m: Any) -> Tensor:
        return affine(m, unpack(m.weight_packed, m.N, m.K), None)

    return Layer(d, dequant, weight_packed=pack(d.codes, 1), scale=d.scales), d.dense()


def asymmetric(d: Draw, unpack: Unpack = by_bytes, channelwise: bool = False) -> Made:
    d = Draw.channelwise(d) if channelwise else d

    def dequant(m: Any) -> Tensor:
        zeros = zeros_of(m, unpack)
        return affine(m, unpack(m.weight_packed, m.N, m.K), zeros)

    layer = Layer(d, dequant, weight_packed=pack(d.codes, 1), weight_zero_point=pack(d.zeros, 0), scale=d.scales)
    return layer, d.dense(d.zeros)


for name, unpack in UNPACK.items():
    core = name == "bytes"
    positive(f"ct symmetric, {name}", core=core)(partial(symmetric, unpack=unpack))
    positive(f"ct asymmetric, {name}", core=core)(partial(asymmetric, unpack=unpack))
    positive(f"ct channel-wise, {name}")(partial(symmetric, unpack=unpack, channelwise=True))
    positive(f"ct channel-wise asymmetric, {name}")(partial(asymmetric, unpack=unpack, channelwise=True))


@positive("ct act-order, scales gathered by g_idx", core=True)
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        q = by_bytes(m.weight_packed, m.N, m.K).to(m.dtype)
        return q * m.scale[:, m.weight_g_idx]

    return Layer(d, dequant, weight_packed=pack(d.codes, 1), scale=d.scales, weight_g_idx=d.g_idx), d.dense(
        g_idx=d.g_idx
    )


@positive("ct act-order asymmetric, scales and zeros gathered by g_idx")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        g_idx = m.weight_g_idx.long()
        q, zeros = by_bytes(m.weight_packed, m.N, m.K), zeros_of(m, by_bytes)
        return (q.to(m.dtype) - zeros.to(m.dtype)[:, g_idx]) * torch.index_select(m.scale, 1, g_idx)

    tensors = {"weight_packed": pack(d.codes, 1), "weight_zero_point": pack(d.zeros, 0), "scale": d.scales}
    return Layer(d, dequant, weight_g_idx=d.g_idx.int(), **tensors), d.dense(d.zeros, g_idx=d.g_idx)


@positive("ct act-order, columns sorted by g_idx and back")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        order = torch.argsort(m.weight_g_idx)
        q = by_bytes(m.weight_packed, m.N, m.K)[:, order]
        return affine(m, q, None)[:, torch.argsort(order)]

    return Layer(d, dequant, weight_packed=pack(d.codes, 1), scale=d.scales, weight_g_idx=d.g_idx), d.dense(
        g_idx=d.g_idx
    )


@positive("ct symmetric, shifts in a buffer")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        q = torch.bitwise_and(torch.bitwise_right_shift(m.weight_packed[:, :, None], m.shifts), 0xF)
        return affine(m, (q - 8).view(m.N, m.K), None)

    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return Layer(d, dequant, weight_packed=pack(d.codes, 1), scale=d.scales, shifts=shifts), d.dense()


@positive("ct symmetric, frozen parameters")
def _(d: Draw) -> Made:
    layer, dense = symmetric(d)
    for name in ("weight_packed", "scale"):
        tensor = getattr(layer, name)
        delattr(layer, name)
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    return layer, dense


@positive("ct symmetric, words read as 16-bit halves")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        halves = m.weight_packed.view(torch.int16)
        q = torch.stack([(halves >> shift) & 15 for shift in (0, 4, 8, 12)], dim=-1)
        return affine(m, q.view(m.N, m.K) - 8, None)

    return Layer(d, dequant, weight_packed=pack(d.codes, 1), scale=d.scales), d.dense()


@positive("ct symmetric, divided by powers of 16")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        wide = m.weight_packed.to(torch.int64)[..., None] & 0xFFFFFFFF
        q = (wide // m.powers) % 16
        return affine(m, q.flatten(-2) - 8, None)

    powers = 16 ** torch.arange(8)
    return Layer(d, dequant, weight_packed=pack(d.codes, 1), scale=d.scales, powers=powers), d.dense()
