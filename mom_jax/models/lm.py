"""The language model: embed, repeated blocks, final norm, logits."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from mom_jax import config
from mom_jax.models import (
    block,
    embed,
    layers,
    memory_params,
    mom,
    outputs,
)
from mom_jax.parallel import sharding

# What the backward pass of a block keeps: name to jax.checkpoint policy.
REMAT = {
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'full': jax.checkpoint_policies.nothing_saveable,
}


class Output(NamedTuple):
  """Logits, cache and aux of a model.

  Attributes:
    logits: of the next token, float32 [B, T, W].
    cache: the cache with these tokens in it, or None.
    aux: one `BlockAux` per block of the pattern, every leaf with the pattern's
      repeats on the leading axis; `outputs.layers` goes through all layers.
  """

  logits: jax.Array
  cache: Any
  aux: tuple[outputs.BlockAux, ...]


class Unit(nn.Module):
  """The blocks of the pattern, once.

  Carried from block to block: the residual stream and, for rules that ask for
  them, the values of the first layer.
  """

  cfg: config.Model

  @nn.compact
  def __call__(self, carry, caches, constants_U, tokens):
    """Run the blocks: (carry, (caches, aux))."""
    x_BTD, v_first_BTHV = carry
    cls = block.Block
    if self.cfg.remat != 'none':
      cls = nn.remat(cls, policy=REMAT[self.cfg.remat], prevent_cse=False)
    new, aux = {}, []
    blocks = zip(self.cfg.unit, self.cfg.mod_blocks)
    for i, ((mixer, channel), is_mod) in enumerate(blocks):
      name = outputs.block_name(i)
      block_ = cls(self.cfg, mixer, channel, is_mod, name=name)
      info = layers.LayerInfo(
          jax.tree.map(lambda a, i=i: a[i], constants_U), v_first_BTHV)
      x_BTD, new[name], block_aux = block_(
          x_BTD, None if caches is None else caches[name], tokens, info)
      mixed = block_aux.mixer
      if mixed.v_first_BTHV is not None:
        v_first_BTHV = mixed.v_first_BTHV
        block_aux = block_aux._replace(mixer=mixed._replace(v_first_BTHV=None))
      aux.append(block_aux)
      x_BTD = sharding.constrain_batch(x_BTD)
    return (x_BTD, v_first_BTHV), (None if caches is None else new, tuple(aux))


class LM(nn.Module):
  """A decoder-only language model over text and image tokens."""

  cfg: config.Config

  @nn.compact
  def __call__(
      self,
      tokens_BT: Int[Array, 'B T'],
      modality_BT: jax.Array | None = None,
      segment_BT: jax.Array | None = None,
      cache: dict[str, Any] | None = None,
  ) -> Output:
    """Compute the logits of the next token at every position.

    Training, prefill and decoding are this one function: with a cache, T may be
    anything from 1 up and the sequences continue where they ended. The rng
    'routing' is for training with `moma.noise`; the collection 'errors' and its
    rng, for wrong decisions of routers, see `moma.Moma`.

    Args:
      tokens_BT: int32.
      modality_BT: index into `model.modalities` of each of these tokens; None
        is all 0.
      segment_BT: document of each token, 0 on padding; None is one document
        without padding. With a cache it marks padding (0) only, which may stand
        anywhere and is not stored.
      cache: of `init_cache`, or None.
    Raises:
      ValueError: modality or segment has another shape than the tokens.
    """
    model = self.cfg.model
    modality_BT = _like(tokens_BT, modality_BT, 'modality', 0)
    segment_BT = _like(tokens_BT, segment_BT, 'segment', 1)
    valid_BT = segment_BT > 0
    modality_BT = jnp.where(valid_BT, modality_BT, -1)
    table = embed.Embed(model, name='embed')
    x_BTD, embed_cache = table(
        tokens_BT, modality_BT, segment_BT,
        None if cache is None else cache['embed'])
    norm = functools.partial(layers.NORMS[model.norm], model.norm_eps)
    if model.embed_norm:
      x_BTD = norm(name='embed_norm')(x_BTD)
    x_BTD = sharding.constrain_batch(x_BTD)
    if cache is None:
      position_BT = layers.position_in_document(segment_BT)
    else:
      position_BT = cache['length_B'][:, None] + jnp.cumsum(valid_BT, 1) - 1
    units = nn.scan(
        Unit,
        variable_axes={'params': 0, 'errors': 0},
        split_rngs={'params': True, 'routing': True, 'errors': True},
        in_axes=(0, 0, nn.broadcast),
        out_axes=0,
        length=model.repeats,
        metadata_params={nn.PARTITION_NAME: 'layers'},
    )(model, name='units')
    (x_BTD, _), (caches, aux) = units(
        (x_BTD, _v_first_zeros(model, x_BTD)),
        None if cache is None else cache['units'], self._layer_values(),
        layers.TokenInfo(modality_BT, segment_BT, position_BT),
    )
    x_BTD = norm(name='final_norm')(x_BTD)
    if model.tie_embeddings:
      logits_BTW = table.logits(x_BTD)
    else:
      logits_BTW = embed.output(model, 'output')(x_BTD)
    if cache is not None:
      length_B = cache['length_B'] + valid_BT.sum(1, dtype=jnp.int32)
      cache = {'length_B': length_B, 'embed': embed_cache, 'units': caches}
    return Output(logits_BTW, cache, aux)

  def _layer_values(self) -> dict[str, jax.Array]:
    """Make the constants of each layer, [repeats, blocks of the unit, ...]."""
    model = self.cfg.model
    mixer, stacked = model.mixer, None
    if any(name == 'mom' for name, _ in model.unit):
      stacked = {}
      for name, (shape, axes, init) in memory_params.cross_layer(mixer).items():
        stacked[name] = layers.param(
            self, f'layers_{name}', (model.num_layers, *shape), (None, *axes),
            init)
    values = mom.layer_values(mixer, model.num_layers, stacked)
    return jax.tree.map(
        lambda a: a.reshape(model.repeats, len(model.unit), *a.shape[1:]),
        values)


def _v_first_zeros(cfg: config.Model, x_BTD: jax.Array) -> jax.Array | None:
  """Make zeros in place of v_first; None if no rule asks for it.

  Raises:
    ValueError: some blocks do not get all tokens.
  """
  mixer = cfg.mixer
  if not any(name == 'mom' for name, _ in cfg.unit) or (
      memory_params.rule_of(mixer).v_first_gate is None):
    return None
  if any(cfg.mod_blocks):
    raise ValueError(
        f'config.model.pattern={cfg.pattern!r} has mod/ blocks, which see a'
        f' part of the tokens; rule={mixer.rule!r} mixes the values of every'
        ' token with those of the first block, so leave mod/ out.'
    )
  shape = (*x_BTD.shape[:2], mixer.num_heads, mixer.value_dim)
  return jnp.zeros(shape, x_BTD.dtype)


def _like(tokens_BT, x_BT, name, default):
  """Return x, or `default` for each token, and check the shape."""
  if x_BT is None:
    return jnp.full_like(tokens_BT, default)
  if x_BT.shape != tokens_BT.shape:
    raise ValueError(
        f'{name} has shape {x_BT.shape} and tokens {tokens_BT.shape}; each'
        f' token needs one {name}.'
    )
  return x_BT


def init_params(cfg: config.Config, key: Key[Array, ''] | jax.Array) -> Any:
  """Make new parameters in flax's boxes, with their logical axes.

  `nn.meta.unbox` opens them; `sharding.param_shardings` reads them. Works under
  any mesh: the dummy tokens for `init` have the smallest shape that the mesh
  can split.
  """
  tokens_BT = jnp.zeros(
      (sharding.batch_shards(), sharding.axis_size('time')), jnp.int32)
  with layers.with_logical_axes():
    return jax.jit(LM(cfg).init)(key, tokens_BT)['params']


def init_cache(
    cfg: config.Config, batch: int, max_len: int | None = None
) -> dict[str, Any]:
  """Make an empty cache.

  Args:
    max_len: most tokens of a sequence; only a pattern with attention needs it.
  Returns:
    A dict:
      length_B: tokens of each sequence so far, int32.
      embed: run_B, image tokens at the end of each sequence, int32; {} without
        `model.image_side`.
      units: by block of the pattern (`outputs.block_name`), each with 'mixer'
        and 'channel', every array with the pattern's repeats on the leading
        axis. mom: as in `Mom.init_cache`; attention: key_BSHK and value_BSHK,
        S = max_len, and length_B; shift_mlp: last_BD, the last token; other
        channel mixers: {}.
  Raises:
    ValueError: the pattern has attention and `max_len` is None.
  """
  return {
      'length_B': jnp.zeros(batch, jnp.int32),
      'embed': embed.init_cache(cfg.model, batch),
      'units': block.init_cache(cfg.model, batch, max_len),
  }
