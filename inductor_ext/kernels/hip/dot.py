"""What launches of the dot2 kernels (csrc/hip/dot.h) share: tiles, splits of k, and the kinds of zeros."""

from __future__ import annotations

import enum
import functools

import torch
from torch import Tensor

TILE, STEP, WAVES, THREADS = 128, 32, 8, 256
"""Of a block: columns, values of k at once, waves, threads."""
MOST_BYTES, MOST_COLUMNS = 2**32, 2**26
"""Offsets into rows of x, and into 8 rows of codes, are 32 bits wide: x and a weight's N must be smaller."""
NAMES = {torch.float16: "f16", torch.bfloat16: "bf16"}
"""Of the dtypes, in the kernels' names."""


class Zeros(enum.IntEnum):
    """How a weight has its zeros: 8 everywhere; uint8 [K/G, N]; int32 [K/G, N/8] with nibbles in order, or such with
    zero - 1."""

    EIGHT = 0
    BYTES = 1
    NIBBLES = 2
    NIBBLES_LESS_ONE = 3


def height(rows: int) -> int:
    """Of the least tile that holds so many rows; of the highest, if none does."""
    return next((tile for tile in (1, 2, 4) if rows <= tile), 8)


def splits(tiles: int, K: int, device: torch.device) -> tuple[int, int]:
    """How many blocks share the k of each tile, and how many steps one has: enough blocks for the whole GPU, with at
    least one step for each wave. Not tuned: nobody has run it."""
    steps = K // STEP
    wanted = -(-4 * _processors(device) // max(tiles, 1))
    each = -(-steps // max(1, min(wanted, steps // WAVES)))
    return -(-steps // each), each


@functools.cache
def _processors(device: torch.device) -> int:
    """Pairs of compute units, which is what HIP counts on RDNA."""
    if device.type != "cuda":
        return 48  # the tests' stand-in for a GPU: a large one
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def on_line(t: Tensor) -> Tensor:
    """The tensor at an address that is a multiple of 16, which wide loads need."""
    return t if t.data_ptr() % 16 == 0 else t.clone()
