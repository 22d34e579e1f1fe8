"""The memory-update rule as a value, and its run over grouped rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mom_jax import pallas
from mom_jax.rules import context_parallel, rotary

ROTARY_BASE = 10000.0  # of the rotary embedding of queries and keys


@dataclasses.dataclass(frozen=True)
class Gate:
  """A learned projection of the layer's input: a gate per token and head.

  Attributes:
    per: 'head', 'key' or 'value': the gate is [R, H], [R, H, K] or [R, H, V];
      an integer n gives [R, H, n].
    rank: (D, K, V) -> rank of a low-rank projection; None is a full matrix.
    activation: applied between the two matrices of a low-rank projection.
    input_of: name of the projection whose token-shifted input this gate shares;
      None gives it a shift of its own.
    per_update: a token with n updates has n of these gates.
  """

  per: str | int = 'head'
  rank: Callable[[int, int, int], int] | None = None
  activation: Callable[[jax.Array], jax.Array] | None = None
  input_of: str | None = None
  per_update: bool = False

  def size(self, K: int, V: int) -> tuple[int, ...]:
    return _size(self.per, K, V)


@dataclasses.dataclass(frozen=True)
class Constant:
  """A parameter of a layer, shared by its memories.

  Attributes:
    per: as in `Gate`, or a tuple of these.
    init: (key, shape, layer_fraction) -> initial value, float32;
      layer_fraction is layer / num_layers, from 0 to below 1.
    per_head: one for each head; otherwise all heads share one.
  """

  per: str | int | tuple[str | int, ...]
  init: Callable[[jax.Array, tuple[int, ...], jax.Array], jax.Array]
  per_head: bool = True

  def shape(self, H: int, K: int, V: int) -> tuple[int, ...]:
    per = self.per if isinstance(self.per, tuple) else (self.per,)
    sizes = tuple(n for p in per for n in _size(p, K, V))
    return (H, *sizes) if self.per_head else sizes


def _size(per, K, V):
  return (per,) if isinstance(per, int) else {
      'head': (), 'key': (K,), 'value': (V,)}[per]


def l2_normalise(x: Float[Array, '*R K']) -> Float[Array, '*R K']:
  """x / sqrt(sum x^2 + L2_EPS) over the last axis, in float32; x's dtype."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(
      jnp.square(y).sum(-1, keepdims=True) + pallas.L2_EPS)
  return y.astype(x.dtype)


Gates = Mapping[str, jax.Array]
Constants = Mapping[str, jax.Array]


class Operands(NamedTuple):
  """The operands of `pallas.chunk_memory`, and a skip around the memory.

  R rows, or R n with n updates per token. Operands with one row per token
  apply to its last update (queries) or before its first (decays).
  """

  q_RHK: jax.Array
  k_RHK: jax.Array
  v_RHV: jax.Array
  log_decay: jax.Array | None = None  # [R, H] or [R, H, K], natural log, <= 0
  beta: jax.Array | None = None  # [R, H], None for an additive update
  removal_key_RHK: jax.Array | None = None  # replaces beta
  value_decay_RHV: jax.Array | None = None  # replaces log_decay
  skip_RHV: jax.Array | None = None  # added to the memory's output


class RuleInputs(NamedTuple):
  """A layer's rows as a rule gets them.

  k, v and gates of every update are [R n, ...], updates of a token in order.
  """

  q_RHK: jax.Array
  k_RHK: jax.Array
  v_RHV: jax.Array
  gates: Gates
  constants: Constants
  position_R: jax.Array  # in the memory: earlier rows of its document there


