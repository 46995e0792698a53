"""Codes packed by hand: in bytes along K or N, pairs or halves, low or high nibble first, signed; and in wider words.

Each entry is a packing and the function that undoes it; groups, scales and the zero, 8, are those of ``grouped``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.base import Build, Draw, Layer, Made, grouped, pack, positive, times_kn


def codes(name: str, packing: Callable[[Draw], Tensor], **fields: Any) -> Callable[[Callable[[Any], Tensor]], Build]:
    """Registers unpack(m), which reads 0..15 [N, K] from ``m.packed``."""

    def register(unpack: Callable[[Any], Tensor]) -> Build:
        @positive(name, **fields)
        def build(d: Draw) -> Made:
            return Layer(d, lambda m: grouped(m, unpack(m)), packed=packing(d), scales=d.scales), d.dense()

        return build

    return register


def signed(name: str, packing: Callable[[Draw], Tensor]) -> Callable[[Callable[[Any], Tensor]], Build]:
    """Registers unpack(m), which reads -8..7 [N, K] from ``m.packed``."""

    def register(unpack: Callable[[Any], Tensor]) -> Build:
        @positive(name)
        def build(d: Draw) -> Made:
            return Layer(d, lambda m: grouped(m, unpack(m), zeros=0), packed=packing(d), scales=d.scales), d.dense()

        return build

    return register


def low_first(d: Draw) -> Tensor:
    return pack(d.codes, 1, torch.uint8)


def high_first(d: Draw) -> Tensor:
    return pack(d.codes, 1, torch.uint8, order=(1, 0))


def halves(d: Draw, dim: int, high: int) -> Tensor:
    """Byte j: value j of the axis and value j + half; ``high`` says which half is in the high nibble."""
    parts = d.codes.chunk(2, dim)
    return (parts[high] * 16 + parts[1 - high]).to(torch.uint8)


def twos_complement(d: Draw) -> Tensor:
    return (d.codes - 8) % 16


@codes("bytes stack, low nibble first", low_first, core=True)
def _(m: Any) -> Tensor:
    return torch.stack((m.packed & 15, m.packed >> 4), dim=-1).view(m.N, m.K)


@codes("bytes stack, high nibble first", high_first)
def _(m: Any) -> Tensor:
    return torch.stack([m.packed >> 4, m.packed & 0x0F], -1).flatten(-2)


@codes("bytes strided writes, low nibble first", low_first)
def _(m: Any) -> Tensor:
    out = torch.empty(m.N, m.K, dtype=torch.uint8)
    out[:, ::2] = m.packed & 15
    out[:, 1::2] = m.packed >> 4
    return out


@codes("bytes strided writes, high nibble first, into floats", high_first)
def _(m: Any) -> Tensor:
    out = torch.zeros((m.N, m.K), dtype=m.dtype)
    out[..., 1::2] = m.packed.bitwise_and(15)
    out[..., 0::2] = m.packed.bitwise_right_shift(4)
    return out


@codes("bytes strided copy_", low_first)
def _(m: Any) -> Tensor:
    out = m.packed.new_empty(m.N, m.K)
    out[:, 0::2].copy_(m.packed & 15)
    out[:, 1::2].copy_(m.packed >> 4)
    return out


@codes("bytes shifts by arange, low nibble first", low_first)
def _(m: Any) -> Tensor:
    shifts = torch.arange(0, 8, 4, dtype=torch.uint8)
    return ((m.packed.unsqueeze(-1) >> shifts) & 15).reshape(m.N, -1)


@codes("bytes shifts by tensor, high nibble first", high_first)
def _(m: Any) -> Tensor:
    shifts = torch.tensor([4, 0], dtype=torch.int32)
    return torch.bitwise_and(m.packed.to(torch.int32)[..., None] >> shifts, 15).view(m.N, m.K)


@codes("bytes division and remainder", low_first)
def _(m: Any) -> Tensor:
    return torch.stack((m.packed % 16, m.packed // 16), dim=2).reshape(m.N, m.K)


@codes("bytes repeat_interleave and where", low_first)
def _(m: Any) -> Tensor:
    each = m.packed.repeat_interleave(2, dim=1)
    return torch.where(torch.arange(m.K) % 2 == 0, each & 15, each >> 4)


@codes("bytes cat halves of columns", lambda d: halves(d, 1, high=1), core=True)
def _(m: Any) -> Tensor:
    return torch.cat((m.packed & 15, m.packed >> 4), dim=1)


@codes("bytes cat halves of columns, high nibble first", lambda d: halves(d, 1, high=0))
def _(m: Any) -> Tensor:
    return torch.cat([m.packed >> 4, m.packed & 15], dim=-1)


@codes("bytes cat halves of rows", lambda d: halves(d, 0, high=1))
def _(m: Any) -> Tensor:
    return torch.cat((m.packed & 15, m.packed >> 4), dim=0)


@codes("bytes cat halves of rows, high nibble first", lambda d: halves(d, 0, high=0))
def _(m: Any) -> Tensor:
    return torch.concat((m.packed >> 4, m.packed & 15))


@codes("bytes pairs along N, stack", lambda d: pack(d.codes, 0, torch.uint8))
def _(m: Any) -> Tensor:
    return torch.stack((m.packed & 15, m.packed >> 4), dim=1).view(m.N, m.K)


@codes("bytes pairs along N, strided writes, high nibble first", lambda d: pack(d.codes, 0, torch.uint8, order=(1, 0)))
def _(m: Any) -> Tensor:
    out = torch.empty((m.N, m.K), dtype=torch.int8)
    out[::2] = m.packed >> 4
    out[1::2] = m.packed & 15
    return out


@codes("bytes halves of every group", lambda d: halves_of_groups(d))
def _(m: Any) -> Tensor:
    """As GGUF orders its 32 values, but with the scales apart."""
    blocks = m.packed.view(m.N, -1, m.group // 2)
    return torch.cat((blocks & 15, blocks >> 4), dim=-1).view(m.N, m.K)


def halves_of_groups(d: Draw) -> Tensor:
    low, high = d.codes.view(d.N, -1, 2, d.group // 2).unbind(2)
    return (low + high * 16).to(torch.uint8).view(d.N, d.K // 2)


@codes("flat bytes, reshaped by the module", lambda d: low_first(d).view(-1))
def _(m: Any) -> Tensor:
    return torch.stack((m.packed & 15, m.packed >> 4), dim=1).reshape(-1).view(m.N, m.K)


@codes("bytes in a byte-wide shape of groups", lambda d: low_first(d).view(d.N, d.K // d.group, d.group // 2))
def _(m: Any) -> Tensor:
    return torch.stack((m.packed & 15, m.packed >> 4), dim=-1).flatten(1)


@codes("int8 bytes, masked after the shift", lambda d: low_first(d).view(torch.int8))
def _(m: Any) -> Tensor:
    return torch.stack((m.packed & 15, (m.packed >> 4) & 15), dim=-1).view(m.N, m.K)


@codes("descending codes: stored as 15 - code", lambda d: pack(15 - d.codes, 1, torch.uint8))
def _(m: Any) -> Tensor:
    return 15 - torch.stack((m.packed & 15, m.packed >> 4), dim=-1).view(m.N, m.K)


@codes("bytes xor 0x88", lambda d: pack(twos_complement(d), 1, torch.uint8))
def _(m: Any) -> Tensor:
    packed = m.packed ^ 0x88
    return torch.stack((packed & 15, packed >> 4), dim=-1).view(m.N, m.K)


@signed("signed nibbles: shift left, then right, on int8", lambda d: pack(twos_complement(d), 1, torch.int8))
def _(m: Any) -> Tensor:
    return torch.stack(((m.packed << 4) >> 4, m.packed >> 4), dim=-1).view(m.N, m.K)


@signed("signed nibbles: where(q >= 8, q - 16, q)", lambda d: pack(twos_complement(d), 1, torch.uint8))
def _(m: Any) -> Tensor:
    q = torch.stack((m.packed & 15, m.packed >> 4), dim=-1).view(m.N, m.K).to(torch.int8)
    return torch.where(q >= 8, q - 16, q)


@signed("signed nibbles: (q ^ 8) - 8", lambda d: pack(twos_complement(d), 1))
def _(m: Any) -> Tensor:
    q = (m.packed[:, :, None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    return ((q ^ 8) - 8).view(m.N, m.K)


@signed("signed nibbles: int32, up by 28 - 4i, down by 28", lambda d: pack(twos_complement(d), 1))
def _(m: Any) -> Tensor:
    return torch.stack([(m.packed << (28 - 4 * i)) >> 28 for i in range(8)], dim=-1).view(m.N, m.K)


@signed("signed nibbles: from a table of 16", low_first)
def _(m: Any) -> Tensor:
    """An affine code book, even if it is written as one."""
    table = torch.arange(-8, 8, dtype=torch.int8)
    return table[torch.stack((m.packed & 15, m.packed >> 4), dim=-1).view(m.N, m.K).long()]


@codes("int64 words", lambda d: pack(d.codes, 1, torch.int64))
def _(m: Any) -> Tensor:
    return ((m.packed.unsqueeze(-1) >> torch.arange(0, 64, 4)) & 15).view(m.N, m.K)


@codes("int16 words", lambda d: pack(d.codes, 1, torch.int16))
def _(m: Any) -> Tensor:
    return ((m.packed.unsqueeze(-1) >> torch.arange(0, 16, 4, dtype=torch.int16)) & 15).view(m.N, m.K)


@codes("int32 words, high bits first", lambda d: pack(d.codes, 1, order=range(7, -1, -1)))
def _(m: Any) -> Tensor:
    return ((m.packed.unsqueeze(-1) >> torch.arange(28, -4, -4, dtype=torch.int32)) & 15).view(m.N, m.K)


@codes("int32 words in exllama's order", lambda d: pack(d.codes, 1, order=(0, 2, 4, 6, 1, 3, 5, 7)))
def _(m: Any) -> Tensor:
    shifts = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28], dtype=torch.int32)
    return ((m.packed[..., None] >> shifts) & 15).flatten(1)


@positive("bytes [K, N/2], pairs along N, weight used as [K, N]")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        q = torch.stack((m.packed & 15, m.packed >> 4), dim=-1).view(m.K, m.N)
        return ((q.view(-1, m.group, m.N).to(m.dtype) - 8) * m.scales[:, None]).view(m.K, m.N)

    layer = Layer(d, dequant, matmul=times_kn, packed=pack(d.codes.T, 1, torch.uint8), scales=d.scales.T)
    return layer, d.dense()


@positive("bytes [K/2, N], pairs along K, zeros in bytes along N")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        q = torch.stack((m.packed & 15, m.packed >> 4), dim=1).view(-1, m.group, m.N)
        z = torch.stack((m.zeros & 15, m.zeros >> 4), dim=2).view(-1, 1, m.N)
        return ((q.to(m.dtype) - z.to(m.dtype)) * m.scales[:, None]).view(m.K, m.N)

    packed, zeros = pack(d.codes.T, 0, torch.uint8), pack(d.zeros.T, 1, torch.uint8)
    return Layer(d, dequant, matmul=times_kn, packed=packed, zeros=zeros, scales=d.scales.T), d.dense(d.zeros)
