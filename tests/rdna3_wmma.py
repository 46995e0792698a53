"""Problems for `torch.ops.w4a16.moe_gemm_w4a16`, and what it gives in float64, told by a slow way."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from rdna3 import align, drawn
from torch import Tensor

import inductor_ext.ops  # noqa: F401  registers torch.ops.w4a16
from inductor_ext.formats import PackedInt4
from inductor_ext.kernels.hip import wmma

moe_gemm = torch.ops.w4a16.moe_gemm_w4a16
CPU = torch.device("cpu")


@dataclasses.dataclass
class Routed:
    """T tokens' choices of E experts with symmetric weights [N, K], in the field's layout by row."""

    E: int
    K: int
    N: int
    top_k: int
    T: int
    G: int = 128
    dtype: torch.dtype = torch.bfloat16
    arch: str = "gfx1100"
    ids: Tensor | None = None
    expert_map: Tensor | None = None
    drop: bool = False
    """Choices of foreign experts are left out of the sorted ones."""

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.K + self.T)
        codes = torch.randint(-(2**31), 2**31, (self.E * self.N, self.K // 8), generator=random, dtype=torch.int32)
        scales = torch.rand(self.E * self.N, self.K // self.G, generator=random) + 0.5
        self.weight = PackedInt4(codes, (scales / self.K**0.5 / 4).to(self.dtype), None)
        known = self.E if self.expert_map is None else len(self.expert_map)
        if self.ids is None:
            self.ids = torch.rand(self.T, known, generator=random).argsort(1)[:, : self.top_k]
        self.A = drawn(self.T, self.K, dtype=self.dtype)
        self.routing = align(self.ids, 32, known, self.expert_map, self.drop)[:2]

    def arguments(self, device: torch.device = CPU) -> dict[str, Any]:
        codes, scales = self.weight.codes.to(device), self.weight.scales.to(device)
        packed = wmma.by_row(PackedInt4(codes, scales, None), self.E, self.arch)
        slots = self.T * self.top_k
        C = torch.full((slots + 3, self.N), float("nan"), dtype=self.dtype, device=device)
        in_order, of = (t.to(device) for t in self.routing)
        return {
            "A": self.A.to(device), "w_packed": packed.words, "w_scale": packed.scales, "sorted_token_ids": in_order,
            "expert_ids": of, "C": C, "n_valid_tokens": slots, "top_k": self.top_k, "block_m": 32,
            "num_blocks": of.numel(),
        }  # fmt: skip

    def run(self, device: torch.device = CPU, **changed: Any) -> Tensor:
        args = self.arguments(device) | changed
        moe_gemm(**args)
        C, slots = args["C"].cpu(), self.T * self.top_k
        assert C[slots:].isnan().all(), "rows beyond the valid ones stay"
        return C[:slots]

    def expected(self) -> Tensor:
        """float64; zeros for choices of nobody."""
        rows = self.ids.flatten().long()
        if self.expert_map is not None:
            rows = self.expert_map.long()[rows.clamp(min=0)].where(rows >= 0, -1)
        y = torch.zeros(len(rows), self.N, dtype=torch.float64)
        for e in rows[rows >= 0].unique().tolist():
            of = slice(e * self.N, (e + 1) * self.N)
            codes = (self.weight.codes[of].unsqueeze(2) >> torch.arange(0, 32, 4) & 15).flatten(1)
            dense = (codes - 8).double() * self.weight.scales[of].double().repeat_interleave(self.G, 1)
            mine = rows == e
            y[mine] = self.A.double()[mine.nonzero()[:, 0] // self.top_k] @ dense.T
        return y
