"""Weights and activations for the Triton kernels behind `w4a16::linear`, and what they give in float64, told by a slow
way that uses no layout of theirs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from interpreter import DEVICE
from models import unpack
from torch import Tensor, nn

from inductor_ext.formats import PackedInt4

ZEROS = ("none", "int", "float")


def weight(
    N: int,
    K: int,
    G: int,
    zeros: str = "none",
    scale_dtype: torch.dtype = torch.float16,
    order: bool = False,
    seed: int = 0,
    device: str = DEVICE,
) -> PackedInt4:
    """A random weight; zeros as in ZEROS, or "float32" whatever the scales are."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2**31), 2**31, (N, K // 8), generator=random).int()
    scales = ((torch.rand(N, K // G, generator=random) + 0.5) / K**0.5).to(scale_dtype)
    stored = None
    if zeros == "int":
        stored = torch.randint(17, (N, K // G), generator=random, dtype=torch.uint8)
    elif zeros != "none":
        stored = (torch.rand(N, K // G, generator=random) * 16).to(scale_dtype if zeros == "float" else torch.float32)
    shuffled = torch.randperm(K, generator=random).int() if order else None
    return PackedInt4(*(None if t is None else t.to(device) for t in (codes, scales, stored, shuffled)))


def dense(weight: PackedInt4) -> Tensor:
    """float64 [N, K]."""
    codes, G = unpack(weight.codes, 1).double(), weight.group_size
    zeros = 8.0 if weight.zeros is None else weight.zeros.double().repeat_interleave(G, 1)
    stored = (codes - zeros) * weight.scales.double().repeat_interleave(G, 1)
    return stored if weight.order is None else stored[:, weight.order.long()]


def activations(M: int, K: int, dtype: torch.dtype, seed: int = 0, device: str = DEVICE) -> Tensor:
    """[M, K], with NaN before and after in memory: a kernel that reads other rows shows it."""
    random = torch.Generator().manual_seed(seed)
    around = torch.full((M + 64, K), float("nan"), dtype=dtype)
    around[32 : 32 + M] = torch.randn(M, K, generator=random).to(dtype)
    return around.to(device)[32 : 32 + M]


def expected(x: Tensor, weight: PackedInt4, bias: Tensor | None = None) -> Tensor:
    """float64 [M, N]."""
    return x.double() @ dense(weight).t() + (0 if bias is None else bias.double())


class Layer(nn.Module):
    """Such a weight, symmetric and in order, as models spell it."""

    def __init__(self, weight: PackedInt4) -> None:
        super().__init__()
        self.register_buffer("packed", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("shifts", torch.arange(0, 32, 4, dtype=torch.int32, device=weight.codes.device))

    def forward(self, x: Tensor) -> Tensor:
        N, groups = self.scales.shape
        q = ((self.packed.unsqueeze(-1) >> self.shifts) & 15).view(N, groups, -1) - 8
        return F.linear(x, (q.to(x.dtype) * self.scales.unsqueeze(-1)).view(N, -1))
