"""What the Triton kernels must know of an int4 weight in ``planes`` when they are compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inductor_ext.kernels import Packed
from inductor_ext.kernels.gpu import planes, runtime, tuning

_KINDS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int16: "int16"}


def meaning(packed: Packed, K: int, group_size: int, device: torch.device) -> dict[str, Any]:
    """What the kernels must know of a weight when they are compiled."""
    return {
        "G": 0 if group_size == K else group_size,
        "KIND": _KINDS[packed.scales.dtype],
        "WHOLE": K % planes.COLUMNS == 0,
        "ZEROS": "none" if packed.zeros is None else _KINDS[packed.zeros.dtype],
        "PTX": runtime.arch_of(device).startswith("sm_"),
    }


def words(values: Tensor) -> Tensor:
    """16-bit pairs as the 32-bit words that a kernel loads."""
    return values if values.dtype == torch.float32 else values.view(torch.int32)


def float_zeros(packed: Packed) -> bool:
    return packed.zeros is not None and packed.zeros.dtype != torch.int16


def may_round(packed: Packed, dtype: torch.dtype) -> bool:
    """Whether weights are rounded as a dense one would be where scales act on codes: a scale of the activations' dtype
    is taken as it is. Zeros come off exactly if they are integers, else but for the rounding of what is left of them
    (``codes.apart``)."""
    return packed.scales.dtype == dtype


def rounding_pays(packed: Packed, x: Tensor) -> bool:
    """Whether it is allowed, and 16-bit floats are multiplied in pairs."""
    return may_round(packed, x.dtype) and not tuning.is_amd(runtime.arch_of(x.device))


def steps(
    config: tuning.Config | tuning.MoeConfig, packed: Packed, group_size: int, x: Tensor, rounding: bool = True
) -> dict[str, Any]:
    """How the kernels go through K, and whether weights are rounded.

    With few rows the sums of each group of 32 would be scaled so often that it is cheaper to scale the weights; and
    zeros that are no integers come off with their scales' multiplication, where they would take another matmul. Both if
    ``rounding`` is allowed for no more than that; with very many rows (see ``mainloop``) it is, but for such zeros."""
    small, floats = group_size == 32, float_zeros(packed)
    cheaper = (small and config.BM <= 32) or (floats and config.BM > 8)
    rounded = (config.ROUNDED and (rounding or not floats)) or (cheaper and rounding and rounding_pays(packed, x))
    return {"WIDTH": 32 if small else config.WIDTH, "ROUNDED": rounded and may_round(packed, x.dtype)}
