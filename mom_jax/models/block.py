"""One block: a token mixer and a channel mixer on the residual stream."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mom_jax import config, routing
from mom_jax.models import (
    attention,
    layers,
    mlp,
    mod,
    mom,
    moma,
    outputs,
    rows,
)


class Mixer(NamedTuple):
  """A token mixer: (x, cache, segment, layer, modality) -> (y, cache, aux).

  Attributes:
    module: makes it from (config.Model, name=...).
    init_cache: (config.Model, batch, max_len) -> its empty cache.
    slots: the cache holds max_len tokens, rather than a fixed size.
    places: it also takes position_BT, of each token in its document, which
      counts tokens that the mixer does not get.
  """

  module: Callable[..., nn.Module]
  init_cache: Callable[[config.Model, int, int], dict[str, jax.Array]]
  slots: bool
  places: bool


MIXERS = {
    'mom': Mixer(
        mom.Mom, lambda cfg, batch, _: mom.init_cache(cfg, batch), False,
        False),
    'attention': Mixer(
        attention.Attention, attention.init_cache, True, True),
}

# (x_BTD, modality_BT) -> (y_BTD, aux); a shifted one reads the token before
# instead: (x_BTD, before_BTD, depth of the layer) -> (y_BTD, aux).
CHANNELS: dict[str, Callable[..., nn.Module] | None] = {
    'mlp': mlp.Mlp,
    'moma': moma.Moma,
    'shift_mlp': mlp.ShiftMlp,
    'none': None,
}
SHIFTED = ('shift_mlp',)
LAST = 'channel_last_BD'  # in a block's cache, what the channel mixer read last


class Block(nn.Module):
  """x += mixer(norm(x)); x += channel(norm(x)), or with norms after.

  'pre': x + f(norm(x)). 'post': x + norm(f(x)), as in Swin and Chameleon.
  Channel mixer 'none': the first half alone, as in Mamba.
  A block of Mixture-of-Depths does so for the tokens that it picks alone.
  """

  cfg: config.Model
  mixer: str
  channel: str
  is_mod: bool

  @nn.compact
  def __call__(
      self,
      x_BTD: Float[Array, 'B T D'],
      cache: Any,
      modality_BT: Int[Array, 'B T'],
      segment_BT: Int[Array, 'B T'],
      position_BT: Int[Array, 'B T'],
      layer: dict[str, jax.Array] | None = None,
  ) -> tuple[Float[Array, 'B T D'], Any, outputs.BlockAux]:
    """One block.

    Args:
      x_BTD: residual stream.
      cache: of the token mixer, or None.
      modality_BT: modality of each token, -1 on padding.
      segment_BT: document of each token, 0 on padding.
      position_BT: of each token in its document.
      layer: what mixers are told of their place among the layers.
    Returns:
      (x, cache, aux).
    """
    if not self.is_mod:
      return self._mix(
          layer, x_BTD, cache, modality_BT, segment_BT, position_BT)
    pick = mod.Mod(self.cfg, name='mod')
    selected_BT, gate_BT, picked = pick(x_BTD, segment_BT > 0)
    # Only expert choice without errors says beforehand how many at most.
    bound = not routing.get(self.cfg.mod.router).causal
    bound &= cache is None and not self.has_variable('errors', 'mod')
    rows = mod.room(self.cfg.mod, x_BTD.shape[1]) if bound else None
    x_BTD, cache, aux = mod.on_picked(
        functools.partial(self._mix, layer), selected_BT, gate_BT, x_BTD, cache,
        modality_BT, segment_BT, position_BT, rows)
    return x_BTD, cache, aux._replace(mod=picked)

  def _mix(self, layer, x_BTD, cache, modality_BT, segment_BT, position_BT):
    """Both mixers."""
    norm = lambda name: functools.partial(
        layers.NORMS[self.cfg.norm](
            self.cfg.norm_eps, self.cfg.num_modality_copies, name=name),
        modality_BT=modality_BT)
    module = MIXERS[self.mixer].module(self.cfg, name='mixer')
    where = position_BT if MIXERS[self.mixer].places else layer
    mixer = lambda *inputs: module(*inputs, where, modality_BT)
    last_BD = None
    if cache is not None:
      cache = dict(cache)
      last_BD = cache.pop(LAST, None)
    if self.cfg.mixer_norm == 'pre':
      y_BTD, cache, mixed = mixer(
          norm('mixer_norm')(x_BTD), cache, segment_BT)
    else:
      y_BTD, cache, mixed = mixer(x_BTD, cache, segment_BT)
      y_BTD = norm('mixer_norm')(y_BTD)
    x_BTD = x_BTD + y_BTD
    if self.channel == 'none':
      return x_BTD, cache, outputs.BlockAux(mixed)
    channel = CHANNELS[self.channel](self.cfg, name='channel')
    y_BTD = x_BTD
    if self.cfg.channel_norm == 'pre':
      y_BTD = norm('channel_norm')(y_BTD)
    if self.channel in SHIFTED:
      before_BTD, last_BD = rows.token_before(y_BTD, segment_BT, last_BD)
      y_BTD, routed = channel(y_BTD, before_BTD, layer['layer_fraction'])
      if cache is not None:
        cache[LAST] = last_BD
    else:
      y_BTD, routed = channel(y_BTD, modality_BT)
    if self.cfg.channel_norm == 'post':
      y_BTD = norm('channel_norm')(y_BTD)
    return x_BTD + y_BTD, cache, outputs.BlockAux(mixed, routed)


def init_cache(
    cfg: config.Model, batch: int, max_len: int | None
) -> dict[str, Any]:
  """Empty caches of the repeated blocks, repeats on the leading axis.

  Raises:
    ValueError: a mixer stores tokens and `max_len` is None.
  """
  units = {}
  for i, (name, channel) in enumerate(cfg.unit):
    mixer = MIXERS[name]
    if mixer.slots and max_len is None:
      raise ValueError(
          f'max_len=None: config.model.pattern={cfg.pattern!r} has {name!r},'
          ' whose cache grows with the tokens; give the longest row, prompt and'
          ' new tokens together.'
      )
    cache = mixer.init_cache(cfg, batch, max_len)
    if channel in SHIFTED:
      cache[LAST] = jnp.zeros((batch, cfg.width), jnp.dtype(cfg.dtype))
    units[outputs.block_name(i)] = jax.tree.map(
        lambda a: jnp.zeros((cfg.repeats, *a.shape), a.dtype), cache)
  return units
