"""Launches of the kernels for Hoppers: for what weights, with what parameters, and by which descriptors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from inductor_ext.kernels import Mlp, Packed
from inductor_ext.kernels.gpu import runtime, weight
from inductor_ext.kernels.gpu.gluon import importable
from inductor_ext.kernels.gpu.tuning import Hopper


def installed() -> bool:
    return importable("inductor_ext.kernels.gpu.hopper.dense", "inductor_ext.kernels.gpu.hopper.moe")


def can(packed: Packed, x: Tensor) -> bool:
    """Whether the kernels multiply x with this weight: each of its elements is rounded to x's dtype, once, if scales
    have that; with zeros that are no integers, which must have it too, what is left of a zero is rounded before."""
    there = runtime.arch_of(x.device) == "sm_90" and packed.scales.dtype == x.dtype and installed()
    return there and (packed.zeros is None or packed.zeros.dtype in (torch.int16, x.dtype))


def dense(config: Hopper, x: Tensor, packed: Packed, bias: Tensor | None, group_size: int, out: Tensor) -> None:
    """out [M, N] = x [M, K] @ W^T + bias. Raises ValueError for tiles that the kernel does not have, and for splits
    that leave a program without a tile of K."""
    from inductor_ext.kernels.gpu.hopper.dense import linear_kernel
    from inductor_ext.kernels.gpu.workspace import counters

    (M, K), N = x.shape, out.shape[1]
    across = packed.qweight.shape[1]
    BN, BM, splits = config.BN, config.BM, config.SPLITS
    if BN not in (128, 192, 256):
        raise ValueError(f"BN must be 128, 192 or 256, not {BN}.")
    if (splits - 1) * -(-across // splits) >= across:
        raise ValueError(f"SPLITS must leave each program a tile of K; {splits} do not of {across} tiles.")
    tiles = -(-N // BN) * -(-M // BM)
    parts = arrived = None
    if splits > 1:
        parts = torch.empty(tiles * BN * splits * BM, dtype=torch.float32, device=x.device)
        arrived = counters(tiles * BN // 64, x.device)
    variant = _variant(config, packed, K, group_size, x.device)
    linear_kernel[(_programs(tiles * splits, x.device),)](
        _rows(x, BM),
        *_weight(packed, variant["G"]),
        bias,
        out,
        parts,
        arrived,
        M,
        N,
        across,
        SPLITS=splits,
        BN=BN,
        **variant,
    )


def _variant(config: Hopper, packed: Packed, K: int, group_size: int, device: torch.device) -> dict[str, Any]:
    meaning = weight.meaning(packed, K, group_size, device)
    return {
        "BM": config.BM,
        "G": meaning["G"],
        "ZEROS": meaning["ZEROS"],
        "STAGES": _stages(config, 1 if packed.zeros is None else 2, meaning["G"]),
        "num_warps": 4,
    }


_ROOM = 208 << 10
"""Bytes of shared memory for stages; storing results takes up to 17 KB."""


def _stages(config: Hopper, numbers: int, G: int) -> int:
    """As many as are wanted and have room. A step has x, the codes, and one or two ``numbers`` for each group."""
    from inductor_ext.kernels.gpu.hopper.loop import pairs

    words: int = pairs("int4", G) * numbers
    return min(config.STAGES, _ROOM // (256 * config.BM + config.BN // 64 * (4096 + 256 * words)))


def _programs(tiles: int, device: torch.device) -> int:
    """As many as there is room for at once, or tiles."""
    return min(tiles, runtime.processors(device))


def _weight(packed: Packed, G: int) -> tuple[Any, Any, Any]:
    """The descriptors of codes, scales, and zeros or None."""
    from inductor_ext.kernels.gpu.hopper.loop import pairs

    height = pairs("int4", G)
    zeros = None if packed.zeros is None else _pairs(weight.words(packed.zeros).squeeze(-1), height)
    return _codes(packed), _pairs(weight.words(packed.scales).squeeze(-1), height), zeros


def _codes(packed: Packed) -> Any:
    return _rows(packed.qweight.view(-1, 32), 64)


def _rows(rows: Tensor, height: int) -> Any:
    """For the copy engine: [.., K] of 16-bit numbers in blocks [height, 32]."""
    return _descriptor(rows, [height, 32], 64)


def _pairs(words: Tensor, height: int) -> Any:
    """Pairs of scales or zeros, int32 [.., rows], in blocks [height, 64]."""
    return _descriptor(words.view(-1, words.shape[-1]), [height, 64], 0)


def _descriptor(rows: Tensor, block: list[int], swizzled: int) -> Any:
    """The copy engine wants addresses that are multiples of 16."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    if rows.data_ptr() % 16:
        rows = rows.clone()
    layout = NVMMASharedLayout(swizzle_byte_width=swizzled, element_bitwidth=8 * rows.element_size(), rank=2)
    return TensorDescriptor.from_tensor(rows, block, layout)


