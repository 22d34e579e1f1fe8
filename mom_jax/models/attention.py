"""Causal softmax attention, a token mixer."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mom_jax import config, pallas
from mom_jax.models import layers, outputs
from mom_jax.parallel import sharding
from mom_jax.rules import rotary

Cache = dict[str, jax.Array]


class Attention(nn.Module):
  """Each token reads the tokens of its document up to itself.

    y_t = W_o sum_{s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s

  Query heads share key/value heads in order; queries and keys are
  RMS-normalised per head (`qk_norm`), then turned by their position inside the
  document. With `window` w a token reads the w newest tokens only, of those
  that this layer gets.

  Source: arXiv 1706.03762; 2104.09864 (rotary), 2305.13245 (grouped heads),
  2405.09818 (normalised queries and keys, there by layer norm).
  """

  cfg: config.Model

  @nn.compact
  def __call__(
      self,
      x_BTD: Float[Array, 'B T D'],
      cache: Cache | None,
      segment_BT: Int[Array, 'B T'],
      position_BT: Int[Array, 'B T'] | None = None,
      modality_BT: Int[Array, 'B T'] | None = None,
  ) -> tuple[Float[Array, 'B T D'], Cache | None, outputs.LayerAux]:
    """Mixes tokens.

    Args:
      x_BTD: normalised residual stream.
      cache: keys and values so far, or None in training. A token beyond its
        last slot gets NaN.
      segment_BT: document of each token; 0 marks padding, which nothing reads
        and whose output is zero. With a cache, any other number is the same
        document going on.
      position_BT: what the rotary embedding turns by; None counts the tokens
        of the document.
      modality_BT: of each token, -1 on padding; for modality-specific maps.
    Returns:
      (y, cache, aux).
    """
    attention, D = self.cfg.attention, self.cfg.width
    H, K = attention.num_heads, attention.head_dim
    copies = self.cfg.num_modality_copies
    project = lambda name, heads: layers.Einsum(
        'btd,dhk->bthk', (D, heads, K), ('embed', 'heads', 'kv'), name=name,
        modalities=copies)(x_BTD, modality_BT)
    norm = lambda name, x_BTHK: layers.RMSNorm(
        self.cfg.norm_eps, copies, name=name)(x_BTHK, modality_BT)
    q_BTHK = project('query', H)
    k_BTGK = project('key', attention.num_kv_heads)
    v_BTGK = project('value', attention.num_kv_heads)
    if attention.qk_norm:
      q_BTHK = norm('query_norm', q_BTHK)
      k_BTGK = norm('key_norm', k_BTGK)
    valid_BT = segment_BT > 0
    if cache is None:
      count_BT = position_in_document(segment_BT)
    else:
      count_BT = cache['length_B'][:, None] + jnp.cumsum(valid_BT, 1) - 1
    place_BT = count_BT if position_BT is None else position_BT
    q_BTHK = rotary.rotate(q_BTHK, place_BT, attention.rope_theta)
    k_BTGK = rotary.rotate(k_BTGK, place_BT, attention.rope_theta)
    if cache is None:
      # Queries stay where they are; keys and values come from all devices.
      k_BTGK = sharding.constrain_batch(k_BTGK, whole_time=True)
      v_BTGK = sharding.constrain_batch(v_BTGK, whole_time=True)
      mask_BTS = _document_mask(segment_BT)
      count_BS = count_BT
    else:
      cache = _append(cache, k_BTGK, v_BTGK, count_BT, valid_BT)
      k_BTGK, v_BTGK = cache['key_BSHK'], cache['value_BSHK']
      count_BS = jnp.arange(k_BTGK.shape[1])[None]
      mask_BTS = count_BT[..., None] >= count_BS[:, None]
    if attention.window:
      age_BTS = count_BT[..., None] - count_BS[:, None]
      mask_BTS &= age_BTS < attention.window
    y_BTHK = attend(q_BTHK, k_BTGK, v_BTGK, mask_BTS, attention.backend)
    y_BTD = layers.Einsum(
        'bthk,hkd->btd', (H, K, D), ('heads', 'kv', 'embed'), name='output',
        modalities=copies)(y_BTHK, modality_BT)
    y_BTD = jnp.where(valid_BT[..., None], y_BTD, 0)
    if cache is not None:
      full_BT = valid_BT & (count_BT >= k_BTGK.shape[1])
      y_BTD = jnp.where(full_BT[..., None], jnp.nan, y_BTD)
    return y_BTD, cache, outputs.no_router()


def init_cache(cfg: config.Model, batch: int, max_len: int) -> Cache:
  """No tokens yet, room for `max_len` a row."""
  attention = cfg.attention
  shape = (batch, max_len, attention.num_kv_heads, attention.head_dim)
  return {
      'key_BSHK': jnp.zeros(shape, cfg.dtype),
      'value_BSHK': jnp.zeros(shape, cfg.dtype),
      'length_B': jnp.zeros(batch, jnp.int32),
  }


def position_in_document(segment: Int[Array, 'B T']) -> Int[Array, 'B T']:
  """Number of tokens of the same document before each token.

  Padding may stand between tokens of a document, and does not count; its own
  position means nothing.
  """
  valid_BT = segment > 0
  count_BT = jnp.cumsum(valid_BT, 1)
  index_BT = jnp.where(valid_BT, jnp.arange(segment.shape[1])[None], -1)
  newest_BT = jax.lax.cummax(index_BT, axis=1)
  before_BT = jnp.pad(newest_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  before_segment_BT = jnp.take_along_axis(
      segment, jnp.maximum(before_BT, 0), axis=1)
  same_BT = (before_BT >= 0) & (before_segment_BT == segment)
  first_BT = jnp.where(valid_BT & ~same_BT, count_BT, 0)
  return count_BT - jax.lax.cummax(first_BT, axis=1)


def _document_mask(segment_BT) -> Bool[Array, 'B T S']:
  """Which tokens read which: earlier ones of the same document."""
  T = segment_BT.shape[1]
  same_BTS = segment_BT[:, :, None] == segment_BT[:, None]
  return same_BTS & jnp.tril(jnp.ones((T, T), bool))[None]


def _append(cache, k_BTGK, v_BTGK, count_BT, valid_BT) -> Cache:
  """Writes tokens one after another, padding to no slot."""
  slots = cache['key_BSHK'].shape[1]
  slot_BT = jnp.where(valid_BT, count_BT, slots)
  write = jax.vmap(lambda old, slot, new: old.at[slot].set(
      new.astype(old.dtype), mode='drop'))
  return {
      'key_BSHK': write(cache['key_BSHK'], slot_BT, k_BTGK),
      'value_BSHK': write(cache['value_BSHK'], slot_BT, v_BTGK),
      'length_B': cache['length_B'] + valid_BT.sum(1, dtype=jnp.int32),
  }


def attend(
    q: Float[Array, 'B T H K'],
    k: Float[Array, 'B S G K'],
    v: Float[Array, 'B S G K'],
    mask: Bool[Array, 'B T S'],
    backend: str,
) -> Float[Array, 'B T H K']:
  """softmax(q k^T / sqrt(K)) v over the slots that the mask allows.

  Args:
    backend: xla, cudnn, or auto: cudnn where it can run.
  Raises:
    NotImplementedError: cudnn was asked for and cannot run; says why.
  """
  reason = _cudnn_cannot(q, k)
  if backend == 'cudnn' and reason:
    raise NotImplementedError(
        f"config.model.attention.backend='cudnn': {reason}; choose auto or xla."
    )
  if backend == 'auto':
    backend = 'xla' if reason else 'cudnn'
  return jax.nn.dot_product_attention(
      q, k.astype(q.dtype), v.astype(q.dtype), mask=mask[:, None],
      implementation=backend,
  )


def _cudnn_cannot(q, k) -> str | None:
  """Why cuDNN cannot attend with a mask here, or None."""
  if pallas.platform() != 'gpu':
    return f'it needs an NVIDIA GPU and this is a {pallas.platform()}'
  if 'cuda' not in jax.devices()[0].client.platform_version:
    return 'it needs an NVIDIA GPU'
  if q.dtype != jnp.bfloat16:
    return f'it takes bfloat16 and not {q.dtype}'
  if q.shape[1] % 2 or k.shape[1] % 2:
    return f'it takes even lengths, not {q.shape[1]} and {k.shape[1]}'
  if q.shape[-1] % 8 or q.shape[-1] > 128:
    return f'head_dim={q.shape[-1]} is no multiple of 8 up to 128'
  return None
