"""Rotary position embedding."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, '*R H K'], position: Int[Array, '*R'], base: float
) -> Float[Array, '*R H K']:
  """Rotate the pair (x_i, x_{i + K/2}) by position * base^(-2 i / K).

  Angles are float32 whatever x is.

  Source: arXiv 2104.09864, eq. 34; halves instead of neighbours are paired, as
  in Llama.
  """
  half = x.shape[-1] // 2
  frequency_K = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = position.astype(jnp.float32)[..., None, None] * frequency_K.reshape(
      (1,) * (x.ndim - 1) + (half,))
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
  return rotated.astype(x.dtype)
