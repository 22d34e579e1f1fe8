"""The model, its layers and their definitions.

The layers stand alone: `Mom(width=512, ...)`, `Moma(...)`, `Attention(...)`.
"""

from mom_jax.models import (
  eval_modes,
  flops,
  layers,
  memory_params,
  outputs,
  reference,
)
from mom_jax.models.attention import Attention
from mom_jax.models.lm import LM, init_cache, init_params
from mom_jax.models.mom import Mom
from mom_jax.models.moma import Moma

__all__ = [
    'LM', 'Attention', 'Mom', 'Moma', 'eval_modes', 'flops', 'init_cache',
    'init_params', 'layers', 'memory_params', 'outputs', 'reference']
