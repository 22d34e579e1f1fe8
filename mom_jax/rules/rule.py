"""What a memory-update rule is, and how it runs over grouped rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mom_jax import pallas
from mom_jax.pallas.short_conv.parts import UNIT_EPS
from mom_jax.rules import context_parallel, rotary

ROTARY_BASE = 10000.0  # of the rotary embedding of queries and keys


@dataclasses.dataclass(frozen=True)
class Gate:
  """A number for each token and head, or for each of a head's channels.

  Attributes:
    per: 'head', 'key' or 'value': shape [R, H], [R, H, K] or [R, H, V]; a
      number is that many for each head.
    rank: (D, K, V) -> columns of a map in two steps; None is a full matrix.
    inner: what stands between the two steps.
    reads: the map whose mixture of shifted rows it reads; None is one of its
      own.
    every_write: a token that writes n times has n of them.
  """

  per: str | int = 'head'
  rank: Callable[[int, int, int], int] | None = None
  inner: Callable[[jax.Array], jax.Array] | None = None
  reads: str | None = None
  every_write: bool = False

  def size(self, K: int, V: int) -> tuple[int, ...]:
    return _size(self.per, K, V)


@dataclasses.dataclass(frozen=True)
class Constant:
  """A parameter of a layer, shared by its memories.

  Attributes:
    per: as of `Gate`, or several of these.
    init: (key, shape, depth) -> its first value, float32; depth is the layer's
      number over that of all layers, from 0 up to 1.
    every_head: each head has its own; else one for all.
  """

  per: str | int | tuple[str | int, ...]
  init: Callable[[jax.Array, tuple[int, ...], jax.Array], jax.Array]
  every_head: bool = True

  def shape(self, H: int, K: int, V: int) -> tuple[int, ...]:
    per = self.per if isinstance(self.per, tuple) else (self.per,)
    sizes = tuple(n for p in per for n in _size(p, K, V))
    return (H, *sizes) if self.every_head else sizes


def _size(per, K, V):
  return (per,) if isinstance(per, int) else {
      'head': (), 'key': (K,), 'value': (V,)}[per]


def l2_normalise(x: Float[Array, '*R K']) -> Float[Array, '*R K']:
  """x / sqrt(sum x^2 + UNIT_EPS) over the last axis, in float32; x's dtype."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True) + UNIT_EPS)
  return y.astype(x.dtype)


Gates = Mapping[str, jax.Array]
Constants = Mapping[str, jax.Array]


class Operands(NamedTuple):
  """What `chunk_memory` takes, and what is added to its result.

  R rows, or R n where a token writes n times; what has one row a token is read
  at its last write (queries) or counts before its first (decays).
  """

  q_RHK: jax.Array
  k_RHK: jax.Array
  v_RHV: jax.Array
  log_decay: jax.Array | None = None  # [R, H] or [R, H, K], natural log, <= 0
  beta: jax.Array | None = None  # [R, H], None for an additive write
  erase_RHK: jax.Array | None = None  # in place of beta
  value_decay_RHV: jax.Array | None = None  # in place of log_decay
  skip_RHV: jax.Array | None = None  # past the memory


class Rows(NamedTuple):
  """What the rows bring; k, v and gates of every write are [R n, ...]."""

  q_RHK: jax.Array
  k_RHK: jax.Array
  v_RHV: jax.Array
  gates: Gates
  constants: Constants
  place_R: jax.Array  # rows of its document that its memory took before it


@dataclasses.dataclass(frozen=True)
class Rule:
  """A memory-update rule.

  Attributes:
    gates: by name; the value is x W before any activation, float32.
    constants: by name. Beside them `operands` finds 'depth', the layer's number
      over that of all layers.
    operands: maps (q, k, v, gates, constants) to `Operands`. q, k, v come after
      the short convolution, if there is one, gates and constants in float32.
    erases: a write first takes out what its key holds, so that a row costs
      three products with the state instead of two.
    scale: of the read; None is K^-0.5.
    silu: which of q, k and v go through SiLU after the short convolution.
    unit: which of q and k get unit length after that, head by head.
    one_write: a token writes once, `mixer.writes` above 1 is refused.
    rotary: q and k turn with their place among their memory's rows.
    read_before: a token reads before it decays or writes.
    past_norm: `Operands.skip_RHV` joins after the layer's norm.
    shift: token shift: what maps read is mixed with the row before it, by
      'learned' shares, or by shares that depend on 'data'; None is no shift.
    shares: first learned shares, (name of the map, D, depth) -> [D].
    first: name of a value gate r, if values move towards those that the token
      wrote in the first layer: v + sigmoid(r + first_bias) (v_first - v).
    stacked: parameters that all layers have together, by name.
    across: turns their values [L, ...] into what layers find in constants.
    state: (K, V) -> shape of a head's state.
    macs: (K, V) -> multiply-adds of a row and head with its state; None counts
      products with K x V.
    update: the whole, for rules that are no single pass of `chunk_memory`:
      (rule, rows, memory, state or None) -> (what rows read, last state).
  """

  gates: Mapping[str, Gate]
  constants: Mapping[str, Constant]
  operands: Callable[
      [jax.Array, jax.Array, jax.Array, Gates, Constants], Operands
  ] | None
  erases: bool = False
  scale: float | None = None
  silu: str = 'qkv'
  unit: str = ''
  one_write: bool = False
  rotary: bool = False
  read_before: bool = False
  past_norm: bool = False
  shift: str | None = None
  shares: Callable[[str, int, jax.Array], jax.Array] | None = None
  first: str | None = None
  stacked: Mapping[str, Constant] = dataclasses.field(default_factory=dict)
  across: Callable[[Constants], Constants] = lambda stacked: stacked
  state: Callable[[int, int], tuple[int, int]] = lambda K, V: (K, V)
  macs: Callable[[int, int], int] | None = None
  update: Callable[..., tuple[jax.Array, jax.Array]] = (
      lambda *args: one_pass(*args))

  def cost(self, K: int, V: int) -> int:
    """Multiply-adds of a row and head with its state."""
    return self.macs(K, V) if self.macs else (2 + self.erases) * K * V


