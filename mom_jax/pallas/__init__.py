"""Operations with several backends: chunk_memory and grouped_matmul."""

from mom_jax.pallas.chunk_memory.api import chunk_memory

__all__ = ['chunk_memory']
