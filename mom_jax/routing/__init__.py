"""Routers, and the sorting of tokens into rows by expert or memory.

  logits -> Router -> Assignment -> dispatch.group -> rows of each group

`routers.py` says how to add a router.
"""

from mom_jax.routing import balance, dispatch
from mom_jax.routing.assignment import (
    Assignment,
    RouterInputs,
    RouterSettings,
    Selection,
    from_mask,
)
from mom_jax.routing.balance import RouterStats
from mom_jax.routing.expert_choice import max_tokens_per_expert
from mom_jax.routing.routers import (
    ROUTERS,
    STATE_NAMES,
    Router,
    add_noise,
    finalize_weights,
    get,
    with_random_errors,
)

__all__ = [
    'ROUTERS', 'STATE_NAMES', 'Assignment', 'Router', 'RouterInputs',
    'RouterSettings', 'RouterStats', 'Selection', 'add_noise', 'balance',
    'dispatch', 'finalize_weights', 'from_mask', 'get', 'max_tokens_per_expert',
    'with_random_errors']
