"""``torch.ops.w4a16.moe``: routed experts with int4 weights, from the router's ids and weights to the tokens' results,
and its gradients with respect to x and the router's weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inductor_ext import kernels
from inductor_ext.kernels import ACTIVATIONS, GATE_UP, Mlp, Packed, Routing
from inductor_ext.ops.linear import LIB

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


class _Call(NamedTuple):
    """The arguments of both ops after x, as the schema has them."""

    topk_weights: Tensor
    topk_ids: Tensor
    w13_qweight: Tensor
    w13_scales: Tensor
    w13_zeros: Tensor | None
    w13_bias: Tensor | None
    w2_qweight: Tensor
    w2_scales: Tensor
    w2_zeros: Tensor | None
    w2_bias: Tensor | None
    expert_map: Tensor | None
    intermediate_size: int
    w13_group_size: int
    w2_group_size: int
    activation: str = "silu"
    gate_up: str = "halves"
    alpha: float = 1.702
    limit: float | None = None
    apply_router_weight_on_input: bool = False
    routed_scaling: float = 1.0
    global_num_experts: int = -1
    kernel: str = "reference"

    @property
    def w13(self) -> Packed:
        return Packed(self.w13_qweight, self.w13_scales, self.w13_zeros, None)

    @property
    def w2(self) -> Packed:
        return Packed(self.w2_qweight, self.w2_scales, self.w2_zeros, None)

    @property
    def mlp(self) -> Mlp:
        return Mlp(
            self.activation,
            self.gate_up,
            self.alpha,
            self.limit,
            self.apply_router_weight_on_input,
            self.routed_scaling,
        )


# -- the door ----------------------------------------------------------------------------------------------------------

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _require(ok: Any, message: Callable[[], str]) -> None:
    if ok is not True:  # a plain True costs nothing; False raises and a SymBool becomes a guard
        torch._check(ok, lambda: f"w4a16::moe: {message()}")


def _check(x: Tensor, call: _Call, weights: bool = True) -> None:
    """Every argument against every other. Raises RuntimeError naming the argument, what it was and what is allowed.

    ``weights=False`` leaves out codes, scales, zeros and biases.
    """
    _check_numbers(call)
    _tokens("x", x, _DTYPES, x)
    _check_experts(call)
    if weights:
        _check_weights(call, x)
    _tokens("topk_weights", call.topk_weights, _DTYPES, x)
    _tokens("topk_ids", call.topk_ids, (torch.int32, torch.int64), x)
    k = call.topk_ids.shape[1]
    _require(k >= 1, lambda: f"topk_ids must name at least one expert for a token, it is {_of(call.topk_ids)}.")
    _require(
        call.topk_weights.shape[1] == k,
        lambda: f"topk_weights must be [T, {k}] as topk_ids, it is {_of(call.topk_weights)}.",
    )
    if call.expert_map is not None:
        _tensor("expert_map", call.expert_map, (_ids(call),), (torch.int32,), x.device)


def _check_numbers(call: _Call) -> None:
    _require(
        call.activation in ACTIVATIONS,
        lambda: f"activation must be one of {', '.join(ACTIVATIONS)}; it is {call.activation!r}.",
    )
    _require(call.gate_up in GATE_UP, lambda: f"gate_up must be one of {', '.join(GATE_UP)}; it is {call.gate_up!r}.")
    oai = call.activation == "swigluoai"
    _require(
        not oai or call.gate_up != "none",
        lambda: "activation 'swigluoai' needs a gate: gate_up must be halves or interleaved, it is 'none'.",
    )
    _require(
        call.limit is None or (oai and call.limit > 0),
        lambda: f"limit must be None, or positive with activation 'swigluoai'; it is {call.limit}.",
    )
    _require(math.isfinite(call.alpha), lambda: f"alpha must be finite, it is {call.alpha}.")
    _require(math.isfinite(call.routed_scaling), lambda: f"routed_scaling must be finite, it is {call.routed_scaling}.")


def _check_experts(call: _Call) -> None:
    """How many there are, and how large."""
    _require(
        call.w13_qweight.dim() >= 1 and call.w13_qweight.shape[0] >= 1,
        lambda: f"w13_qweight must begin with E >= 1 experts, it is {_of(call.w13_qweight)}.",
    )
    E, I, known = call.w13_qweight.shape[0], call.intermediate_size, call.global_num_experts  # noqa: E741
    _require(I >= 8 and I % 8 == 0, lambda: f"intermediate_size must be a positive multiple of 8, it is {I}.")
    if call.expert_map is None:
        _require(
            known in (-1, E), lambda: f"global_num_experts must be -1 or {E} without an expert_map, it is {known}."
        )
    else:
        _require(known == -1 or known >= 1, lambda: f"global_num_experts must be -1 or positive, it is {known}.")


def _check_weights(call: _Call, x: Tensor) -> None:
    """Codes, scales and zeros in the layout of the kernel, and biases, for tokens of x's size."""
    E, H, I = call.w13_qweight.shape[0], x.shape[1], call.intermediate_size  # noqa: E741
    _check_packed("w13", call.w13, call.kernel, E, _rows13(call), H, call.w13_group_size, x)
    _check_packed("w2", call.w2, call.kernel, E, H, I, call.w2_group_size, x)
    for name, bias, rows in (("w13_bias", call.w13_bias, _rows13(call)), ("w2_bias", call.w2_bias, H)):
        if bias is not None:
            _tensor(name, bias, (E, rows), tuple(dict.fromkeys((x.dtype, torch.float32))), x.device)


