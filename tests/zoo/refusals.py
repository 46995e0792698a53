"""What must be left alone: values beyond 4 bits, scales stored otherwise, weights made of more than stored tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.base import Draw, Layer, Made, grouped, linear, negative, pack, positive


def codes(m: Any) -> Tensor:
    return torch.stack((m.packed & 15, m.packed >> 4), dim=-1)


def weight(m: Any) -> Tensor:
    return grouped(m, codes(m))


def packed(d: Draw) -> dict[str, Tensor]:
    return {"packed": pack(d.codes, 1, torch.uint8), "scales": d.scales}


@negative("int8, one scale a row", r"4 bits|beyond|-?\d+\.\.-?\d+", core=True)
def _(d: Draw) -> Made:
    """Weight-only int8, as it is."""
    values = torch.randint(-128, 128, (d.N, d.K), generator=d.generator)
    d = Draw.channelwise(d)
    layer = Layer(d, lambda m: m.q.to(m.dtype) * m.scales, q=values.to(torch.int8), scales=d.scales)
    return layer, d.dense(0, codes=values)


@negative("int8, one value beyond 4 bits", r"4 bits|beyond|-?\d+\.\.-?\d+")
def _(d: Draw) -> Made:
    values = d.codes - 8
    values[3, 5] = 8
    layer = Layer(d, lambda m: grouped(m, m.q, zeros=0), q=values.to(torch.int8), scales=d.scales)
    return layer, d.dense(0, codes=values)


@negative("uint8, one value is 16", r"4 bits|beyond|-?\d+\.\.-?\d+")
def _(d: Draw) -> Made:
    values = d.codes.clone()
    values[-1, -1] = 16
    return Layer(d, lambda m: grouped(m, m.q), q=values.to(torch.uint8), scales=d.scales), d.dense(codes=values)


@negative("int64, one value beyond 4 bits", r"4 bits|beyond|-?\d+\.\.-?\d+")
def _(d: Draw) -> Made:
    values = d.codes - 8
    values[3, 5] = 8
    layer = Layer(d, lambda m: grouped(m, m.q, zeros=0), q=values, scales=d.scales)
    return layer, d.dense(0, codes=values)


@negative("gguf q4_0: the scale is in the block's bytes", "scale|bytes", core=True)
def _(d: Draw) -> Made:
    """18 bytes a group of 32: a float16 scale, then the nibbles, first half of the group in the low ones."""

    def dequant(m: Any) -> Tensor:
        blocks = m.packed.reshape(-1).reshape(-1, 2 + m.group // 2)
        scale = blocks[:, :2].view(torch.float16).to(m.dtype)
        shift = torch.tensor((0, 4), dtype=torch.uint8).reshape(1, 1, -1, 1)
        q = (blocks[:, 2:].reshape(-1, 1, 1, m.group // 2) >> shift).reshape(-1, m.group) & 15
        return (scale * (q.to(torch.int8) - 8)).reshape(m.N, m.K)

    scales = d.scales.half()
    low, high = d.codes.view(-1, 2, d.group // 2).unbind(1)
    data = torch.cat((scales.view(-1, 1).view(torch.uint8), (low + 16 * high).to(torch.uint8)), dim=1)
    return Layer(d, dequant, packed=data.view(d.N, -1)), d.dense(scales=scales)


@negative("scales quantised again", "scale")
def _(d: Draw) -> Made:
    """The group's scale is a byte times a scale of the row."""

    def dequant(m: Any) -> Tensor:
        scales = (m.scales.to(m.dtype) - 128) * m.super_scales
        return ((codes(m).view(m.N, -1, m.group).to(m.dtype) - 8) * scales.unsqueeze(-1)).view(m.N, m.K)

    scales = torch.randint(0, 256, d.scales.shape, generator=d.generator)
    above = d.floats(d.N, 1) / 128
    layer = Layer(d, dequant, packed=pack(d.codes, 1, torch.uint8), scales=scales.to(torch.uint8), super_scales=above)
    return layer, d.dense(scales=(scales - 128) * above.double())


