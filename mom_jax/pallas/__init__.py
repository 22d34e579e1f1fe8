"""Operations with several backends, and a fold over chunks.

The names are the functions; they hide the folders of the same name as
attributes, while `import mom_jax.pallas.chunk_memory.xla` keeps working.
"""

from mom_jax.pallas.chunk_fold import chunk_fold
from mom_jax.pallas.chunk_memory.api import chunk_memory
from mom_jax.pallas.chunk_memory.schedule import document_starts
from mom_jax.pallas.common import inverse_permutation, platform
from mom_jax.pallas.grouped_matmul.api import grouped_matmul
from mom_jax.pallas.grouped_swiglu.api import grouped_swiglu
from mom_jax.pallas.short_conv.api import short_conv
from mom_jax.pallas.short_conv.parts import L2_EPS, Part

__all__ = [
    'L2_EPS', 'Part', 'chunk_fold', 'chunk_memory', 'document_starts',
    'grouped_matmul', 'grouped_swiglu', 'inverse_permutation', 'platform',
    'short_conv']
