"""``torch.ops.w4a16.linear_mxfp4``: y = x @ W^T + bias with an MXFP4 weight in a kernel's layout, and its gradient with
respect to x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inductor_ext import kernels
from inductor_ext.formats import MXFP4_GROUP
from inductor_ext.kernels import Packed
from inductor_ext.ops.linear import LIB

# -- schema ------------------------------------------------------------------------------------------------------------
# x [..., K] float16 | bfloat16 | float32, K even; qweight, scales: the layout of `kernel` (for "reference" that is
# canonical, see formats.PackedMxfp4: uint8 [N, K/2] and [N, ceil(K/32)]); bias [N]; out_features = N. Returns [..., N]
# in x's dtype, accumulated in float32, rounded once.
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
LIB.define(
    "linear_mxfp4(Tensor x, Tensor qweight, Tensor scales, Tensor? bias, int out_features, "
    'str kernel="reference") -> Tensor',
    tags=_TAGS,
)
# grad [..., N] -> [..., K]: grad @ W. The codes get no gradient.
LIB.define(
    "linear_mxfp4_grad_x(Tensor grad, Tensor qweight, Tensor scales, int in_features, "
    'str kernel="reference") -> Tensor',
    tags=_TAGS,
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _require(ok: Any, message: Callable[[], str]) -> None:
    if ok is not True:  # a plain True costs nothing; False raises and a SymBool becomes a guard
        torch._check(ok, lambda: f"w4a16::linear_mxfp4: {message()}")


def _check(name: str, x: Tensor, qweight: Tensor, scales: Tensor, N: int, K: int, kernel: str) -> None:
    """Every argument against every other. Raises RuntimeError naming the argument, what it was and what is allowed."""
    _require(x.dtype in _DTYPES, lambda: f"{name} must be float16, bfloat16 or float32, it is {x.dtype}.")
    _require(N > 0 and K > 0, lambda: f"N and K must be at least 1, they are {N} and {K}; {name} is {_of(x)}.")
    packed = Packed(qweight, scales, None, None)
    try:
        layout = kernels.load_linear_mxfp4(kernel).layout(packed, N, K, MXFP4_GROUP)
    except ValueError as error:
        raise RuntimeError(f"w4a16::linear_mxfp4: {error} {name} is {_of(x)}.") from None
    for field, tensor, expected in zip(("qweight", "scales"), (qweight, scales), layout, strict=False):
        _tensor(field, tensor, expected.shape, expected.dtypes, x.device)


def _tensor(
    name: str, t: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    _require(t.dtype in dtypes, lambda: f"{name} must be {allowed}, it is {t.dtype}.")
    _require(tuple(t.shape) == shape, lambda: f"{name} must be {list(shape)}, it is {_of(t)}.")
    _require(t.device == device, lambda: f"{name} is on {t.device}, the activations are on {device}.")
    _require(t.is_contiguous(), lambda: f"{name} must be contiguous, it has strides {list(t.stride())}.")


def _check_linear(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, N: int, kernel: str) -> None:
    _require(x.dim() >= 1, lambda: "x must have at least one dimension, it is a scalar.")
    _check("x", x, qweight, scales, N, x.shape[-1], kernel)
    if bias is not None:
        _tensor("bias", bias, (N,), (x.dtype,), x.device)


def _check_grad(grad: Tensor, qweight: Tensor, scales: Tensor, K: int, kernel: str) -> None:
    _require(grad.dim() >= 1, lambda: "grad must have at least one dimension, it is a scalar.")
    _check("grad", grad, qweight, scales, grad.shape[-1], K, kernel)


def _of(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


# -- fake --------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("w4a16::linear_mxfp4", lib=LIB)
def _(
    x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, out_features: int, kernel: str = "reference"
) -> Tensor:
    _check_linear(x, qweight, scales, bias, out_features, kernel)
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("w4a16::linear_mxfp4_grad_x", lib=LIB)
def _(grad: Tensor, qweight: Tensor, scales: Tensor, in_features: int, kernel: str = "reference") -> Tensor:
    _check_grad(grad, qweight, scales, in_features, kernel)
    return grad.new_empty(*grad.shape[:-1], in_features)


# -- implementation ----------------------------------------------------------------------------------------------------


def _linear_mxfp4(
    x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, out_features: int, kernel: str = "reference"
) -> Tensor:
    _check_linear(x, qweight, scales, bias, out_features, kernel)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    packed = Packed(qweight, scales, None, None)
    out: Tensor = kernels.load_linear_mxfp4(kernel).run(rows, packed, bias, out_features, MXFP4_GROUP)
    return out.view(*x.shape[:-1], out_features)


def _linear_mxfp4_grad_x(
    grad: Tensor, qweight: Tensor, scales: Tensor, in_features: int, kernel: str = "reference"
) -> Tensor:
    _check_grad(grad, qweight, scales, in_features, kernel)
    packed = Packed(qweight, scales, None, None)
    weight = kernels.load_linear_mxfp4(kernel).unpack(packed, grad.shape[-1], in_features, MXFP4_GROUP)
    rows = grad.reshape(-1, grad.shape[-1]).float()
    out = torch.zeros(rows.shape[0], in_features, dtype=torch.float32, device=grad.device)
    for some, block in weight.blocks():
        out.addmm_(rows[:, some], block.dequantize())
    return out.to(grad.dtype).view(*grad.shape[:-1], in_features)


LIB.impl("linear_mxfp4", _linear_mxfp4, "CompositeExplicitAutograd")
LIB.impl("linear_mxfp4_grad_x", _linear_mxfp4_grad_x, "CompositeExplicitAutograd")

# -- autograd ----------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scales, bias, _, ctx.kernel = inputs
    ctx.in_features = x.shape[-1]
    ctx.bias_ndim = None if bias is None else x.dim() - 1
    ctx.save_for_backward(qweight, scales)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.w4a16.linear_mxfp4_grad_x(grad, *ctx.saved_tensors, ctx.in_features, ctx.kernel)
    if ctx.needs_input_grad[3]:
        grad_bias = grad if ctx.bias_ndim == 0 else grad.sum(dim=list(range(ctx.bias_ndim)))
    return grad_x, None, None, grad_bias, None, None


def _save_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, qweight, scales, _, ctx.kernel = inputs
    ctx.out_features = grad.shape[-1]
    ctx.save_for_backward(qweight, scales)


def _backward_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of grad @ W with respect to grad is the forward itself."""
    twice = torch.ops.w4a16.linear_mxfp4(grad, *ctx.saved_tensors, None, ctx.out_features, ctx.kernel)
    return twice, None, None, None, None


torch.library.register_autograd("w4a16::linear_mxfp4", _backward, setup_context=_save, lib=LIB)
torch.library.register_autograd("w4a16::linear_mxfp4_grad_x", _backward_grad, setup_context=_save_grad, lib=LIB)

linear_mxfp4 = torch.ops.w4a16.linear_mxfp4.default
