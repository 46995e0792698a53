"""Every kernel there is. Names, priorities and the field's backends are all read from this one table.

A kernel is a module (see ``Kernel`` and ``MoeKernel``) and a row here.
"""

from __future__ import annotations

from typing import NamedTuple

EVERYWHERE = ("everywhere",)


class Row(NamedTuple):
    op: str
    """Of the problems that it computes: "linear", "moe", "linear_mxfp4", "moe_mxfp4"."""
    name: str
    """What ``w4a16.kernel`` and the op's argument ``kernel`` call it."""
    module: str
    devices: tuple[str, ...]
    """The torch device types on which it is tried, or EVERYWHERE."""
    backend: str
    """What the field's WNA16 oracle calls it (``oracle/wna16.py``)."""
    bits: tuple[int, ...] = (4,)
    """Of the codes that it takes."""
    package: str = ""
    """What must be installed beside this package."""
    batched: bool = False
    """Takes tokens that come batched by expert."""


_CUDA = ("cuda",)
"""NVIDIA and AMD."""
_MARLIN = "vLLM, sgl-kernel or GPTQModel"
_OURS, _GPU, _OTHERS = "inductor_ext.kernels.", "inductor_ext.kernels.gpu.", "inductor_ext.kernels.external."


TABLE: tuple[Row, ...] = (
    # The first is tried first, on each device.
    Row("linear", "cpu", _OURS + "cpu", ("cpu",), "CPU"),
    Row("linear", "hip", _OURS + "hip.linear", _CUDA, "RDNA3"),
    Row("linear", "triton", _GPU + "linear", _CUDA, "TRITON"),
    Row("linear", "triton_int8", _GPU + "linear_int8", _CUDA, "TRITON", bits=(8,)),
    Row("linear", "marlin", _OTHERS + "marlin", _CUDA, "MARLIN", package=_MARLIN),
    Row("linear", "reference", _OURS + "reference", EVERYWHERE, "EMULATION", bits=(4, 8)),
    Row("moe", "cpu", _OURS + "cpu_moe", ("cpu",), "CPU"),
    Row("moe", "hip", _OURS + "hip.experts", _CUDA, "RDNA3"),
    Row("moe", "triton", _GPU + "experts", _CUDA, "TRITON"),
    Row("moe", "triton_int8", _GPU + "experts_int8", _CUDA, "TRITON", bits=(8,)),
    Row("moe", "rdna3_wmma", _OURS + "hip.by_row", _CUDA, "RDNA3_WMMA"),
    Row("moe", "flashinfer", _OTHERS + "flashinfer_moe", _CUDA, "FLASHINFER_TRTLLM", package="flashinfer"),
    Row("moe", "marlin", _OTHERS + "marlin_moe", _CUDA, "MARLIN", package=_MARLIN),
    Row("moe", "batched_marlin", _OTHERS + "batched_marlin", _CUDA, "BATCHED_MARLIN", package=_MARLIN, batched=True),
    Row("moe", "xpu", _OTHERS + "xpu_moe", ("xpu",), "XPU", package="vllm_xpu_kernels"),
    Row("moe", "reference", _OURS + "reference_moe", EVERYWHERE, "EMULATION", bits=(4, 8)),
    Row("linear_mxfp4", "cpu", _OURS + "cpu_linear_mxfp4", ("cpu",), "CPU"),
    Row("linear_mxfp4", "reference", _OURS + "reference_linear_mxfp4", EVERYWHERE, "EMULATION"),
    Row("moe_mxfp4", "cpu", _OURS + "cpu_mxfp4", ("cpu",), "CPU"),
    Row("moe_mxfp4", "aiter", _OTHERS + "aiter_moe", _CUDA, "AITER_W4A8", package="aiter"),
    Row("moe_mxfp4", "dot_scaled", _GPU + "mxfp4_scaled", _CUDA, "TRITON"),
    Row("moe_mxfp4", "triton", _GPU + "mxfp4", _CUDA, "TRITON"),
    Row("moe_mxfp4", "reference", _OURS + "reference_mxfp4", EVERYWHERE, "EMULATION"),
)


def rows(op: str) -> dict[str, Row]:
    """The kernels of an op, by name."""
    return {row.name: row for row in TABLE if row.op == op}


def ops() -> tuple[str, ...]:
    return tuple(dict.fromkeys(row.op for row in TABLE))


def names() -> tuple[str, ...]:
    """What ``w4a16.kernel`` may be. Not every op has each of them."""
    return tuple(sorted({row.name for row in TABLE}))


def priority(op: str, device: str, bits: int = 4) -> tuple[str, ...]:
    """The kernels that are tried on a device type, the first first. One runs everywhere."""
    found = (row for row in TABLE if row.op == op and bits in row.bits)
    return tuple(row.name for row in found if row.devices == EVERYWHERE or device in row.devices)
