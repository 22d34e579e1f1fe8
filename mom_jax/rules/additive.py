"""Rules that add k^T v to a decaying state.

A row costs 4 K V operations per head with its state (update and output); a
decay per key channel adds K V. In chunks of C rows the matrix units do 4 K V +
2 C (K + V) per row, and 4 K V bytes of state are kept for C rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mom_jax.rules import decay, initializers
from mom_jax.rules.rule import Constant, Gate, Operands, Rule

# linear: S_t = S_{t-1} + k_t^T v_t (arXiv 2006.16236). Feature maps and the
# normaliser are settings: `features`.


def _linear(q_RHK, k_RHK, v_RHV, gates, constants):
  del gates, constants
  return Operands(q_RHK, k_RHK, v_RHV)


LINEAR = Rule({}, {}, _linear)

# retention: S_t = gamma_h S_{t-1} + k_t^T v_t, gamma_h = 1 - 2^(-5 - h) a
# constant of head h, with rotary queries and keys (arXiv 2307.08621, eq. 6 and
# 8; positions count the rows of the memory).


def _retention(q_RHK, k_RHK, v_RHV, gates, constants):
  del gates, constants
  R, H, _ = q_RHK.shape
  g_H = jnp.log1p(-jnp.exp2(-5.0 - jnp.arange(H)))
  return Operands(q_RHK, k_RHK, v_RHV, jnp.broadcast_to(g_H[None], (R, H)))


RETENTION = Rule({}, {}, _retention, rotary=True)

# lightning: S_t = gamma_hl S_{t-1} + k_t^T v_t with log gamma = -8 h / H
# (1 - l / L) a constant of head h of H in layer l of L, q, k and v through SiLU
# (Lightning Attention-2, arXiv 2401.04658; slopes as in TransNormer, arXiv
# 2307.14995, eq. 3, and MiniMax-01, arXiv 2501.08313).


def _lightning(q_RHK, k_RHK, v_RHV, gates, constants):
  del gates
  R, H, _ = q_RHK.shape
  slope_H = 8 / H * jnp.arange(H, dtype=jnp.float32)
  g_H = -slope_H * (1 - constants['layer_fraction'])
  return Operands(
      *map(jax.nn.silu, (q_RHK, k_RHK, v_RHV)),
      jnp.broadcast_to(g_H[None], (R, H)))


LIGHTNING = Rule({}, {}, _lightning, silu='')

# decay: S_t = exp(g_t) S_{t-1} + k_t^T v_t with a scalar gate per head, as
# in Mamba-2 and simple GLA; g_t as in gated_delta.


def _decay(q_RHK, k_RHK, v_RHV, gates, constants):
  return Operands(q_RHK, k_RHK, v_RHV, decay.log_decay(gates, constants))


DECAY = Rule({'decay': Gate()}, decay.PER_HEAD, _decay)

# mamba2: S_t = exp(-exp(A_log) dt_t) S_{t-1} + k_t^T (dt_t v_t), with
# scale 1 and a skip D v_t around the memory; dt_t = softplus(x W + dt_bias).
# The paper's C, B, x are q, k, v here; in published models all heads share B
# and C, which is mixer.key_heads=1 (arXiv 2405.21060). A ~ U(1, 16), D = 1.


def _mamba2(q_RHK, k_RHK, v_RHV, gates, constants):
  dt_RH = jax.nn.softplus(gates['decay'] + constants['dt_bias'][None])
  wide_RHV = v_RHV.astype(jnp.float32)
  return Operands(
      q_RHK, k_RHK, (wide_RHV * dt_RH[..., None]).astype(v_RHV.dtype),
      decay.log_decay(gates, constants),
      skip_RHV=constants['D'][None, :, None] * wide_RHV,
  )


MAMBA2 = Rule(
    {'decay': Gate()},
    decay.PER_HEAD | {
        'A_log': decay.PER_KEY['A_log'],
        'D': Constant('head', initializers.full(1.0))},
    _mamba2, scale=1.0, single_update=True,
)

# gla: S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t with a decay per key channel,
# g_t = log sigmoid(x W_1 W_2 + bias) / 16, W_1 of rank 16 (arXiv 2312.06635).


def _gla(q_RHK, k_RHK, v_RHV, gates, constants):
  g_RHK = jax.nn.log_sigmoid(gates['decay'] + constants['bias'][None]) / 16
  return Operands(q_RHK, k_RHK, v_RHV, g_RHK)


GLA = Rule(
    {'decay': Gate('key', rank=lambda D, K, V: 16)},
    {'bias': Constant('key', initializers.full(0.0))}, _gla,
)

# hgrn2: S_t = diag(f_t) S_{t-1} + (1 - f_t)^T v_t with f_t = b + (1 - b)
# sigmoid(x W_k), so that the key is the complement of the forget gate, and
# q_t = silu(x W_q). The lower bounds b_l of the layers rise from 0 in the
# first: b_l = sum_{0 < i <= l} softmax(bounds)_i over the layers, for each head
# and key channel (arXiv 2404.07904, eq. 5 and 6).


def _hgrn2(q_RHK, k_RHK, v_RHV, gates, constants):
  del gates
  logit_RHK = k_RHK.astype(jnp.float32)
  bound_1HK = constants['bound'][None]
  key_RHK = (1 - bound_1HK) * jax.nn.sigmoid(-logit_RHK)  # 1 - f
  forget_RHK = jax.nn.sigmoid(logit_RHK) + bound_1HK * jax.nn.sigmoid(
      -logit_RHK)
  # log f, without rounding near f = 1 and, where b = 0, near f = 0.
  small = jnp.finfo(jnp.float32).tiny
  g_RHK = jnp.where(
      key_RHK < 0.5, jnp.log1p(-jnp.minimum(key_RHK, 0.5)),
      jnp.where(bound_1HK > 0, jnp.log(jnp.maximum(forget_RHK, small)),
                jax.nn.log_sigmoid(logit_RHK)))
  return Operands(
      jax.nn.silu(q_RHK), key_RHK.astype(k_RHK.dtype), v_RHV, g_RHK)


def _lower_bounds(cross_layer):
  fraction_LHK = jax.nn.softmax(cross_layer['bound'], 0)
  return {'bound': jnp.cumsum(fraction_LHK, 0) - fraction_LHK[:1]}


HGRN2 = Rule(
    {}, {}, _hgrn2, silu='', single_update=True,
    cross_layer={'bound': Constant('key', initializers.full(0.0))},
    per_layer=_lower_bounds,
)
