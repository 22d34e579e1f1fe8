"""Token choice: each token picks its experts or memories.

A router is `(scores_BTE raw logits, allowed_BTE, state_E or None, *, top_k,
capacity, pool, groups) -> Assignment`, see `routing`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np


class Assignment(NamedTuple):
  """Row r of R: token `row_R` goes to group `group_R` with weight `weight_R`.

  Attributes:
    row_R: index into the flattened [B * T] tokens.
    group_R: expert in [0, E), or -1 for a row that no expert takes.
    weight_R: factor of the expert's output, float32, 0 where group is -1.
    aux: 'selected_BTE', bool, and 'probs_BTE', the scores after softmax or
      sigmoid, 0 where not allowed, float32.
    choices: A where row_R = repeat(arange(B * T), A), else None.
  """

  row_R: Int[Array, 'R']
  group_R: Int[Array, 'R']
  weight_R: Float[Array, 'R']
  aux: dict[str, jax.Array]
  choices: int | None


def softmax_topk(
    scores_BTE: Float[Array, 'B T E'],
    allowed_BTE: Bool[Array, 'B T E'],
    state_E: Float[Array, 'E'] | None,
    *,
    top_k: int,
    capacity: float,
    pool: str,
    groups: tuple[int, ...] | None = None,
) -> Assignment:
  """The router of Mixture-of-Memories: softmax, top-k, renormalise.

    p = softmax(scores);  w_j = p_j / sum of the k largest p

  Ties go to the lowest index. The gradient moves the taken ones against each
  other; with k = 1 the weight is 1 and carries none. Causal.

  Source: arXiv 2502.13685, eq. 3 and 4.
  """
  del state_E, capacity, pool, groups
  probs_BTE = _softmax(scores_BTE, allowed_BTE)
  return _take_best(probs_BTE, probs_BTE, allowed_BTE, top_k, renormalise=True)


def softmax_topk_raw(
    scores_BTE: Float[Array, 'B T E'],
    allowed_BTE: Bool[Array, 'B T E'],
    state_E: Float[Array, 'E'] | None,
    *,
    top_k: int,
    capacity: float,
    pool: str,
    groups: tuple[int, ...] | None = None,
) -> Assignment:
  """`softmax_topk` without renormalising: w_j = p_j.

  The gradient also moves the taken ones against the others, so that a router of
  k = 1 learns; the weights sum to less than 1. Causal.

  Source: arXiv 2101.03961, eq. 1 and 2, for k of them.
  """
  del state_E, capacity, pool, groups
  probs_BTE = _softmax(scores_BTE, allowed_BTE)
  return _take_best(probs_BTE, probs_BTE, allowed_BTE, top_k)


def softmax_topk_bias(
    scores_BTE: Float[Array, 'B T E'],
    allowed_BTE: Bool[Array, 'B T E'],
    state_E: Float[Array, 'E'] | None,
    *,
    top_k: int,
    capacity: float,
    pool: str,
    groups: tuple[int, ...] | None = None,
) -> Assignment:
  """`softmax_topk` that picks by p + bias, balanced without a loss.

  The bias (none if `state_E` is None) decides who is picked and nothing else:
  no gradient of a balance loss bends the router. Causal: the bias comes from
  past steps.

  Source: arXiv 2408.15664, algorithm 1.
  """
  del capacity, pool, groups
  probs_BTE = _softmax(scores_BTE, allowed_BTE)
  rank_BTE = probs_BTE
  if state_E is not None:
    rank_BTE = probs_BTE + state_E[None, None]
  return _take_best(rank_BTE, probs_BTE, allowed_BTE, top_k, renormalise=True)


def sigmoid_topk(
    scores_BTE: Float[Array, 'B T E'],
    allowed_BTE: Bool[Array, 'B T E'],
    state_E: Float[Array, 'E'] | None,
    *,
    top_k: int,
    capacity: float,
    pool: str,
    groups: tuple[int, ...] | None = None,
) -> Assignment:
  """Top-k by sigmoid score, renormalised.

    s = sigmoid(scores);  w_j = s_j / sum of the k largest s

  The gradient moves the taken ones against each other and saturates with their
  scores; with k = 1 it carries none. Causal.

  Source: arXiv 2412.19437, eq. 13 to 15, without its bias.
  """
  del state_E, capacity, pool, groups
  probs_BTE = jnp.where(allowed_BTE, jax.nn.sigmoid(scores_BTE), 0)
  return _take_best(probs_BTE, probs_BTE, allowed_BTE, top_k, renormalise=True)


def _softmax(scores_BTE, allowed_BTE):
  lowest = jnp.finfo(jnp.float32).min
  probs_BTE = jax.nn.softmax(jnp.where(allowed_BTE, scores_BTE, lowest))
  return jnp.where(allowed_BTE, probs_BTE, 0)


def _take_best(
    rank_BTE, probs_BTE, allowed_BTE, top_k, renormalise=False
) -> Assignment:
  """The k best of each token by rank, weighted by p."""
  expert_NA, taken_NA = _top_k(rank_BTE, allowed_BTE, top_k)
  weight_NA = jnp.where(taken_NA, pick(probs_BTE, expert_NA), 0)
  if renormalise:
    total_N1 = weight_NA.sum(-1, keepdims=True)
    weight_NA = weight_NA / jnp.where(total_N1 > 0, total_N1, 1)
  return token_major(expert_NA, taken_NA, weight_NA, probs_BTE)


def token_choice(
    scores_BTE: Float[Array, 'B T E'],
    allowed_BTE: Bool[Array, 'B T E'],
    state_E: Float[Array, 'E'] | None,
    *,
    top_k: int,
    capacity: float,
    pool: str,
    groups: tuple[int, ...] | None = None,
) -> Assignment:
  """Top-k by sigmoid score plus a balance bias, weighted by the bare score.

    s = sigmoid(scores);  take the k largest of s + bias;  w_j = s_j

  The bias (none if `state_E` is None) decides who is picked and nothing else.
  The gradient moves each taken one alone. Causal: the bias comes from past
  steps.

  Source: the scores of arXiv 2407.21770, the balance of arXiv 2408.15664.
  """
  del capacity, pool, groups
  probs_BTE = jnp.where(allowed_BTE, jax.nn.sigmoid(scores_BTE), 0)
  rank_BTE = probs_BTE
  if state_E is not None:
    rank_BTE = probs_BTE + state_E[None, None]
  return _take_best(rank_BTE, probs_BTE, allowed_BTE, top_k)


def update_bias(
    state_E: Float[Array, 'E'],
    scores_BTE: Float[Array, 'B T E'],
    allowed_BTE: Bool[Array, 'B T E'],
    selected_BTE: Bool[Array, 'B T E'],
    *,
    rate: float,
    top_k: int,
    capacity: float,
    groups: tuple[int, ...] | None = None,
) -> Float[Array, 'E']:
  """Raises the bias of experts below their group's mean load, lowers others'.

    b_e += rate * sign(mean load of the group - load_e)

  Steps are centred within each group: a common shift picks nobody else, and
  without it the biases would drift.

  Source: arXiv 2408.15664, algorithm 1, per group; the centring is ours.
  """
  del scores_BTE, allowed_BTE, top_k, capacity
  load_E = selected_BTE.sum((0, 1)).astype(jnp.float32)
  step_E = jnp.sign(_group_mean(load_E, groups) - load_E)
  return state_E + rate * (step_E - _group_mean(step_E, groups))


def _group_mean(x_E, groups):
  """Each expert's mean over its group."""
  ends = np.cumsum(groups or x_E.shape)[:-1]
  return jnp.concatenate(
      [jnp.full_like(x_G, x_G.mean()) for x_G in jnp.split(x_E, ends)]
  )


