"""The model and its parts."""

from mom_jax.models.lm import LM, Output, init_cache, init_params
from mom_jax.models.mom import Mom
from mom_jax.models.outputs import apply_router_state, router_state

__all__ = [
    'LM', 'Mom', 'Output', 'apply_router_state', 'init_cache', 'init_params',
    'router_state']
