"""The door of the ops for routed experts: every argument against every other, before a kernel sees one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inductor_ext import kernels
from inductor_ext.kernels import ACTIVATIONS, GATE_UP, Mlp, MoeKernel, Mxfp4Kernel, Packed, Routing


class Call(NamedTuple):
    """The arguments of ``moe`` after x, as its schema has them; and which op they are checked for."""

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
    op: str = "moe"
    """What errors speak of."""
    mxfp4: bool = False
    """The weights are MXFP4: the kernel is one for ``moe_mxfp4``."""

    @property
    def module(self) -> MoeKernel | Mxfp4Kernel:
        return kernels.load_mxfp4(self.kernel) if self.mxfp4 else kernels.load_moe(self.kernel)

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


DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def require(op: str, ok: Any, message: Callable[[], str]) -> None:
    if ok is not True:  # a plain True costs nothing; False raises and a SymBool becomes a guard
        torch._check(ok, lambda: f"w4a16::{op}: {message()}")


def check(x: Tensor, call: Call, weights: bool = True) -> None:
    """Every argument against every other. Raises RuntimeError naming the argument, what it was and what is allowed.

    ``weights=False`` leaves out codes, scales, zeros and biases.
    """
    _check_numbers(call)
    check_tokens(call.op, "x", x, DTYPES, x)
    _check_experts(call)
    if weights:
        _check_weights(call, x)
    check_tokens(call.op, "topk_weights", call.topk_weights, DTYPES, x)
    check_tokens(call.op, "topk_ids", call.topk_ids, (torch.int32, torch.int64), x)
    k = call.topk_ids.shape[1]
    require(
        call.op, k >= 1, lambda: f"topk_ids must name at least one expert for a token, it is {describe(call.topk_ids)}."
    )
    require(
        call.op,
        call.topk_weights.shape[1] == k,
        lambda: f"topk_weights must be [T, {k}] as topk_ids, it is {describe(call.topk_weights)}.",
    )
    if call.expert_map is not None:
        check_tensor(call.op, "expert_map", call.expert_map, (number_of_ids(call),), (torch.int32,), x.device)


def _check_numbers(call: Call) -> None:
    require(
        call.op,
        call.activation in ACTIVATIONS,
        lambda: f"activation must be one of {', '.join(ACTIVATIONS)}; it is {call.activation!r}.",
    )
    require(
        call.op,
        call.gate_up in GATE_UP,
        lambda: f"gate_up must be one of {', '.join(GATE_UP)}; it is {call.gate_up!r}.",
    )
    oai = call.activation == "swigluoai"
    require(
        call.op,
        not oai or call.gate_up != "none",
        lambda: "activation 'swigluoai' needs a gate: gate_up must be halves or interleaved, it is 'none'.",
    )
    require(
        call.op,
        call.limit is None or (oai and call.limit > 0),
        lambda: f"limit must be None, or positive with activation 'swigluoai'; it is {call.limit}.",
    )
    require(call.op, math.isfinite(call.alpha), lambda: f"alpha must be finite, it is {call.alpha}.")
    require(
        call.op,
        math.isfinite(call.routed_scaling),
        lambda: f"routed_scaling must be finite, it is {call.routed_scaling}.",
    )


def _check_experts(call: Call) -> None:
    """How many there are, and how large."""
    require(
        call.op,
        call.w13_qweight.dim() >= 1 and call.w13_qweight.shape[0] >= 1,
        lambda: f"w13_qweight must begin with E >= 1 experts, it is {describe(call.w13_qweight)}.",
    )
    E, I, known = call.w13_qweight.shape[0], call.intermediate_size, call.global_num_experts  # noqa: E741
    step = 2 if call.mxfp4 else 8
    require(
        call.op,
        step <= I and I % step == 0,
        lambda: f"intermediate_size must be a positive multiple of {step}, it is {I}.",
    )
    if call.expert_map is None:
        require(
            call.op,
            known in (-1, E),
            lambda: f"global_num_experts must be -1 or {E} without an expert_map, it is {known}.",
        )
    else:
        require(
            call.op, known == -1 or known >= 1, lambda: f"global_num_experts must be -1 or positive, it is {known}."
        )


def _check_weights(call: Call, x: Tensor) -> None:
    """Codes, scales and zeros in the layout of the kernel, and biases, for tokens of x's size."""
    E, H, I = call.w13_qweight.shape[0], x.shape[1], call.intermediate_size  # noqa: E741
    _check_packed(call, "w13", call.w13, E, rows13(call), H, call.w13_group_size, x)
    _check_packed(call, "w2", call.w2, E, H, I, call.w2_group_size, x)
    for name, bias, rows in (("w13_bias", call.w13_bias, rows13(call)), ("w2_bias", call.w2_bias, H)):
        if bias is not None:
            check_tensor(call.op, name, bias, (E, rows), tuple(dict.fromkeys((x.dtype, torch.float32))), x.device)


