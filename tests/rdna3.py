"""Problems for `torch.ops.w4a16.gptq_gemm_rdna3` and `moe_gptq_gemm_rdna3` in the field's layouts, and what they give
in float64, told by a slow way."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from models import OWED, rel_l2, unpack
from torch import Tensor

import inductor_ext.ops  # noqa: F401  registers torch.ops.w4a16

gemm = torch.ops.w4a16.gptq_gemm_rdna3
moe_gemm = torch.ops.w4a16.moe_gptq_gemm_rdna3
align = torch.ops.w4a16.moe_align_block_size

DTYPES = (torch.float16, torch.bfloat16)


SHIFTS = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28])
"""Where a word has the codes of 8 neighbours along K."""


@dataclasses.dataclass
class Weight:
    """Random codes, scales and zeros of E weights [K, N], or of one, with E = 0."""

    K: int
    N: int
    G: int
    dtype: torch.dtype
    E: int = 0
    v2: bool = False
    """Zeros are 0..15, stored as they are; else 1..16, stored less one."""
    seed: int = 0

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)
        lead, groups = ((self.E,) if self.E else ()), self.K // self.G

        def words(*shape: int) -> Tensor:
            return torch.randint(-(2**31), 2**31, (*lead, *shape), generator=random, dtype=torch.int32)

        self.words, self.zeros = words(self.K // 8, self.N), words(groups, self.N // 8)
        scales = torch.rand(*lead, groups, self.N, generator=random) + 0.5
        self.scales = (scales / self.K**0.5 / 4).to(self.dtype)

    def dense(self, expert: int | None = None) -> Tensor:
        """float64 [K, N]."""
        of = slice(None) if expert is None else expert
        codes = (self.words[of].long().unsqueeze(1) >> SHIFTS.view(8, 1) & 15).flatten(0, 1)
        zeros = unpack(self.zeros[of], 1) + (0 if self.v2 else 1)
        groups = torch.arange(self.K) // self.G
        return (codes - zeros[groups]).double() * self.scales[of].double()[groups]


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0, mean: float = 0.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + mean).to(dtype)


def cancelling(w: Weight, M: int) -> Tensor:
    """Activations, and a change of the weight, for which the last third of k takes off again what the first third
    gives, and that is large: the result's bits tell in which order parts of k were added up."""
    for part in (w.words, w.zeros, w.scales):
        third = part.shape[0] // 3
        part[2 * third :] = part[:third]
    x = drawn(M, w.K, dtype=w.dtype)
    third = w.K // 3
    x[:, :third] *= 1000
    x[:, 2 * third :] = -x[:, :third]
    return x


def right(y: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert (y.dtype, y.shape) == (dtype, expected.shape)
    assert rel_l2(y.cpu(), expected) <= OWED[dtype]
    # Rounded once: but for a few that lie between two numbers, every element is the rounded sum.
    assert (y.cpu() != expected.to(dtype)).double().mean() <= 0.06


@dataclasses.dataclass
class Routed:
    """A problem for `moe_gptq_gemm_rdna3`: T tokens' choices of E experts, some of them elsewhere."""

    T: int
    top_k: int
    weight: Weight
    block: int
    per_token: bool = True
    """Choices of a token share a row of a, as before the activation; else each has its own, as after it."""
    together: bool = False
    """Choices of a token share a row of c."""
    weighted: bool = False
    foreign: int = 0
    """So many of the experts are elsewhere: expert_map has -1 for them."""
    dropped: bool = False
    """Their choices are left out of the sorted ones."""
    inline: bool = False
    """The choices as they are, without moe_align_block_size; with blocks of one."""
    seed: int = 0

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)
        everywhere = self.weight.E + self.foreign
        draw = torch.rand(self.T, everywhere, generator=random)
        self.ids = draw.topk(self.top_k, 1).indices.int()
        self.weights = torch.rand(self.T, self.top_k, generator=random)
        # Global ids in an order that is not the experts'.
        rows = torch.full((everywhere,), -1, dtype=torch.int32)
        rows[torch.randperm(everywhere, generator=random)[: self.weight.E]] = torch.arange(
            self.weight.E, dtype=torch.int32
        )
        self.rows = rows
        if self.inline:
            slots = torch.arange(self.ids.numel(), dtype=torch.int32)
            end = torch.tensor([self.ids.numel()], dtype=torch.int32)
            self.routing = (slots, rows[self.ids.long()].flatten(), end)
        else:
            self.routing = align(self.ids, self.block, everywhere, rows, self.dropped)
        self.a = drawn(
            self.T if self.per_token else self.ids.numel(), self.weight.K, dtype=self.weight.dtype, seed=self.seed
        )

    def arguments(self, c: Tensor) -> dict[str, Any]:
        sorted_ids, experts, end = self.routing
        return {
            "a": self.a,
            "c": c,
            "b_q_weight": self.weight.words,
            "b_scales": self.weight.scales,
            "b_qzeros": self.weight.zeros,
            "topk_weights": self.weights.flatten(),
            "sorted_token_ids": sorted_ids,
            "expert_ids": experts,
            "num_tokens_post_padded": end,
            "top_k": self.top_k if self.per_token else 1,
            "block_size_m": self.block,
            "mul_topk_weight": self.weighted,
            "output_topk": self.top_k if self.together else 0,
        }

    def empty(self) -> Tensor:
        rows = self.T if self.together else self.ids.numel()
        return torch.zeros(rows, self.weight.N, dtype=self.weight.dtype)

    def run(self, device: torch.device, c: Tensor | None = None) -> Tensor:
        """c after the op, on the CPU."""
        args = self.arguments(self.empty() if c is None else c)
        args = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in args.items()}
        moe_gemm(**args)
        return args["c"].cpu()

    def here(self) -> Tensor:
        """Which choices are of an expert with weights here, flat."""
        return self.rows[self.ids.long()].flatten() >= 0

    def expected(self) -> Tensor:
        """float64: what is added to c."""
        x = self.a.double()
        if self.per_token:
            x = x.repeat_interleave(self.top_k, 0)
        y = torch.zeros(self.ids.numel(), self.weight.N, dtype=torch.float64)
        rows = self.rows[self.ids.long()].flatten()
        for row in rows[rows >= 0].unique().tolist():
            y[rows == row] = x[rows == row] @ self.weight.dense(row)
        if self.weighted:
            y *= self.weights.double().view(-1, 1)
        return y.view(self.T, self.top_k, -1).sum(1) if self.together else y
