"""Token choice: each token picks its top k experts or memories.

All of these routers are causal. Experts are ranked by logit, and weights that
add up to 1 are a softmax of log-probabilities: probabilities of large logits
are equal, and those of small ones 0, in float32. Ties go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from mom_jax.routing.assignment import (
    Assignment,
    RouterInputs,
    RouterSettings,
    pick,
    token_major,
)


def softmax_topk(inputs: RouterInputs, settings: RouterSettings) -> Assignment:
  """The router of Mixture-of-Memories: softmax, top-k, renormalise.

    p = softmax(logits);  w_j = p_j / sum of the k largest p

  Gradients flow through the weights of the selected experts only: renormalised,
  they compete with each other; with k = 1 the weight is 1 and has no gradient.

  Source: arXiv 2502.13685, eq. 3 and 4.
  """
  return _take_top_k(
      inputs.logits_BTE, _softmax(inputs), inputs, settings, log_softmax)


def softmax_topk_raw(
    inputs: RouterInputs, settings: RouterSettings
) -> Assignment:
  """`softmax_topk` without renormalising: w_j = p_j.

  The weights sum to less than 1. By the softmax the selected experts compete
  with the others too, so that a router with k = 1 learns.

  Source: arXiv 2101.03961, eq. 1 and 2, for k experts.
  """
  return _take_top_k(
      inputs.logits_BTE, _softmax(inputs), inputs, settings)


def softmax_topk_bias(
    inputs: RouterInputs, settings: RouterSettings
) -> Assignment:
  """`softmax_topk` by p + bias, balanced without a loss.

  The bias (none without state) changes the selection only, not the weights, and
  needs no balance loss, whose gradient would disturb the router. It comes from
  past steps. Gradients are those of `softmax_topk`.

  Source: arXiv 2408.15664, algorithm 1.
  """
  probs_BTE = _softmax(inputs)
  return _take_top_k(
      _biased(probs_BTE, inputs), probs_BTE, inputs, settings, log_softmax)


def sigmoid_topk(inputs: RouterInputs, settings: RouterSettings) -> Assignment:
  """Top-k by sigmoid, renormalised.

    s = sigmoid(logits);  w_j = s_j / sum of the k largest s

  Gradients flow through the weights of the selected experts only: renormalised,
  they compete with each other, and each saturates with its logit; with k = 1
  the weight is 1 and has no gradient.

  Source: arXiv 2412.19437, eq. 13 to 15, without its bias.
  """
  return _take_top_k(
      inputs.logits_BTE, _sigmoid(inputs), inputs, settings,
      jax.nn.log_sigmoid)


def token_choice(inputs: RouterInputs, settings: RouterSettings) -> Assignment:
  """Top-k by sigmoid plus a balance bias, weighted by the sigmoid alone.

    s = sigmoid(logits);  take the k largest of s + bias;  w_j = s_j

  The bias (none without state) changes the selection only; it comes from past
  steps. Each selected pair of token and expert has its own gradient; pairs do
  not compete.

  Source: the sigmoid of arXiv 2407.21770, the balance of arXiv 2408.15664.
  """
  probs_BTE = _sigmoid(inputs)
  return _take_top_k(_biased(probs_BTE, inputs), probs_BTE, inputs, settings)


def update_bias(
    inputs: RouterInputs,
    selected_BTE: Bool[Array, 'B T E'],
    settings: RouterSettings,
) -> Float[Array, ' E']:
  """Raise biases of experts below their modality's mean load, lower others.

    b_e += rate * sign(mean load of its modality - load_e)

  Steps are centred within each modality: a common shift does not change the
  selection, but without centring the biases would drift.

  Source: arXiv 2408.15664, algorithm 1, per modality; the centring is ours.
  """
  load_E = selected_BTE.sum((0, 1)).astype(jnp.float32)
  step_E = jnp.sign(_modality_mean(load_E, settings.experts) - load_E)
  return inputs.state_E + settings.update_rate * (
      step_E - _modality_mean(step_E, settings.experts))


def _softmax(inputs: RouterInputs) -> jax.Array:
  lowest = jnp.finfo(jnp.float32).min
  probs_BTE = jax.nn.softmax(
      jnp.where(inputs.allowed_BTE, inputs.logits_BTE, lowest))
  return jnp.where(inputs.allowed_BTE, probs_BTE, 0)


def _sigmoid(inputs: RouterInputs) -> jax.Array:
  return jnp.where(inputs.allowed_BTE, jax.nn.sigmoid(inputs.logits_BTE), 0)


def log_softmax(logits: Float[Array, '*S E']) -> Float[Array, '*S E']:
  """Return the logits: log-probabilities up to a constant of the token."""
  return logits


def normalised_weights(
    log_probs: Float[Array, '*S E'], selected: Bool[Array, '*S E']
) -> Float[Array, '*S E']:
  """Return w_j = p_j / sum of the selected p; 0 where not selected.

  Args:
    log_probs: log p, up to a constant of the token.
  """
  lowest = jnp.finfo(jnp.float32).min
  top = jnp.where(selected, log_probs, lowest).max(-1, keepdims=True)
  top = jax.lax.stop_gradient(top)
  p = jnp.where(
      selected, jnp.exp(jnp.where(selected, log_probs - top, 0)), 0)
  total = p.sum(-1, keepdims=True)
  return p / jnp.where(selected.any(-1, keepdims=True), total, 1)


def _biased(probs_BTE: jax.Array, inputs: RouterInputs) -> jax.Array:
  if inputs.state_E is None:
    return inputs.logits_BTE
  return probs_BTE + inputs.state_E[None, None]


def _take_top_k(
    score_BTE: Float[Array, 'B T E'],
    probs_BTE: Float[Array, 'B T E'],
    inputs: RouterInputs,
    settings: RouterSettings,
    log_probs: Callable[[jax.Array], jax.Array] | None = None,
) -> Assignment:
  """Select the k best experts of each token by score, then logit.

  Args:
    log_probs: logits -> log-probabilities, from which weights are that add up
      to 1; None takes the probabilities as weights.
  """
  expert_NA, taken_NA = _top_k(score_BTE, inputs, settings.top_k)
  if log_probs is None:
    weight_NA = jnp.where(taken_NA, pick(probs_BTE, expert_NA), 0)
  else:
    weight_NA = normalised_weights(
        log_probs(pick(inputs.logits_BTE, expert_NA)), taken_NA)
  return token_major(expert_NA, taken_NA, weight_NA, probs_BTE)


def _top_k(
    score_BTE: Float[Array, 'B T E'], inputs: RouterInputs, k: int
) -> tuple[Int[Array, 'N A'], Bool[Array, 'N A']]:
  """Return (the k best allowed experts, whether each exists)."""
  E = score_BTE.shape[-1]
  allowed_NE = inputs.allowed_BTE.reshape(-1, E)
  ranked = lambda x_BTE: jax.lax.stop_gradient(
      jnp.where(allowed_NE, x_BTE.reshape(-1, E), -jnp.inf))
  if score_BTE is inputs.logits_BTE:
    _, expert_NA = jax.lax.top_k(ranked(score_BTE), k)
  else:
    index_NE = jax.lax.broadcasted_iota(jnp.int32, allowed_NE.shape, 1)
    *_, expert_NE = jax.lax.sort(
        (-ranked(score_BTE), -ranked(inputs.logits_BTE), index_NE), num_keys=3)
    expert_NA = expert_NE[:, :k]
  taken_NA = jnp.arange(k)[None] < allowed_NE.sum(-1, keepdims=True)
  return expert_NA, taken_NA


def _modality_mean(x_E, experts):
  """Return, for each expert, the mean of x over those of its modality."""
  ends = np.cumsum(experts or x_E.shape)[:-1]
  return jnp.concatenate(
      [jnp.full_like(x_e, x_e.mean()) for x_e in jnp.split(x_E, ends)]
  )
