"""One block: a token mixer and a channel mixer on the residual stream."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mom_jax import config, routing
from mom_jax.models import attention, layers, mlp, mod, mom, moma, outputs


class Sublayer(NamedTuple):
  """A token mixer or channel mixer, made and called in a block.

  The three functions are the only place that knows which settings a layer has
  and which values it takes.

  Attributes:
    make: (config.Model, name) -> the layer.
    call: (layer, x_BTD, cache, `layers.TokenInfo`, `layers.LayerInfo`) ->
      (y_BTD, cache, `outputs.LayerAux`); cache is None in training.
    init_cache: (config.Model, batch, max_len) -> its empty cache, {} for a
      layer that looks at one token at a time.
  """

  make: Callable[..., nn.Module]
  call: Callable[..., tuple[jax.Array, Any, outputs.LayerAux]]
  init_cache: Callable[[config.Model, int, int | None], dict[str, jax.Array]]


def _mom(cfg: config.Model, name: str | None = None) -> mom.Mom:
  settings = vars(cfg.mixer) | {
      'norm_eps': cfg.mixer.norm_eps or cfg.norm_eps}
  return mom.Mom(
      cfg.width, **settings, num_modality_copies=cfg.num_modality_copies,
      router_collection='params', name=name)


def _call_mom(layer, x_BTD, cache, tokens, layer_info):
  return layer(
      x_BTD, cache, tokens.segment_BT, tokens.modality_BT, layer_info)


def _mom_cache(cfg, batch, max_len):
  del max_len
  return _mom(cfg).init_cache(batch, jnp.dtype(cfg.dtype))


def _attention(
    cfg: config.Model, name: str | None = None
) -> attention.Attention:
  return attention.Attention(
      cfg.width, **vars(cfg.attention), norm_eps=cfg.norm_eps,
      num_modality_copies=cfg.num_modality_copies, name=name)


def _call_attention(layer, x_BTD, cache, tokens, layer_info):
  del layer_info
  return layer(
      x_BTD, cache, tokens.segment_BT, tokens.modality_BT, tokens.position_BT)


def _attention_cache(cfg, batch, max_len):
  if max_len is None:
    raise ValueError(
        f"max_len=None: config.model.pattern={cfg.pattern!r} has 'attention',"
        ' whose cache grows with the tokens; give the length of the longest'
        ' sequence, prompt and new tokens together.'
    )
  return _attention(cfg).init_cache(batch, max_len, jnp.dtype(cfg.dtype))


def _mlp(cfg: config.Model, name: str | None = None) -> mlp.Mlp:
  return mlp.Mlp(cfg.width, cfg.mlp.hidden, name=name)


def _call_mlp(layer, x_BTD, cache, tokens, layer_info):
  del tokens, layer_info
  y_BTD, aux = layer(x_BTD)
  return y_BTD, cache, aux


def _moma(cfg: config.Model, name: str | None = None) -> moma.Moma:
  routing.get(cfg.moma.router, 'config.model.moma.router')
  return moma.Moma(
      cfg.width, **vars(cfg.moma), router_collection='params', name=name)


def _call_moma(layer, x_BTD, cache, tokens, layer_info):
  del layer_info
  y_BTD, aux = layer(x_BTD, tokens.modality_BT)
  return y_BTD, cache, aux


def _no_cache(cfg, batch, max_len):
  del cfg, batch, max_len
  return {}


def _shift_mlp(cfg: config.Model, name: str | None = None) -> mlp.ShiftMlp:
  return mlp.ShiftMlp(cfg.width, cfg.mlp.hidden, name=name)


def _call_shift_mlp(layer, x_BTD, cache, tokens, layer_info):
  return layer(x_BTD, cache, tokens.segment_BT,
               layer_info.constants['layer_fraction'])


def _shift_mlp_cache(cfg, batch, max_len):
  del max_len
  return _shift_mlp(cfg).init_cache(batch, jnp.dtype(cfg.dtype))


MIXERS = {
    'mom': Sublayer(_mom, _call_mom, _mom_cache),
    'attention': Sublayer(_attention, _call_attention, _attention_cache),
}
CHANNELS = {
    'mlp': Sublayer(_mlp, _call_mlp, _no_cache),
    'moma': Sublayer(_moma, _call_moma, _no_cache),
    'shift_mlp': Sublayer(_shift_mlp, _call_shift_mlp, _shift_mlp_cache),
    'none': None,
}


class Block(nn.Module):
  """Token mixer and channel mixer on the residual stream.

  Norms 'pre': x + f(norm(x)); 'post': x + norm(f(x)), as in Swin and Chameleon.
  Channel mixer 'none' omits the second half, as in Mamba. A Mixture-of-Depths
  block processes the picked tokens only.

  Attributes:
    mixer: a key of `MIXERS`.
    channel: a key of `CHANNELS`.
    is_mod: the block is a Mixture-of-Depths block.
  """

  cfg: config.Model
  mixer: str
  channel: str
  is_mod: bool

  @nn.compact
  def __call__(
      self,
      x_BTD: Float[Array, 'B T D'],
      cache: dict[str, Any] | None,
      tokens: layers.TokenInfo,
      layer_info: layers.LayerInfo,
  ) -> tuple[Float[Array, 'B T D'], dict[str, Any] | None, outputs.BlockAux]:
    """Run the block.

    Args:
      x_BTD: residual stream.
      cache: {'mixer': its cache, 'channel': its cache}, or None.
      layer_info: inputs of the layers that depend on their index.
    Returns:
      (x, cache, aux).
    """
    run = functools.partial(self._run, layer_info)
    if not self.is_mod:
      return run(x_BTD, cache, tokens)
    pick = mod.Mod(
        **vars(self.cfg.mod), router_collection='params', name='mod')
    selected_BT, gate_BT, picked = pick(x_BTD, tokens.segment_BT > 0)
    # Only expert choice without errors says beforehand how many at most.
    bound = not routing.get(self.cfg.mod.router).causal
    bound &= cache is None and not self.has_variable('errors', 'mod')
    max_rows = None
    if bound:
      max_rows = mod.max_picked(self.cfg.mod.capacity, x_BTD.shape[1])
    x_BTD, cache, aux = mod.on_picked(
        run, selected_BT, gate_BT, x_BTD, cache, tokens, max_rows)
    return x_BTD, cache, aux._replace(mod=picked)

  def _run(self, layer_info, x_BTD, cache, tokens):
    """Run both halves of the block."""
    old = {'mixer': None, 'channel': None} if cache is None else cache
    new, channel_aux = dict(old), None
    x_BTD, new['mixer'], mixer_aux = self._half(
        'mixer', MIXERS[self.mixer], self.cfg.mixer_norm, x_BTD, old['mixer'],
        tokens, layer_info)
    if self.channel != 'none':
      x_BTD, new['channel'], channel_aux = self._half(
          'channel', CHANNELS[self.channel], self.cfg.channel_norm, x_BTD,
          old['channel'], tokens, layer_info)
    aux = outputs.BlockAux(mixer_aux, channel_aux)
    return x_BTD, None if cache is None else new, aux

  def _half(self, name, sublayer, norm_at, x_BTD, cache, tokens, layer_info):
    """Add f(norm(x)), or norm(f(x)), to x."""
    norm = layers.NORMS[self.cfg.norm](
        self.cfg.norm_eps, self.cfg.num_modality_copies, name=f'{name}_norm')
    layer, y_BTD = sublayer.make(self.cfg, name), x_BTD
    if norm_at == 'pre':
      y_BTD = norm(y_BTD, tokens.modality_BT)
    y_BTD, cache, aux = sublayer.call(layer, y_BTD, cache, tokens, layer_info)
    if norm_at == 'post':
      y_BTD = norm(y_BTD, tokens.modality_BT)
    return x_BTD + y_BTD, cache, aux


def init_cache(
    cfg: config.Model, batch: int, max_len: int | None
) -> dict[str, Any]:
  """Make empty caches of the repeated blocks, repeats on the leading axis.

  Raises:
    ValueError: a mixer stores tokens and `max_len` is None.
  """
  caches = {}
  for i, (mixer, channel) in enumerate(cfg.unit):
    sublayers = {'mixer': MIXERS[mixer], 'channel': CHANNELS[channel]}
    cache = {
        name: {} if sublayer is None else sublayer.init_cache(
            cfg, batch, max_len)
        for name, sublayer in sublayers.items()}
    caches[outputs.block_name(i)] = jax.tree.map(
        lambda a: jnp.zeros((cfg.repeats, *a.shape), a.dtype), cache)
  return caches
