"""y = x @ W^T + bias for one row of x."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from inductor_ext.kernels.gpu.decode.loop import add_step, fetch, make_stages, sum_up, sums


@gluon.jit
def linear_kernel(
    x, w, scales, zeros, bias, out,
    N, K,
    ROWS,  # N filled up to a multiple of 64
    ACROSS,  # tiles of a row
    WARPS: gl.constexpr, STAGES: gl.constexpr, G: gl.constexpr, KIND: gl.constexpr, ZEROS: gl.constexpr,
    CHUNKS: gl.constexpr,  # see `chunks`; 0 if there are no zeros
):  # fmt: skip
    stages = make_stages(x.dtype.element_ty, WARPS, STAGES, G, ZEROS, CHUNKS)
    weight = (w, scales, zeros, ROWS, ACROSS)
    steps = gl.cdiv(ACROSS, WARPS)
    ahead_row, ahead = gl.program_id(0) * 16, 0
    for stage in gl.static_range(STAGES - 1):
        fetch((x, K), weight, (ahead_row, ahead), stages, stage, ahead_row < ROWS, WARPS, STAGES, G, ZEROS)
        ahead_row, ahead = _next(ahead_row, ahead, steps)
    if ZEROS != "none":
        sum_up(x, K, stages, WARPS, G, CHUNKS)
    stage = 0
    R: gl.constexpr = gl.SliceLayout(0, sums(WARPS))
    m = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, R)), 0)
    for row in range(gl.program_id(0) * 16, ROWS, gl.num_programs(0) * 16):
        acc = gl.zeros([WARPS, 16, 8], gl.float32, sums(WARPS))
        for step in range(steps):
            async_copy.wait_group(STAGES - 2)
            acc = add_step(acc, stages, stage, step, WARPS, G, KIND, ZEROS)
            # All warps are through with the stage before this one, which is the one that is filled now.
            free = gl.where(stage == 0, STAGES - 1, stage - 1)
            fetch((x, K), weight, (ahead_row, ahead), stages, free, ahead_row < ROWS, WARPS, STAGES, G, ZEROS)
            ahead_row, ahead = _next(ahead_row, ahead, steps)
            stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        y = gl.sum(acc, 0)
        n = row + gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, R)), 1)
        if bias is not None:
            y += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)
        gl.store(out + n + m * 0, y.to(out.dtype.element_ty), mask=(n < N) & (m == 0))
    async_copy.wait_group(0)


@gluon.jit
def _next(row, step, steps):
    last = step + 1 == steps
    return gl.where(last, row + gl.num_programs(0) * 16, row), gl.where(last, 0, step + 1)
