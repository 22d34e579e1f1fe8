"""grouped_matmul as a loop over tiles of rows, in plain XLA, on any device.

Each group is cut into tiles of TILE rows from its own first row; a tile is one
matmul with that group's matrix, in place. The number of tiles is dynamic: rows
past the last group cost nothing, and a group of n rows costs n rounded up to
TILE. Nothing is padded, and indexed rows are gathered tile by tile. A row's
result does not depend on the other rows or on its position. A last tile that
would pass the end of x is moved back and writes only the rows that are its own.
"""

import functools

import jax
import jax.numpy as jnp

from mom_jax.pallas import common

TILE = 128


def _tiles(group_sizes, R, init, body):
  """Fold body(carry, group, first row, mask of the tile's rows) over tiles.

  Tiles lie inside the R rows, so R must be TILE or more.
  """
  end_G = jnp.cumsum(group_sizes)
  start_G = end_G - group_sizes

  def group_step(g, carry):
    def tile_step(i, carry):
      want = start_G[g] + i * TILE
      first = jnp.minimum(want, R - TILE)
      row = first + jnp.arange(TILE)
      return body(carry, g, first, ((row >= want) & (row < end_G[g]))[:, None])

    return jax.lax.fori_loop(0, -(-group_sizes[g] // TILE), tile_step, carry)

  return jax.lax.fori_loop(0, len(group_sizes), group_step, init)


def _pad(x):
  """Pad to at least TILE rows."""
  missing = max(0, TILE - len(x))
  widths = ((0, missing),) + ((0, 0),) * (x.ndim - 1)
  return jnp.pad(x, widths) if missing else x


def _slice(x):
  """Return a function of the first row that slices TILE rows of x."""
  return functools.partial(
      jax.lax.dynamic_slice_in_dim, _pad(x), slice_size=TILE)


def _rows(x, row_index):
  """Return a function of the first row that gives TILE rows of x."""
  if row_index is None:
    return _slice(x)
  index = _slice(row_index)
  return lambda first: x.at[index(first)].get(mode='clip')


def _fwd(x, w, group_sizes, row_index):
  R, F = len(x if row_index is None else row_index), w.shape[2]
  x_rows, size = _rows(x, row_index), max(R, TILE)

  def body(y_RF, g, first, mask):
    x_rD = x_rows(first)
    y_rF = jnp.dot(x_rD, w[g], preferred_element_type=jnp.float32)
    old_rF = jax.lax.dynamic_slice_in_dim(y_RF, first, TILE)
    y_rF = jnp.where(mask, y_rF.astype(x.dtype), old_rF)
    return jax.lax.dynamic_update_slice_in_dim(y_RF, y_rF, first, 0)

  y = common.zeros((size, F), x.dtype, like=x)
  return _tiles(group_sizes, size, y, body)[:R]


def _bwd(x, w, group_sizes, row_index, dy):
  dx = _fwd(dy, w.swapaxes(1, 2), group_sizes, None)
  x_rows, dy_rows = _rows(x, row_index), _slice(dy)

  def body(dw_GDF, g, first, mask):
    x_rD = jnp.where(mask, x_rows(first), 0)
    dw_DF = jnp.dot(
        x_rD.T, dy_rows(first), preferred_element_type=jnp.float32
    )
    return dw_GDF.at[g].add(dw_DF)

  dw = common.zeros(w.shape, jnp.float32, like=w)
  total = _tiles(group_sizes, max(len(dy), TILE), dw, body)
  return dx, total.astype(w.dtype)


BACKEND = common.Backend('xla', common.anywhere, _fwd, _bwd)
