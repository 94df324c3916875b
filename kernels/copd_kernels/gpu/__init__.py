"""Triton kernels of the same operations. Nothing outside this folder imports Triton."""
