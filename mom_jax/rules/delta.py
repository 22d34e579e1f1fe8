"""Delta rules: an update first removes the value stored under its key.

A row costs 6 K V operations per head with its state (look-up, update, output).
In chunks of C rows the matrix units do 6 K V + 2 C (3 K + 2 V) + C^2 / 3 per
row, the last term for the inverse of a C x C triangle; with a decay per key
channel the smallest blocks of the triangle stay off the matrix units. 4 K V
bytes of state are kept for C rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mom_jax.rules import decay
from mom_jax.rules.rule import Gate, Operands, Rule

# delta: S_t = (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t, keys and
# queries l2-normalised (as in all of these), beta = sigmoid(x W) (arXiv
# 2406.06484).


def _delta(q_RHK, k_RHK, v_RHV, gates, constants):
  del constants
  return Operands(
      q_RHK, k_RHK, v_RHV, None, jax.nn.sigmoid(gates['beta']))


_BETA = Gate(per_update=True)

DELTA = Rule({'beta': _BETA}, {}, _delta, removes=True, l2_normalised='qk')

# gated_delta: S' = exp(g_t) S_{t-1};  u_t = beta_t (v_t - k_t S');
# S_t = S' + k_t^T u_t with g_t = -exp(A_log) softplus(x W + dt_bias)
# (arXiv 2412.06464; MoM's default, arXiv 2502.13685). A ~ U(0, 16); dt
# log-uniform in [1e-3, 0.1], dt_bias its inverse softplus.


def _gated_delta(q_RHK, k_RHK, v_RHV, gates, constants):
  operands = _delta(q_RHK, k_RHK, v_RHV, gates, constants)
  return operands._replace(log_decay=decay.log_decay(gates, constants))


GATED_DELTA = Rule(
    {'beta': _BETA, 'decay': Gate()}, decay.PER_HEAD, _gated_delta,
    removes=True, l2_normalised='qk',
)

# gated_delta_product: n delta updates per token, each with its own key, value
# and beta in (0, 2), after one decay: products of Householder matrices, so that
# a token can rotate the state (arXiv 2502.10297). n is
# config.model.mixer.num_householder.


def _gated_delta_product(q_RHK, k_RHK, v_RHV, gates, constants):
  operands = _gated_delta(q_RHK, k_RHK, v_RHV, gates, constants)
  return operands._replace(beta=2 * operands.beta)


GATED_DELTA_PRODUCT = Rule(
    {'beta': _BETA, 'decay': Gate()}, decay.PER_HEAD, _gated_delta_product,
    removes=True, l2_normalised='qk',
)

# kda: gated_delta with a decay per key channel, g_t = -exp(A_log)
# softplus(x W_1 W_2 + dt_bias), W_1 of rank V (Kimi Delta Attention, arXiv
# 2510.26692). A ~ U(1, 16).

_LOW_RANK = Gate('key', rank=lambda D, K, V: V)

KDA = Rule(
    {'beta': _BETA, 'decay': _LOW_RANK}, decay.PER_KEY, _gated_delta,
    removes=True, l2_normalised='qk',
)

# gated_delta_2: kda with separate gates for removal and writing, per channel:
# u_t = w_t * v_t - (b_t * k_t) S' with b_t = sigmoid(x W_b) of the key
# channels and w_t = sigmoid(x W_w) of the value channels. Equal to kda where
# both are beta.


def _gated_delta_2(q_RHK, k_RHK, v_RHV, gates, constants):
  removal_key_RHK = jax.nn.sigmoid(gates['erase']) * k_RHK.astype(jnp.float32)
  v_RHV = (jax.nn.sigmoid(gates['write']) * v_RHV).astype(v_RHV.dtype)
  return Operands(
      q_RHK, k_RHK, v_RHV, decay.log_decay(gates, constants),
      removal_key_RHK=removal_key_RHK,
  )


GATED_DELTA_2 = Rule(
    {'erase': Gate('key', per_update=True),
     'write': Gate('value', per_update=True), 'decay': _LOW_RANK},
    decay.PER_KEY, _gated_delta_2, removes=True, l2_normalised='qk',
)