@dataclasses.dataclass(frozen=True)
class Rule:
  """A memory-update rule.

  Attributes:
    gates: by name; values are x W before any activation, float32.
    constants: by name. `operands` also finds 'layer_fraction' among them:
      layer / num_layers.
    operands: maps (q, k, v, gates, constants) to `Operands`. q, k, v come after
      the short convolution, if there is one, gates and constants in float32.
    removes: an update first removes the value stored under its key, so that a
      row costs three products with the state instead of two.
    scale: of the output; None is K^-0.5.
    silu: which of q, k and v go through SiLU after the short convolution.
    l2_normalised: which of q and k are l2-normalised after that, per head.
    single_update: a token updates once; `mixer.num_householder` > 1 is refused.
    rotary: q and k are rotated by their position in the memory.
    exclusive: a token reads the state before its own decay and update.
    skip_after_norm: `Operands.skip_RHV` is added after the output norm.
    shift: token shift, a mix of each projection's input with the previous row,
      with 'learned' coefficients or with coefficients that depend on 'data';
      None is no shift.
    shift_coefficients: initial mix coefficients, (name of the projection, D,
      layer_fraction) -> [D].
    v_first_gate: name of a value gate r, if values move towards v_first, the
      token's values in the first layer: v + sigmoid(r + first_bias)
      (v_first - v).
    cross_layer: parameters that are declared once for all layers, by name.
    per_layer: maps their values [L, ...] to what layers find in `constants`.
    state_shape: (K, V) -> shape of a head's state.
    macs: (K, V) -> multiply-adds of a row and head with its state; None counts
      products with K x V.
    update: the whole update, for rules that are not one `chunk_memory` call:
      (rule, inputs, memory, state or None) -> (output, last state).
  """

  gates: Mapping[str, Gate]
  constants: Mapping[str, Constant]
  operands: Callable[
      [jax.Array, jax.Array, jax.Array, Gates, Constants], Operands
  ] | None
  removes: bool = False
  scale: float | None = None
  silu: str = 'qkv'
  l2_normalised: str = ''
  single_update: bool = False
  rotary: bool = False
  exclusive: bool = False
  skip_after_norm: bool = False
  shift: str | None = None
  shift_coefficients: Callable[[str, int, jax.Array], jax.Array] | None = None
  v_first_gate: str | None = None
  cross_layer: Mapping[str, Constant] = dataclasses.field(default_factory=dict)
  per_layer: Callable[[Constants], Constants] = lambda cross_layer: cross_layer
  state_shape: Callable[[int, int], tuple[int, int]] = lambda K, V: (K, V)
  macs: Callable[[int, int], int] | None = None
  update: Callable[..., tuple[jax.Array, jax.Array]] = (
      lambda *args: one_pass(*args))

  def cost(self, K: int, V: int) -> int:
    """Multiply-adds of a row and head with its state."""
    return self.macs(K, V) if self.macs else (2 + self.removes) * K * V


def layer_values(
    rule: Rule, cross_layer: Constants, num_layers: int
) -> dict[str, jax.Array]:
  """'layer_fraction' and the rule's cross-layer values, [L, ...] each."""
  fraction_L = jnp.arange(num_layers, dtype=jnp.float32) / num_layers
  return {'layer_fraction': fraction_L, **rule.per_layer(cross_layer)}


@dataclasses.dataclass(frozen=True)
class GroupedMemory:
  """`pallas.chunk_memory` bound to the groups of a layer's rows.

  Attributes:
    real_R: False on padding rows.
    continues_G: where rows are split over devices along time, whether a group's
      rows here continue the document before, or there are none.
    options: keyword arguments of `chunk_memory`.
  """

  real_R: jax.Array
  group_N: jax.Array
  segment_R: jax.Array
  continues_G: jax.Array | None
  options: Mapping[str, Any]

  def __call__(
      self,
      operands: Operands,
      state: jax.Array | None,
      scale: float | None = None,
      exclusive: bool = False,
  ) -> tuple[jax.Array, jax.Array]:
    """Return the output of each token and the last states."""
    ops, R = operands, len(self.real_R)
    n = len(ops.k_RHK) // R  # updates per token

    def repeat(x):
      by_token = n > 1 and x is not None and len(x) == R
      return jnp.repeat(x, n, axis=0) if by_token else x

    def mask(x, keep):
      return None if x is None else jnp.where(
          keep.reshape(-1, *[1] * (x.ndim - 1)), x, 0)

    real, index = repeat(self.real_R), jnp.arange(R * n) % n

    def first_update_only(x):
      return mask(repeat(x), real & (index == 0))

    q_RHK = ops.q_RHK
    if n > 1:
      q_RHK = mask(repeat(q_RHK), index == (0 if exclusive else n - 1))
    # Padding rows have no value, so their keys may stay.
    run = functools.partial(
        pallas.chunk_memory, group_N=jnp.repeat(self.group_N, n),
        segment_R=repeat(self.segment_R), **self.options)
    rest = (
        ops.k_RHK, ops.v_RHV, first_update_only(ops.log_decay),
        mask(ops.beta, real), mask(ops.removal_key_RHK, real),
        first_update_only(ops.value_decay_RHV))
    if self.continues_G is not None:
      state = context_parallel.initial_state(run, *rest, self.continues_G)
    *rest, removal_key_RHK, value_decay_RHV = rest
    o_RHV, state = run(
        q_RHK, *rest, removal_key_RHK=removal_key_RHK,
        value_decay_RHV=value_decay_RHV, initial_state_GHKV=state, scale=scale,
        exclusive=exclusive)
    return o_RHV[(0 if exclusive else n - 1) :: n], state


