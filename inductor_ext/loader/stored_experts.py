"""PackedExperts that are filled from a checkpoint's tensors, one by one, and give them back under the same names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from inductor_ext.loader.config import Scheme
from inductor_ext.loader.experts import Canonical, PackedExperts
from inductor_ext.loader.filled import Filled
from inductor_ext.loader.modules import LAYERS, PackedLinear


@dataclasses.dataclass(frozen=True)
class Projection:
    """One of the three linear maps of every expert.

    name: in the files ("gate_proj", "w1", ...). weight: what it is a part of, "gate_up" or "down". first: its first row
    there. layout: an empty layer of its size, which knows how the format stores a weight.
    """

    name: str
    weight: str
    first: int
    layout: PackedLinear


def lay_out(scheme: Scheme, n: int, k: int) -> PackedLinear:
    """An empty layer [N, K]. Raises ValueError for a size that the format, or the experts, cannot hold."""
    layout = LAYERS[scheme.format](nn.Linear(k, n, bias=False, device="meta"), scheme)
    if k % 8:
        raise ValueError(f"K = {k} is not a multiple of 8, so its codes do not fill whole int32 words")
    return layout


class StoredExperts(Filled, PackedExperts):
    """PackedExperts whose `state_dict()` has the files' tensors, such as "3.up_proj.qweight", in the format's layout.

    The buffers start on the meta device and are filled by `put`, then `settle`. Columns stand in the order of k: a
    stored tensor that says otherwise (act-order) is a fault.
    """

    def __init__(
        self,
        act_fn: Callable[[Tensor], Tensor],
        experts: int,
        projections: tuple[Projection, Projection, Projection],
        scale_dtypes: Mapping[str, torch.dtype],
    ) -> None:
        """projections: gate, up, down; gate and up are stored alike. scale_dtypes: of "gate_up" and "down"."""
        gate, up, down = projections
        gate_up_rows = gate.layout.out_features + up.layout.out_features
        super().__init__(
            act_fn,
            _empty(experts, gate_up_rows, gate.layout, scale_dtypes["gate_up"]),
            _empty(experts, down.layout.out_features, down.layout, scale_dtypes["down"]),
            persistent=False,
        )
        self._projections = {projection.name: projection for projection in projections}
        self._scale_dtypes = dict(scale_dtypes)
        self._faults: list[str] = []

    def declared(self) -> Iterator[tuple[str, Tensor]]:
        for expert in range(self.num_experts):
            for p in self._projections.values():
                for leaf, like in p.layout.named_buffers():
                    dtype = self._scale_dtypes[p.weight] if like.is_floating_point() else like.dtype
                    yield f"{expert}.{p.name}.{leaf}", torch.empty(like.shape, dtype=dtype, device="meta")

    def put(self, name: str, stored: Tensor) -> None:
        expert, p, leaf = self._find(name)
        if leaf not in p.layout.PARTS:
            self._faults += _contradictions(name, stored, p.layout)
            return
        buffer = f"{p.weight}_{p.layout.PARTS[leaf]}"
        if getattr(self, buffer) is None:
            setattr(self, buffer, torch.full_like(getattr(self, f"{p.weight}_scales"), 8, dtype=torch.uint8))
        elif getattr(self, buffer).is_meta:
            setattr(self, buffer, torch.empty_like(getattr(self, buffer), device=stored.device))
        self._rows(buffer, expert, p).copy_(p.layout.to_canonical(leaf, stored))

    def get(self, name: str) -> Tensor:
        expert, p, leaf = self._find(name)
        if leaf not in p.layout.PARTS:
            return p.layout.implied()[leaf].to(self.down_scales.device)
        return p.layout.from_canonical(leaf, self._rows(f"{p.weight}_{p.layout.PARTS[leaf]}", expert, p))

    def settle(self) -> None:
        """Zeros that are all 8 are the symmetric form, and need no memory."""
        for weight in ("gate_up", "down"):
            zeros = getattr(self, f"{weight}_zeros")
            if zeros is not None and not zeros.is_meta and bool((zeros == 8).all()):
                setattr(self, f"{weight}_zeros", None)

    def faults(self) -> list[str]:
        return self._faults

    def _find(self, name: str) -> tuple[int, Projection, str]:
        expert, projection, leaf = name.split(".")
        return int(expert), self._projections[projection], leaf

    def _rows(self, buffer: str, expert: int, p: Projection) -> Tensor:
        whole, rows = getattr(self, buffer), slice(p.first, p.first + p.layout.out_features)
        if whole is not None:
            part: Tensor = whole[expert, rows]
            return part
        return torch.full_like(getattr(self, f"{p.weight}_scales")[expert, rows], 8, dtype=torch.uint8)

    def _home(self) -> Tensor:
        return self.down_scales

    def _contradictions(self, name: str, stored: Tensor) -> list[str]:
        _, p, leaf = self._find(name)
        return [] if leaf in p.layout.PARTS else _contradictions(name, stored, p.layout)


def _empty(experts: int, rows: int, layout: PackedLinear, scale_dtype: torch.dtype) -> Canonical:
    groups = layout.in_features // layout.group_size
    parts = {layout.PARTS[leaf] for leaf, _ in layout.named_buffers() if leaf in layout.PARTS}
    return Canonical(
        torch.empty(experts, rows, layout.in_features // 8, dtype=torch.int32, device="meta"),
        torch.empty(experts, rows, groups, dtype=scale_dtype, device="meta"),
        torch.empty(experts, rows, groups, dtype=torch.uint8, device="meta") if "zeros" in parts else None,
    )


def _contradictions(name: str, stored: Tensor, layout: PackedLinear) -> list[str]:
    path, _, leaf = name.rpartition(".")
    implied = layout.implied()[leaf]
    if stored.is_meta or torch.equal(stored.cpu(), implied):
        return []
    if leaf.endswith("g_idx"):
        return [f"has {path} in act-order ({leaf} is not k // {layout.group_size}), which experts cannot have"]
    return [f"has {path}.{leaf} {stored.tolist()}, the model needs {implied.tolist()}"]