def layer_values(
    rule: Rule, stacked: Constants, layers: int
) -> dict[str, jax.Array]:
  """'depth' and the rule's values across layers, [L, ...] each."""
  depth_L = jnp.arange(layers, dtype=jnp.float32) / layers
  return {'depth': depth_L, **rule.across(stacked)}


@dataclasses.dataclass(frozen=True)
class Memory:
  """`chunk_memory` over the groups of a layer's rows.

  Attributes:
    real_R: False on rows that are padding.
    continues_G: where rows are split over devices along time, whether a group's
      rows here go on with the document before, or there are none.
    how: what `chunk_memory` is told by keyword.
  """

  real_R: jax.Array
  group_N: jax.Array
  segment_R: jax.Array
  continues_G: jax.Array | None
  how: Mapping[str, Any]

  def __call__(
      self,
      made: Operands,
      state: jax.Array | None,
      scale: float | None = None,
      read_before: bool = False,
  ) -> tuple[jax.Array, jax.Array]:
    """What each token reads, and the last states."""
    n = len(made.k_RHK) // len(self.real_R)
    spread = lambda x: n > 1 and x is not None and len(x) == len(self.real_R)
    each = lambda x: jnp.repeat(x, n, axis=0) if spread(x) else x
    mask = lambda x, keep: None if x is None else jnp.where(
        keep.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
    real, place = each(self.real_R), jnp.arange(len(self.real_R) * n) % n
    first = lambda x: mask(each(x), real & (place == 0))
    q_RHK = made.q_RHK
    if n > 1:
      q_RHK = mask(each(q_RHK), place == (0 if read_before else n - 1))
    # Rows that are padding have no value, so their keys may stay.
    run = functools.partial(
        pallas.chunk_memory, group_N=jnp.repeat(self.group_N, n),
        segment_R=each(self.segment_R), **self.how)
    operands = (
        made.k_RHK, made.v_RHV, first(made.log_decay), mask(made.beta, real),
        mask(made.erase_RHK, real), first(made.value_decay_RHV))
    if self.continues_G is not None:
      state = context_parallel.initial_state(run, *operands, self.continues_G)
    *operands, erase_RHK, value_decay_RHV = operands
    o_RHV, state = run(
        q_RHK, *operands, erase_RHK=erase_RHK, value_decay_RHV=value_decay_RHV,
        initial_state_GHKV=state, scale=scale, read_before=read_before)
    return o_RHV[(0 if read_before else n - 1) :: n], state


def one_pass(
    rule: Rule, rows: Rows, memory: Memory, state: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """The update of rules that are one pass of `chunk_memory`."""
  q, k, v, gates, constants, _ = rows
  made = rule.operands(q, k, v, gates, constants)
  o_RHV, state = memory(made, state, rule.scale, rule.read_before)
  if made.skip_RHV is None:
    return o_RHV, state
  skip_RHV = made.skip_RHV.astype(o_RHV.dtype)
  if rule.past_norm:
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
    place: Int[Array, ' R'],
    group_N: jax.Array,
    segment_R: jax.Array,
    initial_state_GHKV: jax.Array | None = None,
    continues_G: jax.Array | None = None,
    made_unit: bool = False,
    **how: Any,
) -> tuple[Float[Array, 'R H X'], Float[Array, 'G H Y Z']]:
  """What each row reads and the last states.

  Args:
    k, v: n keys and values a row, written one after another; the memory decays
      before the first and is read after the last (arXiv 2502.10297).
    gates: as the rule names them; those of every write are [R, H, n, ...].
    constants: of the rule and, with 'depth', of its `across`.
    real: False on rows that are padding.
    place: rows of its document that its memory took before it.
    group_N, segment_R, initial_state_GHKV, how: as of `chunk_memory`; states
      have the shape that the rule names.
    continues_G: in place of an initial state, as of `Memory`.
    made_unit: what is to have unit length has it.
  Returns:
    (o, state): X is V, or 2 V where a rule adds something past the norm.
  """
  n = k.shape[2]
  write = lambda x: jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], *x.shape[3:])
  gates = {
      name: write(x) if rule.gates[name].every_write else x
      for name, x in gates.items()
  }
  k, v = write(k), write(v)
  if not made_unit:
    q, k = (l2_normalise(x) if name in rule.unit else x
            for name, x in (('q', q), ('k', k)))
  if rule.rotary:
    q = rotary.rotate(q, place, ROTARY_BASE)
    k = rotary.rotate(k, jnp.repeat(place, n), ROTARY_BASE)
  memory = Memory(real, group_N, segment_R, continues_G, how)
  rows = Rows(q, k, v, gates, constants, place)
  return rule.update(rule, rows, memory, initial_state_GHKV)

