"""Rules that erase what a key holds before they write there.

A row costs 6 K V operations a head with its state (look up, write, read). In
chunks of C rows the matrix units do 6 K V + 2 C (3 K + 2 V) + C^2 / 3 a row,
the last for the inverse of a C x C triangle; a decay per key channel keeps the
smallest blocks of the triangle off the matrix units. 4 K V bytes of state are
kept for C rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mom_jax.rules import gates as parts
from mom_jax.rules.rule import Gate, Operands, Rule

# delta: S_t = (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t, keys and
# queries of unit length (all of these), beta = sigmoid(x W) (arXiv 2406.06484).


def _delta(q_RHK, k_RHK, v_RHV, gates, constants):
  del constants
  return Operands(
      q_RHK, k_RHK, v_RHV, None, jax.nn.sigmoid(gates['beta']))


_BETA = Gate(every_write=True)

DELTA = Rule({'beta': _BETA}, {}, _delta, erases=True, unit='qk')

# gated_delta: S' = exp(g_t) S_{t-1};  u_t = beta_t (v_t - k_t S');
# S_t = S' + k_t^T u_t with g_t = -exp(A_log) softplus(x W + dt_bias)
# (arXiv 2412.06464; MoM's default, arXiv 2502.13685). A ~ U(0, 16); dt
# log-uniform in [1e-3, 0.1], dt_bias its inverse softplus.


def _gated_delta(q_RHK, k_RHK, v_RHV, gates, constants):
  made = _delta(q_RHK, k_RHK, v_RHV, gates, constants)
  return made._replace(log_decay=parts.log_decay(gates, constants))


GATED_DELTA = Rule(
    {'beta': _BETA, 'decay': Gate()}, parts.HEAD_DECAY, _gated_delta,
    erases=True, unit='qk',
)

# gated_delta_product: n delta updates a token, each with its own key, value and
# beta in (0, 2), after one decay: products of Householder matrices, so that a
# token can rotate the state (arXiv 2502.10297). n is config.model.mixer.writes.


def _gated_delta_product(q_RHK, k_RHK, v_RHV, gates, constants):
  made = _gated_delta(q_RHK, k_RHK, v_RHV, gates, constants)
  return made._replace(beta=2 * made.beta)


GATED_DELTA_PRODUCT = Rule(
    {'beta': _BETA, 'decay': Gate()}, parts.HEAD_DECAY, _gated_delta_product,
    erases=True, unit='qk',
)

# kda: gated_delta with a decay per key channel, g_t = -exp(A_log)
# softplus(x W_1 W_2 + dt_bias), W_1 of as many columns as a value has channels
# (Kimi Delta Attention, arXiv 2510.26692). A ~ U(1, 16).

_LOW_RANK = Gate('key', rank=lambda D, K, V: V)

KDA = Rule(
    {'beta': _BETA, 'decay': _LOW_RANK}, parts.KEY_DECAY, _gated_delta,
    erases=True, unit='qk',
)

# gated_delta_2: kda with the erasing and the writing strength apart, and per
# channel: u_t = w_t * v_t - (b_t * k_t) S' with b_t = sigmoid(x W_b) of the key
# channels and w_t = sigmoid(x W_w) of the value channels. Equal to kda where
# both are beta.


def _gated_delta_2(q_RHK, k_RHK, v_RHV, gates, constants):
  erase_RHK = jax.nn.sigmoid(gates['erase']) * k_RHK.astype(jnp.float32)
  v_RHV = (jax.nn.sigmoid(gates['write']) * v_RHV).astype(v_RHV.dtype)
  return Operands(
      q_RHK, k_RHK, v_RHV, parts.log_decay(gates, constants),
      erase_RHK=erase_RHK,
  )


GATED_DELTA_2 = Rule(
    {'erase': Gate('key', every_write=True),
     'write': Gate('value', every_write=True), 'decay': _LOW_RANK},
    parts.KEY_DECAY, _gated_delta_2, erases=True, unit='qk',
)
