"""What a kernel for WNA16 experts is told of its weights besides the codes: the field's ``FusedMoEQuantConfig`` for
int4 and int8."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class MoEQuantConfig:
    """The field's attributes. Scales, zeros and biases are in the kernel's layout (``oracle/convert.py``)."""

    weight_dtype: str
    """"int4" or "int8"."""
    block_shape: tuple[int, int]
    """(0, group size); (0, -1): one scale a channel."""
    w1_scale: Tensor
    w2_scale: Tensor
    w1_zp: Tensor | None
    w2_zp: Tensor | None
    w1_bias: Tensor | None
    w2_bias: Tensor | None
    a1_gscale: Tensor | None
    a2_gscale: Tensor | None
    gemm1_clamp_limit: float | None
    gemm1_alpha: float | None
    gemm1_beta: float | None

    @property
    def use_int4_w4a16(self) -> bool:
        return self.weight_dtype == "int4"

    @property
    def use_int8_w8a16(self) -> bool:
        return self.weight_dtype == "int8"


def make_wna16_moe_quant_config(
    w1_scale: Tensor,
    w2_scale: Tensor,
    group_size: int,
    num_bits: int,
    w1_zp: Tensor | None = None,
    w2_zp: Tensor | None = None,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    a1_gscale: Tensor | None = None,
    a2_gscale: Tensor | None = None,
    gemm1_clamp_limit: float | None = None,
    gemm1_alpha: float | None = None,
    gemm1_beta: float | None = None,
) -> MoEQuantConfig:
    """The field's function. Raises ValueError for another number of bits than 4 or 8, a group size that is none, and
    zeros or biases of one projection alone."""
    if num_bits not in (4, 8):
        raise ValueError(f"num_bits must be 4 or 8, not {num_bits}.")
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group_size must be positive, or -1 for one scale a channel; it is {group_size}.")
    for name, one, two in (("zp", w1_zp, w2_zp), ("bias", w1_bias, w2_bias)):
        if (one is None) != (two is None):
            raise ValueError(f"w1_{name} and w2_{name} must both be given, or neither.")
    return MoEQuantConfig(
        f"int{num_bits}", (0, group_size), w1_scale, w2_scale, w1_zp, w2_zp, w1_bias, w2_bias,
        a1_gscale, a2_gscale, gemm1_clamp_limit, gemm1_alpha, gemm1_beta,
    )  # fmt: skip
