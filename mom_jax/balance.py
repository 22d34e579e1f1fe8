"""How evenly a router spreads its tokens: loads, balance loss, entropy."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def load_and_mass(
    probs_BTE: Float[Array, 'B T E'],
    selected_BTE: Bool[Array, 'B T E'],
    valid_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'E'], Float[Array, 'E']]:
  """(f, P): share of valid tokens each expert took, mean normalised p."""
  valid_BT1 = valid_BT[..., None]
  took_E = (selected_BTE & valid_BT1).sum(1).sum(0).astype(jnp.float32)
  mass_E = jnp.where(valid_BT1, _normalise(probs_BTE), 0).sum(1).sum(0)
  tokens = jnp.maximum(valid_BT.sum(), 1).astype(jnp.float32)
  return took_E / tokens, mass_E / tokens


def switch_loss(
    probs_BTE: Float[Array, 'B T E'],
    selected_BTE: Bool[Array, 'B T E'],
    valid_BT: Bool[Array, 'B T'],
) -> Float[Array, '']:
  """Load-balance loss of one layer, over all its valid tokens.

    L = E sum_e f_e P_e,  f_e = share of tokens that e took,
    P_e = mean of p_e, p normalised over experts

  With K experts a token: K when balanced, E when all probability lies evenly on
  K experts that take everything. Gradients flow through P.

  Source: arXiv 2101.03961, eq. 4 to 6, for K choices; per layer, unlike the
  official MoM, which pools the tokens of all layers.
  """
  load_E, mass_E = load_and_mass(probs_BTE, selected_BTE, valid_BT)
  return len(load_E) * (load_E * mass_E).sum()


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
