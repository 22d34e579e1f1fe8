"""The model and its parts."""

from mom_jax.models.lm import LM, Output, apply_buffers, init_cache, init_params

__all__ = ['LM', 'Output', 'apply_buffers', 'init_cache', 'init_params']