def _top_k(rank_BTE, allowed_BTE, top_k):
  """Indices of the k best allowed experts and whether each exists, [N, A]."""
  E = rank_BTE.shape[-1]
  rank_NE = jnp.where(allowed_BTE, rank_BTE, -jnp.inf).reshape(-1, E)
  rank_NA, expert_NA = jax.lax.top_k(jax.lax.stop_gradient(rank_NE), top_k)
  return expert_NA, rank_NA > -jnp.inf


def pick(x_BTE, expert_NA):
  """x at the given experts. A masked sum: its transpose needs no scatter."""
  E = x_BTE.shape[-1]
  hot_NAE = expert_NA[..., None] == jnp.arange(E)[None, None]
  return jnp.where(hot_NAE, x_BTE.reshape(-1, 1, E), 0).sum(-1)


def token_major(expert_NA, taken_NA, weight_NA, probs_BTE) -> Assignment:
  """A rows for every token, in the order of tokens."""
  N, A = expert_NA.shape
  group_NA = jnp.where(taken_NA, expert_NA, -1).astype(jnp.int32)
  hot_NAE = group_NA[..., None] == jnp.arange(probs_BTE.shape[-1])[None, None]
  aux = {
      'selected_BTE': hot_NAE.any(1).reshape(probs_BTE.shape),
      'probs_BTE': probs_BTE,
  }
  return Assignment(
      jnp.repeat(jnp.arange(N), A),
      group_NA.reshape(-1),
      jnp.where(taken_NA, weight_NA, 0).reshape(-1),
      aux,
      A,
  )
