"""Routers that predict, from a token alone, what expert choice would select."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mom_jax.models import layers


class AuxRouter(nn.Module):
  """logits = silu(x W1^m) W2^m for the experts of each modality m, in float32.

  W1 is D x D/2. The sigmoid of a logit above 1/2, the logit above 0, says that
  expert choice would select. No gradient goes to the input: aux-router training
  fits these networks to a finished model.

  Source: arXiv 2407.21770, section 2.4.

  Attributes:
    experts: number of experts of each modality, in order.
  """

  experts: tuple[int, ...]

  @nn.compact
  def __call__(self, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T E']:
    """Compute the logits of every expert."""
    D, G, E = x_BTD.shape[-1], len(self.experts), sum(self.experts)
    x_BTD = jax.lax.stop_gradient(x_BTD)
    h_GBTF = layers.Einsum(
        'btd,gdf->gbtf', (G, D, D // 2), ('modality', 'embed', 'mlp'),
        dtype=jnp.float32, name='hidden',
    )(x_BTD)
    w_FE = layers.param(
        self, 'output', (D // 2, E), ('mlp', None), layers.normal_init)
    logits, first = [], 0
    for h_BTF, size in zip(jax.nn.silu(h_GBTF), self.experts):
      logits.append(jnp.einsum(
          'btf,fe->bte', h_BTF, w_FE[:, first:first + size],
          precision=jax.lax.Precision.HIGHEST))
      first += size
    return jnp.concatenate(logits, -1)
