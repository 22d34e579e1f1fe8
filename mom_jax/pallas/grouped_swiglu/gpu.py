"""grouped_swiglu as Triton kernels: those of grouped_matmul.

Forward, a program multiplies its rows by a tile of both matrices and takes the
unit while the sums are in registers; both products are written too where the
backward pass follows. Backward, XLA makes the cotangents of both products in
one pass over them, and the kernels of grouped_matmul do the rest.
"""

from __future__ import annotations

import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.grouped_matmul.triton import backend as gpu
from mom_jax.pallas.grouped_swiglu import swiglu


def _fwd(x, gate_up, group_sizes, *, keep):
  G, F = len(gate_up), gate_up.shape[2] // 2
  t = gpu.tile('swiglu', x.dtype, len(x) / G, F)
  h, *both = gpu.times_gated(x, gate_up, group_sizes, t, keep=keep)
  return h, both if keep else None


def _bwd(x, gate_up, group_sizes, both, dh):
  dboth_RX = jnp.concatenate(swiglu.swiglu_back(*both, dh), 1)
  return gpu.BACKEND.bwd(x, gate_up, group_sizes, None, dboth_RX)


BACKEND = common.Backend('gpu', gpu.supported, _fwd, _bwd)
