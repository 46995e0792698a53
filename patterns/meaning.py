"""What ``w4a16::moe`` means: its result for a trial's inputs under any finding, to compare a region's with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from inductor_ext.patterns.trial import Inputs
from torch import Tensor

from inductor_ext.kernels import Mlp


@dataclasses.dataclass(frozen=True)
class CutRows:
    """Rows of one cut's matrices, in the order [N, K]."""

    cut: int
    """Its place in Region.cuts."""
    kn: bool
    """The matrices stand as [K, N]."""
    start: int
    stop: int
    step: int = 1

    @property
    def taken(self) -> slice:
        return slice(self.start, self.stop, self.step)

    @property
    def size(self) -> int:
        return len(range(self.start, self.stop, self.step))


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a region computes, free of the graph it was found in."""

    mlp: Mlp
    w13: tuple[CutRows, ...]
    """Gates, then ups; or interleaved, or without gates, as ``mlp`` says."""
    w2: CutRows
    w13_bias: tuple[int, ...]
    """Places in Region.biases, one for each of ``w13`` and cut as it is; or none."""
    w2_bias: int | None
    skips_beyond: bool = False
    """A trial had ids beyond the experts, and they contributed nothing."""

    @property
    def intermediate(self) -> int:
        rows = sum(piece.size for piece in self.w13)
        return rows if self.mlp.gate_up == "none" else rows // 2


class Meaning:
    """The op's result for one trial's inputs, or its first columns. What findings share, x times whole matrices, is
    computed once."""

    def __init__(self, given: Inputs, columns: int | None = None) -> None:
        self._given, self._columns = given, slice(columns)
        known = range(len(given.matrices[0]))  # any other choice contributes nothing
        self._chosen = [
            (e, *(given.ids == e).nonzero(as_tuple=True)) for e in given.ids.unique().tolist() if e in known
        ]
        self._products: dict[tuple[int, bool], list[Tensor]] = {}

    def under(self, finding: Finding) -> Tensor:
        """[T, columns]"""
        given, mlp = self._given, finding.mlp
        b13 = [given.biases[i][:, p.taken] for i, p in zip(finding.w13_bias, finding.w13, strict=False)]
        b2 = None if finding.w2_bias is None else given.biases[finding.w2_bias][:, self._columns]
        pieces = [[x[:, p.taken] for x in self._product(p.cut, p.kn)] for p in finding.w13]
        out = given.base[:, self._columns].clone()
        for (e, t, j), *parts in zip(self._chosen, *pieces, strict=True):
            weight = given.weights[t, j].unsqueeze(-1)
            h = torch.cat(parts, dim=-1)
            h = h * weight if mlp.apply_router_weight_on_input else h  # (weight x) W is weight (x W)
            h = activate(h + torch.cat([b[e] for b in b13]) if b13 else h, mlp)
            y = h @ self._matrix(finding.w2.cut, finding.w2.kn, e)[:, self._columns]
            y = y if b2 is None else y + b2[e]
            out.index_add_(0, t, y if mlp.apply_router_weight_on_input else y * weight)
        return out

    def _product(self, cut: int, kn: bool) -> list[Tensor]:
        """x times one cut's matrix, for every expert that some token chose."""
        if (cut, kn) not in self._products:
            self._products[cut, kn] = [self._given.x[t] @ self._matrix(cut, kn, e) for e, t, _ in self._chosen]
        return self._products[cut, kn]

    def _matrix(self, cut: int, kn: bool, expert: int) -> Tensor:
        """[K, N]"""
        matrix = self._given.matrices[cut][expert]
        return matrix if kn else matrix.t()


def activate(h: Tensor, mlp: Mlp) -> Tensor:
    """h [..., 2 I], or [..., I] without gates -> [..., I]."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "relu": F.relu,
    }
    if mlp.gate_up == "none":
        return functions[mlp.activation](h)
    gate, up = h.chunk(2, dim=-1) if mlp.gate_up == "halves" else (h[..., ::2], h[..., 1::2])
    if mlp.activation != "swigluoai":
        return functions[mlp.activation](gate) * up
    if mlp.limit is not None:
        gate, up = gate.clamp(max=mlp.limit), up.clamp(-mlp.limit, mlp.limit)
    return (up + 1) * gate * torch.sigmoid(mlp.alpha * gate)
