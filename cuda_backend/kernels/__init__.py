"""Triton kernels, each beside its naive twin."""
