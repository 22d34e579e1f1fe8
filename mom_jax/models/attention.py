"""Causal softmax attention, a token mixer."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mom_jax import pallas
from mom_jax.models import layers, outputs
from mom_jax.parallel import sharding
from mom_jax.rules import rotary

Cache = dict[str, jax.Array]


class Context(NamedTuple):
  """Keys and values that tokens read, and which token reads which.

  Attributes:
    mask_BTS: token t reads slot s.
    full_BT: no slot of the cache was left for token t; None without a cache.
  """

  k_BSGK: Float[Array, 'B S G K']
  v_BSGK: Float[Array, 'B S G K']
  mask_BTS: Bool[Array, 'B T S']
  full_BT: Bool[Array, 'B T'] | None


class Attention(nn.Module):
  """Causal softmax attention over the tokens of a document.

    y_t = W_o sum_{s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s

  Query heads share key/value heads in order. Queries and keys are
  RMS-normalised per head (`qk_norm`) and then rotated by their position in the
  document.

    layer = Attention(width=512, num_heads=8)
    variables = layer.init(key, x_BTD)
    y_BTD, _, aux = layer.apply(variables, x_BTD)

  Attributes:
    width: D of the residual stream.
    num_heads: query heads H.
    num_kv_heads: key/value heads, a divisor of H; None is H.
    head_dim: size K of a head, even; None is D / H.
    qk_norm: RMS-normalise queries and keys per head.
    rope_theta: base of the rotary embedding.
    window: a token reads that many newest tokens, of those that this layer
      gets, itself included; 0 is all.
    backend: auto, xla or cudnn.
    norm_eps: epsilon of `qk_norm`.
    num_modality_copies: copies of projections and norms, one per modality
      (arXiv 2411.04996); 0 is one for all.

  Source: arXiv 1706.03762; 2104.09864 (rotary), 2305.13245 (grouped heads),
  2405.09818 (normalised queries and keys, there by layer norm).
  """

  width: int
  num_heads: int
  num_kv_heads: int | None = None
  head_dim: int | None = None
  qk_norm: bool = True
  rope_theta: float = 10000.0
  window: int = 0
  backend: str = 'auto'
  norm_eps: float = 1e-6
  num_modality_copies: int = 0

  @nn.compact
  def __call__(
      self,
      x_BTD: Float[Array, 'B T D'],
      cache: Cache | None = None,
      segment_BT: Int[Array, 'B T'] | None = None,
      modality_BT: Int[Array, 'B T'] | None = None,
      position_BT: Int[Array, 'B T'] | None = None,
  ) -> tuple[Float[Array, 'B T D'], Cache | None, outputs.LayerAux]:
    """Mix tokens.

    Args:
      x_BTD: normalised residual stream.
      cache: keys and values so far (`init_cache`), or None in training. A token
        beyond its last slot gets NaN.
      segment_BT: document of each token; 0 marks padding, which nothing reads
        and whose output is zero. None is one document. With a cache, any other
        number continues the same document.
      modality_BT: of each token, -1 on padding, for `num_modality_copies`.
      position_BT: angle of the rotary embedding; None counts the tokens of the
        document.
    Returns:
      (y, cache, aux).
    Raises:
      ValueError: heads do not divide evenly.
    """
    H, (G, K) = self.num_heads, self.kv_shape
    if segment_BT is None:
      segment_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
    q_BTHK = self._project('query', H, K, x_BTD, modality_BT)
    k_BTGK = self._project('key', G, K, x_BTD, modality_BT)
    v_BTGK = self._project('value', G, K, x_BTD, modality_BT)
    if self.qk_norm:
      q_BTHK = self._norm('query_norm', q_BTHK, modality_BT)
      k_BTGK = self._norm('key_norm', k_BTGK, modality_BT)

    def attend_all(q_BTHK, k_BTGK, v_BTGK, segment_BT, position_BT, cache):
      count_BT = _count(segment_BT, cache)
      if position_BT is None:
        position_BT = count_BT
      q_BTHK = rotary.rotate(q_BTHK, position_BT, self.rope_theta)
      k_BTGK = rotary.rotate(k_BTGK, position_BT, self.rope_theta)
      context, cache = _context(
          k_BTGK, v_BTGK, segment_BT, count_BT, self.window, cache)
      y_BTHK = attend(
          q_BTHK, context.k_BSGK, context.v_BSGK, context.mask_BTS,
          self.backend)
      return y_BTHK, context.full_BT, cache

    y_BTHK, full_BT, cache = layers.unless_initializing(self, attend_all)(
        q_BTHK, k_BTGK, v_BTGK, segment_BT, position_BT, cache)
    y_BTD = layers.Einsum(
        'bthk,hkd->btd', (H, K, self.width), ('heads', 'kv', 'embed'),
        name='output', modalities=self.num_modality_copies,
    )(y_BTHK, modality_BT)
    y_BTD = jnp.where((segment_BT > 0)[..., None], y_BTD, 0)
    if full_BT is not None:
      y_BTD = jnp.where(full_BT[..., None], jnp.nan, y_BTD)
    return y_BTD, cache, outputs.no_router()

  def init_cache(
      self, batch: int, max_len: int, dtype: Any = jnp.float32
  ) -> Cache:
    """Make an empty cache of `max_len` tokens per sequence."""
    shape = (batch, max_len, *self.kv_shape)
    return {
        'key_BSHK': jnp.zeros(shape, dtype),
        'value_BSHK': jnp.zeros(shape, dtype),
        'length_B': jnp.zeros(batch, jnp.int32),
    }

  @property
  def kv_shape(self) -> tuple[int, int]:
    """Number of key/value heads, and size of a head."""
    G = self.num_kv_heads or self.num_heads
    K = self.head_dim or self.width // self.num_heads
    if self.num_heads % G or K % 2:
      raise ValueError(
          f'num_heads={self.num_heads} must be a multiple of num_kv_heads={G},'
          f' and head_dim={K} even.'
      )
    return G, K

  def _project(self, name, heads, size, x_BTD, modality_BT):
    return layers.Einsum(
        'btd,dhk->bthk', (self.width, heads, size), ('embed', 'heads', 'kv'),
        name=name, modalities=self.num_modality_copies)(x_BTD, modality_BT)

  def _norm(self, name, x_BTHK, modality_BT):
    return layers.RMSNorm(
        self.norm_eps, self.num_modality_copies, name=name,
    )(x_BTHK, modality_BT)


def _count(segment_BT, cache):
  """Count the tokens before each token: of its document, or in the cache."""
  if cache is None:
    return layers.position_in_document(segment_BT)
  return cache['length_B'][:, None] + jnp.cumsum(segment_BT > 0, 1) - 1


def _context(
    k_BTGK, v_BTGK, segment_BT, count_BT, window, cache
) -> tuple[Context, Cache | None]:
  """Return the tokens' keys and values, or those of the cache with them in it.
  """
  if cache is None:
    # Queries stay where they are; keys and values come from all devices.
    k_BSGK, v_BSGK = (
        sharding.constrain_batch(x, whole_time=True)
        for x in (k_BTGK, v_BTGK))
    mask_BTS = _document_mask(segment_BT)
    count_BS, full_BT = count_BT, None
  else:
    cache = _append(cache, k_BTGK, v_BTGK, count_BT, segment_BT > 0)
    k_BSGK, v_BSGK = cache['key_BSHK'], cache['value_BSHK']
    count_BS = jnp.arange(k_BSGK.shape[1])[None]
    mask_BTS = count_BT[..., None] >= count_BS[:, None]
    full_BT = (segment_BT > 0) & (count_BT >= k_BSGK.shape[1])
  if window:
    age_BTS = count_BT[..., None] - count_BS[:, None]
    mask_BTS &= age_BTS < window
  return Context(k_BSGK, v_BSGK, mask_BTS, full_BT), cache


def _document_mask(segment_BT) -> Bool[Array, 'B T S']:
  """Let tokens read earlier ones of their document."""
  T = segment_BT.shape[1]
  same_BTS = segment_BT[:, :, None] == segment_BT[:, None]
  return same_BTS & jnp.tril(jnp.ones((T, T), bool))[None]


def _append(cache, k_BTGK, v_BTGK, count_BT, valid_BT) -> Cache:
  """Write tokens one after another, padding to no slot."""
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
  """Compute softmax(q k^T / sqrt(K)) v over the slots that the mask allows.

  Args:
    backend: xla, cudnn, or auto: cudnn where it can run.
  Raises:
    NotImplementedError: cudnn was asked for and cannot run; says why.
  """
  reason = _cudnn_cannot(q, k)
  if backend == 'cudnn' and reason:
    raise NotImplementedError(
        f"backend='cudnn': {reason}; choose auto or xla."
    )
  if backend == 'auto':
    backend = 'xla' if reason else 'cudnn'
  return jax.nn.dot_product_attention(
      q, k.astype(q.dtype), v.astype(q.dtype), mask=mask[:, None],
      implementation=backend,
  )


def _cudnn_cannot(q, k) -> str | None:
  """Return the reason why cuDNN cannot attend with a mask here, or None."""
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
