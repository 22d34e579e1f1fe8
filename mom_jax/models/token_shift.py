"""Token shift: each projection gets a mixture of a row and the row before."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mom_jax import rules
from mom_jax.models import layers

RANK = 32  # of coefficients that depend on the data, per projection


class Coefficients(NamedTuple):
  """Mixing coefficients of S projections, in the activations' type.

  Projection s gets x + (before - x) m_s with m_s = constant_s, or, where
  coefficients depend on the data (arXiv 2404.05892, eq. 14 and 15),

    m_s = constant_s + tanh((x + (before - x) inner) first_s) second_s
  """

  names: tuple[str, ...]
  constant_SD: jax.Array
  inner_D: jax.Array | None
  first_SDR: jax.Array | None
  second_SRD: jax.Array | None


jax.tree_util.register_pytree_node(
    Coefficients, lambda c: (c[1:], c[0]),
    lambda names, rest: Coefficients(names, *rest))


def coefficients(
    module: nn.Module, rule: rules.Rule, D: int, layer_fraction: jax.Array,
    dtype,
) -> Coefficients | None:
  """Make the parameters in `module`; None for a rule without token shift."""
  if not rule.shift:
    return None
  names, axes = projection_names(rule), (None, 'embed')
  constant_SD = layers.param(
      module, 'shift', (len(names), D), axes,
      lambda key, shape: jnp.stack(
          [rule.shift_coefficients(name, D, layer_fraction) for name in names]))
  inner_D = first_SDR = second_SRD = None
  if rule.shift == 'data':
    inner_D = layers.param(
        module, 'shift_query', (D,), axes[1:],
        lambda key, shape: rule.shift_coefficients(
            'shift_inner', D, layer_fraction))
    size = (len(names), D, RANK)
    first_SDR = layers.param(
        module, 'shift_in', size, (*axes, None), layers.mom_init)
    second_SRD = layers.param(
        module, 'shift_out', (len(names), RANK, D), (None, None, 'embed'),
        nn.initializers.uniform(1e-2))
  cast = lambda x: None if x is None else x.astype(dtype)
  return Coefficients(
      names, *map(cast, (constant_SD, inner_D, first_SDR, second_SRD)))


def of_params(
    rule: rules.Rule, params: dict[str, Any]
) -> Coefficients | None:
  """Find the coefficients among a layer's parameters."""
  if not rule.shift:
    return None
  return Coefficients(projection_names(rule), params['shift'], *map(
      params.get, ('shift_query', 'shift_in', 'shift_out')))


def mix(
    x: Float[Array, '*R D'],
    before: Float[Array, '*R D'],
    coefficients: Coefficients,
) -> dict[str, Float[Array, '*R D']]:
  """Mix x with the row before: the input of each projection by name."""
  delta = before - x
  wide = lambda v_D: v_D.reshape((1,) * (x.ndim - 1) + v_D.shape)
  if coefficients.inner_D is not None:
    inner = x + delta * wide(coefficients.inner_D)
  mixed = {}
  for s, name in enumerate(coefficients.names):
    m = wide(coefficients.constant_SD[s])
    if coefficients.inner_D is not None:
      low = jnp.tanh(inner @ coefficients.first_SDR[s])
      m = m + low @ coefficients.second_SRD[s]
    mixed[name] = x + delta * m
  return mixed


def projection_names(rule: rules.Rule) -> tuple[str, ...]:
  """List the projections with own mixing coefficients."""
  own = [name for name, gate in rule.gates.items() if not gate.input_of]
  return ('query', 'key', 'value', *own, 'output')


def macs(rule: rules.Rule, D: int) -> int:
  """Count multiply-adds per row of coefficients that depend on the data."""
  if rule.shift != 'data':
    return 0
  return 2 * len(projection_names(rule)) * D * RANK
