"""One dequantisation and the many ways to multiply by it; and modules with several layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.base import Build, Draw, Layer, Made, either, grouped, linear, pack, positive


def nk(m: Any) -> Tensor:
    return grouped(m, torch.stack((m.packed & 15, m.packed >> 4), dim=-1))


def kn(m: Any) -> Tensor:
    """[K, N], by its own layout: pairs along N."""
    q = torch.stack((m.packed & 15, m.packed >> 4), dim=-1).view(-1, m.group, m.N)
    return ((q.to(m.dtype) - 8) * m.scales[:, None]).view(m.K, m.N)


def layer_nk(d: Draw, **fields: Any) -> Layer:
    return Layer(d, fields.pop("dequant", nk), packed=pack(d.codes, 1, torch.uint8), scales=d.scales, **fields)


def layer_kn(d: Draw, **fields: Any) -> Layer:
    return Layer(d, kn, packed=pack(d.codes.T, 1, torch.uint8), scales=d.scales.T, **fields)


MATRIX, BATCH_1, BATCHES = ((5,),), ((1, 5),), ((2, 3),)

Matmul = Callable[[Any, Tensor, Tensor], Tensor]


def over_nk(name: str, bias: bool = False, **fields: Any) -> Callable[[Matmul], Build]:
    """Registers matmul(m, x, w) with w [N, K]."""

    def register(matmul: Matmul) -> Build:
        @positive(name, **fields)
        def build(d: Draw) -> Made:
            return layer_nk(d, matmul=matmul, bias=d.floats(d.N) if bias else None), d.dense()

        return build

    return register


def over_kn(name: str, bias: bool = False, **fields: Any) -> Callable[[Matmul], Build]:
    """Registers matmul(m, x, w) with w [K, N]."""

    def register(matmul: Matmul) -> Build:
        @positive(name, **fields)
        def build(d: Draw) -> Made:
            return layer_kn(d, matmul=matmul, bias=d.floats(d.N) if bias else None), d.dense()

        return build

    return register


over_nk("F.linear", core=True)(lambda m, x, w: F.linear(x, w))
over_nk("F.linear, bias by name", bias=True, core=True)(lambda m, x, w: F.linear(x, weight=w, bias=m.bias))
over_nk("torch._C._nn.linear")(lambda m, x, w: torch._C._nn.linear(x, w, None))
over_nk("x @ w.t()", core=True)(lambda m, x, w: x @ w.t())
over_nk("x @ w.T + bias", bias=True)(lambda m, x, w: x @ w.T + m.bias)
over_nk("torch.matmul(x, w.transpose(0, 1))")(lambda m, x, w: torch.matmul(x, w.transpose(0, 1)))
over_nk("x.matmul(w.mT)")(lambda m, x, w: x.matmul(w.mT))
over_nk("x.matmul(w.permute(1, 0).contiguous())")(lambda m, x, w: x.matmul(w.permute(1, 0).contiguous()))
over_nk("torch.mm(x, w.t())", leading=MATRIX)(lambda m, x, w: torch.mm(x, w.t()))
over_nk("torch.mm over flattened rows")(lambda m, x, w: torch.mm(x.reshape(-1, m.K), w.t()).view(*x.shape[:-1], m.N))
over_nk("torch.addmm(bias, x, w.t())", bias=True, leading=MATRIX, core=True)(
    lambda m, x, w: torch.addmm(m.bias, x, w.t())
)
over_nk("torch.bmm, batch 1", leading=BATCH_1)(lambda m, x, w: torch.bmm(x, w.t().unsqueeze(0)))
over_nk("torch.bmm, batch 1, transposed after", leading=BATCH_1)(
    lambda m, x, w: torch.bmm(x, w.unsqueeze(0).transpose(1, 2))
)
over_nk('einsum "bmk,nk->bmn"', leading=BATCHES)(lambda m, x, w: torch.einsum("bmk,nk->bmn", x, w))
over_nk('einsum "mk,nk->mn"', leading=MATRIX, core=True)(lambda m, x, w: torch.einsum("mk,nk->mn", x, w))
over_nk('einsum "nk,mk->mn", weight first', leading=MATRIX)(lambda m, x, w: torch.einsum("nk,mk->mn", w, x))
over_nk('einsum "...k,nk->...n"')(lambda m, x, w: torch.einsum("...k,nk->...n", x, w))
over_nk("F.linear of x scaled before")(lambda m, x, w: F.linear(x * 2, w) * 0.5)

over_kn("x @ w, w [K, N]", core=True)(lambda m, x, w: x @ w)
over_kn("torch.matmul(x, w), w [K, N]")(lambda m, x, w: torch.matmul(x, w))
over_kn("torch.matmul by name, w [K, N]")(lambda m, x, w: torch.matmul(input=x, other=w))
over_kn("torch.mm(x, w), w [K, N]", leading=MATRIX)(lambda m, x, w: torch.mm(x, w))
over_kn("x.mm(w), w [K, N]", leading=MATRIX)(lambda m, x, w: x.mm(w))
over_kn("torch.addmm(bias, x, w), w [K, N]", bias=True, leading=MATRIX)(lambda m, x, w: torch.addmm(m.bias, x, w))
over_kn("torch.bmm(x, w), w [1, K, N]", leading=BATCH_1)(lambda m, x, w: torch.bmm(x, w[None]))
over_kn('einsum "mk,kn->mn"', leading=MATRIX)(lambda m, x, w: torch.einsum("mk,kn->mn", x, w))
over_kn("F.linear(x, w.t()), w [K, N]", bias=True)(lambda m, x, w: F.linear(x, w.t(), m.bias))


@positive("dequantised in a helper that a helper calls")
def _(d: Draw) -> Made:
    def inner(packed: Tensor) -> Tensor:
        return torch.stack((packed & 15, packed >> 4), dim=-1)

    def outer(m: Any) -> Tensor:
        return grouped(m, inner(m.packed))

    return layer_nk(d, dequant=lambda m: outer(m)), d.dense()


@positive("tensors in a plain dict", core=True)
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        held = m.held
        q = torch.stack((held["packed"] & 15, held["packed"] >> 4), dim=-1).view(m.N, -1, m.group)
        return ((q - 8.0) * held["scales"].unsqueeze(-1)).to(m.dtype).view(m.N, m.K)

    layer = Layer(d, dequant)
    layer.held = {"packed": pack(d.codes, 1, torch.uint8), "scales": d.scales}
    return layer, d.dense()


@positive("under autocast", core=True)
def _(d: Draw) -> Made:
    def matmul(m: Any, x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(x, w)

    return layer_nk(d, matmul=matmul), d.dense()


@positive("under no_grad")
def _(d: Draw) -> Made:
    def dequant(m: Any) -> Tensor:
        with torch.no_grad():
            return nk(m)

    return layer_nk(d, dequant=dequant), d.dense()


class TwoUsers(Layer):
    """One dequantised weight, used twice."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.dequant(self)
        return torch.cat((linear(self, x, w), x.relu() @ w.t()), dim=-1)

    def expected(self, x: Tensor, dense: Tensor) -> Tensor:
        return torch.cat((x.double() @ dense.T, x.double().relu() @ dense.T), dim=-1)


