"""Which experts or memories take which tokens: scores -> Assignment.

A `Router` maps raw router logits to an `Assignment`, rows that say "this token
goes to this group with this weight". Selection is by index and never by
`weight > 0`; a selected token is never dropped. A new router is a function and
its line in `ROUTERS`.

Experts lie in contiguous groups (one a modality; memories are one group). A
token may use the experts of one group or, if it is padding, none: the rows of
`allowed_BTE` are equal or disjoint.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from mom_jax.routing import selection, token_choice
from mom_jax.routing.token_choice import Assignment


@dataclasses.dataclass(frozen=True)
class Router:
  """A router.

  Attributes:
    name: its key in `ROUTERS`.
    causal: tokens after t, and other samples, never change the rows of t.
    route: (scores_BTE raw logits, allowed_BTE, state_E or None, *, top_k,
      capacity, pool, groups) -> Assignment.
    buffer: name of the router's state, if it has one.
    init_state: number of experts -> first state.
    update: (state_E, scores_BTE, allowed_BTE, selected_BTE, *, rate, top_k,
      capacity, groups) -> next step's state.
    auxiliary: route also takes `auxiliary_BTE`, logits of a second network.
    exact_k: a token has top_k experts, or its whole group if that is smaller.
    renormalised: the weights of a token add up to 1.

  Settings of route and update, each used by the routers it concerns:
    top_k: experts per token.
    capacity: mean experts per token c.
    pool: tokens that compete, 'sequence', or 'device' and 'global' (all rows
      given, of one device or of all).
    groups: experts in each group, side by side; None is one group.
    rate: step of the balance bias, or 1 - decay of the threshold's average.
  """

  name: str
  causal: bool
  route: Callable[..., Assignment]
  buffer: str | None = None
  init_state: Callable[[int], jax.Array] | None = None
  update: Callable[..., jax.Array] | None = None
  auxiliary: bool = False
  exact_k: bool = False
  renormalised: bool = False


def from_mask(
    selected_BTE: Bool[Array, 'B T E'],
    weight_BTE: Float[Array, 'B T E'],
    allowed_BTE: Bool[Array, 'B T E'],
    groups: tuple[int, ...] | None,
) -> Assignment:
  """The assignment that a mask describes, whoever made it.

  A token has 0 to all experts of its group. Rows: B * T * A with A the size of
  the largest group.
  """
  B, T, E = selected_BTE.shape
  first_N1 = jnp.argmax(allowed_BTE, -1).reshape(B * T, 1)
  expert_NA = first_N1 + jnp.arange(max(groups or (E,)))[None]
  taken_NA = token_choice.pick(selected_BTE.astype(jnp.int32), expert_NA) > 0
  weight_NA = token_choice.pick(weight_BTE, expert_NA)
  return token_choice.token_major(expert_NA, taken_NA, weight_NA, weight_BTE)


def settled(
    router: Router,
    selected_BTE: Bool[Array, 'B T E'],
    probs_BTE: Float[Array, 'B T E'],
) -> tuple[Bool[Array, 'B T E'], Float[Array, 'B T E']]:
  """(selected, weight) of a selection: scores, renormalised if the router does.
  """
  if not router.renormalised:
    return selected_BTE, probs_BTE
  weight_BTE = jnp.where(selected_BTE, probs_BTE, 0)
  total_BT1 = weight_BTE.sum(-1, keepdims=True)
  return selected_BTE, weight_BTE / jnp.where(total_BT1 > 0, total_BT1, 1)


def with_errors(
    key: Key[Array, ''] | jax.Array,
    rate: float | Float[Array, ''],
    router: Router,
    chosen: dict[str, jax.Array],
    allowed_BTE: Bool[Array, 'B T E'],
) -> tuple[Bool[Array, 'B T E'], Float[Array, 'B T E']]:
  """(selected, weight) with a share of decisions turned around at random.

  Args:
    rate: as `selection.with_errors` takes it.
    chosen: aux of the router's assignment.
  """
  selected_BTE = selection.with_errors(
      key, rate, chosen['selected_BTE'], allowed_BTE, router.exact_k)
  return settled(router, selected_BTE, chosen['probs_BTE'])


# Threshold: expert choice made causal by remembering past batches.


def threshold(
    scores_BTE: Float[Array, 'B T E'],
    allowed_BTE: Bool[Array, 'B T E'],
    state_E: Float[Array, 'E'] | None,
    *,
    top_k: int,
    capacity: float,
    pool: str,
    groups: tuple[int, ...] | None = None,
) -> Assignment:
  """Expert e takes a token iff sigmoid(score) > threshold_e; weight is it.

  The gradient moves each taken one alone. Causal: thresholds come from past
  steps.

  Raises:
    ValueError: there is no state.
  """
  del top_k, capacity, pool
  if state_E is None:
    raise ValueError(
        "router 'threshold' needs its thresholds; a layer that keeps no router"
        ' state needs a router without, such as softmax_topk.'
    )
  probs_BTE = jnp.where(allowed_BTE, jax.nn.sigmoid(scores_BTE), 0)
  selected_BTE = allowed_BTE & (probs_BTE > state_E[None, None])
  return from_mask(selected_BTE, probs_BTE, allowed_BTE, groups)


def update_threshold(
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
  """Moves thresholds towards the score of the last token of expert choice.

    threshold_e += rate * (k_e-th largest score of e - threshold_e)

  over all tokens of the batch that may use e, k_e as in `expert_choice`. An
  expert without such tokens keeps its threshold.
  """
  del selected_BTE, top_k
  E = scores_BTE.shape[-1]
  probs_1NE = jax.nn.sigmoid(scores_BTE).reshape(1, -1, E)
  allowed_1NE = allowed_BTE.reshape(1, -1, E)
  count_1E = selection.capacity(allowed_1NE, capacity, groups)
  kth_E = selection.kth_largest(probs_1NE, allowed_1NE, count_1E)[0]
  step_E = jnp.where(count_1E[0] > 0, kth_E - state_E, 0)
  return state_E + rate * step_E


# Expert choice: each expert picks its tokens. Sees the future.


def expert_choice(
    scores_BTE: Float[Array, 'B T E'],
    allowed_BTE: Bool[Array, 'B T E'],
    state_E: Float[Array, 'E'] | None,
    *,
    top_k: int,
    capacity: float,
    pool: str,
    groups: tuple[int, ...] | None = None,
) -> Assignment:
  """The router of MoMa in training: expert e takes its k_e best tokens.

    s = sigmoid(scores);  k_e = ceil(c b / E_group) of the b tokens in the pool
    that may use e, at least 1 and at most b;  w = s, not renormalised

  Ties go to the lowest index. The gradient moves each taken one alone. Not
  causal: who is taken depends on later tokens and, but for pool 'sequence', on
  other samples. Rows: a pool of n tokens takes at most c n + E of them,
  whatever the mixture of modalities.

  Raises:
    ValueError: unknown pool.
  Source: arXiv 2407.21770, eq. 1 and 5.
  """
  del state_E, top_k
  B, T, E = scores_BTE.shape
  if pool not in ('sequence', 'device', 'global'):
    raise ValueError(f'unknown pool {pool!r}; known: device, global, sequence.')
  pools = B if pool == 'sequence' else 1
  probs_BTE = jnp.where(allowed_BTE, jax.nn.sigmoid(scores_BTE), 0)
  probs_PNE = probs_BTE.reshape(pools, -1, E)
  allowed_PNE = allowed_BTE.reshape(pools, -1, E)
  count_PE = selection.capacity(allowed_PNE, capacity, groups)
  selected_PNE = selection.largest(probs_PNE, allowed_PNE, count_PE)
  # E more than c n + E: float32 may round a count of millions up by one.
  n = probs_PNE.shape[1]
  rows = min(math.ceil(capacity * n) + 2 * E, n * E)
  pairs = lambda s_NE: jnp.nonzero(s_NE.ravel(), size=rows, fill_value=n * E)[0]
  pair_PR = jax.vmap(pairs)(selected_PNE)
  empty_PR = pair_PR == n * E
  row_PR = jnp.where(empty_PR, 0, pair_PR // E + n * jnp.arange(pools)[:, None])
  group_PR = jnp.where(empty_PR, -1, pair_PR % E)
  score_PR = jnp.take_along_axis(
      probs_PNE.reshape(pools, -1), jnp.where(empty_PR, 0, pair_PR), 1
  )
  weight_PR = jnp.where(empty_PR, 0, score_PR)
  selected_BTE = selected_PNE.reshape(B, T, E)
  return Assignment(
      row_PR.reshape(-1).astype(jnp.int32),
      group_PR.reshape(-1).astype(jnp.int32),
      weight_PR.reshape(-1),
      {'selected_BTE': selected_BTE, 'probs_BTE': probs_BTE},
      None,
  )


# Auxiliary routers: expert choice made causal by a network that predicts it.


def aux_causal(
    scores_BTE: Float[Array, 'B T E'],
    allowed_BTE: Bool[Array, 'B T E'],
    state_E: Float[Array, 'E'] | None,
    *,
    top_k: int,
    capacity: float,
    pool: str,
    groups: tuple[int, ...] | None = None,
    auxiliary_BTE: Float[Array, 'B T E'] | None = None,
) -> Assignment:
  """Expert e takes a token iff sigmoid(auxiliary_e) > 1/2; w = sigmoid(score).

  There is no capacity. The auxiliary logits see the token alone; they decide
  who takes it and nothing else, and get no gradient from it. Causal.

  Raises:
    ValueError: there are no auxiliary logits.
  Source: arXiv 2407.21770, section 2.4.
  """
  del state_E, top_k, capacity, pool
  if auxiliary_BTE is None:
    raise ValueError(
        "router 'aux_causal' needs auxiliary routers; a layer that has none"
        ' needs another router, such as softmax_topk.'
    )
  probs_BTE = jnp.where(allowed_BTE, jax.nn.sigmoid(scores_BTE), 0)
  selected_BTE = allowed_BTE & (auxiliary_BTE > 0)
  return from_mask(selected_BTE, probs_BTE, allowed_BTE, groups)


def add_noise(
    key: Key[Array, ''] | jax.Array, scores: Float[Array, '*S']
) -> Float[Array, '*S']:
  """Gumbel-sigmoid noise: logits plus standard logistic noise.

  The difference of two Gumbel samples is logistic: mean 0, variance pi^2 / 3.

  Source: arXiv 2407.21770, section 2.4 (upcycling).
  """
  return scores + jax.random.logistic(key, scores.shape, scores.dtype)


def first_threshold(num_experts: int) -> Float[Array, 'E']:
  """Thresholds at first, of a type as fixed as that of later ones."""
  return jnp.full(num_experts, 0.5, jnp.float32)


ROUTERS = {
    router.name: router
    for router in (
        Router(
            'softmax_topk', True, token_choice.softmax_topk,
            exact_k=True, renormalised=True,
        ),
        Router(
            'softmax_topk_raw', True, token_choice.softmax_topk_raw,
            exact_k=True,
        ),
        Router(
            'sigmoid_topk', True, token_choice.sigmoid_topk,
            exact_k=True, renormalised=True,
        ),
        Router(
            'softmax_topk_bias', True, token_choice.softmax_topk_bias,
            'balance_bias', lambda num_experts: jnp.zeros(num_experts),
            token_choice.update_bias, exact_k=True, renormalised=True,
        ),
        Router(
            'token_choice', True, token_choice.token_choice, 'balance_bias',
            lambda num_experts: jnp.zeros(num_experts),
            token_choice.update_bias, exact_k=True,
        ),
        Router(
            'threshold', True, threshold, 'threshold',
            first_threshold, update_threshold,
        ),
        # Keeps thresholds too, for `threshold` to stand in at evaluation.
        Router(
            'expert_choice', False, expert_choice, 'threshold',
            first_threshold, update_threshold,
        ),
        # The same choice for evaluation, of models that aux_causal runs too.
        Router('expert_choice_oracle', False, expert_choice),
        Router(
            'aux_causal', True, aux_causal, 'threshold',
            first_threshold, update_threshold,
            auxiliary=True,
        ),
    )
}


def get(name: str, key: str = 'router') -> Router:
  """The router of that name.

  Raises:
    ValueError: there is none; names the setting `key`, lists the known ones.
  """
  if name not in ROUTERS:
    raise ValueError(
        f'{key}={name!r} must be one of {", ".join(sorted(ROUTERS))}.'
    )
  return ROUTERS[name]
