"""Which tokens go to which memories and experts, and their rows by group."""

from mom_jax.routing.balance import RouterStats
from mom_jax.routing.routers import (
    ROUTERS,
    Assignment,
    Router,
    add_noise,
    aux_causal,
    from_mask,
    get,
    settled,
    update_threshold,
    with_errors,
)

__all__ = [
    'ROUTERS', 'Assignment', 'Router', 'RouterStats', 'add_noise',
    'aux_causal', 'from_mask', 'get', 'settled', 'update_threshold',
    'with_errors']
