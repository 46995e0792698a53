"""The Triton kernels, for NVIDIA and AMD GPUs. Only ``planes`` can be imported without triton."""
