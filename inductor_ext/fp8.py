"""Rounding activations to fp8 (e4m3) by a static scale."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
"""The largest value of e4m3fn."""


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """float8_e4m3fn: x / scale, divided in float32, rounded once to the nearest (ties to even).

    scale: float32, one element. Values beyond +-448 and infinities become +-448, NaN stays NaN. e4m3fn has no infinity,
    and torch's cast gives NaN beyond its range (the OCP 8-bit Floating Point Specification 1.0 has a saturating and a
    non-saturating conversion; torch's is the latter), so the clamp comes first, which lets NaN through.
    """
    return (x.float() / scale.view(())).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def native_dtype(arch: str) -> torch.dtype:
    """The e4m3 that a device's matrix units take: e4m3fnuz on gfx942, e4m3fn elsewhere (ROCm's documentation of data
    types by architecture: MI300 has the FNUZ types only, gfx950 and gfx12 those of the OCP).

    The bits of an e4m3fn value mean half of it in e4m3fnuz, whose exponent bias is greater by one; but 0x80 is -0 in
    the one and NaN in the other. So ``to_fp8``'s values at twice the scale are those of a gfx942, once 0x80 is 0.
    """
    return torch.float8_e4m3fnuz if arch == "gfx942" else torch.float8_e4m3fn


def to_native_fp8(x: Tensor, scale: Tensor, arch: str) -> tuple[Tensor, Tensor]:
    """x rounded as ``to_fp8`` does, in the device's own e4m3, and the scale that goes with it: the same values."""
    rounded = to_fp8(x, scale)
    if native_dtype(arch) == torch.float8_e4m3fn:
        return rounded, scale
    bits = rounded.view(torch.uint8)
    nan = (bits & 127) == 127  # 0x7f and 0xff; the NaN of e4m3fnuz is 0x80
    bits = torch.where(nan, 128, torch.where(bits == 128, 0, bits)).to(torch.uint8)
    return bits.view(torch.float8_e4m3fnuz), 2 * scale
