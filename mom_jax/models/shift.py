"""Token shift: maps read a mixture of a row and the row before it."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mom_jax import rules
from mom_jax.models import layers

RANK = 32  # of the shares that depend on the data, a map


class Shares(NamedTuple):
  """Parameters of the mixtures, S of them, in the activations' type.

  A map s reads x + (before - x) m_s with m_s = share_s, and if there is a
  `query` (data-dependent shares, arXiv 2404.05892, eq. 14 and 15),

    m_s = share_s + tanh((x + (before - x) query) first_s) second_s
  """

  names: tuple[str, ...]
  share_SD: jax.Array
  query_D: jax.Array | None
  first_SDR: jax.Array | None
  second_SRD: jax.Array | None


jax.tree_util.register_pytree_node(
    Shares, lambda s: (s[1:], s[0]), lambda names, rest: Shares(names, *rest))


def shares(
    module: nn.Module, rule: rules.Rule, names: tuple[str, ...], D: int,
    depth: jax.Array, dtype,
) -> Shares:
  """Makes the parameters in `module`."""
  axes = (None, 'embed')
  share_SD = layers.param(
      module, 'shift', (len(names), D), axes,
      lambda key, shape: jnp.stack(
          [rule.shift_coefficients(name, D, depth) for name in names]))
  query_D = first_SDR = second_SRD = None
  if rule.shift == 'data':
    query_D = layers.param(
        module, 'shift_query', (D,), axes[1:],
        lambda key, shape: rule.shift_coefficients('query_of_shares', D, depth))
    size = (len(names), D, RANK)
    first_SDR = layers.param(
        module, 'shift_in', size, (*axes, None), layers.mom_init)
    second_SRD = layers.param(
        module, 'shift_out', (len(names), RANK, D), (None, None, 'embed'),
        nn.initializers.uniform(1e-2))
  cast = lambda x: None if x is None else x.astype(dtype)
  return Shares(
      names, *map(cast, (share_SD, query_D, first_SDR, second_SRD)))


def mix(
    x: Float[Array, '*R D'], before: Float[Array, '*R D'], shares: Shares
) -> dict[str, Float[Array, '*R D']]:
  """What each map reads, by name."""
  delta = before - x
  wide = lambda v_D: v_D.reshape((1,) * (x.ndim - 1) + v_D.shape)
  if shares.query_D is not None:
    query = x + delta * wide(shares.query_D)
  mixed = {}
  for s, name in enumerate(shares.names):
    share = wide(shares.share_SD[s])
    if shares.query_D is not None:
      low = jnp.tanh(query @ shares.first_SDR[s])
      share = share + low @ shares.second_SRD[s]
    mixed[name] = x + delta * share
  return mixed


def maps(rule: rules.Rule) -> tuple[str, ...]:
  """Names of the maps that have mixtures of their own."""
  own = [name for name, gate in rule.gates.items() if not gate.input_of]
  return ('query', 'key', 'value', *own, 'output')


def macs(rule: rules.Rule, D: int) -> int:
  """Multiply-adds of a row's shares that depend on the data."""
  names = len(maps(rule))
  return 2 * names * D * RANK if rule.shift == 'data' else 0
