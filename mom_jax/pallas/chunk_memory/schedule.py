"""Order in which chunks are visited, and where documents begin."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Log decay that empties a state: exp gives exactly 0 in float32, and sums with
# it stay finite.
EMPTY = -1e5


def begins(segment_R, group_N):
  """At which rows another document begins inside a group, bool [R].

  The document of a row of segment 0 is that of the row before it, so padding
  neither begins nor ends one.
  """
  R, N = len(segment_R), len(group_N)
  row_R = jnp.arange(R)
  named_R = jax.lax.cummax(jnp.where(segment_R == 0, -1, row_R))
  before_R = jnp.concatenate([jnp.full(1, -1, named_R.dtype), named_R[:-1]])
  known_R = before_R >= jnp.repeat(first_chunk(group_N) * (R // N), R // N)
  change_R = segment_R != segment_R[jnp.maximum(before_R, 0)]
  return (segment_R != 0) & known_R & change_R


def first_chunk(group_N):
  """Number of the first chunk of each chunk's group."""
  new_N = jnp.concatenate([jnp.ones(1, bool), group_N[1:] != group_N[:-1]])
  return jax.lax.cummax(jnp.where(new_N, jnp.arange(len(group_N)), 0))


class Lanes(NamedTuple):
  """Groups dealt to L lanes that advance side by side, a chunk a step.

  Lane l visits chunks order_N[start_L[l] : end_L[l]]. Every group lies in one
  lane, and no lane is longer than total / L plus the longest group.
  """

  order_N: jax.Array  # used chunks, in order
  start_L: jax.Array
  end_L: jax.Array
  first_N: jax.Array  # bool, a group's first chunk
  last_N: jax.Array
  steps: jax.Array  # length of the longest lane


def lanes(group_N, num_lanes):
  """Deals groups to lanes, in order, by number of chunks."""
  used_N = group_N >= 0
  edge_N = group_N[1:] != group_N[:-1]
  end = jnp.ones(1, bool)
  order_N = jnp.argsort(~used_N, stable=True)
  rank_N = jnp.cumsum(used_N) - 1
  total = used_N.sum()
  lane_N = rank_N[first_chunk(group_N)] * num_lanes // jnp.maximum(total, 1)
  lane_N = jnp.where(used_N, lane_N, num_lanes)[order_N]
  bound = jnp.searchsorted(lane_N, jnp.arange(num_lanes + 1))
  start_L, end_L = bound[:-1], bound[1:]
  return Lanes(
      order_N, start_L, end_L,
      jnp.concatenate([end, edge_N]), jnp.concatenate([edge_N, end]),
      (end_L - start_L).max(),
  )
