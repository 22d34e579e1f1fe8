"""Memory-update rules as values.

A `Rule` says what a memory needs beside queries, keys and values: learnt
per-layer constants, per-token gates (linear maps of the layer's input), and how
all of that becomes the operands of `pallas.chunk_memory`. The module that uses
a rule makes the parameters; `run` takes them to what each row reads. A new rule
is one section here.

Shapes: R rows, H heads, K and V the sizes of a key and a value of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mom_jax import pallas

NORM_EPS = 1e-6  # inside the root of the l2 norm of queries and keys


class Operands(NamedTuple):
  """What `chunk_memory` takes, and what is added to its result."""

  q_RHK: jax.Array
  k_RHK: jax.Array
  v_RHV: jax.Array
  log_decay: jax.Array | None = None  # [R, H] or [R, H, K], natural log, <= 0
  beta: jax.Array | None = None  # [R, H], None for an additive write
  erase_RHK: jax.Array | None = None  # in place of beta
  skip_RHV: jax.Array | None = None  # past the memory


@dataclasses.dataclass(frozen=True)
class Gate:
  """A number for each token and head, or for each of a head's channels.

  Attributes:
    per: 'head', 'key' or 'value': shape [R, H], [R, H, K] or [R, H, V].
    rank: of its map, 0 for a full matrix; 'value' is the size of a value.
    every_write: a token that writes n times has n of them.
  """

  per: str = 'head'
  rank: int | str = 0
  every_write: bool = False

  def size(self, K: int, V: int) -> tuple[int, ...]:
    return _size(self.per, K, V)

  def inner(self, V: int) -> int:
    return V if self.rank == 'value' else int(self.rank)


@dataclasses.dataclass(frozen=True)
class Constant:
  """A parameter of a layer, shared by its memories.

  Attributes:
    per: as of `Gate`.
    init: (key, shape) -> its first value, float32.
  """

  per: str
  init: Callable[[jax.Array, tuple[int, ...]], jax.Array]

  def shape(self, H: int, K: int, V: int) -> tuple[int, ...]:
    return (H, *_size(self.per, K, V))


def _size(per, K, V):
  return {'head': (), 'key': (K,), 'value': (V,)}[per]


Gates = Mapping[str, jax.Array]
Constants = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Rule:
  """A memory-update rule.

  Attributes:
    gates: by name; the value is x W before any activation, float32.
    constants: by name.
    operands: maps (q, k, v, gates, constants) to `Operands`. q, k, v come after
      the short convolution, if there is one, gates and constants in float32.
    erases: a write first takes out what its key holds, so that a row costs three
      products with the state instead of two.
    scale: of the read; None is K^-0.5.
    silu: which of q, k and v go through SiLU after the short convolution.
  """

  gates: Mapping[str, Gate]
  constants: Mapping[str, Constant]
  operands: Callable[
      [jax.Array, jax.Array, jax.Array, Gates, Constants], Operands
  ]
  erases: bool = False
  scale: float | None = None
  silu: str = 'qkv'


def run(
    rule: Rule,
    q: Float[Array, 'R H K'],
    k: Float[Array, 'R H n K'],
    v: Float[Array, 'R H n V'],
    gates: Gates,
    constants: Constants,
    real: Bool[Array, ' R'],
    *,
    group_N: jax.Array,
    segment_R: jax.Array,
    **how: Any,
) -> tuple[Float[Array, 'R H V'], Float[Array, 'G H K V']]:
  """What each row reads and the last states, by `chunk_memory`.

  Args:
    k, v: n keys and values a row, written one after another; the memory decays
      before the first and is read after the last (arXiv 2502.10297).
    gates: as the rule names them; those of every write are [R, H, n, ...].
    real: False on rows that are padding.
    group_N, segment_R, how: as of `chunk_memory`.
  """
  n = k.shape[2]
  write = lambda x: jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], *x.shape[3:])
  each = lambda x: x if n == 1 else jnp.repeat(x, n, axis=0)
  gates = {
      name: write(x) if rule.gates[name].every_write else each(x)
      for name, x in gates.items()
  }
  made = rule.operands(each(q), write(k), write(v), gates, constants)
  place = jnp.arange(len(real) * n) % n
  mask = lambda x, keep: None if x is None else jnp.where(
      keep.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
  real = each(real)
  # Rows that are padding have no value, so their keys may stay.
  o_RHV, state_GHKV = pallas.chunk_memory(
      made.q_RHK if n == 1 else mask(made.q_RHK, place == n - 1),
      made.k_RHK, made.v_RHV, mask(made.log_decay, real & (place == 0)),
      mask(made.beta, real), erase_RHK=mask(made.erase_RHK, real),
      group_N=each(group_N), segment_R=each(segment_R), scale=rule.scale, **how,
  )
  if made.skip_RHV is not None:
    o_RHV += made.skip_RHV.astype(o_RHV.dtype)
  return o_RHV[n - 1 :: n], state_GHKV


def l2_normalise(x: Float[Array, '*R K']) -> Float[Array, '*R K']:
  """x / sqrt(sum x^2 + 1e-6) over the last axis, in float32, as x's dtype."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True) + NORM_EPS)
  return y.astype(x.dtype)


