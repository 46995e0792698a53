"""Int4 and int8 weights in the layouts of other people's checkpoints and kernels: a module each, with ``pack``, from
the canonical form, and ``unpack``, its inverse.

    gptq         checkpoints of GPTQ and compressed-tensors
    awq          checkpoints of AWQ

    marlin       GPTQ, AWQ and compressed-tensors on NVIDIA GPUs (vLLM)
    flashinfer   FlashInfer's experts from TensorRT-LLM, MXINT4
    triton       vLLM's WNA16 experts in Triton
    triton_dense    its triton_w4a16_gemm
    xpu          vLLM's experts on Intel GPUs
    rdna3        vLLM's experts on RDNA 3, dot products
    wmma         ROCm's vLLM: experts on RDNA 3, WMMA
    emulation    dequantised

No value changes on the way there and back. What a layout cannot hold raises ValueError with the argument, what it was
and what is allowed. ``adjust.py`` changes weights so that a layout can: finer groups, filling up, shares for tensor
parallelism.
"""

from inductor_ext.layouts.experts import Experts

__all__ = ["Experts"]
