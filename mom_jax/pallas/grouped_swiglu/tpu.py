"""grouped_swiglu as Mosaic TPU kernels: those of grouped_matmul.

Forward, a work item multiplies its rows by a part of both matrices and applies
SwiGLU while the products are in registers; it also stores both where a backward
pass follows. Backward, XLA computes the cotangents of both products in one pass
over them, and the kernels of grouped_matmul do the rest. VMEM in addition to
that of the backward kernels, with b bytes per activation:

  2 b (rows D + 2 D out + 3 rows out)
"""

from __future__ import annotations

import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.grouped_matmul.tpu import backend as matmul
from mom_jax.pallas.grouped_matmul.tpu import tiles
from mom_jax.pallas.grouped_swiglu import swiglu


def supported(x, gate_up, group_sizes):
  """Return None, or why these kernels cannot run here."""
  reason = matmul.supported(x, gate_up, group_sizes)
  if reason is not None:
    return reason
  (R, D), X = x.shape, gate_up.shape[2]
  if X // 2 < tiles.LANE:
    return f'F={X // 2} must be {tiles.LANE} or more'
  if tiles.matmul_tiles(R, D, X // 2, x.dtype, gated=True) is None:
    return f'no tiles of gate_up, {gate_up.shape}, fit the memory of a core'
  return None


def _fwd(x, gate_up, group_sizes, *, keep):
  F = gate_up.shape[2] // 2
  t = tiles.matmul_tiles(*x.shape, F, x.dtype, gated=True)
  h, *products = matmul.matmul_swiglu(x, gate_up, group_sizes, t, keep=keep)
  return h, products if keep else None


def _bwd(x, gate_up, group_sizes, products, dh):
  dproducts_RX = jnp.concatenate(swiglu.swiglu_back(*products, dh), 1)
  return matmul.BACKEND.bwd(x, gate_up, group_sizes, None, dproducts_RX)


BACKEND = common.Backend('tpu', supported, _fwd, _bwd)
