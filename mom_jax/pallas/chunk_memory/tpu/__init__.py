"""The Pallas kernels of chunk_memory for TPUs."""

from mom_jax.pallas.chunk_memory.tpu.backend import BACKEND

__all__ = ['BACKEND']