class ScaledAfter(Layer):
    """The weight is the bare codes; the scale of a row is applied to the result."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(self, x, self.dequant(self)) * self.scales.t()


@negative("scale after the matmul, int8 bytes", "scale", core=True)
def _(d: Draw) -> Made:
    d = Draw.channelwise(d)
    return ScaledAfter(d, lambda m: codes(m).view(m.N, m.K).to(m.dtype) - 8, **packed(d)), d.dense()


@negative("scale after the matmul, unpacked int8", "scale")
def _(d: Draw) -> Made:
    d = Draw.channelwise(d)
    return ScaledAfter(d, lambda m: m.q.to(m.dtype), q=(d.codes - 8).to(torch.int8), scales=d.scales), d.dense()


def from_words(m: Any, words: Tensor) -> Tensor:
    return ((words.unsqueeze(-1) >> torch.arange(0, 64, 4)) & 15).view(m.N, m.K)


@negative("scale after the matmul, int64 words", "scale")
def _(d: Draw) -> Made:
    """Nothing but int64 behind the weight, as behind positions; but these are unpacked."""
    d = Draw.channelwise(d)
    words = pack(d.codes, 1, torch.int64)
    return ScaledAfter(d, lambda m: from_words(m, m.packed).to(m.dtype) - 8, packed=words, scales=d.scales), d.dense()


class PartialSums(Layer):
    """A matmul for every group, and the scales on their results."""

    def forward(self, x: Tensor) -> Tensor:
        q = codes(self).view(self.N, -1, self.group).to(self.dtype) - 8
        parts = torch.einsum("...gk,ngk->...gn", x.unflatten(-1, (-1, self.group)), q)
        return torch.einsum("...gn,ng->...n", parts, self.scales)


@negative("scales on partial sums of the groups", "scale|form|batch|group|einsum")
def _(d: Draw) -> Made:
    return PartialSums(d, codes, **packed(d)), d.dense()


class FromActivation(Layer):
    """The weight depends on x."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(self, x, self.dequant(self) * x.abs().amax())

    def expected(self, x: Tensor, dense: Tensor) -> Tensor:
        return super().expected(x, dense * x.double().abs().amax())


@negative("a scale computed from the activation", "activation|argument|input|not a stored", core=True)
def _(d: Draw) -> Made:
    return FromActivation(d, weight, **packed(d)), d.dense()


