"""Reading and writing of checkpoints in flash-linear-attention's formats."""

from mom_jax.hf import files, tensors

__all__ = ['files', 'tensors']