def one_pass(
    rule: Rule, inputs: RuleInputs, memory: GroupedMemory,
    state: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """The update of rules that are one `chunk_memory` call."""
  q, k, v, gates, constants, _ = inputs
  operands = rule.operands(q, k, v, gates, constants)
  o_RHV, state = memory(operands, state, rule.scale, rule.exclusive)
  if operands.skip_RHV is None:
    return o_RHV, state
  skip_RHV = operands.skip_RHV.astype(o_RHV.dtype)
  if rule.skip_after_norm:
    return jnp.concatenate([o_RHV, skip_RHV], -1), state
  return o_RHV + skip_RHV, state


def run(
    rule: Rule,
    q: Float[Array, 'R H K'],
    k: Float[Array, 'R H n K'],
    v: Float[Array, 'R H n V'],
    gates: Gates,
    constants: Constants,
    real: Bool[Array, ' R'],
    *,
    position_in_memory: Int[Array, ' R'],
    group_N: jax.Array,
    segment_R: jax.Array,
    initial_state_GHKV: jax.Array | None = None,
    continues_G: jax.Array | None = None,
    l2_normalised: bool = False,
    **options: Any,
) -> tuple[Float[Array, 'R H X'], Float[Array, 'G H Y Z']]:
  """Run a rule over grouped rows: the output of each row, the last states.

  Args:
    k, v: n keys and values per row, applied one after another; the memory
      decays before the first update and is read after the last (arXiv
      2502.10297).
    gates: by the rule's names; those with `per_update` are [R, H, n, ...].
    constants: those of the rule and of `layer_values` for this layer.
    real: False on padding rows.
    position_in_memory: number of earlier rows of the same document in the same
      memory.
    group_N, segment_R, initial_state_GHKV: as in `chunk_memory`; states have
      the rule's `state_shape`.
    continues_G: replaces an initial state, as in `GroupedMemory`.
    l2_normalised: q and k are already normalised.
    **options: other keyword arguments of `chunk_memory`.
  Returns:
    (o, state): X is V, or 2 V for rules with `skip_after_norm`.

  Example, one document of 32 rows in one memory:

    >>> import jax.numpy as jnp
    >>> from mom_jax import rules
    >>> o, state = rules.run(
    ...     rules.get('delta'), jnp.ones((32, 2, 8)), jnp.ones((32, 2, 1, 8)),
    ...     jnp.ones((32, 2, 1, 4)), {'beta': jnp.zeros((32, 2, 1))}, {},
    ...     jnp.ones(32, bool), position_in_memory=jnp.arange(32),
    ...     group_N=jnp.array([0, 0]), segment_R=jnp.ones(32, int),
    ...     num_groups=1, chunk=16)
    >>> o.shape, state.shape
    ((32, 2, 4), (1, 2, 8, 4))
  """
  n = k.shape[2]

  def by_update(x):
    """[R, H, n, ...] to [R n, H, ...]."""
    return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], *x.shape[3:])

  gates = {
      name: by_update(x) if rule.gates[name].per_update else x
      for name, x in gates.items()
  }
  k, v = by_update(k), by_update(v)
  if not l2_normalised:
    q, k = (l2_normalise(x) if name in rule.l2_normalised else x
            for name, x in (('q', q), ('k', k)))
  if rule.rotary:
    q = rotary.rotate(q, position_in_memory, ROTARY_BASE)
    k = rotary.rotate(k, jnp.repeat(position_in_memory, n), ROTARY_BASE)
  memory = GroupedMemory(real, group_N, segment_R, continues_G, options)
  inputs = RuleInputs(q, k, v, gates, constants, position_in_memory)
  return rule.update(rule, inputs, memory, initial_state_GHKV)
