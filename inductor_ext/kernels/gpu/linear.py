"""The Triton kernels for ``w4a16::linear``: by the number of rows a fused kernel in one of its variants (on NVIDIA GPUs
that of ``decode`` for one, on a Hopper that of ``hopper`` for many), or dequantising once and a dense matmul."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from inductor_ext import devices
from inductor_ext.kernels import Packed, Problem
from inductor_ext.kernels.gpu import measured, planes, tuning

NAME = "triton"

_FLOATS = (torch.float16, torch.bfloat16)


@functools.cache
def usable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "The package triton is not installed."
    if not torch.cuda.is_available():
        return "There is no GPU that torch can use."
    return None


def reject(problem: Problem) -> str | None:
    if problem.op != "linear":
        return f"The kernel computes linear, not {problem.op}."
    if problem.device != "cuda":
        return f"The kernel runs on NVIDIA and AMD GPUs, not on {problem.device}."
    if (reason := tuning.why_not_on(problem.arch)) is not None:
        return reason
    if problem.dtype not in _FLOATS:
        return f"The activations must be float16 or bfloat16, not {problem.dtype}."
    if problem.scale_dtype not in planes.SCALES:
        return f"The scales must be float16, bfloat16 or float32, not {problem.scale_dtype}."
    return planes.why_not(problem.K, problem.group_size)


pack, unpack, layout = planes.pack, planes.unpack, planes.layout


def run(x: Tensor, packed: Packed, bias: Tensor | None, N: int, group_size: int) -> Tensor:
    require(x)
    with on_device_of(x):
        return _run(x, packed, bias, N, group_size)


def _run(x: Tensor, packed: Packed, bias: Tensor | None, N: int, group_size: int) -> Tensor:
    if packed.order is not None:
        x = x.index_select(1, packed.order)
    from inductor_ext.kernels.gpu.decode import launch as decode
    from inductor_ext.kernels.gpu.hopper import launch as hopper

    M, K = x.shape
    if M == 0:
        return x.new_empty(0, N)
    config = None
    if not decode.can(packed, x):
        config = chosen(x, packed, N, group_size)
        if config is None:
            return torch.nn.functional.linear(x, dequantise(packed, N, K, group_size, x.dtype), bias)
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if config is None:
        decode.dense(x, packed, bias, group_size, out)
    elif isinstance(config, tuning.Hopper):
        hopper.dense(config, x, packed, bias, group_size, out)
    else:
        launch(config, x, packed, bias, group_size, out)
    return out


def chosen(x: Tensor, packed: Packed, N: int, group_size: int) -> tuning.Config | tuning.Hopper | None:
    """Which fused kernel multiplies, and its launch parameters; None for a dense matmul of the dequantised weight."""
    from inductor_ext.kernels.gpu.hopper import launch as hopper

    M, K = x.shape
    arch, count = arch_of(x.device), processors(x.device)
    on_a_hopper = hopper.can(packed, x)
    plain = packed.zeros is None and group_size not in (32, 64)
    if plain:
        found = measured.dense(M, N, K, arch, count)
        if found is not None and (on_a_hopper or isinstance(found, tuning.Config)):
            return found
    if on_a_hopper and (many := tuning.hopper(M, N, K, count, plain)) is not None:
        return many
    if tuning.dense_from(float_zeros(packed) and not _rounding_pays(packed, x)) <= M:
        return None
    return tuning.dense(M, N, K, arch, count, plain)


def launch(config: tuning.Config, x: Tensor, packed: Packed, bias: Tensor | None, group_size: int, out: Tensor) -> None:
    """The fused kernel with these parameters: out [M, N] = x [M, K] @ W^T + bias. Apart from ``run`` for tuning."""
    from inductor_ext.kernels.gpu.dense import linear_kernel
    from inductor_ext.kernels.gpu.workspace import counters

    (M, K), N = x.shape, out.shape[1]
    variant = meaning(packed, K, group_size, x.device)
    down, across, _ = packed.qweight.shape
    tiles = down * planes.ROWS // config.BN * -(-M // config.BM)
    parts = arrived = None
    if config.SPLITS > 1:
        parts = torch.empty(tiles * config.SPLITS * config.BN * config.BM, dtype=torch.float32, device=x.device)
        arrived = counters(tiles, x.device)
    linear_kernel[(tiles, config.SPLITS)](
        x,
        packed.qweight,
        words(packed.scales),
        None if packed.zeros is None else words(packed.zeros),
        bias,
        out,
        parts,
        arrived,
        M,
        N,
        K,
        down * planes.ROWS,
        across,
        SPLITS=config.SPLITS,
        ONE=M <= config.BM,
        BN=config.BN,
        BM=config.BM,
        **steps(config, packed, group_size, x),
        WIDE=config.WIDE,
        STAGES=config.STAGES,
        num_warps=config.num_warps,
        # So that three programs share a processor: with float zeros Triton 3.6 wants a few registers more.
        **({"maxnreg": 168} if variant["PTX"] and float_zeros(packed) and config.BM == 32 else {}),
        **variant,
    )


def dequantise(packed: Packed, N: int, K: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """[N, K] in ``dtype``, each element rounded once; columns in stored order."""
    from inductor_ext.kernels.gpu.dequantise import dequantise_kernel

    down, across, _ = packed.qweight.shape
    out = torch.empty(N, K, dtype=dtype, device=packed.qweight.device)
    dequantise_kernel[(2 * across, down)](
        packed.qweight,
        words(packed.scales),
        None if packed.zeros is None else words(packed.zeros),
        out,
        N,
        K,
        down * planes.ROWS,
        across,
        num_warps=4,
        **meaning(packed, K, group_size, out.device),
    )
    return out


def float_zeros(packed: Packed) -> bool:
    return packed.zeros is not None and packed.zeros.dtype != torch.int16


def require(x: Tensor) -> None:
    """The oracle chooses these kernels where they can run; an op may be called with their name by hand, too. Raises
    RuntimeError."""
    if x.dtype not in _FLOATS:
        raise RuntimeError(f"The Triton kernels take float16 or bfloat16 activations; x is {_short(x.dtype)}.")
    if os.environ.get("TRITON_INTERPRET") == "1":
        if x.dtype == torch.bfloat16:
            raise RuntimeError("Triton's interpreter computes wrong bfloat16 products; x must be float16 there.")
    elif not x.is_cuda:
        raise RuntimeError(f"The Triton kernels run on NVIDIA and AMD GPUs; x is on {x.device}.")
    elif (reason := tuning.why_not_on(arch_of(x.device))) is not None:
        raise RuntimeError(reason)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def may_round(packed: Packed, dtype: torch.dtype) -> bool:
    """Whether weights are rounded but once where scales act on codes: zeros come off exactly or in the same rounding,
    and a scale of the activations' dtype is taken as it is."""
    return packed.scales.dtype == dtype