def _a_log(low):
  """log A with A ~ U(low, 16)."""
  return lambda key, shape: jnp.log(
      jax.random.uniform(key, shape, minval=low, maxval=16))


def _dt_bias(key, shape):
  """Inverse softplus of dt, log-uniform in [1e-3, 0.1]."""
  low, high = jnp.log(1e-3), jnp.log(0.1)
  dt = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
  dt = jnp.maximum(dt, 1e-4)
  return dt + jnp.log(-jnp.expm1(-dt))


def _zeros(key, shape):
  del key
  return jnp.zeros(shape, jnp.float32)


def _ones(key, shape):
  del key
  return jnp.ones(shape, jnp.float32)


def _log_decay(gates, constants):
  """-exp(A_log) softplus(x W + dt_bias); per head, or per key channel."""
  dt = jax.nn.softplus(gates['decay'] + constants['dt_bias'][None])
  a_H = jnp.exp(constants['A_log'])
  return -a_H.reshape(1, -1, *[1] * (dt.ndim - 2)) * dt


_HEAD_DECAY = {
    'A_log': Constant('head', _a_log(1e-4)),
    'dt_bias': Constant('head', _dt_bias),
}
_KEY_DECAY = {
    'A_log': Constant('head', _a_log(1.0)),
    'dt_bias': Constant('key', _dt_bias),
}

# linear: S_t = S_{t-1} + k_t^T v_t (arXiv 2006.16236, without normaliser).


def _linear(q_RHK, k_RHK, v_RHV, gates, constants):
  del gates, constants
  return Operands(q_RHK, k_RHK, v_RHV)


# retention: S_t = gamma_h S_{t-1} + k_t^T v_t, gamma_h = 1 - 2^(-5 - h) a
# constant of head h (arXiv 2307.08621, without its rotary embedding).


def _retention(q_RHK, k_RHK, v_RHV, gates, constants):
  del gates, constants
  R, H, _ = q_RHK.shape
  g_H = jnp.log1p(-jnp.exp2(-5.0 - jnp.arange(H)))
  return Operands(q_RHK, k_RHK, v_RHV, jnp.broadcast_to(g_H[None], (R, H)))


# decay: S_t = exp(g_t) S_{t-1} + k_t^T v_t with a scalar gate per head, as
# Mamba-2 and simple GLA; g_t as gated_delta's.


def _decay(q_RHK, k_RHK, v_RHV, gates, constants):
  return Operands(q_RHK, k_RHK, v_RHV, _log_decay(gates, constants))


# mamba2: S_t = exp(-exp(A_log) dt_t) S_{t-1} + k_t^T (dt_t v_t), read with
# scale 1, plus D v_t past the memory; dt_t = softplus(x W + dt_bias). The
# paper's C, B, x are q, k, v here, with as many B and C as heads (arXiv
# 2405.21060). A ~ U(1, 16), D = 1.


def _mamba2(q_RHK, k_RHK, v_RHV, gates, constants):
  dt_RH = jax.nn.softplus(gates['decay'] + constants['dt_bias'][None])
  wide_RHV = v_RHV.astype(jnp.float32)
  return Operands(
      q_RHK, k_RHK, (wide_RHV * dt_RH[..., None]).astype(v_RHV.dtype),
      _log_decay(gates, constants),
      skip_RHV=constants['D'][None, :, None] * wide_RHV,
  )


# gla: S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t with a decay per key channel,
# g_t = log sigmoid(x W_1 W_2 + bias) / 16, W_1 of 16 columns (arXiv
# 2312.06635).


def _gla(q_RHK, k_RHK, v_RHV, gates, constants):
  g_RHK = jax.nn.log_sigmoid(gates['decay'] + constants['bias'][None]) / 16
  return Operands(q_RHK, k_RHK, v_RHV, g_RHK)


# hgrn2: S_t = diag(f_t) S_{t-1} + (1 - f_t)^T v_t with f_t = sigmoid(x W_k), so
# that the key is the complement of the forget gate, and q_t = silu(x W_q)
# (arXiv 2404.07904, without a lower bound of f).


