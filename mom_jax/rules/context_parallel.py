"""States of memories whose rows are split over devices along time.

The rows of one device take a state S to T S + Z. Every device computes its T
and Z in one pass over its rows, and an associative scan over the devices
composes them: log2 n exchanges of a state and a transition. T is a K x K matrix
for rules with removal, and one number per key or value channel for the others.
Call these functions inside `per_device.batch_local`.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mom_jax.parallel import sharding

_EXACT = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def initial_state(
    chunk_memory: Callable[..., tuple[jax.Array, jax.Array]],
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    beta: jax.Array | None,
    removal_key: jax.Array | None,
    value_decay: jax.Array | None,
    continues_G: jax.Array,
) -> jax.Array:
  """Return the states before this device's rows, [G, H, K, V].

  Args:
    chunk_memory: `pallas.chunk_memory` with its other arguments bound.
    continues_G: whether a group's rows continue the document before, or there
      are none.
  """
  G, H = len(continues_G), k.shape[1]
  K, V = k.shape[2], v.shape[2]
  pad = lambda x, n: jnp.pad(x, ((0, 0), (0, 0), (0, n)))
  start = jnp.zeros((K, V), jnp.float32)
  if value_decay is not None:
    # One more key channel that nothing writes: its row becomes T.
    k, start = pad(k, 1), jnp.concatenate([start, jnp.ones((1, V))])
  else:
    # More value channels, all 0: their columns become T, or T's diagonal.
    removes = beta is not None or removal_key is not None
    more = jnp.eye(K) if removes else jnp.ones((K, 1))
    v, start = pad(v, more.shape[1]), jnp.concatenate([start, more], 1)
  _, end = chunk_memory(
      jnp.zeros_like(k), k, v, log_decay, beta, removal_key_RHK=removal_key,
      value_decay_RHV=value_decay,
      initial_state_GHKV=jnp.broadcast_to(start, (G, H, *start.shape)))
  T, Z = (end[:, :, K:], end[:, :, :K]) if value_decay is not None else (
      end[..., V:], end[..., :V])
  multiply = _EXACT if T.shape[-2:] == (K, K) and K > 1 else jnp.multiply
  return _states_before(multiply, T, Z, continues_G)


def _states_before(multiply, T, Z, continues_G):
  """Compose (T, Z) of all earlier devices and apply them to zeros."""
  keep_G = continues_G[:, None, None, None]
  T = jnp.where(keep_G, T, 0)
  n, distance = sharding.axis_size('time'), 1
  while distance < n:
    # The first devices receive zeros, the state before all rows.
    earlier_T, earlier_Z = (_send_on(x, distance) for x in (T, Z))
    T, Z = multiply(T, earlier_T), multiply(T, earlier_Z) + Z
    distance *= 2
  return jnp.where(keep_G, _send_on(Z, 1), 0)


def chained(
    run: Callable[[jax.Array], jax.Array],
    state: jax.Array,
    continues_G: jax.Array,
) -> jax.Array:
  """Return the states before this device's rows, for non-linear updates.

  Devices run one after the other: every device runs n - 1 times, device i with
  the right state from the i-th time on. This takes as long as one device alone,
  in an n-th of its memory.

  Args:
    run: maps the states before this device's rows to those after.
    state: zeros.
  """
  keep = continues_G.reshape(-1, *(1,) * (state.ndim - 1))

  @jax.checkpoint
  def step(state, _):
    return jnp.where(keep, _send_on(run(state), 1), 0), None

  return jax.lax.scan(step, state, length=sharding.axis_size('time') - 1)[0]


def _send_on(x: Any, distance: int) -> Any:
  """Send x to the device `distance` further on; the first ones get zeros."""
  n = sharding.axis_size('time')
  return jax.lax.ppermute(
      x, sharding.CONTEXT_AXIS,
      [(i, i + distance) for i in range(n - distance)])
