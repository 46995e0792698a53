"""Programs of cones that dequantise only the experts that were selected: q[ids], s[ids] -> W[ids]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from inductor_ext.patterns.anchors import meta
from inductor_ext.patterns.cone import Cone, rows
from torch import Tensor, fx


class Gathered:
    """Such a cone as a program of all experts' weights: it is run with the selection 0, 1, 2, ..., as often as it takes
    to select each expert once."""

    def __init__(self, cone: Cone, select: fx.Node, experts: int) -> None:
        self.program, self.experts = cone.program, experts
        self.kn = cone.program.kn
        sizes = list(meta(select).shape)
        symbols = {s for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}
        for count in range(2, experts + 3):
            chosen = dict.fromkeys(symbols, count)
            self._shape = [_number(size, chosen) for size in sizes]
            if math.prod(self._shape) >= experts or not symbols:
                break
        self._given = [None if node is select else _number(meta(node), chosen) for node in cone.given]
        self._dtype: torch.dtype = meta(select).dtype

    def run(self, values: Sequence[Tensor]) -> Tensor:
        """The rows of all experts, [E*N, K], for these leaf values."""
        count, found = math.prod(self._shape), []
        for first in range(0, self.experts, count):
            ids = torch.arange(first, first + count, dtype=self._dtype, device=values[0].device)
            select = ids.clamp_(max=self.experts - 1).view(self._shape)
            weight = self.program.call([*values, *(select if given is None else given for given in self._given)])
            found.append(weight.reshape(count, *weight.shape[-2:])[: self.experts - first])
        return rows(torch.cat(found), self.kn)

    def signature(self, values: Sequence[Tensor]) -> str:
        """As Program.signature."""
        return f"gathered {self._shape} {self.program.signature(values)}"


def _number(value: Any, chosen: dict[Any, int]) -> int:
    return int(value.node.expr.subs(chosen)) if isinstance(value, torch.SymInt) else int(value)
