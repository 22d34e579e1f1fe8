"""Memory in slots, in two passes: keys of the slots, then their values.

A row costs 4 m (K + V) operations per head with its state of m slots, in two
calls of `chunk_memory`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mom_jax.rules.rule import Gate, Operands, Rule

SLOTS = 64

# gsa: A_t = A_{t-1} diag(f_t) + k_t^T (1 - f_t);  B_t = diag(f_t) B_{t-1} +
# (1 - f_t)^T v_t;  o_t = softmax(q_t A_t) B_t with log f_t = log sigmoid(x W) /
# 8 over 64 slots, q, k and v through SiLU, scale 1 (Gated Slot Attention,
# arXiv 2409.07146, eq. 6 to 8). A state is A on top of B^T: K + V rows of
# slots.


def _gsa(rule, inputs, memory, state_GHXM):
  del rule
  q_RHK, k_RHK, v_RHV = map(
      jax.nn.silu, (inputs.q_RHK, inputs.k_RHK, inputs.v_RHV))
  g_RHM = jax.nn.log_sigmoid(inputs.gates['forget']) / 8
  s_RHM = jnp.where(memory.real_R[:, None, None], -jnp.expm1(g_RHM), 0)
  s_RHM = s_RHM.astype(v_RHV.dtype)
  K = k_RHK.shape[-1]
  keys_GHKM = values_GHMV = None
  if state_GHXM is not None:
    keys_GHKM = state_GHXM[:, :, :K]
    values_GHMV = state_GHXM[:, :, K:].swapaxes(2, 3)
  score_RHM, keys_GHKM = memory(
      Operands(q_RHK, k_RHK, s_RHM, value_decay_RHV=g_RHM), keys_GHKM, 1.0)
  attention_RHM = jax.nn.softmax(score_RHM.astype(jnp.float32))
  o_RHV, values_GHMV = memory(
      Operands(attention_RHM.astype(q_RHK.dtype), s_RHM, v_RHV, g_RHM),
      values_GHMV, 1.0)
  return o_RHV, jnp.concatenate([keys_GHKM, values_GHMV.swapaxes(2, 3)], 2)


GSA = Rule(
    {'forget': Gate(SLOTS)}, {}, None, silu='', single_update=True,
    state_shape=lambda K, V: (K + V, SLOTS),
    macs=lambda K, V: 2 * SLOTS * (K + V),
    update=_gsa,
)
