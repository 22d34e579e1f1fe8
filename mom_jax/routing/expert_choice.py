"""Expert choice: each expert picks its tokens; and its causal replacements.

Expert choice sees the future. After training, `threshold` takes the tokens
whose probability exceeds that of the last token taken in past batches, and
`aux_causal` the tokens that a small network predicts.

Expert choice needs the number of tokens of each expert, the logit of the last
of them and a mask of those above. Here these are sums, without a sort.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from mom_jax.routing.assignment import (
    Assignment,
    RouterInputs,
    RouterSettings,
    Selection,
    from_mask,
)

POOLS = ('device', 'global', 'sequence')


def expert_choice(inputs: RouterInputs, settings: RouterSettings) -> Assignment:
  """The router of MoMa in training: expert e takes its k_e best tokens.

    s = sigmoid(logits);  k_e = ceil(c b / E_modality) of the b tokens in the
    pool that may use e, at least 1 and at most b;  w = s, not renormalised

  The best by logit, since probabilities of large logits are equal in float32;
  ties go to the lowest index. Each selected pair of token and expert has its
  own gradient; pairs do not compete. Not causal: the selection depends on later
  tokens and, but for pool 'sequence', on other samples. A pool of n tokens
  gives at most c n + E rows, whatever the mixture of modalities.

  Raises:
    ValueError: unknown pool.
  Source: arXiv 2407.21770, eq. 1 and 5.
  """
  B, T, E = inputs.logits_BTE.shape
  if settings.pool not in POOLS:
    raise ValueError(
        f'unknown pool {settings.pool!r}; known: {", ".join(POOLS)}.')
  pools = B if settings.pool == 'sequence' else 1
  probs_BTE = _sigmoid(inputs)
  probs_PNE = probs_BTE.reshape(pools, -1, E)
  allowed_PNE = inputs.allowed_BTE.reshape(pools, -1, E)
  count_PE = tokens_per_expert(allowed_PNE, settings)
  selected_PNE = top_tokens(
      inputs.logits_BTE.reshape(pools, -1, E), allowed_PNE, count_PE)
  # E more than c n + E: float32 may round a count of millions up by one.
  n = probs_PNE.shape[1]
  rows = min(math.ceil(settings.capacity * n) + 2 * E, n * E)
  pairs = lambda s_NE: jnp.nonzero(s_NE.ravel(), size=rows, fill_value=n * E)[0]
  pair_PR = jax.vmap(pairs)(selected_PNE)
  empty_PR = pair_PR == n * E
  token_PR = jnp.where(
      empty_PR, 0, pair_PR // E + n * jnp.arange(pools)[:, None])
  group_PR = jnp.where(empty_PR, -1, pair_PR % E)
  prob_PR = jnp.take_along_axis(
      probs_PNE.reshape(pools, -1), jnp.where(empty_PR, 0, pair_PR), 1
  )
  weight_PR = jnp.where(empty_PR, 0, prob_PR)
  return Assignment(
      token_PR.reshape(-1).astype(jnp.int32),
      group_PR.reshape(-1).astype(jnp.int32),
      weight_PR.reshape(-1),
      selected_PNE.reshape(B, T, E),
      probs_BTE,
      None,
  )


def threshold(inputs: RouterInputs, settings: RouterSettings) -> Assignment:
  """Select token t for expert e iff s = sigmoid(logit) > threshold_e.

  The weight is s. Each selected pair has its own gradient; pairs do not
  compete. Causal: thresholds come from past steps.

  Raises:
    ValueError: there is no state.
  """
  if inputs.state_E is None:
    raise ValueError(
        "router 'threshold' needs its thresholds; a layer that keeps no router"
        ' state needs a router without, such as softmax_topk.'
    )
  probs_BTE = _sigmoid(inputs)
  selected_BTE = inputs.allowed_BTE & (probs_BTE > inputs.state_E[None, None])
  return from_mask(
      Selection(selected_BTE, probs_BTE), inputs.allowed_BTE,
      settings.experts)


def aux_causal(inputs: RouterInputs, settings: RouterSettings) -> Assignment:
  """Select token t for expert e iff sigmoid(aux logit) > 1/2.

  The weight is sigmoid(logit). There is no capacity. The auxiliary logits
  depend on the token alone; they change the selection only and get no gradient
  from it. Causal.

  Raises:
    ValueError: there are no auxiliary logits.
  Source: arXiv 2407.21770, section 2.4.
  """
  if inputs.aux_logits_BTE is None:
    raise ValueError(
        "router 'aux_causal' needs auxiliary routers; a layer that has none"
        ' needs another router, such as softmax_topk.'
    )
  selected_BTE = inputs.allowed_BTE & (inputs.aux_logits_BTE > 0)
  return from_mask(
      Selection(selected_BTE, _sigmoid(inputs)), inputs.allowed_BTE,
      settings.experts)


def init_threshold(num_experts: int) -> Float[Array, ' E']:
  """Return the thresholds of the first step."""
  return jnp.full(num_experts, 0.5, jnp.float32)


def update_threshold(
    inputs: RouterInputs,
    selected_BTE: Bool[Array, 'B T E'],  # noqa: ARG001, what experts would take
    settings: RouterSettings,
) -> Float[Array, ' E']:
  """Move thresholds towards the probability of expert choice's last token.

    threshold_e += rate * (k_e-th largest probability of e - threshold_e)

  over all tokens of the batch that may use e, k_e as in `expert_choice`. An
  expert without such tokens keeps its threshold.
  """
  E = inputs.logits_BTE.shape[-1]
  logits_1NE = inputs.logits_BTE.reshape(1, -1, E)
  allowed_1NE = inputs.allowed_BTE.reshape(1, -1, E)
  count_1E = tokens_per_expert(allowed_1NE, settings)
  kth_E = jax.nn.sigmoid(kth_largest(logits_1NE, allowed_1NE, count_1E)[0])
  step_E = jnp.where(count_1E[0] > 0, kth_E - inputs.state_E, 0)
  return inputs.state_E + settings.update_rate * step_E


def _sigmoid(inputs: RouterInputs) -> jax.Array:
  return jnp.where(inputs.allowed_BTE, jax.nn.sigmoid(inputs.logits_BTE), 0)


# Counts and masks of the best tokens.


def tokens_per_expert(
    allowed_PNE: Bool[Array, 'P N E'], settings: RouterSettings
) -> Int[Array, 'P E']:
  """k_e = ceil(c b / E_modality), within [1, b]; 0 where b is 0.

  Args:
    allowed_PNE: the b tokens of a pool that may use e.
  """
  E = allowed_PNE.shape[-1]
  experts = settings.experts or (E,)
  size_E = jnp.asarray(np.repeat(experts, experts), jnp.float32)
  tokens_PE = allowed_PNE.sum(1, dtype=jnp.int32)
  # A thousandth of a token: 1.1 x 10 tokens are 11, though 1.1 is inexact.
  mean_PE = settings.capacity * tokens_PE.astype(jnp.float32) / size_E[None]
  count_PE = jnp.ceil(mean_PE - 1e-3).astype(jnp.int32)
  return jnp.minimum(jnp.maximum(count_PE, 1), tokens_PE)


def max_tokens_per_expert(
    num_tokens: int, capacity: float, num_experts: int
) -> int:
  """Static bound of `tokens_per_expert` where modalities share all experts.

  Args:
    num_tokens: of a pool.
  """
  mean = capacity * num_tokens / num_experts
  # Float32 is off by less than half a thousandth up to here.
  spare = -5e-4 if mean < 4096 else 1
  return min(max(math.ceil(mean + spare), 1), num_tokens)


def kth_largest(
    values_PNE: Float[Array, 'P N E'],
    allowed_PNE: Bool[Array, 'P N E'],
    count_PE: Int[Array, 'P E'],
) -> Float[Array, 'P E']:
  """The count-th largest allowed value along N, 0 where count is 0.

  With all bits of negative values turned over, and the sign of others, float32
  values compare as their bit patterns do, so 32 counts find the pattern bit by
  bit, exactly. Unlike a sort this needs no copy of the values and, over
  devices, only sums of [P, E].
  """
  sign = jnp.uint32(1 << 31)
  values_PNE = jax.lax.stop_gradient(
      jnp.where(values_PNE == 0, 0, values_PNE))  # -0 equals 0
  bits_PNE = jax.lax.bitcast_convert_type(values_PNE, jnp.uint32)
  bits_PNE = jnp.where(bits_PNE >= sign, ~bits_PNE, bits_PNE | sign)
  bits_PNE = jnp.where(allowed_PNE, bits_PNE, 0)

  def refine(i, found_PE):
    try_PE = found_PE | (sign >> i.astype(jnp.uint32))
    enough_PE = (bits_PNE >= try_PE[:, None]).sum(1) >= count_PE
    return jnp.where(enough_PE, try_PE, found_PE)

  found_PE = jax.lax.fori_loop(
      0, 32, refine, jnp.zeros(count_PE.shape, jnp.uint32))
  found_PE = jnp.where(found_PE >= sign, found_PE ^ sign, ~found_PE)
  found_PE = jnp.where(count_PE > 0, found_PE, 0)
  return jax.lax.bitcast_convert_type(found_PE, jnp.float32)


def top_tokens(
    values_PNE: Float[Array, 'P N E'],
    allowed_PNE: Bool[Array, 'P N E'],
    count_PE: Int[Array, 'P E'],
) -> Bool[Array, 'P N E']:
  """Mark the count largest along N, the lowest index first among equals."""
  kth_P1E = kth_largest(values_PNE, allowed_PNE, count_PE)[:, None]
  above_PNE = allowed_PNE & (values_PNE > kth_P1E)
  equal_PNE = allowed_PNE & (values_PNE == kth_P1E)
  left_P1E = count_PE[:, None] - above_PNE.sum(1, keepdims=True)
  return above_PNE | (equal_PNE & (jnp.cumsum(equal_PNE, 1) <= left_P1E))
