"""The Triton kernels for ``w4a16::linear``: by the number of rows a fused kernel in one of its variants (on NVIDIA GPUs
that of ``decode`` for one, on a Hopper that of ``hopper`` for many), or dequantising once and a dense matmul."""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_ext.kernels import Packed, Problem
from inductor_ext.kernels.gpu import measured, planes, runtime, tuning, weight
from inductor_ext.kernels.gpu.decode import launch as decode
from inductor_ext.kernels.gpu.hopper import launch as hopper

NAME = "triton"

usable = runtime.usable


def reject(problem: Problem) -> str | None:
    if problem.op != "linear":
        return f"The kernel computes linear, not {problem.op}."
    if problem.device != "cuda":
        return f"The kernel runs on NVIDIA and AMD GPUs, not on {problem.device}."
    if (reason := tuning.why_not_on(problem.arch)) is not None:
        return reason
    if problem.dtype not in runtime.FLOATS:
        return f"The activations must be float16 or bfloat16, not {problem.dtype}."
    if problem.scale_dtype not in planes.SCALES:
        return f"The scales must be float16, bfloat16 or float32, not {problem.scale_dtype}."
    return planes.why_not(problem.K, problem.group_size)


pack, unpack, layout = planes.pack, planes.unpack, planes.layout


def run(x: Tensor, packed: Packed, bias: Tensor | None, N: int, group_size: int) -> Tensor:
    runtime.require(x)
    with runtime.on_device_of(x):
        return _run(x, packed, bias, N, group_size)


def _run(x: Tensor, packed: Packed, bias: Tensor | None, N: int, group_size: int) -> Tensor:
    if packed.order is not None:
        x = x.index_select(1, packed.order)
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
    M, K = x.shape
    arch, count = runtime.arch_of(x.device), runtime.processors(x.device)
    on_a_hopper = hopper.can(packed, x)
    plain = packed.zeros is None and group_size not in (32, 64)
    if plain:
        found = measured.dense(M, N, K, arch, count)
        if found is not None and (on_a_hopper or isinstance(found, tuning.Config)):
            return found
    if on_a_hopper and (many := tuning.hopper(M, N, K, count, plain)) is not None:
        return many
    if tuning.dense_from(weight.float_zeros(packed) and not weight.rounding_pays(packed, x)) <= M:
        return None
    return tuning.dense(M, N, K, arch, count, plain)


def launch(config: tuning.Config, x: Tensor, packed: Packed, bias: Tensor | None, group_size: int, out: Tensor) -> None:
    """The fused kernel with these parameters: out [M, N] = x [M, K] @ W^T + bias. Apart from ``run`` for tuning.

    Raises ValueError for tiles that do not divide the weight's rows, which the layout fills up to a multiple of 64."""
    from inductor_ext.kernels.gpu.dense import linear_kernel
    from inductor_ext.kernels.gpu.workspace import counters

    (M, K), N = x.shape, out.shape[1]
    variant = weight.meaning(packed, K, group_size, x.device)
    down, across, _ = packed.qweight.shape
    if down * planes.ROWS % config.BN:
        raise ValueError(f"BN must divide the weight's {down * planes.ROWS} rows; {config.BN} does not.")
    tiles = down * planes.ROWS // config.BN * -(-M // config.BM)
    parts = arrived = None
    if config.SPLITS > 1:
        parts = torch.empty(tiles * config.SPLITS * config.BN * config.BM, dtype=torch.float32, device=x.device)
        arrived = counters(tiles, x.device)
    linear_kernel[(tiles, config.SPLITS)](
        x,
        packed.qweight,
        weight.words(packed.scales),
        None if packed.zeros is None else weight.words(packed.zeros),
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
        **weight.steps(config, packed, group_size, x),
        WIDE=config.WIDE,
        STAGES=config.STAGES,
        num_warps=config.num_warps,
        # So that three programs share a processor: with float zeros Triton 3.6 wants a few registers more.
        **({"maxnreg": 168} if variant["PTX"] and weight.float_zeros(packed) and config.BM == 32 else {}),
        **variant,
    )


def dequantise(packed: Packed, N: int, K: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """[N, K] in ``dtype``, each element rounded once; columns in stored order."""
    from inductor_ext.kernels.gpu.dequantise import dequantise_kernel

    down, across, _ = packed.qweight.shape
    out = torch.empty(N, K, dtype=dtype, device=packed.qweight.device)
    dequantise_kernel[(2 * across, down)](
        packed.qweight,
        weight.words(packed.scales),
        None if packed.zeros is None else weight.words(packed.zeros),
        out,
        N,
        K,
        down * planes.ROWS,
        across,
        num_warps=4,
        **weight.meaning(packed, K, group_size, out.device),
    )
    return out
