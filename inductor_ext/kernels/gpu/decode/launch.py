"""Launching the kernels for one row of x: where they can run, and with what."""

from __future__ import annotations

from torch import Tensor

from inductor_ext.kernels import Packed
from inductor_ext.kernels.gpu import runtime, tuning, weight
from inductor_ext.kernels.gpu.gluon import importable


def can(packed: Packed, x: Tensor) -> bool:
    """Whether the kernels multiply x with this weight: one row, of which, as of the codes, 16 bytes are copied at a
    time; scales and zeros in pairs. Zeros need sums of all of x, for which there is so much shared memory."""
    one = x.shape[0] == 1 and x.shape[1] % 16 == 0 and packed.scales.element_size() == 2
    one = one and (packed.zeros is None or (packed.zeros.element_size() == 2 and x.shape[1] <= 65536))
    aligned = x.data_ptr() % 16 == 0 and packed.qweight.data_ptr() % 16 == 0
    nvidia = runtime.arch_of(x.device).startswith("sm_")
    return one and aligned and nvidia and importable("inductor_ext.kernels.gpu.decode.dense")


def dense(x: Tensor, packed: Packed, bias: Tensor | None, group_size: int, out: Tensor) -> None:
    """out [1, N] = x [1, K] @ W^T + bias."""
    from inductor_ext.kernels.gpu.decode.dense import linear_kernel
    from inductor_ext.kernels.gpu.decode.loop import chunks

    K, N = x.shape[1], out.shape[1]
    down, across, _ = packed.qweight.shape
    config = tuning.decode(4 * down, across, runtime.processors(x.device))
    meaning = weight.meaning(packed, K, group_size, x.device)
    linear_kernel[(config.PROGRAMS,)](
        x,
        packed.qweight,
        weight.words(packed.scales),
        None if packed.zeros is None else weight.words(packed.zeros),
        bias,
        out,
        N,
        K,
        64 * down,
        across,
        WARPS=config.WARPS,
        STAGES=config.STAGES,
        CHUNKS=0 if packed.zeros is None else chunks(K, config.WARPS),
        num_warps=config.WARPS,
        maxnreg=65536 // (4 * 32 * config.WARPS),  # four programs share a processor
        **{name: meaning[name] for name in ("G", "KIND", "ZEROS")},
    )
