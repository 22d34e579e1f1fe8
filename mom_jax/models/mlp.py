"""Dense channel mixers: SwiGLU, and that of RWKV."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mom_jax.models import history, layers, outputs

Cache = dict[str, jax.Array]


class Mlp(nn.Module):
  """y = (silu(x W_gate) * (x W_up)) W_down, gate and up in one pass.

  Attributes:
    width: D of the residual stream.
    hidden: F, columns of W_gate and W_up.

  Source: arXiv 2002.05202.
  """

  width: int
  hidden: int

  @nn.compact
  def __call__(
      self, x_BTD: Float[Array, 'B T D']
  ) -> tuple[Float[Array, 'B T D'], outputs.LayerAux]:
    """Mix channels, every token alike: (y, aux)."""
    D, F = self.width, self.hidden
    h_2BTF = layers.Einsum(
        'btd,dif->ibtf', (D, 2, F), ('embed', None, 'mlp'), name='gate_up'
    )(x_BTD)
    y_BTD = layers.Einsum(
        'btf,fd->btd', (F, D), ('mlp', 'embed'), name='down'
    )(jax.nn.silu(h_2BTF[0]) * h_2BTF[1])
    return y_BTD, outputs.no_router()


class ShiftMlp(nn.Module):
  """y_t = relu((x_t + (x_{t-1} - x_t) m) W_k)^2 W_v, within a document.

  m begins at 1 - (i / D)^((1 - l / L)^4) for channel i in layer l of L.

  Attributes:
    width: D of the residual stream.
    hidden: columns of W_k.

  Source: arXiv 2503.14456, section 4.2; first m as in the official repository.
  """

  width: int
  hidden: int

  @nn.compact
  def __call__(
      self,
      x_BTD: Float[Array, 'B T D'],
      cache: Cache | None = None,
      segment_BT: Int[Array, 'B T'] | None = None,
      layer_fraction: float | Float[Array, ''] = 0.0,
  ) -> tuple[Float[Array, 'B T D'], Cache | None, outputs.LayerAux]:
    """Mix channels of a token and the token before.

    Args:
      cache: the last token so far (`init_cache`), or None in training.
      segment_BT: document of each token, 0 on padding; None is one document.
        With a cache, any other number continues the same document.
      layer_fraction: l / L.
    Returns:
      (y, cache, aux).
    """
    D, F = self.width, self.hidden
    if segment_BT is None:
      segment_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
    last_BD = None if cache is None else cache['last_BD']
    token_before = layers.unless_initializing(self, history.token_before)
    before_BTD, last_BD = token_before(x_BTD, segment_BT, last_BD)
    ramp_D = jnp.arange(D, dtype=jnp.float32) / D
    m_D = layers.param(
        self, 'shift', (D,), ('embed',),
        lambda key, shape: 1 - ramp_D ** ((1 - layer_fraction) ** 4))
    m_11D = m_D[None, None].astype(x_BTD.dtype)
    h_BTF = layers.Einsum(
        'btd,df->btf', (D, F), ('embed', 'mlp'), name='up',
    )(x_BTD + (before_BTD - x_BTD) * m_11D)
    y_BTD = layers.Einsum(
        'btf,fd->btd', (F, D), ('mlp', 'embed'), name='down',
    )(jnp.square(jax.nn.relu(h_BTF)))
    cache = None if cache is None else {'last_BD': last_BD}
    return y_BTD, cache, outputs.no_router()

  def init_cache(self, batch: int, dtype: Any = jnp.float32) -> Cache:
    """Make the cache of sequences that have no token yet."""
    return {'last_BD': jnp.zeros((batch, self.width), dtype)}
