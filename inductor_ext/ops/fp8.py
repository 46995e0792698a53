"""``torch.ops.w4a16.round_to_fp8``: what rounding activations to fp8 does to their values. W4A8 modules have it in
their plain PyTorch, and the backend finds it there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inductor_ext.fp8 import to_fp8
from inductor_ext.ops.linear import LIB

# -- schema ------------------------------------------------------------------------------------------------------------
# x of any float dtype and shape, scale float32 [] or [1] -> scale * fp8(x / scale) in x's dtype, see fp8.to_fp8.
LIB.define("round_to_fp8(Tensor x, Tensor scale) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _check(x: Tensor, scale: Tensor) -> None:
    torch._check(x.is_floating_point(), lambda: f"w4a16::round_to_fp8: x must be floating point, it is {x.dtype}.")
    one = scale.dtype == torch.float32 and scale.dim() <= 1 and scale.numel() == 1
    torch._check(
        one,
        lambda: f"w4a16::round_to_fp8: scale must be float32 [] or [1], it is {scale.dtype} {list(scale.shape)}.",
    )


# -- fake --------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("w4a16::round_to_fp8", lib=LIB)
def _(x: Tensor, scale: Tensor) -> Tensor:
    _check(x, scale)
    return torch.empty_like(x)


# -- implementation ----------------------------------------------------------------------------------------------------


def _round_to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    _check(x, scale)
    return (to_fp8(x, scale).float() * scale.view(())).to(x.dtype)


LIB.impl("round_to_fp8", _round_to_fp8, "CompositeExplicitAutograd")

# -- autograd ----------------------------------------------------------------------------------------------------------


def _backward(ctx: Any, grad: Tensor) -> None:
    raise NotImplementedError(
        "w4a16::round_to_fp8 has no derivative: rounding has none. To train through it, leave the activations in 16"
        " bits."
    )


torch.library.register_autograd("w4a16::round_to_fp8", _backward, lib=LIB)

round_to_fp8 = torch.ops.w4a16.round_to_fp8.default