def _check_packed(call: Call, name: str, packed: Packed, E: int, N: int, K: int, group_size: int, x: Tensor) -> None:
    """One projection [E, N, K] in the kernel's layout."""
    require(
        call.op,
        group_size > 0 and (call.mxfp4 or K % group_size == 0),
        lambda: f"{name}_group_size {group_size} does not divide {K}, the columns of {name}; x is {describe(x)}.",
    )
    try:
        layout = call.module.layout(packed, E, N, K, group_size)
    except ValueError as error:
        raise RuntimeError(f"w4a16::{call.op}: {name}: {error} x is {describe(x)}.") from None
    for field, tensor, expected in zip(Packed._fields, packed, layout, strict=True):
        if tensor is not None:
            check_tensor(call.op, f"{name}_{field}", tensor, expected.shape, expected.dtypes, x.device)


def check_tokens(op: str, name: str, t: Tensor, dtypes: Sequence[torch.dtype], x: Tensor) -> None:
    """A tensor of the tokens: two dimensions, as many rows as x. Its strides are free."""
    require(op, t.dtype in dtypes, lambda: f"{name} must be {_either(dtypes)}, it is {t.dtype}.")
    require(op, t.dim() == 2, lambda: f"{name} must have two dimensions, it is {describe(t)}.")
    require(
        op,
        t.shape[0] == x.shape[0],
        lambda: f"{name} must have a row for each of x {describe(x)}, it is {describe(t)}.",
    )
    require(op, t.device == x.device, lambda: f"{name} is on {t.device}, x is on {x.device}.")


def check_tensor(
    op: str, name: str, t: Tensor, shape: tuple[int, ...], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    if t.dtype in dtypes and t.shape == shape and t.device == device and t.is_contiguous():
        return  # as at every call but those that are about to raise
    require(op, t.dtype in dtypes, lambda: f"{name} must be {_either(dtypes)}, it is {t.dtype}.")
    require(op, tuple(t.shape) == shape, lambda: f"{name} must be {list(shape)}, it is {describe(t)}.")
    require(op, t.device == device, lambda: f"{name} is on {t.device}, x is on {device}.")
    require(op, t.is_contiguous(), lambda: f"{name} must be contiguous, it has strides {list(t.stride())}.")


def _either(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def describe(t: Tensor) -> str:
    return f"{_either((t.dtype,))} {list(t.shape)}"


def rows13(call: Call) -> int:
    """Of W13."""
    return call.intermediate_size * (1 if call.gate_up == "none" else 2)


def number_of_ids(call: Call) -> int:
    """How many ids there are."""
    return call.w13_qweight.shape[0] if call.global_num_experts == -1 else call.global_num_experts


def routing(call: Call) -> Routing:
    return Routing(call.topk_weights, call.topk_ids, call.expert_map, number_of_ids(call))