def _rounding_pays(packed: Packed, x: Tensor) -> bool:
    """Whether it is allowed, and 16-bit floats are multiplied in pairs."""
    return may_round(packed, x.dtype) and not tuning.is_amd(arch_of(x.device))


def steps(
    config: tuning.Config | tuning.MoeConfig, packed: Packed, group_size: int, x: Tensor, rounding: bool = True
) -> dict[str, Any]:
    """How the kernels go through K, and whether weights are rounded.

    With few rows the sums of each group of 32 would be scaled so often that it is cheaper to scale the weights; and
    zeros that are no integers come off with their scales' multiplication, where they would take another matmul. Both if
    ``rounding`` is allowed for no more than that; with very many rows (see ``mainloop``) it is, but for such zeros."""
    small, floats = group_size == 32, float_zeros(packed)
    cheaper = (small and config.BM <= 32) or (floats and config.BM > 8)
    rounded = (config.ROUNDED and (rounding or not floats)) or (cheaper and rounding and _rounding_pays(packed, x))
    return {"WIDTH": 32 if small else config.WIDTH, "ROUNDED": rounded and may_round(packed, x.dtype)}


def words(values: Tensor) -> Tensor:
    """16-bit pairs as the 32-bit words that a kernel loads."""
    return values if values.dtype == torch.float32 else values.view(torch.int32)


_KINDS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int16: "int16"}


def meaning(packed: Packed, K: int, group_size: int, device: torch.device) -> dict[str, Any]:
    """What the kernels must know of a weight when they are compiled."""
    return {
        "G": 0 if group_size == K else group_size,
        "KIND": _KINDS[packed.scales.dtype],
        "WHOLE": K % planes.COLUMNS == 0,
        "ZEROS": "none" if packed.zeros is None else _KINDS[packed.zeros.dtype],
        "PTX": arch_of(device).startswith("sm_"),
    }


@functools.cache
def arch_of(device: torch.device) -> str:
    return devices.of(device).arch


@functools.cache
def processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
