"""Custom ops in ``torch.ops.w4a16``. Importing this package registers them; every op file reads schema, fake,
implementation, autograd."""

from inductor_ext.ops.align import moe_align_block_size
from inductor_ext.ops.linear import linear
from inductor_ext.ops.moe import moe
from inductor_ext.ops.triton_gemm import triton_w4a16_gemm

__all__ = ["linear", "moe", "moe_align_block_size", "triton_w4a16_gemm"]