class ChosenRows(Layer):
    """Rows of the weight are chosen by x, as experts are."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.K).sum(0)[: self.N].argsort()
        return linear(self, x, self.dequant(self)[rows])

    def expected(self, x: Tensor, dense: Tensor) -> Tensor:
        return super().expected(x, dense[x.reshape(-1, self.K).sum(0)[: self.N].argsort()])


@negative("rows chosen by the activation", "activation|argument|input|not a stored")
def _(d: Draw) -> Made:
    return ChosenRows(d, weight, **packed(d)), d.dense()


@negative("packed weight is an argument", "argument|activation|input|not a stored", core=True)
def _(d: Draw) -> Made:
    def dequant(m: Any, given: Tensor) -> Tensor:
        return grouped(m, torch.stack((given & 15, given >> 4), dim=-1))

    return Layer(d, dequant, arguments=(packed(d)["packed"],), scales=d.scales), d.dense()


@negative("packed weight is an argument, int64 words", "argument|activation|input|not a stored")
def _(d: Draw) -> Made:
    def dequant(m: Any, given: Tensor) -> Tensor:
        return grouped(m, from_words(m, given))

    return Layer(d, dequant, arguments=(pack(d.codes, 1, torch.int64),), scales=d.scales), d.dense()


@negative("scales are an argument", "argument|activation|input|not a stored")
def _(d: Draw) -> Made:
    def dequant(m: Any, scales: Tensor) -> Tensor:
        q = codes(m).view(m.N, -1, m.group).to(m.dtype) - 8
        return (q * scales.unsqueeze(-1)).view(m.N, m.K)

    return Layer(d, dequant, arguments=(d.scales,), packed=packed(d)["packed"]), d.dense()


WRITTEN = "written|mutated|changed"


@negative("packed weight written in the graph: xor in place, twice", WRITTEN, core=True)
def _(d: Draw) -> Made:
    """The value is the same after every call, but it is not what the buffer held before the graph ran."""

    def dequant(m: Any) -> Tensor:
        m.packed.bitwise_xor_(255)
        w = grouped(m, 15 - codes(m))
        m.packed.bitwise_xor_(255)
        return w

    return Layer(d, dequant, **packed(d)), d.dense()


@negative("packed weight written after its use: inverted, then back", WRITTEN)
def _(d: Draw) -> Made:
    """What the op reads must not be what a later operation leaves behind, in whatever order a compiler puts them."""

    def matmul(m: Any, x: Tensor, w: Tensor) -> Tensor:
        y = linear(m, x, w)
        m.packed.bitwise_xor_(255)
        m.packed.bitwise_xor_(255)
        return y

    return Layer(d, weight, matmul=matmul, **packed(d)), d.dense()


@negative("packed weight copied into in the graph", WRITTEN)
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        m.packed.copy_(m.source)
        return weight(m)

    found = packed(d)
    return Layer(
        d, dequant, source=found["packed"], packed=torch.zeros_like(found["packed"]), scales=d.scales
    ), d.dense()


@negative("scales written through a view", WRITTEN)
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        m.scales.view(-1)[0:1].fill_(0.5)
        return weight(m)

    scales = d.scales.clone()
    scales[0, 0] = 0.5
    return Layer(d, dequant, **packed(d)), d.dense(scales=scales)


@negative("the weight on the left: (w @ x.T).T", "left", leading=((5,),))
def _(d: Draw) -> Made:
    return Layer(d, weight, matmul=lambda m, x, w: (w @ x.T).T, **packed(d)), d.dense()


@negative("addmm with other factors", "alpha|beta|factor", leading=((5,),))
def _(d: Draw) -> Made:
    def matmul(m: Any, x: Tensor, w: Tensor) -> Tensor:
        return torch.addmm(m.added, x, w.t(), beta=0.5, alpha=2)

    layer = Layer(d, weight, matmul=matmul, bias=d.floats(d.N), **packed(d))
    layer.added = layer.bias * 2
    return layer, d.dense() * 2


@negative("a low-rank product added to the weight", "matmul|affine|added")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        return weight(m) + m.b @ m.a

    b, a = d.floats(d.N, 4), d.floats(4, d.K)
    return Layer(d, dequant, b=b, a=a, **packed(d)), d.dense() + b.double() @ a.double()


class Noisy(Layer):
    """Another weight at every call."""

    def expected(self, x: Tensor, dense: Tensor) -> Tensor:
        raise NotImplementedError("a random weight has no expected product")


@negative("noise on the weight", "random", core=True)
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        return weight(m) + torch.rand(m.N, m.K, dtype=m.dtype)

    return Noisy(d, dequant, **packed(d)), d.dense()


@negative("dropout on the weight", "random")
def _(d: Draw) -> Made:
    return Noisy(d, lambda m: F.dropout(weight(m), p=0.25, training=True), **packed(d)), d.dense()


@negative("scales that are trained", "grad|train", core=True)
def _(d: Draw) -> Made:
    """A rewrite would lose their gradient."""
    return trained(Layer(d, weight, **packed(d))), d.dense()


@positive("scales that could be trained, under no_grad")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        with torch.no_grad():
            return weight(m)

    return trained(Layer(d, dequant, **packed(d))), d.dense()


def trained(layer: Layer) -> Layer:
    scales = layer.scales
    del layer.scales
    layer.scales = torch.nn.Parameter(scales)
    return layer
