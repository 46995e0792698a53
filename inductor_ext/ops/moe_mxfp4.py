"""``torch.ops.w4a16.moe_mxfp4`` and ``moe_gemm_a8w4``: routed experts with MXFP4 weights, for activations as they come
(W4A16) and rounded to fp8 by static scales (W4A8)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from inductor_ext import kernels
from inductor_ext.formats import MXFP4_GROUP
from inductor_ext.ops.linear import LIB, refuse_gradients
from inductor_ext.ops.moe import GET_ONE, check_grad, gradients
from inductor_ext.ops.moe_door import Call, check, check_tensor, describe, require, routing

# -- schema ------------------------------------------------------------------------------------------------------------
# As w4a16::moe, but for the weights: w13_* and w2_* in the layout of `kernel`. For "cpu" and "reference" that is
# canonical (see formats.PackedMxfp4) with E in front:
#   w13_qweight uint8 [E, R, H/2], w13_scales uint8 [E, R, ceil(H/32)], R = 2 I, or I without a gate;
#   w2_qweight uint8 [E, H, I/2], w2_scales uint8 [E, H, ceil(I/32)].
# H and I are any even numbers. There are no group sizes and no zeros.
# moe_gemm_a8w4 rounds x to fp8 by w13_input_scale and what lies between the projections by w2_input_scale, each float32
# [] or [1]: what it computes is said in kernels.Mxfp4Kernel.run.
_TENSORS = (
    "Tensor topk_weights, Tensor topk_ids, Tensor w13_qweight, Tensor w13_scales, Tensor? w13_bias, "
    "Tensor w2_qweight, Tensor w2_scales, Tensor? w2_bias, Tensor? expert_map"
)
_SETTINGS = (
    'int intermediate_size, str activation="swigluoai", str gate_up="interleaved", float alpha=1.702, '
    "float? limit=None, bool apply_router_weight_on_input=False, float routed_scaling=1.0, "
    'int global_num_experts=-1, str kernel="reference"'
)
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
LIB.define(f"moe_mxfp4(Tensor x, {_TENSORS}, {_SETTINGS}) -> Tensor", tags=_TAGS)
LIB.define(
    f"moe_gemm_a8w4(Tensor x, {_TENSORS}, Tensor w13_input_scale, Tensor w2_input_scale, {_SETTINGS}) -> Tensor",
    tags=_TAGS,
)
LIB.define(
    f"moe_mxfp4_grad(Tensor grad, Tensor x, {_TENSORS}, {_SETTINGS}) -> (Tensor grad_x, Tensor grad_topk_weights)",
    tags=_TAGS,
)
_COUNT = 9
"""How many there are of _TENSORS."""


def _call(
    op: str,
    tensors: tuple[Any, ...],
    intermediate_size: int,
    activation: str = "swigluoai",
    gate_up: str = "interleaved",
    alpha: float = 1.702,
    limit: float | None = None,
    apply_router_weight_on_input: bool = False,
    routed_scaling: float = 1.0,
    global_num_experts: int = -1,
    kernel: str = "reference",
) -> Call:
    """The arguments after x in the form of w4a16::moe's."""
    weights, ids, q13, s13, b13, q2, s2, b2, expert_map = tensors
    mlp = (activation, gate_up, alpha, limit, apply_router_weight_on_input, routed_scaling)
    sizes = (intermediate_size, MXFP4_GROUP, MXFP4_GROUP)
    given = (weights, ids, q13, s13, None, b13, q2, s2, None, b2, expert_map, *sizes, *mlp)
    return Call(*given, global_num_experts, kernel, op, mxfp4=True)


def _w4a16(*rest: Any) -> Call:
    return _call("moe_mxfp4", rest[:_COUNT], *rest[_COUNT:])


def _w4a8(*rest: Any) -> tuple[Call, tuple[Tensor, Tensor]]:
    scales = rest[_COUNT : _COUNT + 2]
    return _call("moe_gemm_a8w4", rest[:_COUNT], *rest[_COUNT + 2 :]), (scales[0], scales[1])


def _check_scales(x: Tensor, op: str, scales: tuple[Tensor, Tensor]) -> None:
    for name, scale in zip(("w13_input_scale", "w2_input_scale"), scales, strict=True):
        one = scale.dim() <= 1 and scale.numel() == 1
        require(op, one, functools.partial("{} must be [] or [1], it is {}.".format, name, describe(scale)))
        check_tensor(op, name, scale, tuple(scale.shape), (torch.float32,), x.device)


