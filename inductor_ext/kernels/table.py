"""Every kernel there is. Names, priorities and the field's backends are all read from this one table.

A kernel is a module (see ``Kernel`` and ``MoeKernel``) and a row here.
"""

from __future__ import annotations

from typing import NamedTuple

EVERYWHERE = ("everywhere",)


class Row(NamedTuple):
    op: str
    """Of the problems that it computes: "linear", "moe"."""
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


TABLE: tuple[Row, ...] = (
    # The first is tried first, on each device.
    Row("linear", "cpu", "inductor_ext.kernels.cpu", ("cpu",), "CPU"),
    Row("linear", "hip", "inductor_ext.kernels.hip.linear", ("cuda",), "RDNA3"),
    Row("linear", "triton", "inductor_ext.kernels.gpu.linear", ("cuda",), "TRITON"),
    Row("linear", "triton_int8", "inductor_ext.kernels.gpu.linear_int8", ("cuda",), "TRITON", bits=(8,)),
    Row("linear", "reference", "inductor_ext.kernels.reference", EVERYWHERE, "EMULATION", bits=(4, 8)),
    Row("moe", "cpu", "inductor_ext.kernels.cpu_moe", ("cpu",), "CPU"),
    Row("moe", "hip", "inductor_ext.kernels.hip.experts", ("cuda",), "RDNA3"),
    Row("moe", "triton", "inductor_ext.kernels.gpu.experts", ("cuda",), "TRITON"),
    Row("moe", "triton_int8", "inductor_ext.kernels.gpu.experts_int8", ("cuda",), "TRITON", bits=(8,)),
    Row("moe", "reference", "inductor_ext.kernels.reference_moe", EVERYWHERE, "EMULATION", bits=(4, 8)),
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
