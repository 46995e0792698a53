"""A layer's experts from a checkpoint's tensors into the layout of a backend's kernel in the field, and back.

    checkpoint's tensors -> canonical form (a rank's share of it) -> fitted to the kernel -> its layout

What our own kernels take is the canonical form through their ``pack`` (``packed_for``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inductor_ext import devices, kernels
from inductor_ext.kernels.hip.wmma import Weight as ByRow
from inductor_ext.layouts import Experts, adjust, emulation, flashinfer, marlin, rdna3, triton, wmma, xpu
from inductor_ext.oracle.checkpoint import checkpoint_of
from inductor_ext.oracle.wna16 import WNA16MoEBackend


class Fitting(NamedTuple):
    """What a layout depends on besides the weights."""

    dtype: torch.dtype
    """Of the activations."""
    arch: str


class Converted(NamedTuple):
    """Both projections in a kernel's layout, under the field's names. Unused ones are None."""

    w13_qweight: Tensor
    w2_qweight: Tensor
    w13_scales: Tensor | None = None
    w2_scales: Tensor | None = None
    w13_g_idx: Tensor | None = None
    w2_g_idx: Tensor | None = None
    w13_g_idx_sort_indices: Tensor | None = None
    w2_g_idx_sort_indices: Tensor | None = None
    w13_qzeros: Tensor | None = None
    w2_qzeros: Tensor | None = None
    w13_input_global_scale: Tensor | None = None
    w2_input_global_scale: Tensor | None = None
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None


_NAMES = ("qweight", "scales", "g_idx", "g_idx_sort_indices", "qzeros", "bias")


def convert_to_wna16_moe_kernel_format(
    backend: WNA16MoEBackend,
    layer: Any,
    quant_config: Any,
    input_dtype: torch.dtype | None,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor,
    w2_scale: Tensor,
    w13_g_idx: Tensor | None = None,
    w2_g_idx: Tensor | None = None,
    w13_qzeros: Tensor | None = None,
    w2_qzeros: Tensor | None = None,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    experts_cls: Any = None,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    expert_map: Tensor | None = None,
) -> Converted:
    """The field's function: the tensors of a checkpoint (``layouts/gptq.py``, ``layouts/awq.py``) in the layout of the
    backend's kernel. The result is the field's tuple, with names.

    quant_config: as ``checkpoint_of``. input_dtype: of the activations; None: the scales'. layer and experts_cls are
    there for callers of the field's function; nothing is read from them. tp_rank, tp_size, expert_map: as ``shared``,
    for tensors that are the whole layer's. Raises ValueError for what the layout has no place for, and for a backend
    that has none.
    """
    stored = checkpoint_of(quant_config)
    first = stored.experts(w13, w13_scale, w13_g_idx, w13_qzeros, w13_bias)
    second = stored.experts(w2, w2_scale, w2_g_idx, w2_qzeros, w2_bias)
    return converted(backend, *shared(first, second, tp_rank, tp_size, expert_map), input_dtype)


def shared(
    w13: Experts, w2: Experts, rank: int = 0, of: int = 1, expert_map: Tensor | None = None
) -> tuple[Experts, Experts]:
    """What one rank has of a layer whose w13 is gate and up as halves.

    rank of so many: its share of the intermediate size, in finer groups of w2 where one would be cut. expert_map [E]:
    which row each expert becomes here, or -1.
    """
    if expert_map is not None:
        w13, w2 = adjust.local(w13, expert_map), adjust.local(w2, expert_map)
    if of == 1:
        return w13, w2
    return adjust.rows(w13, rank, of, parts=2), adjust.columns(w2, rank, of)


def packed_for(kernel: kernels.MoeKernel, weight: Experts, w13: bool) -> kernels.Packed:
    """One projection as ``w4a16::moe`` takes it for this kernel."""
    return kernels.pack_experts(kernel, weight.joined(), weight.E, w13)


# -- by backend --------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """A kernel's layout of a layer whose w13 is gate and up as halves."""

    fit: Callable[[Experts, Experts], tuple[Experts, Experts]]
    """Both, changed in shape so that the layout can hold them."""
    pack: Callable[[Experts, bool, Fitting], tuple[Tensor | None, ...]]
    """Tensors under _NAMES; the flag says that the weight is w13."""
    unpack: Callable[[tuple[Any, ...], bool, Experts], Experts]
    """Its inverse; the last argument is the weight that was packed, for what a layout does not say of itself."""


def converted(
    backend: WNA16MoEBackend, w13: Experts, w2: Experts, input_dtype: torch.dtype | None = None, arch: str | None = None
) -> Converted:
    """Both projections in the layout of the backend's kernel, fitted to it: filled up to tiles, in groups that it has.

    arch: of the GPU that the kernel runs on; by default the one that the weights are on. Raises ValueError.
    """
    layout = _layout(backend)
    dtype = w13.scales.dtype if input_dtype is None else input_dtype
    fitting = Fitting(dtype, devices.of(w13.codes.device).arch if arch is None else arch)
    first, second = layout.fit(w13, w2)
    a, b = layout.pack(first, True, fitting), layout.pack(second, False, fitting)
    named = {
        f"{w}_{name}": t for w, tensors in (("w13", a), ("w2", b)) for name, t in zip(_NAMES, tensors, strict=True)
    }
    return Converted(**named)  # type: ignore[arg-type]


def fitted(backend: WNA16MoEBackend, w13: Experts, w2: Experts) -> tuple[Experts, Experts]:
    """The weights as the backend's layout holds them."""
    return _layout(backend).fit(w13, w2)


