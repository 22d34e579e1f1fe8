"""Parameters of a layer's memories: names, shapes, axes, initial values, split.

A parameter is one line of `table`; its logical axes say how it is stored
(`sharding.STRATEGIES`) and what of it a device holds inside the layer
(`split`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mom_jax import rules
from mom_jax.models import layers, token_shift
from mom_jax.parallel import all_to_all, sharding

# Columns that the short convolution runs over, in this order.
QKV = ('query', 'key', 'value')
HEADS = ('heads', 'kv')


@runtime_checkable
class Settings(Protocol):
  """Fields that the memories read of `Mom` or of `config.Mixer`."""

  rule: str
  feature_map: str
  normaliser: bool
  num_householder: int
  num_memories: int
  shared: bool
  single_kv_proj: bool
  num_heads: int
  key_heads: int
  key_dim: int
  value_dim: int | None  # None is key_dim
  conv_width: int
  conv_bias: bool
  low_ranks: tuple[int, ...]


class Param(NamedTuple):
  """A parameter: shape, logical axes and initialiser."""

  shape: tuple[int, ...]
  axes: layers.Axes
  init: layers.Init = layers.mom_init


class Weights(NamedTuple):
  """Parameters of one layer, in the activations' type but for constants.

  G: memories with own projections, in rank order (1 with `single_kv_proj`);
  U: heads with own queries and keys; S: modalities with own projections, or 1.
  """

  query_SDUK: jax.Array
  memory: dict[str, jax.Array]  # keys, values, gates: [G, S, D, *size]
  second: dict[str, jax.Array]  # of low-rank gates: [G, S, rank, *size]
  conv: dict[str, jax.Array]  # [W, *size]
  conv_bias: dict[str, jax.Array]  # [*size]
  shift: token_shift.Coefficients | None
  constants: dict[str, jax.Array]
  router_state_M: jax.Array | None


class Matrices(NamedTuple):
  """`Weights` as matrices, concatenated along their columns X.

  G: memories times modalities with own projections, the modalities of a memory
  together; F = U K (1 + n) + H n V: columns of the short convolution, queries
  and n keys and values per token.
  """

  query_SDX: jax.Array
  memory_GDX: jax.Array  # keys, values and gates
  second_GRX: dict[str, jax.Array]
  conv_WF: jax.Array | None
  conv_F: jax.Array | None  # its bias


class HeadSizes(NamedTuple):
  """Heads that a device holds, and their sizes.

  Attributes:
    H, U: heads, and those of them with queries and keys of their own.
    K, V: sizes of a key and a value.
    n: updates per token, each with a key and a value.
  """

  H: int
  U: int
  K: int
  V: int
  n: int

  @classmethod
  def of(cls, settings: Settings) -> HeadSizes:
    """Make the sizes of all heads of a layer."""
    H = settings.num_heads
    K = settings.key_dim
    return cls(H, settings.key_heads or H, K, settings.value_dim or K,
               settings.num_householder)

  def here(self, weights: Weights) -> HeadSizes:
    """Make the sizes of the part that a device's `weights` are."""
    H = weights.memory['value'].shape[3] // self.n
    return self._replace(H=H, U=weights.query_SDUK.shape[2])

  def row_shapes(self, rule: rules.Rule) -> dict[str, tuple[int, ...]]:
    """Return the shape of each projection of a row by name, heads first."""
    H, U, K, V, n = self
    shapes = {'query': (U, K), 'key': (U, n, K), 'value': (H, n, V)}
    for name, gate in rule.gates.items():
      heads = (H, n) if gate.per_update else (H,)
      shapes[name] = heads + gate.size(K, V)
    return shapes

  def conv_shapes(self) -> dict[str, tuple[int, int]]:
    """Return (heads, size) of the short convolution's columns, by name."""
    H, U, K, V, n = self
    return {'query': (U, K), 'key': (U * n, K), 'value': (H * n, V)}


def rule_of(settings: Settings) -> rules.Rule:
  """Return the rule that the settings name.

  Raises:
    ValueError: the settings name no rule.
  """
  return rules.get(settings.rule, settings.feature_map, settings.normaliser,
                   settings.num_householder)


def ranks(settings: Settings, D: int) -> dict[str, int]:
  """Return the ranks of the rule's low-rank gates by name.

  Raises:
    ValueError: `low_ranks` has not one for each.
  """
  rule, sizes = rule_of(settings), HeadSizes.of(settings)
  found = {name: gate.rank(D, sizes.K, sizes.V)
           for name, gate in rule.gates.items() if gate.rank}
  if not settings.low_ranks:
    return found
  if len(settings.low_ranks) != len(found) or min(settings.low_ranks) < 1:
    raise ValueError(
        f'config.model.mixer.low_ranks={settings.low_ranks} needs one number'
        f' above 0 for each of the {len(found)} gates {tuple(found)} of'
        f' rule={settings.rule!r}; () is as published.'
    )
  return dict(zip(found, settings.low_ranks))


def shifted_projections(settings: Settings) -> tuple[str, ...]:
  """List the projections with own mixing coefficients, under token shift."""
  return token_shift.projection_names(rule_of(settings))


