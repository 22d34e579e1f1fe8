"""Wrong routing decisions at random."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key


def random_errors(
    key: Key[Array, ''] | jax.Array,
    error_prob: float | Float[Array, ''],
    selected_BTE: Bool[Array, 'B T E'],
    allowed_BTE: Bool[Array, 'B T E'],
    exact_k: bool,
) -> Bool[Array, 'B T E']:
  """Replace decisions of a selection by wrong ones.

  Args:
    error_prob: probability of an error per decision: whether an allowed expert
      takes a token or, with `exact_k`, the identity of each selected expert.
    exact_k: a token keeps its number of experts: an error swaps a selected
      expert for an unselected one, if the token has one left.
  """
  wrong_key, other_key = jax.random.split(key)
  wrong_BTE = jax.random.bernoulli(wrong_key, error_prob, selected_BTE.shape)
  if not exact_k:
    return selected_BTE ^ (wrong_BTE & allowed_BTE)
  free_BTE = allowed_BTE & ~selected_BTE
  order_BTE = jnp.where(
      free_BTE, jax.random.uniform(other_key, free_BTE.shape), 2.0)
  rank_BTE = jnp.argsort(jnp.argsort(order_BTE, -1), -1)
  leave_BTE = selected_BTE & wrong_BTE
  # There may be fewer free experts than leavers: the first ones are swapped.
  leave_BTE &= jnp.cumsum(leave_BTE, -1) <= free_BTE.sum(-1, keepdims=True)
  come_BTE = free_BTE & (rank_BTE < leave_BTE.sum(-1, keepdims=True))
  return (selected_BTE & ~leave_BTE) | come_BTE
