"""Definitions of the layers, token by token in float32.

They say what a layer computes, and are slow: every expert runs on every token.
The layers equal them in outputs and gradients.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np


def moma_ref(
    params: dict[str, Any],
    x_BTD: Float[Array, 'B T D'],
    modality_BT: Int[Array, 'B T'],
    *,
    experts: tuple[int, ...],
    router: str,
    top_k: int = 1,
    capacity: float = 1.0,
    pool: str = 'sequence',
    state_E: Float[Array, 'E'] | None = None,
) -> tuple[Float[Array, 'B T D'], Bool[Array, 'B T E']]:
  """Mixture of modality-aware experts.

    y_t = sum_e g_te SwiGLU_e(x_t)  over the experts e of the token's modality

  Args:
    params: of `Moma`.
    modality_BT: modality of each token; -1 is padding, whose output is 0.
    experts, router, top_k, capacity, pool: as of `Moma`.
    state_E: balance bias or thresholds of a router that has some.
  Returns:
    (y, whether expert e takes token t).
  Source: arXiv 2407.21770, eq. 1, sections 2.2 and 2.4.
  """
  # Level 1: the modality of a token says which experts it may use.
  modality_E = np.repeat(np.arange(len(experts)), experts)
  valid_BT = modality_BT >= 0
  if len(experts) == 1:  # one group for all modalities
    modality_BT = jnp.where(valid_BT, 0, -1)
  allowed_BTE = modality_BT[..., None] == modality_E[None, None]
  selected_BTE, gate_BTE = allowed_BTE, allowed_BTE.astype(jnp.float32)
  if max(experts) > 1:
    # Level 2: scores of these experts, s = sigmoid(x W_g), and a choice.
    logits_BTE = x_BTD @ params['router']['kernel']
    scores_BTE = _scores(router, logits_BTE, allowed_BTE)
    if router in ('expert_choice', 'expert_choice_oracle'):
      selected_BTE = _by_experts(
          scores_BTE, allowed_BTE, capacity, pool, experts)
    elif router == 'aux_causal':
      selected_BTE = allowed_BTE & (_predicted(params, x_BTD, modality_E) > 0.5)
    elif router == 'threshold':
      selected_BTE = allowed_BTE & (scores_BTE > state_E[None, None])
    else:
      selected_BTE = _by_tokens(scores_BTE, allowed_BTE, top_k, state_E)
    # g = s of those that take the token.
    gate_BTE = jnp.where(selected_BTE, scores_BTE, 0)
    if router in ('softmax_topk', 'softmax_topk_bias', 'sigmoid_topk'):
      gate_BTE = _normalise(gate_BTE)

  def token(x_D, gate_E):  # eq. 1
    return sum(gate_E[e] * _swiglu(x_D, params['gate_up'][e], params['down'][e])
               for e in range(len(gate_E)))

  y_BTD = jax.vmap(jax.vmap(token))(x_BTD, gate_BTE)
  if 'shared_down' in params:
    shared_BTD = _swiglu(
        x_BTD, params['shared_gate_up']['kernel'],
        params['shared_down']['kernel'])
    y_BTD += jnp.where(valid_BT[..., None], shared_BTD, 0)
  return y_BTD, selected_BTE


def _swiglu(x, gate_up_D2F, down_FD):
  gate, up = x @ gate_up_D2F[:, 0], x @ gate_up_D2F[:, 1]
  return (jax.nn.silu(gate) * up) @ down_FD


def _scores(router, logits_BTE, allowed_BTE):
  """Sigmoid; or softmax over the experts that a token may use."""
  if router.startswith('softmax'):
    return _normalise(jnp.where(allowed_BTE, jnp.exp(logits_BTE), 0))
  return jnp.where(allowed_BTE, jax.nn.sigmoid(logits_BTE), 0)


def _normalise(x_BTE):
  total_BT1 = x_BTE.sum(-1, keepdims=True)
  return x_BTE / jnp.where(total_BT1 > 0, total_BT1, 1)


def _by_tokens(scores_BTE, allowed_BTE, top_k, bias_E):
  """Each token takes its k best experts, by score plus balance bias."""
  if bias_E is not None:
    scores_BTE += bias_E[None, None]
  rank_BTE = _rank(jnp.where(allowed_BTE, scores_BTE, -jnp.inf), -1)
  return allowed_BTE & (rank_BTE < top_k)


def _by_experts(scores_BTE, allowed_BTE, capacity, pool, experts):
  """Each expert takes its k best tokens of every pool.

    k = ceil(c b / E_group) of the b tokens that may use it, at least 1, at
    most b
  """
  pools = len(scores_BTE) if pool == 'sequence' else 1
  split = lambda x_BTE: x_BTE.reshape(pools, -1, x_BTE.shape[-1])
  scores_PNE, allowed_PNE = split(scores_BTE), split(allowed_BTE)
  group_size_E = np.repeat(experts, experts)
  tokens_PE = allowed_PNE.sum(1)
  # A thousandth of a token: 1.1 x 10 tokens are 11, though 1.1 is inexact.
  k_PE = jnp.ceil(capacity * tokens_PE / group_size_E[None] - 1e-3)
  k_PE = jnp.minimum(jnp.maximum(k_PE, 1), tokens_PE)
  rank_PNE = _rank(jnp.where(allowed_PNE, scores_PNE, -jnp.inf), 1)
  return (allowed_PNE & (rank_PNE < k_PE[:, None])).reshape(allowed_BTE.shape)


def _predicted(params, x_BTD, modality_E):
  """Auxiliary routers: sigmoid(silu(x W_1) W_2), W_1 that of the modality."""
  hidden_EDF = params['auxiliary']['hidden']['kernel'][modality_E]
  h_BTEF = jax.nn.silu(jnp.einsum('btd,edf->btef', x_BTD, hidden_EDF))
  return jax.nn.sigmoid(jnp.einsum(
      'btef,fe->bte', h_BTEF, params['auxiliary']['output']))


def _rank(x, axis):
  """0 for the largest along an axis; of equals the first comes first."""
  return jnp.argsort(jnp.argsort(-x, axis, stable=True), axis)
