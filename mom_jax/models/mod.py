"""Mixture-of-Depths: a block that works on a part of the tokens."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mom_jax import routing
from mom_jax.models import auxiliary, layers, outputs


class Mod(nn.Module):
  """Router that picks the tokens a block works on; the others pass it by.

    r = sigmoid(x w);  y_t = x_t + r_t (block(x)_t - x_t)  for picked t

  Expert choice picks the ceil(c T) largest r of each sequence, which sees the
  future; thresholds or auxiliary routers take its place as in `moma.Moma`, and
  so does the collection 'errors'. A token that is not picked does not exist for
  the block: no attention, memory, convolution or expert sees it, in decoding
  either.

  Attributes:
    capacity: fraction c of a sequence's tokens that expert choice picks.
    router: a key of `routing.ROUTERS`.
    threshold_rate: 1 - decay of the threshold's moving average.
    router_collection: Flax collection of the router's state.

  Source: arXiv 2404.02258 and, for the sigmoid and the auxiliary routers,
  2407.21770, section 2.3; the pool of the latter is the whole batch, ours the
  sequence, for static shapes.
  """

  capacity: float
  router: str = 'expert_choice'
  threshold_rate: float = 0.01
  router_collection: str = 'router'

  @nn.compact
  def __call__(
      self, x_BTD: Float[Array, 'B T D'], valid_BT: Bool[Array, 'B T']
  ) -> tuple[
      Bool[Array, 'B T'], Float[Array, 'B T'], outputs.LayerAux]:
    """Pick tokens: (picked, r, aux), aux as of `Moma` with one expert."""
    router = routing.get(self.router)
    logits_BT1 = layers.Einsum(
        'btd,de->bte', (x_BTD.shape[-1], 1), ('embed', None),
        dtype=jnp.float32, name='router',
    )(x_BTD)
    allowed_BT1 = valid_BT[..., None]
    inputs, state = routing.RouterInputs(logits_BT1, allowed_BT1), {}
    if router.state:
      inputs = inputs._replace(state_E=layers.router_state(
          self, self.router_collection, router.state.name, 1,
          router.state.init))
    if router.needs_aux_logits or self.has_variable('params', 'auxiliary'):
      inputs = inputs._replace(
          aux_logits_BTE=auxiliary.AuxRouter((1,), name='auxiliary')(x_BTD))
    settings = routing.RouterSettings(
        capacity=self.capacity, experts=(1,), update_rate=self.threshold_rate)
    chosen = router.route(inputs, settings)
    selected_BT1, gate_BT1 = chosen.selected_BTE, chosen.probs_BTE
    if self.has_variable('errors', 'error_prob'):
      selected_BT1, gate_BT1 = routing.with_random_errors(
          self.make_rng('errors'),
          self.get_variable('errors', 'error_prob'), router,
          selected_BT1, gate_BT1, inputs)
    if router.state:
      state[router.state.name] = router.state.update(
          jax.lax.stop_gradient(inputs), selected_BT1, settings)
    stats = routing.RouterStats(selected_BT1, _entropy(logits_BT1, valid_BT))
    if inputs.aux_logits_BTE is not None:
      stats = stats._replace(
          aux_logits_BTE=inputs.aux_logits_BTE, allowed_BTE=allowed_BT1)
    aux = outputs.LayerAux(jnp.zeros((), jnp.float32), state, stats)
    return selected_BT1[..., 0], gate_BT1[..., 0], aux


def _entropy(logits_BT1, valid_BT):
  """Average the entropy of picked or not over valid tokens, in nats."""
  p_BT = jax.nn.sigmoid(logits_BT1[..., 0])
  each_BT = jax.nn.softplus(logits_BT1[..., 0]) - p_BT * logits_BT1[..., 0]
  tokens = jnp.maximum(valid_BT.sum(), 1)
  return jnp.where(valid_BT, each_BT, 0).sum(1).sum(0) / tokens


def max_picked(capacity: float, tokens: int) -> int:
  """Count the most tokens that expert choice picks of a sequence."""
  return min(tokens, math.ceil(capacity * tokens))


def on_picked(
    block: Callable[..., tuple[jax.Array, Any, outputs.BlockAux]],
    selected_BT: Bool[Array, 'B T'],
    gate_BT: Float[Array, 'B T'],
    x_BTD: Float[Array, 'B T D'],
    cache: Any,
    tokens: layers.TokenInfo,
    max_rows: int | None,
) -> tuple[Float[Array, 'B T D'], Any, outputs.BlockAux]:
  """Run a block on picked tokens alone: (x, cache, aux).

  Args:
    block: (x, cache, tokens) -> (x, cache, aux).
    max_rows: the block gets that many tokens of each sequence, all picked ones
      and padding; None gives it all T, and those not picked are padding.
  """
  pick, spread = _moves(selected_BT, max_rows)
  x_BRD, picked_BR, tokens = jax.tree.map(pick, (x_BTD, selected_BT, tokens))
  tokens = tokens._replace(
      modality_BT=jnp.where(picked_BR, tokens.modality_BT, -1),
      segment_BT=jnp.where(picked_BR, tokens.segment_BT, 0))
  out_BRD, cache, aux = block(x_BRD, cache, tokens)
  change_BTD = spread(out_BRD - x_BRD) * gate_BT[..., None].astype(x_BTD.dtype)
  x_BTD = x_BTD + jnp.where(selected_BT[..., None], change_BTD, 0)

  def of_all_tokens(part):
    if part.stats is None:
      return part
    stats, picked_BT1 = part.stats, selected_BT[..., None]
    stats = stats._replace(selected_BTE=spread(stats.selected_BTE) & picked_BT1)
    if stats.aux_logits_BTE is not None:
      stats = stats._replace(
          aux_logits_BTE=spread(stats.aux_logits_BTE),
          allowed_BTE=spread(stats.allowed_BTE) & picked_BT1)
    return part._replace(stats=stats)

  (aux,) = outputs.map_parts(of_all_tokens, [aux])
  return x_BTD, cache, aux


def _moves(selected_BT, max_rows):
  """Make two functions: all tokens -> rows, picked ones first; and back."""
  if max_rows is None:
    same = lambda a: a
    return same, same
  index_BR = jnp.argsort(~selected_BT, axis=1, stable=True)[:, :max_rows]
  row_BT = jnp.clip(jnp.cumsum(selected_BT, 1) - 1, 0, max_rows - 1)

  def pick(a_BT):
    return _along(a_BT, index_BR)

  def spread(a_BR):
    return _along(a_BR, row_BT)

  return pick, spread


def _along(a_BT, index_BR):
  """Take entries along the second axis, whatever axes follow it."""
  index = index_BR.reshape(*index_BR.shape, *(1,) * (a_BT.ndim - 2))
  return jnp.take_along_axis(a_BT, index, 1)
