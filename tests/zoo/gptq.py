"""GPTQ: int32 words along K, low bits first, [K/8, N]; scales [K/G, N]; zeros packed along N, [K/G, N/8].

g_idx int32 [K] gives the group of a column. The first format stores zero - 1, and its readers differ in what a stored
15 is: 16 or 0. The second format stores the zero itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.base import Draw, Layer, Made, either, pack, positive, times_kn

SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)

Zeros = Callable[[Tensor], Tensor]
ZEROS: dict[str, tuple[Zeros, Zeros]] = {
    "stored zeros": (lambda z: z & 15, lambda z: z),
    "zeros (z & 15) + 1": (lambda z: (z & 15) + 1, lambda z: z + 1),
    "zeros (z + 1) & 15": (lambda z: (z + 1) & 15, lambda z: (z + 1) % 16),
}
"""What a reader does to shifted words, and what a stored 0..15 means."""


def tensors(d: Draw, g_idx: Tensor | None) -> dict[str, Tensor]:
    found = {"qweight": pack(d.codes.T, 0), "qzeros": pack(d.zeros.T, 1), "scales": d.scales.T}
    return found if g_idx is None else {**found, "g_idx": g_idx.int()}


def g_idx_of(d: Draw, act_order: bool) -> Tensor:
    return d.g_idx if act_order else torch.arange(d.K) // d.group


def shift_tables(d: Draw, zeros: tuple[Zeros, Zeros], act_order: bool) -> Made:
    """As in GPTQModel's TorchLinear: the tables of shifts are buffers, one for each axis."""
    read, meaning = zeros
    g_idx = g_idx_of(d, act_order)

    def dequant(m: Any) -> Tensor:
        z = torch.bitwise_right_shift(m.qzeros.unsqueeze(2).expand(-1, -1, 8), m.wf_zero).to(torch.int8)
        z = read(z).reshape(m.qzeros.shape[0], -1)[:, : m.N]
        g = m.g_idx.long()
        w = torch.bitwise_right_shift(m.qweight.unsqueeze(1).expand(-1, 8, -1), m.wf_neg_one).to(torch.int8)
        w = torch.bitwise_and(w, 15).reshape(m.K, m.N)
        return m.scales[g] * (w[: m.K] - z[g])

    def matmul(m: Any, x: Tensor, w: Tensor) -> Tensor:
        return torch.matmul(x.reshape(-1, m.K), w).reshape(*x.shape[:-1], m.N)

    tables = {"wf_zero": SHIFTS.view(1, 1, 8), "wf_neg_one": SHIFTS.view(1, 8, 1)}
    layer = Layer(d, dequant, matmul=matmul, **tensors(d, g_idx), **tables)
    return layer, d.dense(meaning(d.zeros), g_idx=g_idx)


def table_attribute(d: Draw, zeros: tuple[Zeros, Zeros], act_order: bool) -> Made:
    """As in AutoGPTQ's cuda kernel: one table of shifts, a plain attribute, which state_dict() does not see."""
    read, meaning = zeros
    g_idx = g_idx_of(d, act_order)

    def dequant(m: Any) -> Tensor:
        z = torch.unsqueeze(m.qzeros, 2).expand(-1, -1, 8)
        z = read(torch.bitwise_right_shift(z, m.wf.unsqueeze(0)).to(torch.int8)).reshape(m.scales.shape)
        w = torch.unsqueeze(m.qweight, 1).expand(-1, 8, -1)
        w = torch.bitwise_and(torch.bitwise_right_shift(w, m.wf.unsqueeze(-1)).to(torch.int8), 15)
        w = w.reshape(w.shape[0] * w.shape[1], w.shape[2])
        return m.scales[m.g_idx.long()] * (w - z[m.g_idx.long()])

    def matmul(m: Any, x: Tensor, w: Tensor) -> Tensor:
        return torch.matmul(x.reshape(-1, x.shape[-1]), w).to(x.dtype).reshape((*x.shape[:-1], m.N))

    layer = Layer(d, dequant, matmul=matmul, **tensors(d, g_idx))
    layer.wf = SHIFTS.unsqueeze(0)
    return layer, d.dense(meaning(d.zeros), g_idx=g_idx)


