"""Custom ops in ``torch.ops.w4a16``. Importing this package registers them; every op file reads schema, fake,
implementation, autograd."""

from inductor_ext.ops.align import moe_align_block_size
from inductor_ext.ops.fp8 import round_to_fp8
from inductor_ext.ops.linear import linear
from inductor_ext.ops.linear_mxfp4 import linear_mxfp4
from inductor_ext.ops.moe import moe
from inductor_ext.ops.moe_mxfp4 import moe_gemm_a8w4, moe_mxfp4
from inductor_ext.ops.rdna3 import gptq_gemm_rdna3, moe_gptq_gemm_rdna3
from inductor_ext.ops.rdna3_wmma import gptq_gemm_rdna3_wmma, moe_gemm_w4a16
from inductor_ext.ops.triton_gemm import triton_w4a16_gemm

__all__ = [
    "gptq_gemm_rdna3",
    "gptq_gemm_rdna3_wmma",
    "linear",
    "linear_mxfp4",
    "moe",
    "moe_align_block_size",
    "moe_gemm_a8w4",
    "moe_gemm_w4a16",
    "moe_gptq_gemm_rdna3",
    "moe_mxfp4",
    "round_to_fp8",
    "triton_w4a16_gemm",
]
