"""Problems for `torch.ops.w4a16.triton_w4a16_gemm` in the field's layout, on a GPU or for Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch
from interpreter import DEVICE
from models import OWED, pack, rel_l2
from torch import Tensor

import inductor_ext.ops  # noqa: F401  registers torch.ops.w4a16

gemm = torch.ops.w4a16.triton_w4a16_gemm


def problem(
    M: int, N: int, K: int, G: int, zeros: bool, dtype: torch.dtype, zp_bias: int = 8
) -> tuple[dict[str, Any], Tensor]:
    """The op's arguments, and a @ W in float64 with W rounded as the contract says."""
    random = torch.Generator().manual_seed(M + N + K + G)
    codes = torch.randint(16, (K, N), generator=random)
    stored = torch.randint(16, (K // G, N), generator=random)
    scales = (torch.randn(K // G, N, generator=random) / 16).to(dtype)
    a = torch.randn(M, K, generator=random).to(dtype)
    groups = torch.arange(K) // G
    weight = (codes - (stored[groups] if zeros else zp_bias)).to(dtype) * scales[groups]
    args = {
        "a": a.to(DEVICE),
        "b_q": pack(codes, 1).to(DEVICE),
        "scales": scales.to(DEVICE),
        "qzeros": pack(stored, 1).to(DEVICE) if zeros else None,
        "group_size": G,
        "zp_bias": zp_bias,
    }
    return args, a.double() @ weight.double()


def check(M: int, N: int, K: int, G: int, zeros: bool, dtype: torch.dtype, zp_bias: int = 8) -> None:
    args, wanted = problem(M, N, K, G, zeros, dtype, zp_bias)
    y = gemm(**args)
    assert (y.shape, y.dtype, y.is_contiguous()) == ((M, N), dtype, True)
    # Rounded once, so most bits agree; a weight that was not rounded as the contract says is 0.43 of what is owed away.
    assert rel_l2(y.cpu(), wanted.to(dtype)) <= OWED[dtype] / 4
