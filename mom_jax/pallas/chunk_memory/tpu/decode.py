"""chunk_memory for chunks of one row, as in decoding: states change in place.

A grid step takes one row: the vector units load some heads of its group's
state, decay, update and read it in float32, and store it in place. So each
state that has a row moves once each way, whatever the rule; others are not
touched. Rows of one group follow each other with the state left in fast memory.
All variants of the recurrence are brought to

  S = d S;  y = v - e S;  S = S + k^T y;  o = q S

with d per key or value channel. Fast memory: 16 h K V bytes for h heads.
"""

from __future__ import annotations

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mom_jax.pallas import common

STATE_BYTES = 2 * 2**20  # of the states that a step takes
ROWS = 8  # of a register


def kernel(
    group_N, same_N, key_rows, value_rows, before, o, after, *, h, removes,
    by_value, exclusive,
):
  """One row of h heads.

  key_rows [P, K] holds q of each head, then k, (d) and (e); value_rows [P, V]
  holds v and (d).
  """
  n = pl.program_id(1)

  @pl.when(same_N[n] == 0)
  def _():
    after[...] = before[...]

  @pl.when(group_N[n] < 0)
  def _():
    o[...] = jnp.zeros_like(o)

  @pl.when(group_N[n] >= 0)
  def _():
    columns = key_rows[...].T
    for a in range(h):
      column = lambda i, a=a: columns[:, i * h + a : i * h + a + 1]
      row = lambda i, a=a: value_rows[pl.ds(i * h + a, 1), :]
      look_up = lambda x, s: (x * s).sum(0, keepdims=True)
      s, y = after[a], row(0)
      found = look_up(column(0), s)
      s = s * (row(1) if by_value else column(2))
      if removes:
        y -= look_up(column(3), s)
      s += column(1) * y
      after[a] = s
      o[a : a + 1] = found if exclusive else look_up(column(0), s)


def decode(
    q, k, v, log_decay, beta, removal_key, value_decay, state, group_N, *,
    scale, exclusive,
):
  """(o, state) of rows that are chunks by themselves."""
  (N, H, K), (G, V) = q.shape, (len(state), v.shape[2])
  h = _heads(H, K, V)
  wide = lambda x: x.astype(jnp.float32)
  v_RHV = wide(v)
  decay_RHK = jnp.ones((N, H, K), jnp.float32)
  if log_decay is not None:
    decay = jnp.exp(log_decay)
    decay_RHK *= decay if decay.ndim == 3 else decay[..., None]
  by_key = [scale * wide(q), wide(k), decay_RHK]
  if beta is not None:
    by_key.append(beta[..., None] * wide(k))
    v_RHV *= beta[..., None]
  if removal_key is not None:
    by_key.append(removal_key)
  by_value = [v_RHV]
  if value_decay is not None:
    by_value.append(jnp.exp(value_decay))
  resident, same = _resident_groups(group_N)
  blocked = lambda X, Y: pl.BlockSpec(
      (None, None, X, Y), lambda a, n, resident, same, group: (n, a, 0, 0))
  states = pl.BlockSpec(
      (None, h, K, V), lambda a, n, resident, same, group: (
          resident[n], a, 0, 0))
  key_rows_NaPK, value_rows_NaPV = (
      _stacked(xs, h) for xs in (by_key, by_value))
  o_NahV, state_GHKV = pl.pallas_call(
      lambda resident, same, group, *refs: kernel(
          group, same, *refs, h=h, removes=len(by_key) > 3,
          by_value=len(by_value) > 1, exclusive=exclusive),
      out_shape=[
          common.shape_like((N, H // h, h, V), jnp.float32, q),
          common.shape_like((G, H, K, V), jnp.float32, q)],
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=3, grid=(H // h, N),
          in_specs=[
              blocked(*key_rows_NaPK.shape[2:]),
              blocked(*value_rows_NaPV.shape[2:]), states],
          out_specs=[blocked(h, V), states]),
      input_output_aliases={5: 1},
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary')),
      name='chunk_memory_decode',
  )(resident, same, group_N, key_rows_NaPK, value_rows_NaPV, state)
  return o_NahV.reshape(N, H, V).astype(v.dtype), state_GHKV


def _heads(H, K, V):
  """Heads per step: as many as fit STATE_BYTES, at least one."""
  return max([h for h in range(1, H + 1)
              if H % h == 0 and 4 * h * K * V <= STATE_BYTES] or [1])


def _stacked(xs_RHX, h):
  """[N, H / h, P, X]: all xs of h heads, padded to whole registers."""
  N, H, X = xs_RHX[0].shape
  rows = jnp.stack(xs_RHX, 1).reshape(N, len(xs_RHX), H // h, h, X)
  rows = rows.swapaxes(1, 2).reshape(N, H // h, len(xs_RHX) * h, X)
  return jnp.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % ROWS), (0, 0)))


def _resident_groups(group_N):
  """The group whose state is loaded in each step; whether it was before.

  For unused rows, that of the row before, or of the first used row.
  """
  N = len(group_N)
  used_N, at_N = group_N >= 0, jnp.arange(N)
  first = jnp.argmax(used_N)
  latest_N = jax.lax.cummax(jnp.where(used_N, at_N, first))
  resident_N = jnp.maximum(group_N[latest_N], 0)
  same_N = jnp.concatenate(
      [jnp.zeros(1, bool), resident_N[1:] == resident_N[:-1]])
  return resident_N.astype(jnp.int32), same_N.astype(jnp.int32)
