"""Mixture-of-Depths: a block that works on a part of the tokens."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mom_jax import config, routing
from mom_jax.models import auxiliary, layers, outputs


class Mod(nn.Module):
  """Picks the tokens that a block works on; the others pass it by.

    r = sigmoid(x w);  y_t = x_t + r_t (block(x)_t - x_t)  for picked t

  Expert choice picks the ceil(c T) largest r of each sequence, which sees the
  future; thresholds or auxiliary routers take its place as in `moma.Moma`, and
  so does the collection 'errors'. Who is not picked is not there for the block:
  no attention, memory, convolution or expert sees it, in decoding either.

  Source: arXiv 2404.02258 and, for the sigmoid and the auxiliary routers,
  2407.21770, section 2.3; the pool of the latter is the whole batch, ours the
  sequence, for static shapes.
  """

  cfg: config.Model

  @nn.compact
  def __call__(
      self, x_BTD: Float[Array, 'B T D'], valid_BT: Bool[Array, 'B T']
  ) -> tuple[
      Bool[Array, 'B T'], Float[Array, 'B T'], outputs.LayerAux]:
    """(picked, r, aux); aux is as that of `moma.Moma` with one expert."""
    mod = self.cfg.mod
    router = routing.get(mod.router, 'config.model.mod.router')
    scores_BT1 = layers.Einsum(
        'btd,de->bte', (x_BTD.shape[-1], 1), ('embed', None),
        dtype=jnp.float32, name='router',
    )(x_BTD)
    allowed_BT1 = valid_BT[..., None]
    inputs, state = routing.RouterInputs(scores_BT1, allowed_BT1), {}
    if router.state:
      init = lambda key, shape: router.state.init(shape[0])
      inputs = inputs._replace(state_E=jax.lax.stop_gradient(
          layers.param(self, router.state.name, (1,), (None,), init)))
    if router.needs_aux_logits or self.has_variable('params', 'auxiliary'):
      inputs = inputs._replace(
          aux_logits_BTE=auxiliary.Auxiliary((1,), name='auxiliary')(x_BTD))
    settings = routing.RouterSettings(
        capacity=mod.capacity, groups=(1,), update_rate=mod.threshold_rate)
    chosen = router.route(inputs, settings)
    selected_BT1, gate_BT1 = chosen.selected_BTE, chosen.probs_BTE
    if self.has_variable('errors', 'rate'):
      selected_BT1, gate_BT1 = routing.with_random_errors(
          self.make_rng('errors'), self.get_variable('errors', 'rate'), router,
          selected_BT1, gate_BT1, allowed_BT1)
    if router.state:
      state[router.state.name] = router.state.update(
          inputs._replace(logits_BTE=jax.lax.stop_gradient(scores_BT1)),
          selected_BT1, settings)
    stats = routing.RouterStats(selected_BT1, _entropy(scores_BT1, valid_BT))
    if inputs.aux_logits_BTE is not None:
      stats = stats._replace(
          aux_logits_BTE=inputs.aux_logits_BTE, allowed_BTE=allowed_BT1)
    aux = outputs.LayerAux(jnp.zeros((), jnp.float32), state, stats)
    return selected_BT1[..., 0], gate_BT1[..., 0], aux


def _entropy(scores_BT1, valid_BT):
  """Mean over valid tokens of the entropy of picked or not, in nats."""
  p_BT = jax.nn.sigmoid(scores_BT1[..., 0])
  each_BT = jax.nn.softplus(scores_BT1[..., 0]) - p_BT * scores_BT1[..., 0]
  tokens = jnp.maximum(valid_BT.sum(), 1)
  return jnp.where(valid_BT, each_BT, 0).sum(1).sum(0) / tokens


def room(cfg: config.Mod, tokens: int) -> int:
  """Most tokens that expert choice picks of a sequence."""
  return min(tokens, math.ceil(cfg.capacity * tokens))


def on_picked(
    block: Callable[..., tuple[jax.Array, Any, outputs.BlockAux]],
    selected_BT: Bool[Array, 'B T'],
    gate_BT: Float[Array, 'B T'],
    x_BTD: Float[Array, 'B T D'],
    cache: Any,
    modality_BT: Int[Array, 'B T'],
    segment_BT: Int[Array, 'B T'],
    position_BT: Int[Array, 'B T'],
    rows: int | None,
) -> tuple[Float[Array, 'B T D'], Any, outputs.BlockAux]:
  """Runs a block on picked tokens alone: (x, cache, aux).

  Args:
    block: (x, cache, modality, segment, position) -> (x, cache, aux).
    rows: the block gets that many tokens of each sequence, all picked ones and
      padding; None gives it all T with those that were not picked as padding.
  """
  y_BTD, back = x_BTD, lambda a_BT: a_BT
  if rows is not None:
    index_BR = jnp.argsort(~selected_BT, axis=1, stable=True)[:, :rows]
    slot_BT = jnp.clip(jnp.cumsum(selected_BT, 1) - 1, 0, rows - 1)
    pick = lambda a_BT: _along(a_BT, index_BR)
    back = lambda a_BR: _along(a_BR, slot_BT)
    y_BTD, modality_BT, segment_BT, position_BT, mine_BR = map(
        pick, (x_BTD, modality_BT, segment_BT, position_BT, selected_BT))
  else:
    mine_BR = selected_BT
  out_BRD, cache, aux = block(
      y_BTD, cache, jnp.where(mine_BR, modality_BT, -1),
      jnp.where(mine_BR, segment_BT, 0), position_BT)
  change_BTD = back(out_BRD - y_BTD) * gate_BT[..., None].astype(x_BTD.dtype)
  x_BTD = x_BTD + jnp.where(selected_BT[..., None], change_BTD, 0)


  def of_all_tokens(part):
    if part.stats is None:
      return part
    stats = part.stats
    picked_BT1 = selected_BT[..., None]
    stats = stats._replace(selected_BTE=back(stats.selected_BTE) & picked_BT1)
    if stats.aux_logits_BTE is not None:
      stats = stats._replace(
          aux_logits_BTE=back(stats.aux_logits_BTE),
          allowed_BTE=back(stats.allowed_BTE) & picked_BT1)
    return part._replace(stats=stats)

  (aux,) = outputs.map_parts(of_all_tokens, [aux])
  return x_BTD, cache, aux


def _along(a_BT, index_BR):
  """Entries of each row, whatever lies behind the second axis."""
  index = index_BR.reshape(*index_BR.shape, *(1,) * (a_BT.ndim - 2))
  return jnp.take_along_axis(a_BT, index, 1)
