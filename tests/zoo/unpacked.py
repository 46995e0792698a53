"""One integer a code: int8 -8..7, bytes 0..15 with zero points, wider integers.

That they fit 4 bits is known from the values alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed.dequantize_per_channel_group
from torch import Tensor

from zoo.base import Draw, Layer, Made, positive, times_kn


def blocks(m: Any, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As torchao's dequantize_affine: scales and zeros brought to [N, K/G, 1]."""
    q = m.q.view(m.N, m.K // m.group, m.group).to(dtype)
    scale = m.scales.view(m.N, m.K // m.group, 1)
    if zeros is not None:
        q = q - zeros.view(m.N, m.K // m.group, 1).to(dtype)
    return (q * scale).view(m.N, m.K).to(m.dtype)


@positive("unpacked int8 -8..7, blocks, zeros that are all 0", core=True)
def _(d: Draw) -> Made:
    """As torchao's symmetric int4: zero points are kept, and are 0."""
    q, zeros = (d.codes - 8).to(torch.int8), torch.zeros_like(d.zeros).to(torch.int8)
    return Layer(d, lambda m: blocks(m, m.zeros, m.dtype), q=q, zeros=zeros, scales=d.scales), d.dense()


@positive("unpacked int8 -8..7, blocks, zeros -8..7")
def _(d: Draw) -> Made:
    q, zeros = (d.codes - 8).to(torch.int8), (d.zeros - 8).to(torch.int8)
    return Layer(d, lambda m: blocks(m, m.zeros, m.dtype), q=q, zeros=zeros, scales=d.scales), d.dense(d.zeros)


@positive("unpacked int8 -8..7, no zeros")
def _(d: Draw) -> Made:
    q = (d.codes - 8).to(torch.int8)
    return Layer(d, lambda m: blocks(m, None, m.dtype), q=q, scales=d.scales), d.dense()


@positive("unpacked int8 -8..7, one scale a row, mul after to")
def _(d: Draw) -> Made:
    d = Draw.channelwise(d)
    q = (d.codes - 8).to(torch.int8)
    return Layer(d, lambda m: m.q.to(m.dtype) * m.scales, q=q, scales=d.scales), d.dense()


@positive("unpacked uint8 0..15, int32 zeros")
def _(d: Draw) -> Made:
    q, zeros = d.codes.to(torch.uint8), d.zeros.int()
    return Layer(d, lambda m: blocks(m, m.zeros, m.dtype), q=q, zeros=zeros, scales=d.scales), d.dense(d.zeros)


@positive("unpacked uint8 0..15, int8 zeros, computed in float32")
def _(d: Draw) -> Made:
    q, zeros = d.codes.to(torch.uint8), d.zeros.to(torch.int8)
    return Layer(d, lambda m: blocks(m, m.zeros, torch.float32), q=q, zeros=zeros, scales=d.scales), d.dense(d.zeros)


@positive("unpacked uint8 0..15, constant zero 8")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        return ((m.q.to(torch.int8) - 8).unflatten(1, (-1, m.group)) * m.scales[..., None]).flatten(1)

    return Layer(d, dequant, q=d.codes.to(torch.uint8), scales=d.scales), d.dense()


@positive("unpacked uint8 0..15, float zeros")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        return ((m.q.view(m.N, -1, m.group) - m.zeros[..., None]) * m.scales[..., None]).view(m.N, m.K)

    zeros = (d.zeros + 0.375).to(d.dtype)
    return Layer(d, dequant, q=d.codes.to(torch.uint8), zeros=zeros, scales=d.scales), d.dense(zeros)


@positive("unpacked int32 0..15, zeros 1..16")
def _(d: Draw) -> Made:
    zeros = (d.zeros + 1).to(torch.uint8)
    layer = Layer(d, lambda m: blocks(m, m.zeros, m.dtype), q=d.codes.int(), zeros=zeros, scales=d.scales)
    return layer, d.dense(d.zeros + 1)


@positive("unpacked int64 [K, N]")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        return (m.q - 8) * m.scales.repeat_interleave(m.group, dim=0)

    return Layer(d, dequant, matmul=times_kn, q=d.codes.T, scales=d.scales.T), d.dense()


@positive("unpacked int8 -8..7, act-order", core=True)
def _(d: Draw) -> Made:
    q = (d.codes - 8).to(torch.int8)
    layer = Layer(d, lambda m: m.q * m.scales[:, m.g_idx], q=q, scales=d.scales, g_idx=d.g_idx)
    return layer, d.dense(g_idx=d.g_idx)


@positive("PT2E dequantize_per_channel_group, zeros that are all 0", core=True)
def _(d: Draw) -> Made:
    q, zeros = (d.codes - 8).to(torch.int8), torch.zeros_like(d.zeros).to(torch.int8)
    scales = d.scales.float()
    return Layer(d, per_channel_group, q=q, zeros=zeros, scales=scales), d.dense()


@positive("PT2E dequantize_per_channel_group, zeros -8..7")
def _(d: Draw) -> Made:
    q, zeros = (d.codes - 8).to(torch.int8), (d.zeros - 8).to(torch.int8)
    scales = d.floats(*d.scales.shape, dtype=torch.float32)
    return Layer(d, per_channel_group, q=q, zeros=zeros, scales=scales), d.dense(d.zeros, scales=scales)


def per_channel_group(m: Any) -> Tensor:
    return torch.ops.quantized_decomposed.dequantize_per_channel_group(
        m.q, m.scales, m.zeros, -8, 7, torch.int8, m.group, m.dtype
    )


@positive("PT2E dequantize_per_channel")
def _(d: Draw) -> Made:
    d = Draw.channelwise(d)

    def dequant(m: Any) -> Tensor:
        return torch.ops.quantized_decomposed.dequantize_per_channel(
            m.q, m.scales, m.zeros, 0, -8, 7, torch.int8, out_dtype=m.dtype
        )

    tensors = {"q": (d.codes - 8).to(torch.int8), "zeros": (d.zeros - 8).view(-1), "scales": d.scales.float().view(-1)}
    return Layer(d, dequant, **tensors), d.dense(d.zeros)
