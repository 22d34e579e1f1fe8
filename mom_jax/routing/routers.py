"""The table of routers.

A router maps logits to an `Assignment`: which expert or memory takes which
token, with which weight. Selection is by index and never by `weight > 0`; a
selected token is never dropped.

To add one, write a function `(RouterInputs, RouterSettings) -> Assignment` in
`token_choice.py` or `expert_choice.py` (or a file of its own) and its line in
`ROUTERS`. docs/own_router.md says what some routers need besides that.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from mom_jax.routing import expert_choice, token_choice
from mom_jax.routing.assignment import (
    Assignment,
    RouterInputs,
    RouterSettings,
    Selection,
)
from mom_jax.routing.random_errors import random_errors


@dataclasses.dataclass(frozen=True)
class RouterState:
  """An array that a router keeps from step to step and no gradient trains.

  Attributes:
    name: of the array in a layer's router state.
    rate: setting of the layer that becomes `RouterSettings.update_rate`.
    init: number of experts -> first state.
    update: (inputs, selected_BTE, settings) -> state of the next step.
  """

  name: str
  rate: str
  init: Callable[[int], jax.Array]
  update: Callable[[RouterInputs, jax.Array, RouterSettings], jax.Array]


@dataclasses.dataclass(frozen=True)
class Router:
  """A router.

  Attributes:
    name: its key in `ROUTERS`.
    route: (inputs, settings) -> Assignment.
    causal: later tokens and other samples never change the rows of a token.
    state: what it keeps, or None.
    exact_k: a token has top_k experts, or all of its modality if that has
      fewer.
    renormalise: logits -> log-probabilities, up to a constant of the token, if
      `route` renormalises; `finalize_weights` then does it for forced
      selections too. None if it does not.
    needs_aux_logits: it selects by `RouterInputs.aux_logits_BTE`.
  """

  name: str
  route: Callable[[RouterInputs, RouterSettings], Assignment]
  causal: bool = True
  state: RouterState | None = None
  exact_k: bool = False
  renormalise: Callable[[jax.Array], jax.Array] | None = None
  needs_aux_logits: bool = False


BALANCE_BIAS = RouterState(
    'balance_bias', 'balance_rate', jnp.zeros, token_choice.update_bias)
THRESHOLD = RouterState(
    'threshold', 'threshold_rate', expert_choice.init_threshold,
    expert_choice.update_threshold)

ROUTERS = {
    router.name: router
    for router in (
        # Each token picks its experts.
        Router('softmax_topk', token_choice.softmax_topk, exact_k=True,
               renormalise=token_choice.log_softmax),
        Router('softmax_topk_raw', token_choice.softmax_topk_raw, exact_k=True),
        Router('sigmoid_topk', token_choice.sigmoid_topk, exact_k=True,
               renormalise=jax.nn.log_sigmoid),
        Router('softmax_topk_bias', token_choice.softmax_topk_bias,
               state=BALANCE_BIAS, exact_k=True,
               renormalise=token_choice.log_softmax),
        Router('token_choice', token_choice.token_choice, state=BALANCE_BIAS,
               exact_k=True),
        # Each expert picks its tokens. It keeps the thresholds of `threshold`,
        # its replacement in evaluation; the oracle runs models of aux_causal.
        Router('expert_choice', expert_choice.expert_choice, causal=False,
               state=THRESHOLD),
        Router('expert_choice_oracle', expert_choice.expert_choice,
               causal=False),
        Router('threshold', expert_choice.threshold, state=THRESHOLD),
        Router('aux_causal', expert_choice.aux_causal, state=THRESHOLD,
               needs_aux_logits=True),
    )
}

# Names of the arrays that routers keep and no gradient trains.
STATE_NAMES = tuple(dict.fromkeys(
    router.state.name for router in ROUTERS.values() if router.state))


def get(name: str, key: str = 'router') -> Router:
  """Return the router of that name.

  Raises:
    ValueError: there is none; names the setting `key`, lists the known ones.
  """
  if name not in ROUTERS:
    raise ValueError(
        f'{key}={name!r} must be one of {", ".join(sorted(ROUTERS))}.'
    )
  return ROUTERS[name]


def finalize_weights(
    router: Router,
    selected_BTE: Bool[Array, 'B T E'],
    probs_BTE: Float[Array, 'B T E'],
    inputs: RouterInputs,
) -> Selection:
  """Give a selection the router's weights, renormalised if it renormalises."""
  if router.renormalise is None:
    return Selection(selected_BTE, probs_BTE)
  return Selection(selected_BTE, token_choice.normalised_weights(
      router.renormalise(inputs.logits_BTE), selected_BTE))


def with_random_errors(
    key: Key[Array, ''] | jax.Array,
    error_prob: float | Float[Array, ''],
    router: Router,
    selected_BTE: Bool[Array, 'B T E'],
    probs_BTE: Float[Array, 'B T E'],
    inputs: RouterInputs,
) -> Selection:
  """Replace decisions of a router by wrong ones, to see what errors cost.

  Args:
    error_prob: as in `random_errors`.
    selected_BTE, probs_BTE: of the router's assignment.
    inputs: of the router.
  """
  selected_BTE = random_errors(
      key, error_prob, selected_BTE, inputs.allowed_BTE, router.exact_k)
  return finalize_weights(router, selected_BTE, probs_BTE, inputs)


def add_noise(
    key: Key[Array, ''] | jax.Array, logits: Float[Array, '*S']
) -> Float[Array, '*S']:
  """Add Gumbel-sigmoid noise: standard logistic noise on the logits.

  The difference of two Gumbel samples is logistic: mean 0, variance pi^2 / 3.

  Source: arXiv 2407.21770, section 2.4 (upcycling).
  """
  return logits + jax.random.logistic(key, logits.shape, logits.dtype)