def broadcast(d: Draw, zeros: tuple[Zeros, Zeros]) -> Made:
    """As in AutoGPTQ's older kernel: no g_idx, groups by reshape."""
    read, meaning = zeros

    def dequant(m: Any) -> Tensor:
        z = torch.unsqueeze(m.qzeros, 2).expand(-1, -1, 8)
        z = read(torch.bitwise_right_shift(z, m.wf.unsqueeze(0)).to(torch.int8)).reshape(-1, 1, m.N)
        scales = m.scales.reshape(-1, 1, m.N)
        w = torch.unsqueeze(m.qweight, 1).expand(-1, 8, -1)
        w = torch.bitwise_and(torch.bitwise_right_shift(w, m.wf.unsqueeze(-1)).to(torch.int8), 15)
        w = w.reshape(-1, m.group, m.N)
        return (scales * (w - z)).reshape(m.K, m.N)

    layer = Layer(d, dequant, matmul=times_kn, **tensors(d, None))
    layer.wf = SHIFTS.unsqueeze(0)
    return layer, d.dense(meaning(d.zeros))


for name, zeros in ZEROS.items():
    positive(f"gptq shift tables, {name}", core=True)(partial(shift_tables, zeros=zeros, act_order=False))
    positive(f"gptq shift tables, {name}, act-order", core=True)(partial(shift_tables, zeros=zeros, act_order=True))
    positive(f"gptq table attribute, {name}")(partial(table_attribute, zeros=zeros, act_order=False))
    positive(f"gptq table attribute, {name}, act-order")(partial(table_attribute, zeros=zeros, act_order=True))
    positive(f"gptq groups by reshape, {name}")(partial(broadcast, zeros=zeros))


@positive("gptq symmetric: every stored zero is 7")
def _(d: Draw) -> Made:
    d.zeros = torch.full_like(d.zeros, 7)
    return shift_tables(d, ZEROS["zeros (z & 15) + 1"], act_order=False)


@positive("gptq one group a row")
def _(d: Draw) -> Made:
    return shift_tables(Draw.channelwise(d), ZEROS["zeros (z & 15) + 1"], act_order=False)


@positive("gptq transposed for linear, repeat_interleave, no zeros")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        w = (m.qweight[:, None, :] >> torch.arange(0, 32, 4)[None, :, None]) & 15
        w = w.reshape(m.K, m.N).to(m.dtype) - 8
        return (w * m.scales.repeat_interleave(m.group, dim=0)).t()

    return Layer(d, dequant, qweight=pack(d.codes.T, 0), scales=d.scales.T), d.dense()


@either("gptq act-order, rows gathered from the dequantised weight")
def _(d: Draw) -> Made:
    """Stored with the groups made contiguous, as exllama's loader does, and brought back by index."""
    order = torch.argsort(d.g_idx, stable=True)

    def dequant(m: Any) -> Tensor:
        w = (m.qweight[:, None, :] >> SHIFTS[:, None]) & 15
        w = (w.reshape(-1, m.group, m.N) - 8) * m.scales[:, None, :]
        return w.reshape(m.K, m.N)[m.inverse]

    stored = d.codes[:, order]
    layer = Layer(
        d, dequant, matmul=times_kn, qweight=pack(stored.T, 0), scales=d.scales.T, inverse=torch.argsort(order)
    )
    return layer, d.dense(g_idx=d.g_idx)


@positive("gptq act-order, the activation's columns permuted")
def _(d: Draw) -> Made:
    order = torch.argsort(d.g_idx, stable=True)

    def dequant(m: Any) -> Tensor:
        w = (m.qweight[:, None, :] >> SHIFTS[:, None]) & 15
        return ((w.reshape(-1, m.group, m.N) - 8) * m.scales[:, None, :]).reshape(m.K, m.N)

    def matmul(m: Any, x: Tensor, w: Tensor) -> Tensor:
        return x[..., m.order] @ w

    layer = Layer(d, dequant, matmul=matmul, qweight=pack(d.codes[:, order].T, 0), scales=d.scales.T, order=order)
    return layer, d.dense(g_idx=d.g_idx)
