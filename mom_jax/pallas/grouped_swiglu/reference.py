"""grouped_swiglu row by row in float32: the definition."""

import jax
import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.grouped_matmul import reference


def grouped_swiglu_ref(x, gate_up, group_sizes):
  """Multiply every row in turn by its group's two matrices."""
  products_RX = reference.grouped_matmul_ref(
      x.astype(jnp.float32), gate_up.astype(jnp.float32), group_sizes)
  gate_RF, up_RF = jnp.split(products_RX, 2, 1)
  return (jax.nn.silu(gate_RF) * up_RF).astype(x.dtype)


def _fwd(*operands, keep):
  del keep
  return grouped_swiglu_ref(*operands), None


def _bwd(x, gate_up, group_sizes, _, dh):
  run = lambda x, gate_up: grouped_swiglu_ref(x, gate_up, group_sizes)
  return jax.vjp(run, x, gate_up)[1](dh)


BACKEND = common.Backend('reference', common.anywhere, _fwd, _bwd)
