"""The Triton kernels of grouped_matmul for NVIDIA GPUs."""

from mom_jax.pallas.grouped_matmul.triton.backend import BACKEND

__all__ = ['BACKEND']
