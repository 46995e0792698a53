"""The Triton kernels, for NVIDIA and AMD GPUs. What chooses, packs and refuses can be imported without triton."""
