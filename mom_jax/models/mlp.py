"""Channel mixers of one dense map: SwiGLU, and that of RWKV."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mom_jax import config
from mom_jax.models import layers, outputs


class Mlp(nn.Module):
  """y = (silu(x W_gate) * (x W_up)) W_down, gate and up in one pass.

  Source: arXiv 2002.05202.
  """

  cfg: config.Model

  @nn.compact
  def __call__(
      self, x_BTD: Float[Array, 'B T D'], modality_BT: Int[Array, 'B T']
  ) -> tuple[Float[Array, 'B T D'], outputs.LayerAux]:
    """Every token alike; `modality_BT` plays no part."""
    del modality_BT
    D, F = self.cfg.width, self.cfg.mlp.hidden
    h_2BTF = layers.Einsum(
        'btd,dif->ibtf', (D, 2, F), ('embed', None, 'mlp'), name='gate_up'
    )(x_BTD)
    y_BTD = layers.Einsum(
        'btf,fd->btd', (F, D), ('mlp', 'embed'), name='down'
    )(jax.nn.silu(h_2BTF[0]) * h_2BTF[1])
    return y_BTD, outputs.no_router()


class ShiftMlp(nn.Module):
  """y = relu((x + (before - x) m) W_k)^2 W_v, `before` the token before.

  m begins at 1 - (i / D)^((1 - l / L)^4) for channel i in layer l of L.

  Source: arXiv 2503.14456, section 4.2; first m as in the official repository.
  """

  cfg: config.Model

  @nn.compact
  def __call__(
      self,
      x_BTD: Float[Array, 'B T D'],
      before_BTD: Float[Array, 'B T D'],
      depth: Float[Array, ''],
  ) -> tuple[Float[Array, 'B T D'], outputs.LayerAux]:
    """`before_BTD`: of the token before, 0 at a document's first."""
    D, F = self.cfg.width, self.cfg.mlp.hidden
    ramp_D = jnp.arange(D, dtype=jnp.float32) / D
    share_D = layers.param(
        self, 'shift', (D,), ('embed',),
        lambda key, shape: 1 - ramp_D ** ((1 - depth) ** 4))
    share_11D = share_D[None, None].astype(x_BTD.dtype)
    h_BTF = layers.Einsum(
        'btd,df->btf', (D, F), ('embed', 'mlp'), name='up',
    )(x_BTD + (before_BTD - x_BTD) * share_11D)
    y_BTD = layers.Einsum(
        'btf,fd->btd', (F, D), ('mlp', 'embed'), name='down',
    )(jnp.square(jax.nn.relu(h_BTF)))
    return y_BTD, outputs.no_router()
