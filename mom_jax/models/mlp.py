"""SwiGLU channel mixer."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int

from mom_jax import config
from mom_jax.models import layers


class Mlp(nn.Module):
  """y = (silu(x W_gate) * (x W_up)) W_down, gate and up in one pass.

  Source: arXiv 2002.05202.
  """

  cfg: config.Model

  @nn.compact
  def __call__(
      self, x_BTD: Float[Array, 'B T D'], modality_BT: Int[Array, 'B T']
  ) -> tuple[Float[Array, 'B T D'], dict[str, Any]]:
    """Every token alike; `modality_BT` plays no part."""
    del modality_BT
    D, F = self.cfg.width, self.cfg.mlp.hidden
    h_2BTF = layers.Einsum(
        'btd,dif->ibtf', (D, 2, F), ('embed', None, 'mlp'), name='gate_up'
    )(x_BTD)
    y_BTD = layers.Einsum(
        'btf,fd->btd', (F, D), ('mlp', 'embed'), name='down'
    )(jax.nn.silu(h_2BTF[0]) * h_2BTF[1])
    return y_BTD, {}