def recovered(backend: WNA16MoEBackend, given: Converted, w13: Experts, w2: Experts) -> tuple[Experts, Experts]:
    """The inverse of ``converted``: the fitted weights from the tensors. w13 and w2: weights of these sizes, for what a
    layout does not say of itself (of emulation, scales and zeros)."""
    layout = _layout(backend)

    def back(name: str, like: Experts) -> Experts:
        return layout.unpack(tuple(getattr(given, f"{name}_{n}") for n in _NAMES), name == "w13", like)

    return back("w13", w13), back("w2", w2)


def _layout(backend: WNA16MoEBackend) -> Layout:
    if backend.value not in LAYOUTS:
        raise ValueError(f"backend must be one of {', '.join(LAYOUTS)} for integer weights, not {backend.value}.")
    return LAYOUTS[backend.value]


def _as_they_are(w13: Experts, w2: Experts) -> tuple[Experts, Experts]:
    return w13, w2


def _to_marlin(w13: Experts, w2: Experts) -> tuple[Experts, Experts]:
    """A single group in act-order is put in order: the kernel knows act-order by groups only."""
    one, two = (adjust.in_order(w) if w.scales.shape[2] == 1 else w for w in (w13, w2))
    return marlin.filled(one, two)


def _to_flashinfer(w13: Experts, w2: Experts) -> tuple[Experts, Experts]:
    w13, w2 = adjust.finer(w13, flashinfer.GROUP), adjust.finer(w2, flashinfer.GROUP)
    full = -(-w2.K // flashinfer.COLUMNS) * flashinfer.COLUMNS
    return adjust.filled(w13, 2 * full, w13.K, parts=2), adjust.filled(w2, w2.N, full)


def _marlin(weight: Experts, is_w13: bool, fitting: Fitting) -> tuple[Tensor | None, ...]:
    p = marlin.pack(weight)
    return p.qweight, p.scales, p.g_idx, p.sort_indices, p.zeros, p.bias


def _from_marlin(t: tuple[Any, ...], is_w13: bool, like: Experts) -> Experts:
    qweight, scales, g_idx, sort_indices, zeros, bias = t
    return marlin.unpack(marlin.Marlin(qweight, scales, zeros, g_idx, sort_indices, bias))


def _flashinfer(weight: Experts, is_w13: bool, fitting: Fitting) -> tuple[Tensor | None, ...]:
    return (*flashinfer.pack(weight, is_w13), None, None, None, None)


def _from_flashinfer(t: tuple[Any, ...], is_w13: bool, like: Experts) -> Experts:
    return flashinfer.unpack(flashinfer.MxInt4(*t[:2]), is_w13)


def _xpu(weight: Experts, is_w13: bool, fitting: Fitting) -> tuple[Tensor | None, ...]:
    p = xpu.pack(weight)
    return p.weights, p.scales, None, None, None, p.bias


def _from_xpu(t: tuple[Any, ...], is_w13: bool, like: Experts) -> Experts:
    return xpu.unpack(xpu.Xpu(t[0], t[1], t[5]))


def _rdna3(weight: Experts, is_w13: bool, fitting: Fitting) -> tuple[Tensor | None, ...]:
    p = rdna3.pack(weight)
    return p.qweight, p.scales, None, None, p.qzeros, None


def _from_rdna3(t: tuple[Any, ...], is_w13: bool, like: Experts) -> Experts:
    return rdna3.unpack(rdna3.Rdna3(t[0], t[1], t[4]))


def _wmma(weight: Experts, is_w13: bool, fitting: Fitting) -> tuple[Tensor | None, ...]:
    p = wmma.pack(weight, fitting.arch)
    return p.words, p.scales, None, None, None, None


def _from_wmma(t: tuple[Any, ...], is_w13: bool, like: Experts) -> Experts:
    return wmma.unpack(ByRow(t[0], t[1], by_row=True))


def _triton(weight: Experts, is_w13: bool, fitting: Fitting) -> tuple[Tensor | None, ...]:
    p = triton.pack(weight)
    return p.weights, p.scales, None, None, p.zeros, None


def _from_triton(t: tuple[Any, ...], is_w13: bool, like: Experts) -> Experts:
    return triton.unpack(triton.TritonWna16(t[0], t[1], t[4]), like.bits)


def _canonical(weight: Experts, is_w13: bool, fitting: Fitting) -> tuple[Tensor | None, ...]:
    return weight.codes, weight.scales, None, weight.order, weight.zeros, weight.bias


def _from_canonical(t: tuple[Any, ...], is_w13: bool, like: Experts) -> Experts:
    return Experts(t[0], t[1], t[4], t[3], t[5])


def _emulation(weight: Experts, is_w13: bool, fitting: Fitting) -> tuple[Tensor | None, ...]:
    return emulation.pack(weight, fitting.dtype), None, None, None, None, weight.bias


def _from_emulation(t: tuple[Any, ...], is_w13: bool, like: Experts) -> Experts:
    return emulation.unpack(t[0], like.scales, like.zeros, like.order, t[5], like.bits)


LAYOUTS = {
    "RDNA3": Layout(_as_they_are, _rdna3, _from_rdna3),
    "RDNA3_WMMA": Layout(_as_they_are, _wmma, _from_wmma),
    "TRITON": Layout(adjust.one_group, _triton, _from_triton),
    "MARLIN": Layout(_to_marlin, _marlin, _from_marlin),
    "BATCHED_MARLIN": Layout(_to_marlin, _marlin, _from_marlin),
    "FLASHINFER_TRTLLM": Layout(_to_flashinfer, _flashinfer, _from_flashinfer),
    "XPU": Layout(_as_they_are, _xpu, _from_xpu),
    "CPU": Layout(_as_they_are, _canonical, _from_canonical),
    "EMULATION": Layout(_as_they_are, _emulation, _from_emulation),
}
"""By backend. The CPU's is our own kernel's: the canonical form as it is."""
