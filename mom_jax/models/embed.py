"""Token embedding, positions inside an image, and output logits."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mom_jax import config
from mom_jax.models import layers
from mom_jax.parallel import sharding


class Embed(nn.Module):
  """Table of token vectors, which `logits` also multiplies by.

  With `image_side` > 0 an image token also gets the embeddings of its row and
  column, as in arXiv 2102.12092: a linear-recurrent mixer has no positions of
  its own.
  """

  cfg: config.Model

  def setup(self):
    shape = (self.cfg.vocab_size, self.cfg.width)
    self.embedding_WD = layers.param(
        self, 'embedding', shape, ('vocab', 'embed'), layers.normal_init)
    if self.cfg.image_side:
      self.row_SD, self.column_SD = (
          layers.param(self, name, (self.cfg.image_side, self.cfg.width),
                       (None, 'embed'), layers.normal_init)
          for name in ('row_embedding', 'column_embedding')
      )

  def __call__(
      self,
      tokens_BT: Int[Array, 'B T'],
      modality_BT: Int[Array, 'B T'],
      segment_BT: Int[Array, 'B T'],
      cache: dict[str, jax.Array] | None,
  ) -> tuple[Float[Array, 'B T D'], dict[str, jax.Array] | None]:
    """Embed tokens: their vectors, and the cache with these tokens in it."""
    table_WD = sharding.constrain_replicated(
        self.embedding_WD.astype(self.cfg.dtype))
    x_BTD = jnp.take(table_WD, sharding.constrain_batch(tokens_BT), axis=0)
    side = self.cfg.image_side
    if not side:
      return x_BTD, cache
    image_BT = modality_BT == self.cfg.modalities.index(config.IMAGE)
    position_BT, run_B = image_positions(
        image_BT, segment_BT, None if cache is None else cache['run_B'])
    row_BT, column_BT = jnp.divmod(position_BT % side**2, side)
    row_SD, column_SD = map(
        sharding.constrain_replicated, (self.row_SD, self.column_SD))
    position_BTD = row_SD[row_BT] + column_SD[column_BT]
    position_BTD = jnp.where(image_BT[..., None], position_BTD, 0)
    x_BTD += position_BTD.astype(x_BTD.dtype)
    return x_BTD, None if cache is None else {'run_B': run_B}

  def logits(self, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T W']:
    """Compute tied logits: products in x's type, sums and result float32."""
    return jnp.einsum(
        'btd,wd->btw', x_BTD, self.embedding_WD.astype(x_BTD.dtype),
        preferred_element_type=jnp.float32,
    )


def init_cache(cfg: config.Model, batch: int) -> dict[str, jax.Array]:
  """Make the cache of empty sequences: image tokens at the end of each."""
  return {'run_B': jnp.zeros(batch, jnp.int32)} if cfg.image_side else {}


def image_positions(
    image_BT: Bool[Array, 'B T'],
    segment_BT: Int[Array, 'B T'],
    run_B: Int[Array, ' B'] | None,
) -> tuple[Int[Array, 'B T'], Int[Array, ' B']]:
  """Count the image tokens right before each token, in its document.

  Args:
    segment_BT: as the model's; 0 is no token and counts for nothing.
    run_B: image tokens right before the first token, with a cache; then all
      tokens of a row are one document.
  Returns:
    (positions, image tokens at the end of each row). Positions of other tokens
    than images mean nothing.
  """
  valid_BT = segment_BT > 0
  count_BT = jnp.cumsum(valid_BT, 1, dtype=jnp.int32)
  # A run begins after `begin` tokens: after a token of text, at a document.
  begin_BT = jnp.where(valid_BT & ~image_BT, count_BT, -1)
  if run_B is None:
    first_BT = layers.position_in_document(segment_BT) == 0
    begin_BT = jnp.maximum(
        begin_BT, jnp.where(first_BT & valid_BT, count_BT - 1, 0))
  else:
    begin_BT = jnp.where(begin_BT < 0, -run_B[:, None], begin_BT)
  begin_BT = jax.lax.cummax(begin_BT, axis=1)
  return count_BT - 1 - begin_BT, count_BT[:, -1] - begin_BT[:, -1]


def output(cfg: config.Model, name: str) -> Any:
  """Make the output layer of a model that does not tie its embeddings."""
  return layers.Einsum(
      'btd,dw->btw', (cfg.width, cfg.vocab_size), ('embed', 'vocab'),
      out_dtype=jnp.float32, name=name,
  )
