"""Kernels for one row of x on NVIDIA GPUs, in Gluon: what decodes a single sequence."""