def table(
    settings: Settings, D: int, copies: int, layer_fraction: Any
) -> dict[str, Param]:
  """Describe the memories' parameters by name, but for router and token shift.

  Args:
    copies: modalities with own projections; 0 is one for all.
    layer_fraction: of the layer, for the rule's constants.
  """
  rule, low = rule_of(settings), ranks(settings, D)
  H, U, K, V, n = sizes = HeadSizes.of(settings)
  G = 1 if settings.single_kv_proj else settings.num_memories + settings.shared
  S, modality = ((copies,), ('modality',)) if copies else ((), ())
  memory = ('memory', *modality)
  params = {
      'query': Param((*S, D, U, K), (*modality, 'embed', *HEADS)),
      'key': Param((G, *S, D, U * n, K), (*memory, 'embed', *HEADS)),
      'value': Param((G, *S, D, H * n, V), (*memory, 'embed', *HEADS)),
  }
  for name, gate in rule.gates.items():
    out = (H * n if gate.per_update else H, *gate.size(K, V))
    axes, r = HEADS[: len(out)], low.get(name)
    if r:
      params |= {
          f'{name}_in': Param((G, *S, D, r), (*memory, 'embed', None)),
          f'{name}_out': Param((G, *S, r, *out), (*memory, None, *axes)),
      }
    else:
      params[name] = Param((G, *S, D, *out), (*memory, 'embed', *axes))
  if settings.conv_width:
    W, zeros = settings.conv_width, nn.initializers.zeros_init()
    conv = sizes.conv_shapes()
    params |= {
        f'conv_{name}': Param((W, *size), (None, *HEADS), layers.conv_init)
        for name, size in conv.items()}
    if settings.conv_bias:
      params |= {f'conv_{name}_bias': Param(size, HEADS, zeros)
                 for name, size in conv.items()}
  for name, constant in rule.constants.items():
    shape = constant.shape(H, K, V)
    axes = (None,) * len(shape)
    if constant.per_head:
      axes = (*HEADS[: len(shape)], *axes[2:])
    params[name] = Param(shape, axes, _initial_value(constant, layer_fraction))
  return params


def cross_layer(settings: Settings) -> dict[str, Param]:
  """Describe the rule's cross-layer parameters, without the axis of layers."""
  H, _, K, V, _ = HeadSizes.of(settings)
  return {
      name: Param((shape := c.shape(H, K, V)), HEADS[: len(shape)],
                  _initial_value(c, jnp.zeros(())))
      for name, c in rule_of(settings).cross_layer.items()}


def _initial_value(
    constant: rules.Constant, layer_fraction: Any
) -> layers.Draw:
  """Return the initialiser of a constant."""
  def init(key, shape):
    return constant.init(key, shape, layer_fraction)

  return init


def weights_of(
    params: dict[str, jax.Array],
    settings: Settings,
    copies: int,
    placement: all_to_all.Placement,
    dtype: Any,
    layer_constants: dict[str, jax.Array],
    shift: token_shift.Coefficients | None,
    router_state_M: jax.Array | None,
) -> Weights:
  """Bring the parameters of `table` into the form that the memories use.

  Args:
    placement: of the memories on ranks, whose order the projections get.
    dtype: of the activations.
    layer_constants: of the layer, see `rules.layer_values`.
  """
  rule, S = rule_of(settings), copies or 1
  lead = 2 if copies else 1  # memories, and modalities

  def by_memory(name):
    """Return a parameter as [G, S, ...], in rank order."""
    w = params[name].astype(dtype)
    w = w if settings.single_kv_proj else placement.to_rank_order(w)
    return w.reshape(-1, S, *w.shape[lead:])

  memory = {name: by_memory(name) for name in ('key', 'value')}
  second = {}
  for name in rule.gates:
    if name in params:
      memory[name] = by_memory(name)
    else:
      memory[name] = by_memory(f'{name}_in')
      second[name] = by_memory(f'{name}_out')
  named = lambda form: {
      name: params[form.format(name)].astype(dtype) for name in QKV
      if form.format(name) in params}
  query = params['query']
  return Weights(
      query.reshape(S, *query.shape[lead - 1:]).astype(dtype), memory, second,
      named('conv_{}'), named('conv_{}_bias'), shift,
      layer_constants | {name: params[name] for name in rule.constants},
      router_state_M)


def split(rule: rules.Rule, weights: Weights, per_memory: bool) -> Weights:
  """Return the part of each parameter that a device holds inside the layer.

  Args:
    per_memory: each memory has its own projections.
  """
  memory, whole = 'memory' if per_memory else None, PartitionSpec()
  heads = PartitionSpec(memory, None, sharding.FSDP_SHARDED, 'heads')
  low_rank = PartitionSpec(memory, None, sharding.FSDP_SHARDED)
  by_head = {
      name for name, c in {**rule.constants, **rule.cross_layer}.items()
      if c.per_head}
  return Weights(
      query_SDUK=PartitionSpec(None, sharding.FSDP_SHARDED, 'heads'),
      memory={name: low_rank if name in weights.second else heads
              for name in weights.memory},
      second={name: PartitionSpec(memory, None, None, 'heads')
              for name in weights.second},
      conv={name: PartitionSpec(None, 'heads') for name in weights.conv},
      conv_bias={name: PartitionSpec('heads') for name in weights.conv_bias},
      shift=whole,
      constants={name: PartitionSpec('heads') if name in by_head else whole
                 for name in weights.constants},
      router_state_M=whole,
  )


def concatenated(rule: rules.Rule, weights: Weights) -> Matrices:
  """Concatenate the weights into one matrix for each product with rows."""
  flat = lambda w: w.reshape(-1, w.shape[2], math.prod(w.shape[3:]))
  join = lambda by_name, lead: jnp.concatenate(
      [by_name[name].reshape(*lead, -1) for name in QKV], -1)
  conv, bias = weights.conv, weights.conv_bias
  return Matrices(
      flat(weights.query_SDUK[None]),
      jnp.concatenate([flat(weights.memory[name]) for name in (
          'key', 'value', *rule.gates)], -1),
      {name: flat(w) for name, w in weights.second.items()},
      join(conv, (len(conv['query']),)) if conv else None,
      join(bias, ()) if bias else None,
  )
