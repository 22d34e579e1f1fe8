"""Token embedding, and output logits from it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mom_jax import config
from mom_jax.models import layers


class Embed(nn.Module):
  """A row of the table for each token; `logits` reads the table backwards."""

  cfg: config.Model

  def setup(self):
    shape = (self.cfg.vocab_size, self.cfg.width)
    self.embedding_WD = layers.param(
        self, 'embedding', shape, ('vocab', 'embed'), layers.normal_init)

  def __call__(self, tokens_BT: Int[Array, 'B T']) -> Float[Array, 'B T D']:
    table_WD = self.embedding_WD.astype(self.cfg.dtype)
    return jnp.take(table_WD, tokens_BT, axis=0)

  def logits(self, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T W']:
    """Tied output: products in x's type, sums and result in float32."""
    return jnp.einsum(
        'btd,wd->btw', x_BTD, self.embedding_WD.astype(x_BTD.dtype),
        preferred_element_type=jnp.float32,
    )


def untied(cfg: config.Model, name: str) -> Any:
  """The output layer of its own, for models that do not tie embeddings."""
  return layers.Einsum(
      'btd,dw->btw', (cfg.width, cfg.vocab_size), ('embed', 'vocab'),
      out_dtype=jnp.float32, name=name,
  )
