"""``torch.ops.w4a16.triton_w4a16_gemm``: a @ W with W in the field's layout for Triton, packed along N. With the names,
layouts and meanings of vLLM's function, so that its callers can call it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from inductor_ext.ops.linear import LIB

# -- schema ------------------------------------------------------------------------------------------------------------
# a [M, K] float16 | bfloat16; b_q int32 [K, N/8], nibble i of word j is column 8 j + i; scales [K/G, N] in a's dtype;
# qzeros int32 [K/G, N/8], packed as b_q, or None: zp_bias everywhere. All contiguous, on one CUDA or ROCm device.
# group_size is G: 32, 64, 128, 256 or K, and divides K. Zeros count as stored; GPTQ's + 1 is the caller's to add.
# Returns a new [M, N] in a's dtype: the weight is (code - zero) in a's dtype times the scale, rounded to a's dtype;
# products are accumulated in float32 and rounded once.
LIB.define(
    "triton_w4a16_gemm(Tensor a, Tensor b_q, Tensor scales, Tensor? qzeros, int group_size, int zp_bias=8) -> Tensor",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)

_DTYPES = (torch.float16, torch.bfloat16)
_GROUPS = (32, 64, 128, 256)


def _require(ok: Any, message: Callable[[], str]) -> None:
    if ok is not True:  # a plain True costs nothing; False raises and a SymBool becomes a guard
        torch._check(ok, lambda: f"w4a16::triton_w4a16_gemm: {message()}")


def _check(a: Tensor, b_q: Tensor, scales: Tensor, qzeros: Tensor | None, group_size: int) -> None:
    """Raises RuntimeError naming the argument, what it was and what is allowed."""
    _require(a.dtype in _DTYPES, lambda: f"a must be float16 or bfloat16, it is {_name(a.dtype)}.")
    _require(a.dim() == 2, lambda: f"a must be [M, K], it is {list(a.shape)}.")
    _require(b_q.dim() == 2, lambda: f"b_q must be [K, N/8], it is {list(b_q.shape)}.")
    K, words = a.shape[1], b_q.shape[1]
    _require(
        group_size in _GROUPS or group_size == K > 0,
        lambda: f"group_size must be 32, 64, 128, 256 or K={K}, it is {group_size}; for -1 the caller gives K.",
    )
    _require(K % group_size == 0, lambda: f"group_size {group_size} does not divide K={K}.")
    _contiguous("a", a)
    _tensor("b_q", b_q, (K, words), torch.int32, a.device)
    _tensor("scales", scales, (K // group_size, 8 * words), a.dtype, a.device)
    if qzeros is not None:
        _tensor("qzeros", qzeros, (K // group_size, words), torch.int32, a.device)


def _tensor(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    _require(t.dtype == dtype, lambda: f"{name} must be {_name(dtype)}, it is {_name(t.dtype)}.")
    _require(tuple(t.shape) == shape, lambda: f"{name} must be {list(shape)}, it is {list(t.shape)}.")
    _require(t.device == device, lambda: f"{name} is on {t.device}, a is on {device}.")
    _contiguous(name, t)


def _contiguous(name: str, t: Tensor) -> None:
    _require(t.is_contiguous(), lambda: f"{name} must be contiguous, it has strides {list(t.stride())}.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- fake --------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("w4a16::triton_w4a16_gemm", lib=LIB)
def _(a: Tensor, b_q: Tensor, scales: Tensor, qzeros: Tensor | None, group_size: int, zp_bias: int = 8) -> Tensor:
    _check(a, b_q, scales, qzeros, group_size)
    return a.new_empty(a.shape[0], scales.shape[1])


# -- implementation ----------------------------------------------------------------------------------------------------


@functools.cache
def _kernel() -> ModuleType:
    """Imported at the first call: importing this package imports no triton, and works without one."""
    try:
        from inductor_ext.kernels.gpu import field_gemm
    except ImportError as error:
        raise RuntimeError(
            f"w4a16::triton_w4a16_gemm: the kernel needs triton, which cannot be imported ({error}). PyTorch for CUDA"
            " or ROCm brings it; elsewhere `pip install triton`."
        ) from error
    return field_gemm


def _gemm(a: Tensor, b_q: Tensor, scales: Tensor, qzeros: Tensor | None, group_size: int, zp_bias: int = 8) -> Tensor:
    _check(a, b_q, scales, qzeros, group_size)
    kernel = _kernel()
    if kernel.INTERPRETED:
        _require(
            a.dtype == torch.float16,
            lambda: "a must be float16 under TRITON_INTERPRET=1, it is bfloat16, which the interpreter gets wrong.",
        )
    else:
        _require(
            a.device.type == "cuda",
            lambda: (
                f"a must be on a CUDA or ROCm device, it is on {a.device}. Triton's interpreter, which is slow, needs"
                " none: set TRITON_INTERPRET=1 before triton is imported."
            ),
        )
    out: Tensor = kernel.run(a, b_q, scales, qzeros, group_size, zp_bias)
    return out


LIB.impl("triton_w4a16_gemm", _gemm, "CompositeExplicitAutograd")

# -- autograd ----------------------------------------------------------------------------------------------------------


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "w4a16::triton_w4a16_gemm has no gradient, as in the field; torch.ops.w4a16.linear has one."
    )


# Without this PyTorch would warn and go on with no gradient.
torch.library.register_autograd("w4a16::triton_w4a16_gemm", _backward, lib=LIB)

triton_w4a16_gemm = torch.ops.w4a16.triton_w4a16_gemm.default
