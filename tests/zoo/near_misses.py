"""Weights that look like groups of int4 and are not: one thing is off, and a rewrite would give another result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.base import Build, Draw, Layer, Made, negative, pack, times_kn
from zoo.gptq import ZEROS, shift_tables


def both(packed: Tensor, dim: int = -1) -> Tensor:
    """uint8 codes [..., K/2, 2] of bytes, low nibble first."""
    return torch.stack((packed & 15, packed >> 4), dim=dim)


def codes(m: Any) -> Tensor:
    return both(m.packed).view(m.N, m.K)


def scaled(m: Any, q: Tensor) -> Tensor:
    return (q.reshape(m.N, -1, m.group).to(m.dtype) * m.scales.unsqueeze(-1)).view(m.N, m.K)


Meaning = Callable[[Draw], Tensor]


def misread(name: str, reason: str, meaning: Meaning) -> Callable[[Callable[[Any], Tensor]], Build]:
    """Registers values(m), which reads the codes in ``m.packed`` (pairs along K, low first) as ``meaning(d)``."""

    def register(values: Callable[[Any], Tensor]) -> Build:
        @negative(name, reason)
        def build(d: Draw) -> Made:
            layer = Layer(d, lambda m: scaled(m, values(m)), packed=pack(d.codes, 1, torch.uint8), scales=d.scales)
            return layer, d.dense(0, codes=meaning(d))

        return build

    return register


def signed_columns(d: Draw, columns: Tensor) -> Tensor:
    """Codes, in two's complement where ``columns`` [K] says so."""
    return torch.where(columns & (d.codes > 7), d.codes - 16, d.codes)


BOOK = "code book|affine|codes|depends on where|bit order"


@misread("masked with 7", BOOK, lambda d: d.codes % 8 - 8)
def _(m: Any) -> Tensor:
    return torch.stack((m.packed & 7, (m.packed >> 4) & 7), dim=-1).to(torch.int8) - 8