@positive("one weight, two users", rewritten=2, core=True)
def _(d: Draw) -> Made:
    return TwoUsers(d, nk, packed=pack(d.codes, 1, torch.uint8), scales=d.scales), d.dense()


class Split(Layer):
    """q, k and v from rows of one packed weight: dequantised once, cut by rows."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.dequant(self).split([self.N // 2, self.N // 4, self.N // 4])
        return torch.cat((F.linear(x, v), F.linear(x, q), F.linear(x, k)), dim=-1)

    def expected(self, x: Tensor, dense: Tensor) -> Tensor:
        return (x.double() @ dense.T).roll(self.N // 4, dims=-1)


@either("one packed weight, cut by rows for three users")
def _(d: Draw) -> Made:
    return Split(d, nk, packed=pack(d.codes, 1, torch.uint8), scales=d.scales), d.dense()


class InTurn(nn.Module):
    """Residual layers, one after another."""

    def __init__(self, layers: list[Layer]):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.125 * layer(x)
        return x

    def expected(self, x: Tensor, dense: list[Tensor]) -> Tensor:
        x = x.double()
        for w in dense:
            x = x + 0.125 * (x @ w.T)
        return x


def chain(d: Draw, n: int, again: bool = False) -> Made:
    """n layers [K, K]; with ``again`` the same one n times."""
    draws = [Draw(d.K, d.K, d.group, d.dtype, d.generator) for _ in range(1 if again else n)]
    layers, dense = [layer_nk(each) for each in draws], [each.dense() for each in draws]
    return InTurn(layers * (n if again else 1)), dense * (n if again else 1)


@positive("two layers in turn", rewritten=2)
def _(d: Draw) -> Made:
    return chain(d, 2)


@positive("eight layers alike", rewritten=8, core=True)
def _(d: Draw) -> Made:
    return chain(d, 8)


@positive("one layer, eight times", rewritten=8)
def _(d: Draw) -> Made:
    return chain(d, 8, again=True)
