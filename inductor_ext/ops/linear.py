"""``torch.ops.w4a16.linear``: y = x @ W^T + bias with an int4 weight in a kernel's layout, and its gradient with
respect to x."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from inductor_ext import kernels
from inductor_ext.formats import PackedInt
from inductor_ext.kernels import Packed

LIB = torch.library.Library("w4a16", "FRAGMENT")

# -- schema ------------------------------------------------------------------------------------------------------------
# x [..., K] float16 | bfloat16 | float32; qweight, scales, zeros, order: the layout of `kernel` (for "cpu" and
# "reference" the canonical form, see formats.PackedInt4; "reference" and "triton_int8" take formats.PackedInt8 too);
# bias [N]; out_features = N. Returns [..., N] in x's dtype, accumulated in float32, rounded once.
LIB.define(
    "linear(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? order, Tensor? bias, "
    'int out_features, int group_size, str kernel="reference") -> Tensor',
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)
# grad [..., N] -> [..., K]: grad @ W. The codes get no gradient.
LIB.define(
    "linear_grad_x(Tensor grad, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? order, "
    'int in_features, int group_size, str kernel="reference") -> Tensor',
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _require(ok: Any, message: Callable[[], str]) -> None:
    if ok is not True:  # a plain True costs nothing; False raises and a SymBool becomes a guard
        torch._check(ok, lambda: f"w4a16::linear: {message()}")


def _check(name: str, x: Tensor, packed: Packed, N: int, K: int, group_size: int, kernel: str) -> None:
    """The ops' door: every argument against every other.

    Raises RuntimeError naming the argument, what it was and what is allowed.
    """
    _require(x.dtype in _DTYPES, lambda: f"{name} must be float16, bfloat16 or float32, it is {x.dtype}.")
    _require(N > 0 and K > 0, lambda: f"N and K must be at least 1, they are {N} and {K}; {name} is {_of(x)}.")
    _require(
        group_size > 0 and K % group_size == 0,
        lambda: f"group_size {group_size} does not divide K={K}; {name} is {_of(x)}.",
    )
    try:
        layout = kernels.load(kernel).layout(packed, N, K, group_size)
    except ValueError as error:
        raise RuntimeError(f"w4a16::linear: {error} {name} is {_of(x)}.") from None
    for field, tensor, expected in zip(Packed._fields, packed, layout, strict=True):
        if tensor is not None:
            _tensor(field, tensor, expected.shape, expected.dtypes, x.device, f" for {name} {_of(x)}")


def _tensor(
    name: str, t: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device, of: str = ""
) -> None:
    allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    _require(t.dtype in dtypes, lambda: f"{name} must be {allowed}, it is {t.dtype}.")
    _require(tuple(t.shape) == shape, lambda: f"{name} must be {list(shape)}{of}, it is {_of(t)}.")
    _require(t.device == device, lambda: f"{name} is on {t.device}, the activations are on {device}.")
    _require(t.is_contiguous(), lambda: f"{name} must be contiguous, it has strides {list(t.stride())}.")


def _check_linear(x: Tensor, packed: Packed, bias: Tensor | None, N: int, group_size: int, kernel: str) -> None:
    _require(x.dim() >= 1, lambda: "x must have at least one dimension, it is a scalar.")
    _check("x", x, packed, N, x.shape[-1], group_size, kernel)
    if bias is not None:
        _tensor("bias", bias, (N,), (x.dtype,), x.device)


def _check_grad(grad: Tensor, packed: Packed, K: int, group_size: int, kernel: str) -> None:
    _require(grad.dim() >= 1, lambda: "grad must have at least one dimension, it is a scalar.")
    _check("grad", grad, packed, grad.shape[-1], K, group_size, kernel)


def _of(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


# -- fake --------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("w4a16::linear", lib=LIB)
def _(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    kernel: str = "reference",
) -> Tensor:
    _check_linear(x, Packed(qweight, scales, zeros, order), bias, out_features, group_size, kernel)
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("w4a16::linear_grad_x", lib=LIB)
def _(
    grad: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    in_features: int,
    group_size: int,
    kernel: str = "reference",
) -> Tensor:
    _check_grad(grad, Packed(qweight, scales, zeros, order), in_features, group_size, kernel)
    return grad.new_empty(*grad.shape[:-1], in_features)


# -- implementation ----------------------------------------------------------------------------------------------------


def _linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    kernel: str = "reference",
) -> Tensor:
    packed = Packed(qweight, scales, zeros, order)
    _check_linear(x, packed, bias, out_features, group_size, kernel)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = kernels.load(kernel).run(rows, packed, bias, out_features, group_size)
    return out.view(*x.shape[:-1], out_features)


def _linear_grad_x(
    grad: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    in_features: int,
    group_size: int,
    kernel: str = "reference",
) -> Tensor:
    packed = Packed(qweight, scales, zeros, order)
    _check_grad(grad, packed, in_features, group_size, kernel)
    weight: PackedInt = kernels.load(kernel).unpack(packed, grad.shape[-1], in_features, group_size)
    rows = grad.reshape(-1, grad.shape[-1]).float()
    out = torch.zeros(rows.shape[0], in_features, dtype=torch.float32, device=grad.device)
    for some, block in weight.blocks():
        out.addmm_(rows[:, some], block.dequantize())
    return out.to(grad.dtype).view(*grad.shape[:-1], in_features)


LIB.impl("linear", _linear, "CompositeExplicitAutograd")
LIB.impl("linear_grad_x", _linear_grad_x, "CompositeExplicitAutograd")

# -- autograd ----------------------------------------------------------------------------------------------------------


def refuse_gradients(op: str, arguments: Iterable[tuple[str, Tensor | None]], can: str) -> None:
    """Raises RuntimeError if one of these tensor arguments requires a gradient. ``can``: which others may."""
    for name, t in arguments:
        if t is not None and t.requires_grad:
            raise RuntimeError(
                f"w4a16::{op} gives no gradient to {name}, which requires one; only {can} can. Freeze it"
                " (requires_grad_(False)), or call the op under torch.no_grad()."
            )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scales, zeros, order, bias, _, ctx.group_size, ctx.kernel = inputs
    refuse_gradients("linear", (("scales", scales), ("zeros", zeros)), "x and bias")
    ctx.in_features = x.shape[-1]
    ctx.bias_ndim = None if bias is None else x.dim() - 1
    ctx.save_for_backward(qweight, scales, zeros, order)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.w4a16.linear_grad_x(grad, *ctx.saved_tensors, ctx.in_features, ctx.group_size, ctx.kernel)
    if ctx.needs_input_grad[5]:
        grad_bias = grad if ctx.bias_ndim == 0 else grad.sum(dim=list(range(ctx.bias_ndim)))
    return grad_x, None, None, None, None, grad_bias, None, None, None


def _save_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, qweight, scales, zeros, order, _, ctx.group_size, ctx.kernel = inputs
    refuse_gradients("linear_grad_x", (("scales", scales), ("zeros", zeros)), "grad")
    ctx.out_features = grad.shape[-1]
    ctx.save_for_backward(qweight, scales, zeros, order)


def _backward_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of grad @ W with respect to grad is the forward itself."""
    twice = torch.ops.w4a16.linear(grad, *ctx.saved_tensors, None, ctx.out_features, ctx.group_size, ctx.kernel)
    return twice, None, None, None, None, None, None, None


torch.library.register_autograd("w4a16::linear", _backward, setup_context=_save, lib=LIB)
torch.library.register_autograd("w4a16::linear_grad_x", _backward_grad, setup_context=_save_grad, lib=LIB)

linear = torch.ops.w4a16.linear.default
