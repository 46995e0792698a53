"""AWQ: int32 words along N, [K, N/8]; scales [K/G, N]; zeros [K/G, N/8].

Nibble i of a word holds column ORDER[i] of its eight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.base import Draw, Layer, Made, pack, positive, times_kn

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
REVERSE = [0, 4, 1, 5, 2, 6, 3, 7]


def tensors(d: Draw) -> dict[str, Tensor]:
    return {"qweight": pack(d.codes.T, 1, order=ORDER), "qzeros": pack(d.zeros.T, 1, order=ORDER), "scales": d.scales.T}


def columns(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.int32).view(-1, 8)[:, REVERSE].view(-1)


@positive("awq int8, reordered, then masked", core=True)
def _(d: Draw) -> Made:
    """As AutoAWQ reads it."""

    def dequant(m: Any) -> Tensor:
        shifts = torch.arange(0, 32, 4)
        w = torch.bitwise_right_shift(m.qweight[:, :, None], shifts[None, None, :]).to(torch.int8).view(m.K, -1)
        z = torch.bitwise_right_shift(m.qzeros[:, :, None], shifts[None, None, :]).to(torch.int8)
        z = z.view(m.qzeros.shape[0], -1)
        z, w = z[:, columns(m.N)], w[:, columns(m.N)]
        w, z = torch.bitwise_and(w, 15), torch.bitwise_and(z, 15)
        scales = m.scales.repeat_interleave(m.group, dim=0)
        return (w - z.repeat_interleave(m.group, dim=0)) * scales

    return Layer(d, dequant, matmul=times_kn, **tensors(d)), d.dense(d.zeros)


@positive("awq int64, masked, then reordered")
def _(d: Draw) -> Made:
    """As GPTQModel reads it."""

    def codes(m: Any, words: Tensor) -> Tensor:
        shifts = torch.arange(0, 32, 4)
        unpacked = torch.bitwise_right_shift(words[:, :, None], shifts[None, None, :]).view(words.shape[0], -1) & 15
        return torch.bitwise_and(unpacked[..., : m.N][:, columns(m.N)], 15)

    def dequant(m: Any) -> Tensor:
        w, z = codes(m, m.qweight), codes(m, m.qzeros)
        scales = m.scales.repeat_interleave(m.group, dim=0)
        return (w - z.repeat_interleave(m.group, dim=0)) * scales

    def matmul(m: Any, x: Tensor, w: Tensor) -> Tensor:
        return torch.matmul(x.reshape(-1, x.shape[-1]), w).reshape((*x.shape[:-1], m.N))

    return Layer(d, dequant, matmul=matmul, **tensors(d)), d.dense(d.zeros)


@positive("awq strided writes")
def _(d: Draw) -> Made:
    def codes(words: Tensor) -> Tensor:
        out = torch.empty(words.shape[0], words.shape[1] * 8, dtype=torch.int32)
        for i, column in enumerate(ORDER):
            out[:, column::8] = (words >> (4 * i)) & 0xF
        return out

    def dequant(m: Any) -> Tensor:
        q = codes(m.qweight).view(-1, m.group, m.N)
        return ((q - codes(m.qzeros).unsqueeze(1)) * m.scales.unsqueeze(1)).view(m.K, m.N)

    return Layer(d, dequant, matmul=times_kn, **tensors(d)), d.dense(d.zeros)


@positive("awq shifts in their order, transposed for linear")
def _(d: Draw) -> Made:
    """The table of shifts already undoes the order, so nothing is gathered."""

    def codes(m: Any, words: Tensor) -> Tensor:
        return ((words.unsqueeze(-1) >> m.shifts) & 15).flatten(1)

    def dequant(m: Any) -> Tensor:
        w, z = codes(m, m.qweight).t(), codes(m, m.qzeros).t()
        w = w.reshape(m.N, -1, m.group)
        return ((w - z.unsqueeze(-1)) * m.scales.t().unsqueeze(-1)).reshape(m.N, m.K)

    shifts = torch.tensor([4 * i for i in REVERSE], dtype=torch.int32)
    return Layer(d, dequant, shifts=shifts, **tensors(d)), d.dense(d.zeros)


@positive("awq symmetric")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        w = (m.qweight[:, :, None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
        w = w[..., REVERSE].view(m.K, m.N) - 8
        return w.to(m.dtype) * m.scales.repeat_interleave(m.group, dim=0)

    found = tensors(d)
    return Layer(d, dequant, matmul=times_kn, qweight=found["qweight"], scales=found["scales"]), d.dense()


@positive("awq one group a row")
def _(d: Draw) -> Made:
    d = Draw.channelwise(d)

    def dequant(m: Any) -> Tensor:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        w, z = ((words[..., None] >> shifts & 15)[..., REVERSE].view(-1, m.N) for words in (m.qweight, m.qzeros))
        return (w - z) * m.scales

    return Layer(d, dequant, matmul=times_kn, **tensors(d)), d.dense(d.zeros)
