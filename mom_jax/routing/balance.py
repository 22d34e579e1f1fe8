"""Statistics of routers and their losses: loads, balance, z-loss, entropy.

The losses look at all tokens of a batch and change the output of none: a causal
router stays causal under them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class RouterStats(NamedTuple):
  """The decisions of one router and how even they are.

  Attributes:
    selected_BTE: experts or memories that took a token.
    entropy: of the router, a mean over valid tokens, nats.
    load_E, mean_prob_E: as of `load_and_mean_prob`; None where not computed.
    sample_balance: `sample_loss`, None where not computed.
    router_z: `z_loss`, None where not computed.
    aux_logits_BTE: logits of auxiliary routers, None without them.
    allowed_BTE: experts that a token may use; None without auxiliary routers.
  """

  selected_BTE: Bool[Array, 'B T E']
  entropy: Float[Array, '']
  load_E: Float[Array, ' E'] | None = None
  mean_prob_E: Float[Array, ' E'] | None = None
  sample_balance: Float[Array, ''] | None = None
  router_z: Float[Array, ''] | None = None
  aux_logits_BTE: Float[Array, 'B T E'] | None = None
  allowed_BTE: Bool[Array, 'B T E'] | None = None


def router_stats(
    logits_BTE: Float[Array, 'B T E'],
    probs_BTE: Float[Array, 'B T E'],
    selected_BTE: Bool[Array, 'B T E'],
    weight_BTE: Float[Array, 'B T E'],
    valid_BT: Bool[Array, 'B T'],
) -> RouterStats:
  """All statistics of a router without auxiliary routers."""
  load_E, mean_prob_E = load_and_mean_prob(probs_BTE, selected_BTE, valid_BT)
  return RouterStats(
      selected_BTE,
      entropy(probs_BTE, valid_BT),
      load_E,
      mean_prob_E,
      sample_loss(weight_BTE, selected_BTE, valid_BT),
      z_loss(logits_BTE, valid_BT),
  )


def router_loss(
    stats: RouterStats, balance_weight: float, z_weight: float
) -> Float[Array, '']:
  """Weighted balance and z-loss of one layer, ready to add to a loss."""
  balance = switch_loss(stats.load_E, stats.mean_prob_E)
  return balance_weight * balance + z_weight * stats.router_z


def load_and_mean_prob(
    probs_BTE: Float[Array, 'B T E'],
    selected_BTE: Bool[Array, 'B T E'],
    valid_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, ' E'], Float[Array, ' E']]:
  """(f, P): fraction of valid tokens each expert took, mean normalised p."""
  valid_BT1 = valid_BT[..., None]
  took_E = (selected_BTE & valid_BT1).sum(1).sum(0).astype(jnp.float32)
  prob_E = jnp.where(valid_BT1, _normalise(probs_BTE), 0).sum(1).sum(0)
  tokens = jnp.maximum(valid_BT.sum(), 1).astype(jnp.float32)
  return took_E / tokens, prob_E / tokens


def switch_loss(
    load_E: Float[Array, ' E'], mean_prob_E: Float[Array, ' E']
) -> Float[Array, '']:
  """Load-balance loss of one layer, over all its valid tokens.

    L = E sum_e f_e P_e,  f_e = fraction of tokens that e took,
    P_e = mean of p_e, p normalised over experts

  With K experts a token: K when balanced, E when all probability lies evenly on
  K experts that take everything. Gradients flow through P to every expert.

  Args:
    load_E, mean_prob_E: f and P, as of `load_and_mean_prob`.
  Source: arXiv 2101.03961, eq. 4 to 6, for K choices.
  """
  return len(load_E) * (load_E * mean_prob_E).sum()


def sample_loss(
    weight_BTE: Float[Array, 'B T E'],
    selected_BTE: Bool[Array, 'B T E'],
    valid_BT: Bool[Array, 'B T'],
) -> Float[Array, '']:
  """Load-balance loss of one layer, sample by sample.

    L = E^2 mean_be f_be P_be,  f_be = fraction of b's tokens that e took,
    P_be = mean over b's tokens of e's weight, 0 where it took none

  over samples b that have tokens.

  Balances every sample by itself; gradients flow through the weights of experts
  that took a token only.

  Source: the first official MoM (spring 2025).
  """
  valid_BT1 = valid_BT[..., None]
  tokens_B1 = jnp.maximum(valid_BT.sum(1, keepdims=True), 1)
  took_BE = (selected_BTE & valid_BT1).sum(1) / tokens_B1
  weight_BE = jnp.where(valid_BT1, weight_BTE, 0).sum(1) / tokens_B1
  samples = jnp.maximum(valid_BT.any(1).sum(), 1)
  E = weight_BTE.shape[-1]
  return E**2 * ((took_BE * weight_BE).sum() / (E * samples))


def z_loss(
    logits_BTE: Float[Array, 'B T E'], valid_BT: Bool[Array, 'B T']
) -> Float[Array, '']:
  """Mean over valid tokens of (log sum_e exp logit_e)^2.

  Keeps router logits small; the gradient moves each by its probability.

  Source: arXiv 2202.08906, eq. 5.
  """
  z_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
  tokens = jnp.maximum(valid_BT.sum(), 1)
  return jnp.where(valid_BT, jnp.square(z_BT), 0).sum(1).sum(0) / tokens


def entropy(
    probs_BTE: Float[Array, 'B T E'], valid_BT: Bool[Array, 'B T']
) -> Float[Array, '']:
  """Mean over valid tokens of -sum_e p_e log p_e in nats, p normalised."""
  p_BTE = _normalise(probs_BTE)
  log_BTE = jnp.log(jnp.where(p_BTE > 0, p_BTE, 1))
  each_BT = -(p_BTE * log_BTE).sum(-1)
  tokens = jnp.maximum(valid_BT.sum(), 1)
  return jnp.where(valid_BT, each_BT, 0).sum(1).sum(0) / tokens


def _normalise(probs_BTE):
  total_BT1 = probs_BTE.sum(-1, keepdims=True)
  return probs_BTE / jnp.where(total_BT1 > 0, total_BT1, 1)


def over_layers(
    stats: Sequence[RouterStats], over: str
) -> Float[Array, '']:
  """Balance loss of a model.

  Args:
    stats: of routers, each of several layers, on the leading axis of every
      leaf; equally many tokens in each layer.
    over: 'layer', the mean of `switch_loss` over layers; 'model', f and P of
      all layers' tokens together, as the official MoM, so that one layer may
      collapse while another compensates; 'sample', the mean of `sample_loss`.
  """
  if not stats:
    return jnp.zeros(())
  if over == 'sample':
    return jnp.concatenate([s.sample_balance for s in stats]).mean()
  load_LE = jnp.concatenate([s.load_E for s in stats])
  mean_prob_LE = jnp.concatenate([s.mean_prob_E for s in stats])
  if over == 'model':
    load_LE, mean_prob_LE = load_LE.mean(0)[None], mean_prob_LE.mean(0)[None]
  return load_LE.shape[-1] * (load_LE * mean_prob_LE).sum(-1).mean()


def mean_z(stats: Sequence[RouterStats]) -> Float[Array, '']:
  """Mean of `router_z` over layers, 0 without routers."""
  if not stats:
    return jnp.zeros(())
  return jnp.concatenate([s.router_z for s in stats]).mean()
