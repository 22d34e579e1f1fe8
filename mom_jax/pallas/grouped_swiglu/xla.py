"""grouped_swiglu as one grouped product and SwiGLU, on any device."""

import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.grouped_matmul import xla
from mom_jax.pallas.grouped_swiglu import swiglu


def _fwd(x, gate_up, group_sizes, *, keep):
  products_RX = xla.BACKEND.fwd(x, gate_up, group_sizes, None)
  h_RF = swiglu.swiglu(*jnp.split(products_RX, 2, 1))
  return h_RF, products_RX if keep else None


def _bwd(x, gate_up, group_sizes, products_RX, dh):
  dproducts_RX = jnp.concatenate(
      swiglu.swiglu_back(*jnp.split(products_RX, 2, 1), dh), 1)
  return xla.BACKEND.bwd(x, gate_up, group_sizes, None, dproducts_RX)


BACKEND = common.Backend('xla', common.anywhere, _fwd, _bwd)
