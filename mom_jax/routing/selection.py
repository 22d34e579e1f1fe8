"""Which pairs of token and expert are chosen: exact counts, and errors.

An expert that picks its tokens needs their number, the score of the last of
them and a mask of those above; here they are as sums, without a sort.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
import numpy as np


def capacity(
    allowed_PNE: Bool[Array, 'P N E'],
    mean: float,
    groups: tuple[int, ...] | None,
) -> Int[Array, 'P E']:
  """k_e = ceil(c b / E_group), within [1, b]; 0 where b is 0.

  Args:
    allowed_PNE: the b tokens of a pool that may use e.
    mean: experts per token c.
    groups: experts in each group; None is one group.
  """
  E = allowed_PNE.shape[-1]
  groups = groups or (E,)
  size_E = jnp.asarray(np.repeat(groups, groups), jnp.float32)
  tokens_PE = allowed_PNE.sum(1, dtype=jnp.int32)
  # A thousandth of a token: 1.1 x 10 tokens are 11, though 1.1 is inexact.
  share_PE = mean * tokens_PE.astype(jnp.float32) / size_E[None] - 1e-3
  count_PE = jnp.ceil(share_PE).astype(jnp.int32)
  return jnp.minimum(jnp.maximum(count_PE, 1), tokens_PE)


def room(tokens: int, mean: float, experts: int) -> int:
  """Most tokens that each of `experts` takes of a pool, by `capacity`."""
  share = mean * tokens / experts
  # Float32 is off by less than half a thousandth up to here.
  spare = -5e-4 if share < 4096 else 1
  return min(max(math.ceil(share + spare), 1), tokens)


def kth_largest(
    probs_PNE: Float[Array, 'P N E'],
    allowed_PNE: Bool[Array, 'P N E'],
    count_PE: Int[Array, 'P E'],
) -> Float[Array, 'P E']:
  """The count-th largest allowed value >= 0 along N, 0 where count is 0.

  Float32 values from 0 up compare as their bit patterns do, so 31 counts find
  the pattern bit by bit, exactly. Unlike a sort this needs no copy of the
  scores and, over devices, only sums of [P, E].
  """
  bits_PNE = jax.lax.bitcast_convert_type(
      jax.lax.stop_gradient(probs_PNE), jnp.int32
  )
  bits_PNE = jnp.where(allowed_PNE, bits_PNE, -1)

  def refine(i, found_PE):
    try_PE = found_PE | (1 << (30 - i))
    enough_PE = (bits_PNE >= try_PE[:, None]).sum(1) >= count_PE
    return jnp.where(enough_PE & (count_PE > 0), try_PE, found_PE)

  found_PE = jax.lax.fori_loop(0, 31, refine, jnp.zeros_like(count_PE))
  return jax.lax.bitcast_convert_type(found_PE, jnp.float32)


def largest(
    probs_PNE: Float[Array, 'P N E'],
    allowed_PNE: Bool[Array, 'P N E'],
    count_PE: Int[Array, 'P E'],
) -> Bool[Array, 'P N E']:
  """Marks the count largest along N, the lowest index first among equals."""
  kth_P1E = kth_largest(probs_PNE, allowed_PNE, count_PE)[:, None]
  above_PNE = allowed_PNE & (probs_PNE > kth_P1E)
  equal_PNE = allowed_PNE & (probs_PNE == kth_P1E)
  left_P1E = count_PE[:, None] - above_PNE.sum(1, keepdims=True)
  return above_PNE | (equal_PNE & (jnp.cumsum(equal_PNE, 1) <= left_P1E))


def with_errors(
    key: Key[Array, ''] | jax.Array,
    rate: float | Float[Array, ''],
    selected_BTE: Bool[Array, 'B T E'],
    allowed_BTE: Bool[Array, 'B T E'],
    exact_k: bool,
) -> Bool[Array, 'B T E']:
  """The selection with wrong decisions at random, to see what they cost.

  Args:
    rate: share of decisions that are wrong. A decision is whether an allowed
      expert takes a token; with `exact_k`, who each expert taken is.
    exact_k: a token keeps its number of experts: a wrong one stands for a
      right one, where there is another one.
  """
  wrong_key, other_key = jax.random.split(key)
  wrong_BTE = jax.random.bernoulli(wrong_key, rate, selected_BTE.shape)
  if not exact_k:
    return selected_BTE ^ (wrong_BTE & allowed_BTE)
  free_BTE = allowed_BTE & ~selected_BTE
  order_BTE = jnp.where(
      free_BTE, jax.random.uniform(other_key, free_BTE.shape), 2.0)
  place_BTE = jnp.argsort(jnp.argsort(order_BTE, -1), -1)
  leave_BTE = selected_BTE & wrong_BTE
  # Who leaves first leaves for sure; there may be too few to come.
  leave_BTE &= jnp.cumsum(leave_BTE, -1) <= free_BTE.sum(-1, keepdims=True)
  come_BTE = free_BTE & (place_BTE < leave_BTE.sum(-1, keepdims=True))
  return (selected_BTE & ~leave_BTE) | come_BTE
