"""The Triton kernels of chunk_memory for NVIDIA GPUs."""

from mom_jax.pallas.chunk_memory.triton.backend import BACKEND

__all__ = ['BACKEND']