def _hgrn2(q_RHK, k_RHK, v_RHV, gates, constants):
  del gates, constants
  logit_RHK = k_RHK.astype(jnp.float32)
  return Operands(
      jax.nn.silu(q_RHK), jax.nn.sigmoid(-logit_RHK).astype(k_RHK.dtype), v_RHV,
      jax.nn.log_sigmoid(logit_RHK),
  )


# delta: S_t = (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t, keys and
# queries of unit length, beta = sigmoid(x W) (arXiv 2406.06484).


def _delta(q_RHK, k_RHK, v_RHV, gates, constants):
  del constants
  beta_RH = jax.nn.sigmoid(gates['beta'])
  return Operands(
      l2_normalise(q_RHK), l2_normalise(k_RHK), v_RHV, None, beta_RH
  )


# gated_delta: S' = exp(g_t) S_{t-1};  u_t = beta_t (v_t - k_t S');
# S_t = S' + k_t^T u_t with g_t = -exp(A_log) softplus(x W + dt_bias)
# (arXiv 2412.06464; MoM's default, arXiv 2502.13685). A ~ U(0, 16); dt
# log-uniform in [1e-3, 0.1], dt_bias its inverse softplus.


def _gated_delta(q_RHK, k_RHK, v_RHV, gates, constants):
  return Operands(
      l2_normalise(q_RHK),
      l2_normalise(k_RHK),
      v_RHV,
      _log_decay(gates, constants),
      jax.nn.sigmoid(gates['beta']),
  )


# gated_delta_product: n delta updates a token, each with its own key, value and
# beta in (0, 2), after one decay: products of Householder matrices, so that a
# token can rotate the state (arXiv 2502.10297). n is config.model.mixer.writes.


def _gated_delta_product(q_RHK, k_RHK, v_RHV, gates, constants):
  made = _gated_delta(q_RHK, k_RHK, v_RHV, gates, constants)
  return made._replace(beta=2 * made.beta)


# kda: gated_delta with a decay per key channel, g_t = -exp(A_log)
# softplus(x W_1 W_2 + dt_bias), W_1 of as many columns as a value has channels
# (Kimi Delta Attention, arXiv 2510.26692). A ~ U(1, 16).

_kda = _gated_delta

# gated_delta_2: kda with the erasing and the writing strength apart, and per
# channel: u_t = w_t * v_t - (b_t * k_t) S' with b_t = sigmoid(x W_b) of the key
# channels and w_t = sigmoid(x W_w) of the value channels. Equal to kda where
# both are beta.


def _gated_delta_2(q_RHK, k_RHK, v_RHV, gates, constants):
  k_RHK = l2_normalise(k_RHK)
  erase_RHK = jax.nn.sigmoid(gates['erase']) * k_RHK.astype(jnp.float32)
  v_RHV = (jax.nn.sigmoid(gates['write']) * v_RHV).astype(v_RHV.dtype)
  return Operands(
      l2_normalise(q_RHK), k_RHK, v_RHV, _log_decay(gates, constants),
      erase_RHK=erase_RHK,
  )


_BETA = Gate(every_write=True)
_LOW_RANK = Gate('key', rank='value')

RULES = {
    'linear': Rule({}, {}, _linear),
    'retention': Rule({}, {}, _retention),
    'decay': Rule({'decay': Gate()}, _HEAD_DECAY, _decay),
    'mamba2': Rule(
        {'decay': Gate()},
        _HEAD_DECAY | {'A_log': _KEY_DECAY['A_log'], 'D': Constant(
            'head', _ones)},
        _mamba2, scale=1.0),
    'gla': Rule(
        {'decay': Gate('key', rank=16)}, {'bias': Constant('key', _zeros)},
        _gla),
    'hgrn2': Rule({}, {}, _hgrn2, silu=''),
    'delta': Rule({'beta': _BETA}, {}, _delta, erases=True),
    'gated_delta': Rule(
        {'beta': _BETA, 'decay': Gate()}, _HEAD_DECAY, _gated_delta,
        erases=True),
    'gated_delta_product': Rule(
        {'beta': _BETA, 'decay': Gate()}, _HEAD_DECAY, _gated_delta_product,
        erases=True),
    'kda': Rule(
        {'beta': _BETA, 'decay': _LOW_RANK}, _KEY_DECAY, _kda, erases=True),
    'gated_delta_2': Rule(
        {'erase': Gate('key', every_write=True),
         'write': Gate('value', every_write=True), 'decay': _LOW_RANK},
        _KEY_DECAY, _gated_delta_2, erases=True),
}


def get(name: str) -> Rule:
  """The rule of that name.

  Raises:
    ValueError: there is none; lists the known ones.
  """
  if name not in RULES:
    raise ValueError(
        f'config.model.mixer.rule={name!r} must be one of'
        f' {", ".join(sorted(RULES))}.'
    )
  return RULES[name]
