"""An int4 weight as floats, once, for a dense matmul over many rows: there the dequantisation is small beside it, and
the vendor's library multiplies faster than a kernel that dequantises on the way.

Each element is (code - zero) * scale in float32, rounded once to the activations' dtype. Columns stay in stored order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_ext.kernels.gpu.codes import four_planes, number
from inductor_ext.kernels.gpu.mainloop import row_pointers


@triton.jit
def dequantise_kernel(
    w,
    scales,
    zeros,
    out,  # [N, K]
    N,
    K,
    ROWS,
    STEPS,
    G: tl.constexpr,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    WHOLE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Half a tile: 64 rows, and of 256 columns the left or the right 32 of each 64."""
    tile, part = tl.program_id(0) // 2, tl.program_id(0) % 2
    n0 = tl.program_id(1) * 64
    n, j = n0 + tl.arange(0, 64), tl.arange(0, 32)
    dtype: tl.constexpr = out.dtype.element_ty
    words = tl.load(row_pointers(w, n, STEPS, 32) + tile * 4096 + part * 2048)
    a, b, c, d = four_planes(words, dtype, PTX)
    for p in tl.static_range(4):
        k = tile * 256 + p * 64 + part * 32
        group = 0 if G == 0 else k // G
        value = (a if p == 0 else b if p == 1 else c if p == 2 else d).to(tl.float32)
        if ZEROS != "none":
            value -= (number(zeros, group // 2, group % 2, n, ROWS, ZEROS) - 8.0)[:, None]
        value *= number(scales, group // 2, group % 2, n, ROWS, KIND)[:, None]
        known = (n < N)[:, None]
        if not WHOLE:
            known = known & (k + j < K)[None, :]
        tl.store(out + n.to(tl.int64)[:, None] * K + (k + j)[None, :], value.to(dtype), mask=known)
