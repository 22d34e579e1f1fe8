"""Feature maps of queries and keys, and the normaliser of linear attention.

Both wrap an additive rule without gates per key channel into another rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mom_jax.rules import initializers
from mom_jax.rules.rule import Constant, Constants, Rule


@dataclasses.dataclass(frozen=True)
class FeatureMap:
  """A map of queries and keys before the memory.

  Attributes:
    apply: (x, constants, 'q' or 'k') -> features.
    constants: learned parameters, shared by the memories of a layer.
    size: K -> number of features.
    scale: of the output; None is the rule's.
  """

  apply: Callable[[jax.Array, Constants, str], jax.Array]
  constants: Mapping[str, Constant] = dataclasses.field(default_factory=dict)
  size: Callable[[int], int] = lambda K: K
  scale: float | None = None


def _maps(*names, init=None, bias=True):
  """Matrices [K, K] and biases for q and k, shared by all heads."""
  constants = {}
  for name in [f'{name}_{which}' for name in names for which in 'qk']:
    constants[name] = Constant(('key', 'key'), init or _xavier, per_head=False)
    if bias:
      constants[f'{name}_bias'] = Constant(
          'key', initializers.full(0.0), per_head=False)
  return constants


def _xavier(key, shape, layer_fraction):
  del layer_fraction
  bound = (6 / sum(shape[-2:])) ** 0.5
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _identity(key, shape, layer_fraction):
  del key, layer_fraction
  return jnp.eye(shape[-1])


def _mapped(x_RHK, constants, name):
  y_RHK = x_RHK @ constants[name].astype(x_RHK.dtype)
  if f'{name}_bias' in constants:
    y_RHK += constants[f'{name}_bias'].astype(x_RHK.dtype)[None, None]
  return y_RHK


# hadamard: (x W_1 + b_1) * (x W_2 + b_2), the map of the official MoM's linear
# attention.


def _hadamard(x_RHK, constants, which):
  return _mapped(x_RHK, constants, f'map_{which}') * _mapped(
      x_RHK, constants, f'map_2_{which}')


# hedgehog: softmax over [2 y, -2 y], y = x W + b, W initially the identity
# (arXiv 2402.04347, as trained from scratch in flash-linear-attention).


def _hedgehog(x_RHK, constants, which):
  y_RHK = 2 * _mapped(x_RHK, constants, f'map_{which}')
  return jax.nn.softmax(jnp.concatenate([y_RHK, -y_RHK], -1))


# taylor: features whose product is 1 + s + s^2 / 2, s = q k / sqrt(K) (Based,
# arXiv 2402.18668, eq. 2). Equal products of channels are kept once.


def _taylor(x_RHK, constants, which):
  del constants, which
  K = x_RHK.shape[-1]
  return jnp.concatenate([
      jnp.ones_like(x_RHK[..., :1]), x_RHK * K**-0.25, _squares(x_RHK, 0.5)
  ], -1)


def _squares(x_RHK, factor):
  """Features whose product is factor s^2, s = q k / sqrt(K)."""
  K = x_RHK.shape[-1]
  i, j = np.triu_indices(K)
  weight_F = np.sqrt(factor * np.where(i == j, 1, 2) / K)
  return x_RHK[..., i] * x_RHK[..., j] * jnp.asarray(
      weight_F, x_RHK.dtype)[None, None]


def _pairs(K):
  return K * (K + 1) // 2


# rebased: features whose product is s^2 of x' = gain * layer_norm(x) + offset,
# both learned per head (ReBased, arXiv 2402.10644, eq. 7).


def _rebased(x_RHK, constants, which):
  x = x_RHK.astype(jnp.float32)
  x = x - x.mean(-1, keepdims=True)
  x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
  x = x * constants['gain'][None] + constants['offset'][None]
  return _squares(x, 1.0).astype(x_RHK.dtype)


def _same_for_qk(function):
  return lambda x, constants, which: function(x)


FEATURE_MAPS = {
    'identity': FeatureMap(_same_for_qk(lambda x: x)),
    'elu': FeatureMap(_same_for_qk(lambda x: jax.nn.elu(x) + 1)),  # 2006.16236
    'relu': FeatureMap(_same_for_qk(jax.nn.relu)),
    'silu': FeatureMap(_same_for_qk(jax.nn.silu)),
    't2r': FeatureMap(  # relu(x W), arXiv 2103.13076
        lambda x, c, which: jax.nn.relu(_mapped(x, c, f'map_{which}')),
        _maps('map', bias=False)),
    'hadamard': FeatureMap(_hadamard, _maps('map', 'map_2')),
    'hedgehog': FeatureMap(
        _hedgehog, _maps('map', init=_identity), lambda K: 2 * K),
    'taylor': FeatureMap(_taylor, {}, lambda K: 1 + K + _pairs(K), 1.0),
    'rebased': FeatureMap(
        _rebased,
        {'gain': Constant('key', initializers.full(1.0)),
         'offset': Constant('key', initializers.full(0.0))}, _pairs, 1.0),
}


def with_features(rule: Rule, feature_map: FeatureMap) -> Rule:
  """The rule with its queries and keys mapped."""

  def mapped_operands(q, k, v, gates, constants):
    operands = rule.operands(q, k, v, gates, constants)
    return operands._replace(
        q_RHK=feature_map.apply(operands.q_RHK, constants, 'q'),
        k_RHK=feature_map.apply(operands.k_RHK, constants, 'k'))

  size = feature_map.size
  return dataclasses.replace(
      rule, operands=mapped_operands,
      constants={**rule.constants, **feature_map.constants},
      scale=rule.scale if feature_map.scale is None else feature_map.scale,
      state_shape=lambda K, V: rule.state_shape(size(K), V),
      macs=lambda K, V: rule.cost(size(K), V),
  )


def normalised(rule: Rule, eps: float = 1e-10) -> Rule:
  """The rule with its outputs divided by the sum of their weights.

    o_t = (q_t S_t) / (q_t z_t + eps),  z the state for values of 1

  The state has one more column, z.

  Source: arXiv 2006.16236, eq. 9 to 12.
  """

  def update(_, inputs, memory, state):
    q, k, v, gates, constants, _ = inputs
    operands = rule.operands(q, k, v.astype(jnp.float32), gates, constants)
    real = jnp.repeat(memory.real_R, len(k) // len(q)).astype(jnp.float32)
    one = jnp.broadcast_to(
        real[:, None, None], (*operands.v_RHV.shape[:2], 1))
    v_and_one = jnp.concatenate([operands.v_RHV, one], -1)
    o, state = memory(
        operands._replace(v_RHV=v_and_one), state, rule.scale, rule.exclusive)
    return (o[..., :-1] / (o[..., -1:] + eps)).astype(v.dtype), state

  return dataclasses.replace(
      rule, update=update,
      state_shape=lambda K, V: rule.state_shape(K, V + 1),
      macs=lambda K, V: rule.cost(K, V + 1),
  )
