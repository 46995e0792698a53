"""Kernels for many rows of x on Hoppers (sm_90), in Gluon: ``loop`` says how."""
