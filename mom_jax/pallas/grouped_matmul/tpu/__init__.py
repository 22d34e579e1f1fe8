"""The Pallas kernels of grouped_matmul for TPUs."""

from mom_jax.pallas.grouped_matmul.tpu.backend import BACKEND

__all__ = ['BACKEND']