def can_experts(x: Tensor, w13: Packed, w2: Packed, mlp: Mlp, I: int) -> bool:  # noqa: E741
    """Whether the kernels compute these experts."""
    # Weights of both projections are rounded, act(h) and with many tokens y: in bfloat16 that is what may be owed, and
    # the rest of zeros that are no integers would make it more.
    exact = not weight.float_zeros(w13) and not weight.float_zeros(w2)
    return _placed(mlp, I) and exact and can(w13, x) and can(w2, x)


def _placed(mlp: Mlp, I: int) -> bool:  # noqa: E741
    """Whether gates and ups are where ``moe.up_kernel`` needs them."""
    return mlp.gate_up == "interleaved" or (mlp.gate_up == "halves" and I % 64 == 0)


def gather(x: Tensor, found: tuple[Tensor, ...], top_k: int, BM: int, gathered: Tensor) -> None:
    """gathered [slots, H]: each slot's token."""
    from inductor_ext.kernels.gpu.hopper.moe import gather_kernel

    _, slots, _, total = found
    H = x.shape[1]
    gather_kernel[(len(gathered) // 8, -(-H // 1024))](
        x, slots, total, gathered, top_k, H, BM=BM, ROWS=8, BN=1024, num_warps=4, **EARLY
    )


EARLY = {"EARLY": True, "launch_pdl": True}
"""How a layer's kernels are launched (see ``early.py``). Here long programs do no harm: there is one a processor."""


class Weights(NamedTuple):
    """One projection's weights of E experts, and how they are multiplied."""

    config: Hopper
    tensors: tuple[Any, Any, Any]
    """Descriptors of codes, scales, zeros."""
    sizes: tuple[int, int, int, int]
    """ROWS, ACROSS, SCALE_ROWS, ZERO_ROWS: an expert's rows, and what a row of each tensor has in its layout."""
    variant: dict[str, Any]
    """What is known when the kernel is compiled."""


def int4(config: Hopper, packed: Packed, K: int, group_size: int) -> Weights:
    _, tall, across, _ = packed.qweight.shape
    zero_rows = 0 if packed.zeros is None else packed.zeros.shape[1]
    variant = {"CODES": "int4"} | _variant(config, packed, K, group_size, packed.qweight.device)
    return Weights(
        config, _weight(packed, variant["G"]), (tall * 64, across, packed.scales.shape[1], zero_rows), variant
    )


def fp4(config: Hopper, packed: Packed) -> Weights:
    """Of MXFP4 weights, in ``fp4_planes``."""
    _, tall, across, _ = packed.qweight.shape
    scales = packed.scales.view(torch.int32).squeeze(-1)
    variant = {"CODES": "fp4", "BM": config.BM, "G": 32, "ZEROS": "none", "STAGES": config.STAGES, "num_warps": 4}
    return Weights(config, (_codes(packed), _pairs(scales, 1), None), (tall * 64, across, scales.shape[1], 0), variant)


def can_fp4(x: Tensor, w13: Packed, w2: Packed, mlp: Mlp, I: int) -> bool:  # noqa: E741
    """As ``can_experts``. A weight times its scale is a bfloat16, if the scale is of a size that has such; and the copy
    engine reads rows of multiples of 16 bytes."""
    rows = x.shape[1] % 8 == 0 and I % 8 == 0
    exact = x.dtype == torch.bfloat16 and w13.scales.dtype == w2.scales.dtype == torch.uint8
    return rows and exact and runtime.arch_of(x.device) == "sm_90" and _placed(mlp, I) and installed()


def up(
    weights: Weights,
    x: Tensor,  # gathered
    bias: Tensor | None,
    found: tuple[Tensor, ...],  # topk_weights, slots, block_expert, total
    mlp: Mlp,
    scales: tuple[Tensor, Tensor] | None,
    h: Tensor,
) -> None:
    """h [slots, I] = act(W13 x + b13)."""
    from inductor_ext.kernels.gpu.hopper.moe import up_kernel

    I, BM = h.shape[1], weights.config.BM  # noqa: E741
    up_kernel[(_programs(-(-I // 128) * len(h) // BM, x.device),)](
        _rows(x, BM),
        *weights.tensors,
        bias,
        *found,
        h,
        I,
        *weights.sizes,
        mlp.alpha,
        mlp.limit or 0.0,
        *(scales or (None, None)),
        HALVES=mlp.gate_up == "halves",
        ACTIVATION=mlp.activation,
        LIMITED=mlp.limit is not None,
        ON_INPUT=mlp.apply_router_weight_on_input,
        **weights.variant,
        **EARLY,
    )


def down(
    weights: Weights,
    h: Tensor,
    bias: Tensor | None,
    found: tuple[Tensor, ...],
    mlp: Mlp,
    scales: tuple[Tensor, Tensor] | None,
    y: Tensor,
) -> None:
    """y [pairs, H] = weight * (W2 h + b2)."""
    from inductor_ext.kernels.gpu.hopper.moe import down_kernel

    H, BM = y.shape[1], weights.config.BM
    down_kernel[(_programs(-(-H // 256) * len(h) // BM, h.device),)](
        _rows(h, BM),
        *weights.tensors,
        bias,
        *found,
        y,
        H,
        *weights.sizes,
        None if scales is None else scales[1],
        ON_INPUT=mlp.apply_router_weight_on_input,
        **weights.variant,
        **EARLY,
    )