# -- fake --------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("w4a16::moe_mxfp4", lib=LIB)
def _(x: Tensor, *rest: Any) -> Tensor:
    check(x, _w4a16(*rest))
    return x.new_empty(x.shape)


@torch.library.register_fake("w4a16::moe_gemm_a8w4", lib=LIB)
def _(x: Tensor, *rest: Any) -> Tensor:
    call, scales = _w4a8(*rest)
    check(x, call)
    _check_scales(x, call.op, scales)
    return x.new_empty(x.shape)


@torch.library.register_fake("w4a16::moe_mxfp4_grad", lib=LIB)
def _(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    call = _w4a16(*rest)
    check_grad(grad, x, call)
    return x.new_empty(x.shape), call.topk_weights.new_empty(call.topk_weights.shape)


# -- implementation ----------------------------------------------------------------------------------------------------


def _moe_mxfp4(x: Tensor, *rest: Any) -> Tensor:
    return _run(x, _w4a16(*rest), None)


def _moe_gemm_a8w4(x: Tensor, *rest: Any) -> Tensor:
    call, scales = _w4a8(*rest)
    _check_scales(x, call.op, scales)
    return _run(x, call, scales)


def _run(x: Tensor, call: Call, input_scales: tuple[Tensor, Tensor] | None) -> Tensor:
    kernel = kernels.load_mxfp4(call.kernel)
    check(x, call, weights=not kernel.CHECKS_WEIGHTS)
    biases = call.w13_bias, call.w2_bias
    try:
        return kernel.run(
            x.contiguous(), routing(call), call.w13, call.w2, *biases, call.mlp, call.intermediate_size, input_scales
        )
    except RuntimeError:
        check(x, call)  # says in the op's words what the kernel has met, if it is that
        raise


def _moe_mxfp4_grad(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    call = _w4a16(*rest)
    check_grad(grad, x, call)
    return gradients(grad, x, call)


LIB.impl("moe_mxfp4", _moe_mxfp4, "CompositeExplicitAutograd")
LIB.impl("moe_gemm_a8w4", _moe_gemm_a8w4, "CompositeExplicitAutograd")
LIB.impl("moe_mxfp4_grad", _moe_mxfp4_grad, "CompositeExplicitAutograd")

# -- autograd ----------------------------------------------------------------------------------------------------------

_NAMES = (
    *("topk_weights", "topk_ids", "w13_qweight", "w13_scales", "w13_bias", "w2_qweight", "w2_scales", "w2_bias"),
    *("expert_map", "w13_input_scale", "w2_input_scale"),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    refuse_gradients("moe_mxfp4", zip(_NAMES[2:], inputs[3 : _COUNT + 1], strict=False), GET_ONE)
    ctx.settings = inputs[_COUNT + 1 :]
    ctx.save_for_backward(*inputs[: _COUNT + 1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *tensors = ctx.saved_tensors
    for_x, for_weights = torch.ops.w4a16.moe_mxfp4_grad(grad, x, *tensors, *ctx.settings)
    return (for_x, for_weights, *[None] * (len(tensors) - 1 + len(ctx.settings)))


def _backward_grad(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "w4a16::moe_mxfp4 has no second derivative: it can be differentiated once. Call backward without"
        " create_graph=True."
    )


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    refuse_gradients("moe_gemm_a8w4", zip(_NAMES[2:], inputs[3 : _COUNT + 3], strict=True), GET_ONE)


def _backward_a8(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "w4a16::moe_gemm_a8w4 has no derivative: rounding to fp8 has none. To train through these experts, leave the"
        " activations in 16 bits."
    )


torch.library.register_autograd("w4a16::moe_mxfp4", _backward, setup_context=_save, lib=LIB)
torch.library.register_autograd("w4a16::moe_mxfp4_grad", _backward_grad, lib=LIB)
torch.library.register_autograd("w4a16::moe_gemm_a8w4", _backward_a8, setup_context=_save_nothing, lib=LIB)

moe_mxfp4 = torch.ops.w4a16.moe_mxfp4.default
moe_gemm_a8w4 = torch.ops.w4a16.moe_gemm_a8w4.default
