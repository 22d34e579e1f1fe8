"""grouped_matmul row by row in float32: the definition."""

import jax
import jax.numpy as jnp

from mom_jax.pallas import common


def grouped_matmul_ref(x, w, group_sizes, row_index=None):
  """Multiply every row in turn by its group's matrix."""
  x_RD = x if row_index is None else x.at[row_index].get(mode='clip')
  end_G = jnp.cumsum(group_sizes)
  w_GDF = w.astype(jnp.float32)

  def row(args):
    x_D, r = args
    group = (r >= end_G).sum()  # G for a row past the last group
    x_D = jnp.where(group < len(w), x_D, 0)
    w_DF = w_GDF.at[group].get(mode='clip')
    return jnp.dot(x_D, w_DF, precision=jax.lax.Precision.HIGHEST)

  y_RF = jax.lax.map(row, (x_RD.astype(jnp.float32), jnp.arange(len(x_RD))))
  return y_RF.astype(x.dtype)


def _bwd(x, w, group_sizes, row_index, dy):
  x_RD = x if row_index is None else x.at[row_index].get(mode='clip')
  run = lambda x, w: grouped_matmul_ref(x, w, group_sizes)
  return jax.vjp(run, x_RD, w)[1](dy)


BACKEND = common.Backend(
    'reference', common.anywhere, grouped_matmul_ref, _bwd
)
