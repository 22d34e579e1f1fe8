"""Document starts, and the order in which chunks are visited."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Log decay that resets a state: exp gives exactly 0 in float32, and sums with
# it stay finite.
RESET = -1e5


def document_starts(segment_R: jax.Array, group_N: jax.Array) -> jax.Array:
  """Mark the rows at which a new document begins inside a group, bool [R].

  A row of segment 0, padding, belongs to the document of the row before it, so
  padding neither begins nor ends a document.
  """
  R, N = len(segment_R), len(group_N)
  row_R = jnp.arange(R)
  last_real_R = jax.lax.cummax(jnp.where(segment_R == 0, -1, row_R))
  before_R = jnp.concatenate(
      [jnp.full(1, -1, last_real_R.dtype), last_real_R[:-1]])
  in_group_R = before_R >= jnp.repeat(
      first_chunk_of_group(group_N) * (R // N), R // N)
  change_R = segment_R != segment_R[jnp.maximum(before_R, 0)]
  return (segment_R != 0) & in_group_R & change_R


def first_chunk_of_group(group_N):
  """Index of the first chunk of each chunk's group."""
  new_N = jnp.concatenate([jnp.ones(1, bool), group_N[1:] != group_N[:-1]])
  return jax.lax.cummax(jnp.where(new_N, jnp.arange(len(group_N)), 0))


class ParallelGroups(NamedTuple):
  """Groups divided among Q queues that advance in parallel, a chunk per step.

  Queue i visits chunks order_N[start_Q[i] : end_Q[i]]. Every group is in one
  queue, and no queue is longer than total / Q plus the longest group.
  """

  order_N: jax.Array  # used chunks, in order
  start_Q: jax.Array
  end_Q: jax.Array
  first_N: jax.Array  # bool, a group's first chunk
  last_N: jax.Array
  steps: jax.Array  # length of the longest queue


def parallel_groups(group_N, num_queues: int) -> ParallelGroups:
  """Divide groups among queues, in order, by number of chunks."""
  used_N = group_N >= 0
  edge_N = group_N[1:] != group_N[:-1]
  end = jnp.ones(1, bool)
  order_N = jnp.argsort(~used_N, stable=True)
  rank_N = jnp.cumsum(used_N) - 1
  total = used_N.sum()
  queue_N = rank_N[first_chunk_of_group(group_N)] * num_queues // jnp.maximum(
      total, 1)
  queue_N = jnp.where(used_N, queue_N, num_queues)[order_N]
  bound = jnp.searchsorted(
      queue_N, jnp.arange(num_queues + 1), method='compare_all')
  start_Q, end_Q = bound[:-1], bound[1:]
  return ParallelGroups(
      order_N, start_Q, end_Q,
      jnp.concatenate([end, edge_N]), jnp.concatenate([edge_N, end]),
      (end_Q - start_Q).max(),
  )


class QueueStep(NamedTuple):
  """Step j of all queues.

  Attributes:
    chunk_Q: the chunk that each queue reads.
    write_Q: the chunk that it may write, N past the queue's end.
    group_Q: the chunk's group.
    valid_Q: False past the queue's end.
    first_Q, last_Q: whether the chunk is its group's first or last.
  """

  chunk_Q: jax.Array
  write_Q: jax.Array
  group_Q: jax.Array
  valid_Q: jax.Array
  first_Q: jax.Array
  last_Q: jax.Array


def queue_step(queues: ParallelGroups, group_N, j) -> QueueStep:
  """Return the chunks of step j."""
  N = len(group_N)
  index_Q = queues.start_Q + j
  valid_Q = index_Q < queues.end_Q
  chunk_Q = queues.order_N[jnp.minimum(index_Q, N - 1)]
  group_Q = jnp.maximum(group_N[chunk_Q], 0)
  first_Q = queues.first_N[chunk_Q]
  last_Q = queues.last_N[chunk_Q]
  return QueueStep(
      chunk_Q, jnp.where(valid_Q, chunk_Q, N), group_Q, valid_Q, first_Q,
      last_Q)
