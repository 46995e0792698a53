"""The CPU kernel for linear layers with an MXFP4 weight: the int4 kernel over another table of values. Rows are filled
up to whole groups by zeros where K is none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from inductor_ext.formats import MXFP4_GROUP, PackedMxfp4
from inductor_ext.kernels import Layout, Packed, Problem, cpu
from inductor_ext.kernels.pages import in_huge_pages
from inductor_ext.kernels.reference_linear_mxfp4 import layout_of_width

NAME = "cpu"

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)

usable = cpu.usable


def reject(problem: Problem) -> str | None:
    if problem.op != "linear_mxfp4":
        return f"The kernel computes linear_mxfp4, not {problem.op}."
    if problem.device != "cpu":
        return f"The kernel runs on the CPU, not on {problem.device}."
    if problem.dtype not in _FLOATS:
        return f"The activations must be bfloat16, float16 or float32, not {problem.dtype}."
    return None


def pack(weight: PackedMxfp4) -> Packed:
    return Packed(whole_groups(weight), weight.scales, None, None)


def whole_groups(weight: PackedMxfp4) -> Tensor:
    """The codes [N, K/2] with K filled up, in memory that words can be read from."""
    codes, missing = weight.codes, -weight.K % MXFP4_GROUP
    if missing:
        codes = F.pad(codes, (0, missing // 2))
    elif codes.data_ptr() % 4:  # a slice of a file
        codes = codes.clone()
    in_huge_pages(codes)
    return codes


def unpack(packed: Packed, N: int, K: int, group_size: int) -> PackedMxfp4:
    return PackedMxfp4(packed.qweight[:, : K // 2].contiguous(), packed.scales)


def layout(packed: Packed, N: int, K: int, group_size: int) -> Layout:
    return layout_of_width(N, K, -(-K // MXFP4_GROUP) * MXFP4_GROUP)


def run(x: Tensor, packed: Packed, bias: Tensor | None, N: int, group_size: int) -> Tensor:
    if (reason := usable()) is not None:
        raise RuntimeError(reason)
    missing = -x.shape[1] % MXFP4_GROUP
    x = F.pad(x, (0, missing)) if missing else x
    y: Tensor = torch.ops.w4a16_cpu.linear_mxfp4.default(x, packed.qweight, packed.scales, bias)
    return y
