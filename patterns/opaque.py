"""Matmuls that are one fused int4 op already. They are left to whoever made them, and the report says so."""

from __future__ import annotations

from torch import fx

_FUSED = {
    "aten::_weight_int4pack_mm": "PyTorch's own int4 matmul",
    "aten::_weight_int4pack_mm_with_scales_and_zeros": "PyTorch's own int4 matmul",
    "aten::_weight_int4pack_mm_for_cpu": "PyTorch's own int4 matmul",
    "aten::_dyn_quant_matmul_4bit": "PyTorch's own int4 matmul with quantised activations",
    "bitsandbytes::gemm_4bit": "bitsandbytes' own 4-bit matmul",
    "bitsandbytes::gemv_4bit": "bitsandbytes' own 4-bit matmul",
}


def already_fused(node: fx.Node) -> str | None:
    """Why there is nothing to do for this node, or None if it is no such op."""
    if node.op != "call_function":
        return None
    name = getattr(getattr(node.target, "_schema", None), "name", None)
    if name is None:  # torch._weight_int4pack_mm, not torch.ops.aten's
        name = f"aten::{getattr(node.target, '__name__', '')}"
    return f"Already fused: it is {_FUSED[name]}." if name in _FUSED else None
