"""Launches of csrc/hip/experts.hip: what lies before, between and behind the products of routed experts."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from inductor_ext.kernels import Mlp, Routing
from inductor_ext.kernels.hip import dot, runtime
from inductor_ext.kernels.hip.wmma import ACTIVATIONS, GATE_UP

MOST_EXPERTS = 4096
_THREADS = 256


class _Ids(ctypes.Structure):
    _fields_ = (
        ("ids", ctypes.c_void_p),
        ("map", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("number", "E", "wide")),
    )


class _RouteArgs(ctypes.Structure):
    _fields_ = (
        ("ids", _Ids),
        *((name, ctypes.c_void_p) for name in ("sorted", "experts", "end")),
        *((name, ctypes.c_int32) for name in ("slots", "height", "blocks")),
    )


class _ActivateArgs(ctypes.Structure):
    _fields_ = (
        ("h", ctypes.c_void_p),
        ("act", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("columns", "gate_up", "activation")),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
    )


class _CombineArgs(ctypes.Structure):
    _fields_ = (
        ("ids", _Ids),
        ("y", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("per_token", "columns", "wide_y")),
        ("scaling", ctypes.c_float),
    )


class Blocks(NamedTuple):
    """Slots in blocks of one expert, int32 all: as moe_align_block_size gives them, without foreign experts."""

    sorted: Tensor
    experts: Tensor
    end: Tensor
    height: int


def route(routing: Routing, E: int, height: int) -> Blocks:
    """The blocks for topk_ids, which are contiguous."""
    slots, device = routing.topk_ids.numel(), routing.topk_ids.device
    blocks = min(slots, slots // height + min(E, slots))
    made = torch.empty(blocks * height + blocks + 1, dtype=torch.int32, device=device)
    in_order, experts, end = made.split([blocks * height, blocks, 1])
    found = Blocks(in_order, experts, end, height)
    args = _RouteArgs(_ids(routing, E), *map(dot.pointer, found[:3]), slots, height, blocks)
    runtime.launch(device, "route", args, (E, 1, 1), _THREADS)
    return found


def activate(h: Tensor, mlp: Mlp, act: Tensor) -> None:
    """act [slots, I] of products h, float32 [slots, I or twice as many]."""
    args = _ActivateArgs(
        h.data_ptr(), act.data_ptr(), act.shape[1], GATE_UP[mlp.gate_up], ACTIVATIONS[mlp.activation], *steepness(mlp)
    )
    _launch("activate", act, args)


def combine(y: Tensor, routing: Routing, E: int, scaling: float, out: Tensor) -> None:
    """out [T, N]: the sums over the choices of each token of y [T k, N], times scaling."""
    k = routing.topk_ids.shape[1]
    args = _CombineArgs(
        _ids(routing, E), y.data_ptr(), out.data_ptr(), k, out.shape[1], y.dtype == torch.float32, scaling
    )
    _launch("combine", out, args)


def steepness(mlp: Mlp) -> tuple[float, float]:
    """alpha and limit as csrc/hip/activation.h wants them: silu is x sigmoid(x), and no limit is far away."""
    return mlp.alpha if mlp.activation == "swigluoai" else 1.0, float("inf") if mlp.limit is None else mlp.limit


def _launch(name: str, rows: Tensor, args: ctypes.Structure) -> None:
    """Four columns of rows a thread."""
    grid = (rows.shape[0], -(-rows.shape[1] // (4 * _THREADS)), 1)
    runtime.launch(rows.device, f"{name}_{dot.NAMES[rows.dtype]}", args, grid, _THREADS)


def _ids(routing: Routing, E: int) -> _Ids:
    ids = routing.topk_ids
    return _Ids(ids.data_ptr(), dot.pointer(routing.expert_map), routing.number, E, ids.dtype == torch.int64)
