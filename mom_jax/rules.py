"""Memory-update rules as values.

A `Rule` says what a memory needs beside queries, keys and values: learnt
per-layer constants, per-token gates (each a linear map of the layer's input),
and how all of that becomes the operands of `pallas.chunk_memory`. The module
that uses a rule makes the parameters. A new rule is one section here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NORM_EPS = 1e-6  # inside the root of the l2 norm of queries and keys


class Operands(NamedTuple):
  """What `chunk_memory` takes; R rows, H heads."""

  q_RHK: jax.Array
  k_RHK: jax.Array
  v_RHV: jax.Array
  log_decay: jax.Array | None  # [R, H] or [R, H, K], natural log, <= 0
  beta: jax.Array | None  # [R, H], None for an additive write


Gates = Mapping[str, jax.Array]
Constants = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Rule:
  """A memory-update rule.

  Attributes:
    gates: names of the per-token, per-head gates; each is x W before any
      activation, shape [R, H].
    constants: name to initialiser(key, num_heads) of per-head constants.
    operands: maps (q, k, v, gates, constants) to `Operands`. q, k, v come after
      the short convolution and its SiLU, gates and constants in float32.
  """

  gates: tuple[str, ...]
  constants: Mapping[str, Callable[[jax.Array, int], jax.Array]]
  operands: Callable[
      [jax.Array, jax.Array, jax.Array, Gates, Constants], Operands
  ]


def l2_normalise(x: Float[Array, '*R K']) -> Float[Array, '*R K']:
  """x / sqrt(sum x^2 + 1e-6) over the last axis, in float32, as x's dtype."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True) + NORM_EPS)
  return y.astype(x.dtype)


# linear: S_t = S_{t-1} + k_t^T v_t (arXiv 2006.16236, without normaliser).


def _linear(q_RHK, k_RHK, v_RHV, gates, constants):
  del gates, constants
  return Operands(q_RHK, k_RHK, v_RHV, None, None)


# decay: S_t = exp(g_t) S_{t-1} + k_t^T v_t with a scalar gate per head, as
# Mamba-2 and simple GLA; g_t as gated_delta's.


def _decay(q_RHK, k_RHK, v_RHV, gates, constants):
  return Operands(q_RHK, k_RHK, v_RHV, _log_decay(gates, constants), None)


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


def _a_log(key, num_heads):
  return jnp.log(jax.random.uniform(key, (num_heads,), minval=1e-4, maxval=16))


def _dt_bias(key, num_heads):
  low, high = jnp.log(1e-3), jnp.log(0.1)
  dt = jnp.exp(jax.random.uniform(key, (num_heads,), minval=low, maxval=high))
  dt = jnp.maximum(dt, 1e-4)
  return dt + jnp.log(-jnp.expm1(-dt))


def _log_decay(gates, constants):
  step_RH = jax.nn.softplus(gates['decay'] + constants['dt_bias'][None])
  return -jnp.exp(constants['A_log'])[None] * step_RH


def _gated_delta(q_RHK, k_RHK, v_RHV, gates, constants):
  return Operands(
      l2_normalise(q_RHK),
      l2_normalise(k_RHK),
      v_RHV,
      _log_decay(gates, constants),
      jax.nn.sigmoid(gates['beta']),
  )


_DECAY_CONSTANTS = {'A_log': _a_log, 'dt_bias': _dt_bias}

RULES = {
    'linear': Rule((), {}, _linear),
    'decay': Rule(('decay',), _DECAY_CONSTANTS, _decay),
    'delta': Rule(('beta',), {}, _delta),
    'gated_delta': Rule(('beta', 'decay'), _DECAY_CONSTANTS, _gated_delta),
}


def get(name: str) -> Rule:
  """The rule of that name.

  Raises:
    ValueError: there is none; lists the known ones.
  """
  if name not in RULES:
    raise ValueError(
        f'unknown rule {name!r}; known: {", ".join(sorted(RULES))}.'
    )
  return RULES[name]
