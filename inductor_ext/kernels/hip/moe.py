"""Launches of csrc/hip/moe.hip: x W^T of routed experts."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from inductor_ext.kernels.gpu.workspace import counters
from inductor_ext.kernels.hip import dot, runtime

HEIGHTS = (1, 2, 4, 8)
"""Of the blocks of slots."""


class MoeArgs(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "words", "scales", "zeros", "sorted", "experts", "end", "weights", "out", "partials")
        ),
        *((name, ctypes.c_void_p) for name in ("marks", "counters")),
        *((name, ctypes.c_int32) for name in ("K", "N", "G", "E", "kind", "slots", "per_row", "together")),
        *((name, ctypes.c_int32) for name in ("blocks", "splits", "steps", "written")),
    )


def gemm(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: dot.Zeros,
    sorted_slots: Tensor,
    experts: Tensor,
    end: Tensor,
    weights: Tensor | None,
    out: Tensor,
    height: int,
    per_row: int,
    together: int,
) -> None:
    """Adds to out, row by row, what the slots' experts make of x; or, if it is float32, writes it there.

    Slot s multiplies row s // per_row of x [slots / per_row, K] and, if there are weights [slots], that by its own; it
    is added to row s // together of out [slots / together, N]. The words are [E, K/8, N] and so on. Blocks of
    ``height`` slots, and where they end, as moe_align_block_size gives them.
    """
    (E, _, N), (rows, K) = words.shape, x.shape
    x = dot.on_line(x)
    slots, blocks, across = rows * per_row, sorted_slots.numel() // height, -(-N // dot.TILE)
    if blocks * across == 0:
        return
    splits, steps = dot.splits(blocks * across, K, x.device)
    partials = marks = arrived = None
    if splits > 1 or together > 1:
        partials = torch.empty(slots, splits, N, dtype=torch.float32, device=x.device)
        arrived = counters(across * (1 + slots * splits) if together > 1 else across * slots, x.device)
        if together > 1:
            marks = arrived[across:]
    args = MoeArgs(
        *map(dot.pointer, (x, words, scales, zeros, sorted_slots, experts, end, weights, out, partials)),
        *map(dot.pointer, (marks, arrived)),
        K, N, K // scales.shape[1], E, kind, slots, per_row, together, blocks, splits, steps,
        out.dtype == torch.float32,
    )  # fmt: skip
    name = f"moe_gptq_gemm_rdna3_{dot.NAMES[x.dtype]}_{height}"
    runtime.launch(x.device, name, args, (blocks * across, splits, 1), dot.THREADS)
