"""Random int8 weights."""

from __future__ import annotations

import torch

from inductor_ext.formats import PackedInt8


def weight(N: int, K: int, G: int, zeros: str, order: bool, dtype: torch.dtype, seed: int = 0) -> PackedInt8:
    """Every code occurs, and zeros up to 256."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (N, K), generator=random).to(torch.uint8)
    scales = (torch.randn(N, K // G, generator=random) / K**0.5 / 64).to(dtype)
    given = None
    if zeros == "int":
        given = torch.randint(257, scales.shape, generator=random).to(torch.int16)
        given[0, 0] = 256
    elif zeros == "float":
        given = (torch.rand(scales.shape, generator=random) * 255).to(dtype)
    permuted = torch.randperm(K, generator=random).int() if order else None
    return PackedInt8(codes, scales, given, permuted)
