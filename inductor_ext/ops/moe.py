"""``torch.ops.w4a16.moe``: routed experts with int4 weights, from the router's ids and weights to the tokens' results,
and its gradients with respect to x and the router's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inductor_ext import kernels
from inductor_ext.ops.linear import LIB, refuse_gradients
from inductor_ext.ops.moe_door import DTYPES, Call, check, check_tokens, describe, require, routing, rows13

# -- schema ------------------------------------------------------------------------------------------------------------
# x [T, H], topk_weights [T, k] float16 | bfloat16 | float32; topk_ids [T, k] int32 | int64; w13_* and w2_*: the layout
# of `kernel`. For "cpu" and "reference" that is the canonical form (see formats.PackedInt4) with E in front:
#   w13_qweight int32 [E, R, H/8], w13_scales and w13_zeros [E, R, H / w13_group_size], R = 2 I, or I without a gate;
#   w2_qweight int32 [E, H, I/8], w2_scales and w2_zeros [E, H, I / w2_group_size].
# "reference" and "triton_int8" take weights of 8 bits, too: the canonical form of formats.PackedInt8, E in front.
# Biases w13_bias [E, R], w2_bias [E, H] in x's dtype or float32; I = intermediate_size. expert_map int32
# [global_num_experts]: id -> row of the weights or -1; without it ids are rows, and global_num_experts -1 means E.
# What is computed with h = W13 x + b13 is said in kernels.Mlp. An id of -1, or mapped to -1, contributes exactly
# nothing; any other id without a weight is an error on the CPU and contributes nothing elsewhere.
# Returns [T, H] in x's dtype, accumulated in float32, summed over k in order, rounded once.
_WEIGHTS = (
    "Tensor topk_weights, Tensor topk_ids, Tensor w13_qweight, Tensor w13_scales, Tensor? w13_zeros, Tensor? w13_bias, "
    "Tensor w2_qweight, Tensor w2_scales, Tensor? w2_zeros, Tensor? w2_bias, Tensor? expert_map, "
    'int intermediate_size, int w13_group_size, int w2_group_size, str activation="silu", str gate_up="halves", '
    "float alpha=1.702, float? limit=None, bool apply_router_weight_on_input=False, float routed_scaling=1.0, "
    'int global_num_experts=-1, str kernel="reference"'
)
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
LIB.define(f"moe(Tensor x, {_WEIGHTS}) -> Tensor", tags=_TAGS)
# grad [T, H] -> the gradients of x and topk_weights, in their dtypes. Codes, scales, zeros and biases get none.
LIB.define(f"moe_grad(Tensor grad, Tensor x, {_WEIGHTS}) -> (Tensor grad_x, Tensor grad_topk_weights)", tags=_TAGS)


# -- fake --------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("w4a16::moe", lib=LIB)
def _(x: Tensor, *rest: Any) -> Tensor:
    check(x, Call(*rest))
    return x.new_empty(x.shape)


@torch.library.register_fake("w4a16::moe_grad", lib=LIB)
def _(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    call = Call(*rest)
    check_grad(grad, x, call)
    return x.new_empty(x.shape), call.topk_weights.new_empty(call.topk_weights.shape)


# -- implementation ----------------------------------------------------------------------------------------------------


def _moe(x: Tensor, *rest: Any) -> Tensor:
    call = Call(*rest)
    kernel = kernels.load_moe(call.kernel)
    check(x, call, weights=not kernel.CHECKS_WEIGHTS)
    try:
        return kernel.run(
            x.contiguous(),
            routing(call),
            call.w13,
            call.w2,
            call.w13_bias,
            call.w2_bias,
            call.mlp,
            call.intermediate_size,
            (call.w13_group_size, call.w2_group_size),
        )
    except RuntimeError:
        check(x, call)  # says in the op's words what the kernel has met, if it is that
        raise


def _moe_grad(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    call = Call(*rest)
    check_grad(grad, x, call)
    return gradients(grad, x, call)


def gradients(grad: Tensor, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Of x and topk_weights, in their dtypes, for int4 and MXFP4 weights in any kernel's layout."""
    from inductor_ext.kernels.reference_moe import Experts, gradient  # which imports this package
    from inductor_ext.kernels.rows import rows

    kernel: Any = call.module
    reference: Any = call._replace(kernel="reference").module
    E = call.w13_qweight.shape[0]
    H, I = x.shape[1], call.intermediate_size  # noqa: E741
    w13, w2 = (
        reference.pack(kernels.unpack_experts(kernel, packed, N, K, group_size, is_w13), E)
        for packed, N, K, group_size, is_w13 in (
            (call.w13, rows13(call), H, call.w13_group_size, True),
            (call.w2, H, I, call.w2_group_size, False),
        )
    )
    experts = Experts(w13, w2, call.w13_bias, call.w2_bias, call.mlp, call.mxfp4)
    for_x, for_weights = gradient(grad, x, call.topk_weights.float().contiguous(), rows(routing(call), E), experts)
    return for_x.to(x.dtype), for_weights.to(call.topk_weights.dtype)


def check_grad(grad: Tensor, x: Tensor, call: Call) -> None:
    check(x, call)
    check_tokens(call.op, "grad", grad, DTYPES, x)
    require(call.op, grad.shape[1] == x.shape[1], lambda: f"grad must be as x {describe(x)}, it is {describe(grad)}.")


LIB.impl("moe", _moe, "CompositeExplicitAutograd")
LIB.impl("moe_grad", _moe_grad, "CompositeExplicitAutograd")

# -- autograd ----------------------------------------------------------------------------------------------------------


_TENSORS = 12
"""The arguments of the op that are tensors: x, and of Call those up to expert_map."""


GET_ONE = "x and topk_weights"
"""What gets a gradient."""


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    refuse_gradients("moe", zip(Call._fields[2:], inputs[3:_TENSORS], strict=False), GET_ONE)
    ctx.settings = inputs[_TENSORS:]
    ctx.save_for_backward(*inputs[:_TENSORS])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *tensors = ctx.saved_tensors
    for_x, for_weights = torch.ops.w4a16.moe_grad(grad, x, *tensors, *ctx.settings)
    return (for_x, for_weights, *[None] * (len(tensors) - 1 + len(ctx.settings)))


def _backward_grad(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "w4a16::moe has no second derivative: it can be differentiated once. Call backward without create_graph=True."
    )


torch.library.register_autograd("w4a16::moe", _backward, setup_context=_save, lib=LIB)
torch.library.register_autograd("w4a16::moe_grad", _backward_grad, lib=LIB)

moe = torch.ops.w4a16.moe.default
