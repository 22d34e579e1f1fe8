"""grouped_swiglu as Mosaic TPU kernels: those of grouped_matmul.

Forward, a visit multiplies its rows by a part of both matrices, and the unit is
taken while the products are in registers; they are written too where the
backward pass follows. Backward, XLA makes the cotangents of both products in
one pass over them, and the kernels of grouped_matmul do the rest. VMEM beside
the backward kernels' own, in bytes of an activation b:

  2 b (rows D + 2 D out + 3 rows out)
"""

from __future__ import annotations

import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.grouped_matmul.tpu import backend as tpu
from mom_jax.pallas.grouped_matmul.tpu import tiles as tpu_tiles
from mom_jax.pallas.grouped_swiglu import swiglu


def supported(x, gate_up, group_sizes):
  """None, or why these kernels cannot run here."""
  reason = tpu.supported(x, gate_up, group_sizes)
  if reason is not None:
    return reason
  (R, D), X = x.shape, gate_up.shape[2]
  if X // 2 < tpu_tiles.LANE:
    return f'F={X // 2} must be {tpu_tiles.LANE} or more'
  if tpu_tiles.times(R, D, X // 2, x.dtype, gated=True) is None:
    return f'no tiles of gate_up, {gate_up.shape}, fit the memory of a core'
  return None


def _fwd(x, gate_up, group_sizes, *, keep):
  F = gate_up.shape[2] // 2
  tiles = tpu_tiles.times(*x.shape, F, x.dtype, gated=True)
  h, *both = tpu.times_gated(x, gate_up, group_sizes, tiles, keep=keep)
  return h, both if keep else None


def _bwd(x, gate_up, group_sizes, both, dh):
  dboth_RX = jnp.concatenate(swiglu.swiglu_back(*both, dh), 1)
  return tpu.BACKEND.bwd(x, gate_up, group_sizes, None, dboth_RX)


BACKEND = common.Backend('tpu', supported, _fwd, _bwd)