@misread("the high nibble masked with 7", BOOK, lambda d: d.codes % torch.tensor([16, 8] * (d.K // 2)) - 8)
def _(m: Any) -> Tensor:
    return torch.stack((m.packed & 15, (m.packed >> 4) & 7), dim=-1).to(torch.int8) - 8


@misread("codes clamped to 1..15", BOOK, lambda d: d.codes.clamp(min=1) - 8)
def _(m: Any) -> Tensor:
    return codes(m).clamp(min=1).to(torch.int8) - 8


@misread("values clamped to -7..7", BOOK, lambda d: (d.codes - 8).clamp(min=-7))
def _(m: Any) -> Tensor:
    return (codes(m).to(torch.int8) - 8).clamp(-7, 7)


@misread("one entry of the code book is another", BOOK, lambda d: torch.where(d.codes == 3, 4, d.codes) - 8)
def _(m: Any) -> Tensor:
    q = codes(m)
    return torch.where(q == 3, 4, q).to(torch.int8) - 8


@misread("shifted by 3", BOOK, lambda d: _shifted_by_3(d) - 8)
def _(m: Any) -> Tensor:
    return torch.stack((m.packed & 15, (m.packed >> 3) & 15), dim=-1).to(torch.int8) - 8


def _shifted_by_3(d: Draw) -> Tensor:
    low, high = d.codes[:, ::2], d.codes[:, 1::2]
    return torch.stack((low, (low + 16 * high) // 8 % 16), dim=-1).view(d.N, d.K)


@misread("the low nibble is read twice", BOOK + "|nibble", lambda d: d.codes[:, ::2].repeat_interleave(2, 1) - 8)
def _(m: Any) -> Tensor:
    return (m.packed & 15).repeat_interleave(2, dim=1).to(torch.int8) - 8


@misread("one column is read twice", BOOK + "|nibble|column", lambda d: d.codes[:, _twice(d.K)] - 8)
def _(m: Any) -> Tensor:
    return (codes(m).to(torch.int8) - 8)[:, _twice(m.K)]


def _twice(n: int) -> Tensor:
    """0, 1, 2, 3, 4, 4, 6, ...: column 5 is lost."""
    columns = torch.arange(n)
    return torch.where(columns == 5, 4, columns)


@misread("only high nibbles are signed", BOOK, lambda d: signed_columns(d, torch.arange(d.K) % 2 == 1))
def _(m: Any) -> Tensor:
    """The usual bug with int8 storage: its shift carries the sign down, the mask does not."""
    packed = m.packed.view(torch.int8)
    return torch.stack((packed & 15, packed >> 4), dim=-1)


@misread("one column is signed", BOOK, lambda d: signed_columns(d, torch.arange(d.K) == 17))
def _(m: Any) -> Tensor:
    q = codes(m).to(torch.int8)
    return torch.where((torch.arange(m.K) == 17) & (q > 7), q - 16, q)


@misread(
    "the zero of one column is another", "zero|group", lambda d: d.codes - torch.where(torch.arange(d.K) == 5, 7, 8)
)
def _(m: Any) -> Tensor:
    return codes(m) - torch.where(torch.arange(m.K) == 5, 7, 8)


@misread("nf4 code book", BOOK, lambda d: NF4.double()[d.codes])
def _(m: Any) -> Tensor:
    return NF4[codes(m).long()]


@misread("fp4 code book", BOOK, lambda d: FP4.double()[d.codes])
def _(m: Any) -> Tensor:
    return FP4[codes(m).long()]


NF4 = torch.tensor([-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
                    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0])  # fmt: skip
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@misread("squared values", BOOK, lambda d: (d.codes - 8) ** 2)
def _(m: Any) -> Tensor:
    return (codes(m).to(torch.int8) - 8).to(m.dtype) ** 2


def changed(name: str, reason: str, change: Callable[..., Tensor]) -> None:
    """Registers a change of the finished weight, ``change(w, m)``; the dense weight is changed by the same function.

    m.mask [N, K] is 1 or 0, m.column [K] and m.extra [N, K] are floats.
    """

    @negative(name, reason)
    def build(d: Draw) -> Made:
        layer = Layer(
            d,
            lambda m: change(scaled(m, codes(m).to(torch.int8) - 8), m),
            packed=pack(d.codes, 1, torch.uint8),
            scales=d.scales,
            mask=torch.randint(2, (d.N, d.K), generator=d.generator).to(d.dtype),
            column=d.floats(d.K),
            extra=d.floats(d.N, d.K),
        )
        return layer, change(d.dense(), layer)


changed("a mask of 0 and 1", "scale|group|mask", lambda w, m: w * m.mask)
changed("masked_fill", "scale|group|mask|affine|code", lambda w, m: w.masked_fill(m.mask == 0, 0.0))
changed("columns scaled: scales vary inside a group", "scale.*group|group.*scale", lambda w, m: w * m.column)
changed("columns divided", "scale.*group|group.*scale", lambda w, m: w / m.column)
changed("a full matrix added", "affine|zero|added|group", lambda w, m: w + m.extra)
changed("a row added", "affine|zero|added|group", lambda w, m: w + m.column)
changed("relu", BOOK, lambda w, m: w.relu())
changed("absolute value", BOOK, lambda w, m: w.abs())
changed("tanh", BOOK, lambda w, m: w.tanh())
changed("clamped to what float8 holds", BOOK, lambda w, m: w.clamp(-0.2, 0.2))
changed("one element set", "affine|zero|scale|code|group", lambda w, m: torch.where(_first(m), 0.0, w))
changed("lower triangle", "scale|group|mask", lambda w, m: w.tril())
changed("rows divided by their norm", "scale|code|affine|mixes", lambda w, m: w / w.norm(dim=1, keepdim=True))
changed("columns averaged in pairs", BOOK + "|scale|group", lambda w, m: (w + w.roll(1, dims=1)) / 2)
changed("the cumulative sum", BOOK + "|scale|group", lambda w, m: w.cumsum(dim=1))


def _first(m: Any) -> Tensor:
    return torch.arange(m.N * m.K).view(m.N, m.K) == 0


def coarse(name: str, grid: Callable[[Tensor], Tensor]) -> None:
    """Registers a weight that is rounded again, to a grid that is much coarser than its dtype."""

    @negative(name, BOOK + "|round")
    def build(d: Draw) -> Made:
        layer = Layer(
            d,
            lambda m: grid(scaled(m, codes(m).to(torch.int8) - 8)),
            packed=pack(d.codes, 1, torch.uint8),
            scales=d.scales,
        )
        return layer, grid(d.dense().to(d.dtype)).double()


coarse("rounded through int8", lambda w: (w * 127).round().to(torch.int8).to(w.dtype) / 127)
coarse("rounded through float8", lambda w: w.to(torch.float8_e4m3fn).to(w.dtype))


@negative("scales that depend on the code", BOOK + "|scale")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        q = (codes(m).to(torch.int8) - 8).view(m.N, -1, m.group)
        return (q * torch.where(q > 0, m.up[..., None], m.down[..., None])).view(m.N, m.K)

    down = d.floats(*d.scales.shape)
    dense = torch.where(d.codes > 8, d.dense(), d.dense(scales=down))
    return Layer(d, dequant, packed=pack(d.codes, 1, torch.uint8), up=d.scales, down=down), dense


@negative("groups along N", "group")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        q = codes(m).view(-1, 8, m.K).to(m.dtype) - 8
        return (q * m.scales.unsqueeze(1)).view(m.N, m.K)

    scales = d.floats(d.N // 8, d.K)
    layer = Layer(d, dequant, packed=pack(d.codes, 1, torch.uint8), scales=scales)
    return layer, (d.codes - 8) * scales.double().repeat_interleave(8, 0)


@negative("hqq axis 0: groups along N", "group", core=True)
def _(d: Draw) -> Made:
    """The grouped matrix is [G, N*K/G]: a scale belongs to every (N*K/G)th value."""

    def dequant(m: Any) -> Tensor:
        step = m.W_q.shape[0]
        out = torch.empty([2 * step, m.W_q.shape[1]], dtype=m.dtype)
        out[:step] = (m.W_q & 0b11110000) >> 4
        out[step:] = m.W_q & 0b00001111
        return ((out - m.zero) * m.scale).reshape(m.N, m.K)

    first, second = d.codes.view(d.group, -1).chunk(2)
    scale, zero = d.scales.view(1, -1), d.zeros.view(1, -1).to(d.dtype) + 0.5
    dense = (d.codes.view(d.group, -1) - zero.double()) * scale.double()
    return Layer(d, dequant, W_q=(first * 16 + second).to(torch.uint8), zero=zero, scale=scale), dense.view(d.N, d.K)


@negative("gptq groups of unequal size", "group", core=True)
def _(d: Draw) -> Made:
    d.g_idx[d.g_idx == 1] = 0
    return shift_tables(d, ZEROS["zeros (z & 15) + 1"], act_order=True)


@negative("gptq random g_idx", "group")
def _(d: Draw) -> Made:
    d.g_idx = torch.randint(d.K // d.group, (d.K,), generator=d.generator)
    return shift_tables(d, ZEROS["stored zeros"], act_order=True)


@negative("3-bit codes, ten to a word", BOOK)
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        q = (m.packed.unsqueeze(-1) >> torch.arange(0, 30, 3, dtype=torch.int32)) & 7
        return scaled(m, q.flatten(1)[:, : m.K] - 4)

    values = d.codes % 8
    padded = torch.nn.functional.pad(values, (0, -d.K % 10)).view(d.N, -1, 10)
    packed = (padded << torch.arange(0, 30, 3)).sum(-1).int()
    return Layer(d, dequant, packed=packed, scales=d.scales), d.dense(4, codes=values)


@negative("2-bit codes with a ternary code book", BOOK)
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        table = torch.tensor([0.0, 1.0, -1.0, 0.0])
        q = (m.packed.unsqueeze(-1) >> torch.arange(0, 8, 2, dtype=torch.uint8)) & 3
        return scaled(m, table[q.flatten(1).long()])

    values = d.codes % 3
    packed = (values.view(d.N, -1, 4) << torch.arange(0, 8, 2)).sum(-1).to(torch.uint8)
    return Layer(d, dequant, packed=packed, scales=d.scales), d.dense(0, codes=(values + 1) % 3 - 1)


def _awq_wrong_order(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        q = (m.qweight[:, :, None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
        q = q[..., [0, 4, 1, 5, 2, 6, 3, 3]].view(m.K, m.N) - 8
        return q * m.scales.repeat_interleave(m.group, dim=0)

    order = (0, 2, 4, 6, 1, 3, 5, 7)
    read = torch.arange(d.N).view(-1, 8)[:, [0, 1, 2, 3, 4, 5, 6, 6]].view(-1)
    layer = Layer(d, dequant, matmul=times_kn, qweight=pack(d.codes.T, 1, order=order), scales=d.scales.T)
    return layer, d.dense(codes=d.codes[read])


negative("awq order that loses a nibble", BOOK + "|nibble|column")(_awq_wrong_order)
