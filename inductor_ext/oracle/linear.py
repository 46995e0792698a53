"""The same for dense layers: backends by the field's names, and conversions of their weights (``wna16.py``,
``convert.py``)."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inductor_ext import kernels
from inductor_ext.devices import Device
from inductor_ext.kernels import Problem, table
from inductor_ext.layouts import Experts, emulation, marlin, rdna3, triton_dense
from inductor_ext.oracle import select
from inductor_ext.oracle.checkpoint import checkpoint_of
from inductor_ext.oracle.wna16 import WeightKey, device_of


class WNA16LinearBackend(enum.Enum):
    RDNA3 = "RDNA3"
    TRITON = "TRITON"
    MARLIN = "MARLIN"
    CPU = "CPU"
    EMULATION = "EMULATION"


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """Of a layer, what a backend is selected by; the first two attributes are those of the field's
    ``MPLinearLayerConfig``."""

    partition_weight_shape: tuple[int, int]
    """(K, N) on this rank."""
    act_type: torch.dtype
    has_bias: bool = False
    linear_backend: str = "auto"
    """"auto", or a backend's name in small letters."""


def get_priority_backends(device: str | Device, bits: int = 4) -> list[WNA16LinearBackend]:
    """The backends that are tried on a device, the first first. A device is a ``Device`` or the name of one."""
    tried = table.priority("linear", device_of(device).type, bits)
    return list(dict.fromkeys(WNA16LinearBackend(table.rows("linear")[name].backend) for name in tried))


def backend_to_kernel_cls(backend: WNA16LinearBackend) -> list[kernels.Kernel]:
    """The kernels of a backend: modules here, classes in the field."""
    return [kernels.load(row.name) for row in table.rows("linear").values() if row.backend == backend.value]


def select_wna16_linear_backend(
    config: LinearConfig, weight_key: WeightKey, device: str | Device | None = None, elsewhere: bool = False
) -> tuple[WNA16LinearBackend, kernels.Kernel]:
    """As ``select_wna16_moe_backend``, for a dense layer."""
    asked, known = config.linear_backend, [backend.value.lower() for backend in WNA16LinearBackend]
    if asked not in ("auto", *known):
        raise ValueError(
            f"There is no WNA16 linear backend {asked!r}; linear_backend may be {', '.join(['auto', *known])}."
        )
    problem = linear_problem(config, weight_key, device_of(device))
    row = select.choose_backend(problem, None if asked == "auto" else asked.upper(), elsewhere)
    return WNA16LinearBackend(row.backend), kernels.load(row.name)


def linear_problem(config: LinearConfig, weight_key: WeightKey, device: Device) -> Problem:
    """The problem that such a layer is."""
    K, N = config.partition_weight_shape
    return Problem(
        op="linear",
        device=device.type,
        arch=device.arch,
        dtype=config.act_type,
        scale_dtype=weight_key.scale_dtype or config.act_type,
        N=N,
        K=K,
        group_size=K if weight_key.group_size == -1 else weight_key.group_size,
        zeros="none" if weight_key.symmetric else "int",
        order=weight_key.desc_act,
        bias=config.has_bias,
        codes=f"int{weight_key.bits}",
    )


# -- conversion --------------------------------------------------------------------------------------------------------


class ConvertedLinear(NamedTuple):
    """A weight in a kernel's layout. Unused tensors are None."""

    qweight: Tensor
    scales: Tensor | None = None
    g_idx: Tensor | None = None
    g_idx_sort_indices: Tensor | None = None
    qzeros: Tensor | None = None
    bias: Tensor | None = None


def convert_to_wna16_linear_kernel_format(
    backend: WNA16LinearBackend,
    quant_config: Any,
    input_dtype: torch.dtype | None,
    qweight: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    qzeros: Tensor | None = None,
    bias: Tensor | None = None,
) -> ConvertedLinear:
    """A checkpoint's tensors (of ``layouts/gptq.py`` and ``layouts/awq.py``, without E) in the layout of the backend's
    kernel in the field. Raises ValueError for what the layout has no place for."""
    given = (None if t is None else t[None] for t in (g_idx, qzeros, bias))
    return converted(backend, checkpoint_of(quant_config).experts(qweight[None], scales[None], *given), input_dtype)


def converted(backend: WNA16LinearBackend, weight: Experts, input_dtype: torch.dtype | None = None) -> ConvertedLinear:
    """One expert, which a dense layer is, in the layout of the backend's kernel. The bias is passed on, but for
    Marlin's, which adds it itself."""
    bias, plain = weight.bias, dataclasses.replace(weight, bias=None)
    tensors: tuple[Tensor | None, ...]
    if backend == WNA16LinearBackend.MARLIN:
        p = marlin.pack(weight)
        tensors = (p.qweight, p.scales, p.g_idx, p.sort_indices, p.zeros, p.bias)
    elif backend == WNA16LinearBackend.RDNA3:
        r = rdna3.pack(plain)
        tensors = (r.qweight, r.scales, None, None, r.qzeros, bias)
    elif backend == WNA16LinearBackend.TRITON:
        t = triton_dense.pack(plain)
        tensors = (t.b_q, t.scales, None, None, t.qzeros, bias)
    elif backend == WNA16LinearBackend.CPU:
        tensors = (weight.codes, weight.scales, None, weight.order, weight.zeros, bias)
    else:
        tensors = (emulation.pack(plain, input_dtype or weight.scales.dtype), None, None, None, None, bias)
    return ConvertedLinear(*(None if t is None else t[0] for t in tensors))  # type: ignore[arg-type]


def recovered(backend: WNA16LinearBackend, given: ConvertedLinear, like: Experts) -> Experts:
    """The inverse of ``converted``. like: a weight of this kind, for what a layout does not say of itself."""
    qweight, scales, g_idx, sort_indices, qzeros, bias = (None if t is None else t[None] for t in given)
    assert qweight is not None
    if backend == WNA16LinearBackend.EMULATION:
        return emulation.unpack(qweight, like.scales, like.zeros, like.order, bias, like.bits)
    assert scales is not None
    if backend == WNA16LinearBackend.MARLIN:
        assert g_idx is not None and sort_indices is not None
        return marlin.unpack(marlin.Marlin(qweight, scales, qzeros, g_idx, sort_indices, bias))
    if backend == WNA16LinearBackend.RDNA3:
        assert qzeros is not None
        return dataclasses.replace(rdna3.unpack(rdna3.Rdna3(qweight, scales, qzeros)), bias=bias)
    if backend == WNA16LinearBackend.TRITON:
        return dataclasses.replace(triton_dense.unpack(triton_dense.TritonDense(qweight, scales, qzeros)), bias=bias)
    return Experts(qweight, scales, qzeros, sort_indices, bias)
