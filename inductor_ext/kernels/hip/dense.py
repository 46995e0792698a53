"""Launches of csrc/hip/dense.hip: x W^T for few rows."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from inductor_ext.kernels.gpu.workspace import counters
from inductor_ext.kernels.hip import dot, runtime


class DenseArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "words", "scales", "zeros", "bias", "out", "partials", "counters")),
        *((name, ctypes.c_int32) for name in ("M", "K", "N", "G", "columns", "kind", "splits", "steps")),
    )


def gemm(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, kind: dot.Zeros, bias: Tensor | None, out: Tensor
) -> None:
    """out [M, columns] = x [M, K] @ W^T + bias, with the weight's tensors as csrc/hip/dot.h has them.

    The weight's N is a multiple of 8; ``columns`` may be less.
    """
    (M, K), N = x.shape, words.shape[1]
    x = dot.on_line(x)
    rows = dot.height(M)
    across = -(-N // dot.TILE)
    tiles = across * -(-M // rows)
    if tiles == 0:
        return
    splits, steps = dot.splits(tiles, K, x.device)
    partials = arrived = None
    if splits > 1:
        partials = torch.empty(splits, M, N, dtype=torch.float32, device=x.device)
        arrived = counters(M * across, x.device)
    args = DenseArgs(
        *map(dot.pointer, (x, words, scales, zeros, bias, out, partials, arrived)),
        M, K, N, K // scales.shape[0], out.shape[1], kind, splits, steps,
    )  # fmt: skip
    name = f"gptq_gemm_rdna3_{dot.NAMES[x.dtype]}_{rows}"
    runtime.launch(x.device, name, args, (tiles, splits, 1), dot.THREADS)