def _check_packed(name: str, packed: Packed, kernel: str, E: int, N: int, K: int, group_size: int, x: Tensor) -> None:
    """One projection [E, N, K] in the kernel's layout."""
    _require(
        group_size > 0 and K % group_size == 0,
        lambda: f"{name}_group_size {group_size} does not divide {K}, the columns of {name}; x is {_of(x)}.",
    )
    try:
        layout = kernels.load_moe(kernel).layout(packed, E, N, K, group_size)
    except ValueError as error:
        raise RuntimeError(f"w4a16::moe: {name}: {error} x is {_of(x)}.") from None
    for field, tensor, expected in zip(Packed._fields, packed, layout, strict=True):
        if tensor is not None:
            _tensor(f"{name}_{field}", tensor, expected.shape, expected.dtypes, x.device)


def _tokens(name: str, t: Tensor, dtypes: Sequence[torch.dtype], x: Tensor) -> None:
    """A tensor of the tokens: two dimensions, as many rows as x. Its strides are free."""
    _require(t.dtype in dtypes, lambda: f"{name} must be {_either(dtypes)}, it is {t.dtype}.")
    _require(t.dim() == 2, lambda: f"{name} must have two dimensions, it is {_of(t)}.")
    _require(t.shape[0] == x.shape[0], lambda: f"{name} must have a row for each of x {_of(x)}, it is {_of(t)}.")
    _require(t.device == x.device, lambda: f"{name} is on {t.device}, x is on {x.device}.")


def _tensor(name: str, t: Tensor, shape: tuple[int, ...], dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    if t.dtype in dtypes and t.shape == shape and t.device == device and t.is_contiguous():
        return  # as at every call but those that are about to raise
    _require(t.dtype in dtypes, lambda: f"{name} must be {_either(dtypes)}, it is {t.dtype}.")
    _require(tuple(t.shape) == shape, lambda: f"{name} must be {list(shape)}, it is {_of(t)}.")
    _require(t.device == device, lambda: f"{name} is on {t.device}, x is on {device}.")
    _require(t.is_contiguous(), lambda: f"{name} must be contiguous, it has strides {list(t.stride())}.")


def _either(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _of(t: Tensor) -> str:
    return f"{_either((t.dtype,))} {list(t.shape)}"


def _rows13(call: _Call) -> int:
    """Of W13."""
    return call.intermediate_size * (1 if call.gate_up == "none" else 2)


def _ids(call: _Call) -> int:
    """How many ids there are."""
    return call.w13_qweight.shape[0] if call.global_num_experts == -1 else call.global_num_experts


# -- fake --------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("w4a16::moe", lib=LIB)
def _(x: Tensor, *rest: Any) -> Tensor:
    _check(x, _Call(*rest))
    return x.new_empty(x.shape)


@torch.library.register_fake("w4a16::moe_grad", lib=LIB)
def _(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    call = _Call(*rest)
    _check_grad(grad, x, call)
    return x.new_empty(x.shape), call.topk_weights.new_empty(call.topk_weights.shape)


# -- implementation ----------------------------------------------------------------------------------------------------


def _moe(x: Tensor, *rest: Any) -> Tensor:
    call = _Call(*rest)
    kernel = kernels.load_moe(call.kernel)
    _check(x, call, weights=not kernel.CHECKS_WEIGHTS)
    try:
        return kernel.run(
            x.contiguous(),
            _routing(call),
            call.w13,
            call.w2,
            call.w13_bias,
            call.w2_bias,
            call.mlp,
            call.intermediate_size,
            (call.w13_group_size, call.w2_group_size),
        )
    except RuntimeError:
        _check(x, call)  # says in the op's words what the kernel has met, if it is that
        raise


def _routing(call: _Call) -> Routing:
    return Routing(call.topk_weights, call.topk_ids, call.expert_map, _ids(call))


def _moe_grad(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from inductor_ext.kernels.reference_moe import Experts, gradient  # which imports this package
    from inductor_ext.kernels.rows import rows

    call = _Call(*rest)
    _check_grad(grad, x, call)
    kernel, reference = kernels.load_moe(call.kernel), kernels.load_moe("reference")
    E = call.w13_qweight.shape[0]
    H, I = x.shape[1], call.intermediate_size  # noqa: E741
    w13, w2 = (
        reference.pack(kernels.unpack_experts(kernel, packed, N, K, group_size, is_w13), E)
        for packed, N, K, group_size, is_w13 in (
            (call.w13, _rows13(call), H, call.w13_group_size, True),
            (call.w2, H, I, call.w2_group_size, False),
        )
    )
    experts = Experts(w13, w2, call.w13_bias, call.w2_bias, call.mlp)
    for_x, for_weights = gradient(grad, x, call.topk_weights.float().contiguous(), rows(_routing(call), E), experts)
    return for_x.to(x.dtype), for_weights.to(call.topk_weights.dtype)


def _check_grad(grad: Tensor, x: Tensor, call: _Call) -> None:
    _check(x, call)
    _tokens("grad", grad, _DTYPES, x)
    _require(grad.shape[1] == x.shape[1], lambda: f"grad must be as x {_of(x)}, it is {_of(grad)}.")


LIB.impl("moe", _moe, "CompositeExplicitAutograd")
LIB.impl("moe_grad", _moe_grad, "CompositeExplicitAutograd")

# -- autograd ----------------------------------------------------------------------------------------------------------


_TENSORS = 12
"""The arguments of the op that are tensors: x, and of _Call those up to expert_map."""


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    for name, t in zip(_Call._fields, inputs[1:_TENSORS], strict=False):
        if name not in ("topk_weights", "topk_ids") and t is not None and t.requires_grad:
            raise RuntimeError(
                f"w4a16::moe gives no gradient to {name}, which requires one; only x and topk_weights can. Freeze it"
                " (requires_grad_(False)), or call the op under torch.no_grad()."
            )
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
