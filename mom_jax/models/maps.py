"""Parameters of a layer's memories, and as the matrices that rows meet."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mom_jax import rules
from mom_jax.models import shift
from mom_jax.parallel import sharding


class Weights(NamedTuple):
  """Parameters of one layer, in the activations' type but for constants.

  G is the number of memories with projections of their own, the shared one
  last, in the order of ranks; 1 with `single_kv_proj`. U of the H heads
  have queries and keys of their own. In an untied model S is the number of
  modalities, else 1.
  """

  query_SDUK: jax.Array
  memory: dict[str, jax.Array]  # keys, values, gates: [G, S, D, *size]
  second: dict[str, jax.Array]  # gates of low rank: [G, S, rank, *size]
  conv: dict[str, jax.Array]  # [W, *size]
  conv_bias: dict[str, jax.Array]  # [*size]
  shares: shift.Shares | None
  constants: dict[str, jax.Array]
  router_M: jax.Array | None  # router state


class Matrices(NamedTuple):
  """`Weights`, side by side.

  F = U K (1 + n) + H n V is what the short convolution runs over: queries, and
  n keys and values a token. G counts memories times S, those of a memory side
  by side.
  """

  query_SDX: jax.Array
  memory_GDX: jax.Array  # keys, values and gates
  second_GRX: dict[str, jax.Array]
  conv_WF: jax.Array | None
  conv_F: jax.Array | None  # its bias
  shares: shift.Shares | None
  constants: dict[str, jax.Array]


def local(rule: rules.Rule, weights: Weights, own: bool) -> Weights:
  """How weights are split inside `per_device.batch_local`.

  Args:
    own: each memory has its own projections.
  """
  memory, whole = 'memory' if own else None, PartitionSpec()
  heads = PartitionSpec(memory, None, sharding.FSDP_SHARDED, 'heads')
  low_rank = PartitionSpec(memory, None, sharding.FSDP_SHARDED)
  by_head = {
      name for name, c in {**rule.constants, **rule.cross_layer}.items()
      if c.per_head}
  return Weights(
      PartitionSpec(None, sharding.FSDP_SHARDED, 'heads'),
      {name: low_rank if name in weights.second else heads
       for name in weights.memory},
      {name: PartitionSpec(memory, None, None, 'heads')
       for name in weights.second},
      {name: PartitionSpec(None, 'heads') for name in weights.conv},
      {name: PartitionSpec('heads') for name in weights.conv_bias},
      whole,
      {name: PartitionSpec('heads') if name in by_head else whole
       for name in weights.constants},
      whole,
  )


def side_by_side(rule: rules.Rule, weights: Weights) -> Matrices:
  """The matrices."""
  flat = lambda w: w.reshape(-1, w.shape[2], math.prod(w.shape[3:]))
  parts = ('query', 'key', 'value')
  join = lambda by_name, lead: jnp.concatenate(
      [by_name[name].reshape(*lead, -1) for name in parts], -1)
  conv, bias = weights.conv, weights.conv_bias
  return Matrices(
      flat(weights.query_SDUK[None]),
      jnp.concatenate([flat(weights.memory[name]) for name in (
          'key', 'value', *rule.gates)], -1),
      {name: flat(w) for name, w in weights.second.items()},
      join(conv, (len(conv['query']),)) if conv else None,
      join(bias, ()) if bias else None,
      weights.shares,
      weights.constants,
  )
