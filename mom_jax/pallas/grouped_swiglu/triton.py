"""grouped_swiglu as Triton kernels: those of grouped_matmul.

Forward, a program multiplies its rows by a tile of both matrices and applies
SwiGLU while the sums are in registers; it also stores both products where a
backward pass follows. Backward, XLA computes the cotangents of both products in
one pass over them, and the kernels of grouped_matmul do the rest.
"""

from __future__ import annotations

import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.grouped_matmul.triton import backend as matmul
from mom_jax.pallas.grouped_swiglu import swiglu


def _fwd(x, gate_up, group_sizes, *, keep):
  G, F = len(gate_up), gate_up.shape[2] // 2
  config = matmul.best_config('swiglu', x.dtype, len(x) / G, F)
  h, *products = matmul.matmul_swiglu(
      x, gate_up, group_sizes, config, keep=keep)
  return h, products if keep else None


def _bwd(x, gate_up, group_sizes, products, dh):
  dproducts_RX = jnp.concatenate(swiglu.swiglu_back(*products, dh), 1)
  return matmul.BACKEND.bwd(x, gate_up, group_sizes, None, dproducts_RX)


BACKEND = common.Backend('gpu', matmul.supported, _fwd, _bwd)
