"""grouped_matmul as Triton kernels: y and dx by one, dw by another.

x is cut into tiles of rows, each group's from its own first row on, so a tile
knows one matrix and a row's result does not depend on its position. The number
of tiles depends on the load and is known on the device only: the grid has as
many programs as any load needs, XLA computes three integers per tile (group,
first row, last row of its group), and a program without a tile ends at once.
Rows past the last group are tiles of no group, which become zeros. For dw a
program takes a tile [inner, width] of one group's matrix and loops over its
rows.

Sums are float32. bfloat16 operands go to the tensor cores; float32 ones too, as
three products of TF32 halves, which keep float32's accuracy. Shared memory,
with b bytes per activation:

  y, dx, dw   stages b (rows inner + inner width), or rows width for rows inner
  swiglu      stages b (rows inner + 2 inner width)

Batched calls (`jax.vmap`) are one launch with more groups. Kernels are in
kernels.py, which alone needs Triton.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mom_jax.pallas import common, triton_call

DTYPES = ('bfloat16', 'float32')


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
  """Block sizes and launch settings of a kernel.

  Attributes:
    rows: rows of x; for dw, of a product.
    width: columns of the result.
    inner: of D, of a product; for dw, rows of the result.
    warps: warps of 32 threads.
    stages: tiles of operands in flight at once.
    band: tiles of rows that run side by side.
    min_capability: compute capability below which registers spill.
  """

  rows: int
  width: int
  inner: int
  warps: int
  stages: int
  band: int = 8
  min_capability: int = 80

  def shared_memory(self, op: str, itemsize: int) -> int:
    """Bytes of shared memory for operands of `itemsize` bytes."""
    return self.stages * itemsize * {
        'matmul': self.inner * (self.rows + self.width),
        'swiglu': self.inner * (self.rows + 2 * self.width),
        'dw': self.rows * (self.inner + self.width),
    }[op]


# Best first; the last one fits every GPU.
CONFIGS = {
    ('matmul', 'bfloat16'): (
        MatmulConfig(128, 256, 64, warps=8, stages=3),
        MatmulConfig(64, 128, 64, warps=4, stages=4)),
    ('matmul', 'float32'): (MatmulConfig(64, 64, 32, warps=4, stages=3),),
    ('swiglu', 'bfloat16'): (
        MatmulConfig(128, 128, 64, warps=8, stages=3, min_capability=90),
        MatmulConfig(64, 64, 64, warps=4, stages=4)),
    ('swiglu', 'float32'): (MatmulConfig(64, 64, 32, warps=8, stages=3),),
    ('dw', 'bfloat16'): (
        MatmulConfig(64, 256, 128, warps=8, stages=3),
        MatmulConfig(64, 128, 64, warps=4, stages=4)),
    ('dw', 'float32'): (MatmulConfig(32, 64, 64, warps=4, stages=3),),
}


def best_config(op: str, dtype, rows: float, out: int) -> MatmulConfig:
  """Return the best config for groups of so many rows on the GPU in scope."""
  itemsize = jnp.dtype(dtype).itemsize
  configs = CONFIGS[op, jnp.dtype(dtype).name]
  capability = common.gpu_target().capability
  limit = triton_call.SHARED_LIMIT[capability]
  for c in configs[:-1]:
    if (capability >= c.min_capability
        and c.shared_memory(op, itemsize) <= limit
        and rows >= c.rows and out >= c.width):
      return c
  return configs[-1]


class RowTiles(NamedTuple):
  """Tiles of rows, P of them at most.

  Attributes:
    group_P: group of the rows, counted over the batch; -1 for rows past the
      last group.
    first_P: first row.
    last_P: first row past the group; not after `first_P` where there is no
      tile.
  """

  group_P: jax.Array
  first_P: jax.Array
  last_P: jax.Array


def group_bounds(group_sizes_BG, R):
  """First row of each group of a batch and first row past it, [B, G]."""
  offset_B1 = R * jnp.arange(len(group_sizes_BG))[:, None]
  end_BG = jnp.minimum(jnp.cumsum(group_sizes_BG, 1), R)
  start_BG = jnp.pad(end_BG[:, :-1], ((0, 0), (1, 0)))
  return start_BG + offset_B1, end_BG + offset_B1


def row_tiles(group_sizes_BG, R, rows) -> RowTiles:
  """Return the tiles of all groups and of the rows past the last one."""
  B, G = group_sizes_BG.shape
  start, end = group_bounds(group_sizes_BG, R)
  after = R * (1 + jnp.arange(B))[:, None]
  start = jnp.concatenate([start, end[:, -1:]], 1).ravel()
  end = jnp.concatenate([end, after], 1).ravel()
  count = -((start - end) // rows)
  stop = jnp.cumsum(count)
  P = B * ((R + (G + 1) * (rows - 1)) // rows)
  p = jnp.arange(P)
  which = (p[:, None] >= stop[None]).sum(1).clip(max=B * (G + 1) - 1)
  group = jnp.where(
      which % (G + 1) < G, which - which // (G + 1), -1)
  first = start[which] + (p - (stop - count)[which]) * rows
  used = p < stop[-1]
  return RowTiles(*(
      a.astype(jnp.int32)
      for a in (group, jnp.where(used, first, 0), jnp.where(
          used, end[which], 0))))


def _constants(config, dtype, *, band=True):
  out = dict(
      rows=config.rows, width=config.width, inner=config.inner,
      precision='tf32x3' if dtype == jnp.float32 else 'tf32')
  return out | dict(band=config.band) if band else out


def matmul(x, w, group_sizes, config, *, row_index=None, transposed=False):
  """x_r w_g, or x_r w_g^T; with `row_index`, of those rows of x."""
  return triton_call.batched(
      functools.partial(_matmul, config=config, transposed=transposed),
      shared=(1,))(x, w, group_sizes, *_optional(row_index))


def _optional(row_index):
  return () if row_index is None else (row_index,)


def _index_into_batch(x, row_index):
  """Index of each row into all of a batch's x; () without `row_index`."""
  if not row_index:
    return ()
  (B, N, _), (index_BR,) = x.shape, row_index
  offset_B1 = N * jnp.arange(B, dtype=jnp.int32)[:, None]
  return (jnp.clip(index_BR.astype(jnp.int32), 0, N - 1) + offset_B1,)


def _matmul(x, w, group_sizes, *row_index, config, transposed):
  from mom_jax.pallas.grouped_matmul.triton import kernels
  (B, R), D = (row_index[0] if row_index else x).shape[:2], x.shape[2]
  F, G = w.shape[2 if transposed else 3], w.shape[1]
  tiles = row_tiles(group_sizes, R, config.rows)
  P = len(tiles.group_P)
  (y,) = triton_call.call(
      kernels.grouped_matmul, x,
      *(_index_into_batch(x, row_index) or (tiles.first_P,)), w,
      _matrix_index(tiles, w, B, G), tiles.first_P, tiles.last_P,
      out=[jax.ShapeDtypeStruct((B, R, F), x.dtype)],
      grid=(P * -(-F // config.width),), warps=config.warps,
      stages=config.stages, D=D, F=F, P=P, transposed=transposed,
      gathered=bool(row_index), **_constants(config, x.dtype))
  return y


def matmul_swiglu(x, w, group_sizes, config, *, keep):
  """silu(x_r a_g) * (x_r b_g) with w_g = [a_g, b_g]; if keep, both products."""
  return triton_call.batched(
      functools.partial(_matmul_swiglu, config=config, keep=keep),
      shared=(1,))(x, w, group_sizes)


def _matmul_swiglu(x, w, group_sizes, *, config, keep):
  from mom_jax.pallas.grouped_matmul.triton import kernels
  B, R, D = x.shape
  F, G = w.shape[3] // 2, w.shape[1]
  tiles = row_tiles(group_sizes, R, config.rows)
  P = len(tiles.group_P)
  kernel = kernels.grouped_swiglu_keep if keep else kernels.grouped_swiglu
  return triton_call.call(
      kernel, x, w, _matrix_index(tiles, w, B, G), tiles.first_P, tiles.last_P,
      out=[jax.ShapeDtypeStruct((B, R, F), x.dtype)] * (3 if keep else 1),
      grid=(P * -(-F // config.width),), warps=config.warps,
      stages=config.stages, D=D, F=F, P=P, **_constants(config, x.dtype))


def _matrix_index(tiles, w, B, G):
  """Index of each tile's matrix; a batch may share its matrices."""
  if len(w) == B:
    return tiles.group_P
  return jnp.where(tiles.group_P < 0, -1, tiles.group_P % (len(w) * G))


def weight_gradient(x, dy, group_sizes, config, *, row_index=None):
  """Sum of x_r^T dy_r over each group's rows; x indexed by `row_index`."""
  return triton_call.batched(
      functools.partial(_weight_gradient, config=config))(
          x, dy, group_sizes, *_optional(row_index))


def _weight_gradient(x, dy, group_sizes, *row_index, config):
  from mom_jax.pallas.grouped_matmul.triton import kernels
  (B, R, F), D, G = dy.shape, x.shape[2], group_sizes.shape[1]
  first, last = (
      a.ravel().astype(jnp.int32) for a in group_bounds(group_sizes, R))
  (dw,) = triton_call.call(
      kernels.grouped_matmul_dw, x,
      *(_index_into_batch(x, row_index) or (first,)), dy, first, last,
      out=[jax.ShapeDtypeStruct((B, G, D, F), x.dtype)],
      grid=(-(-D // config.inner) * -(-F // config.width), B * G),
      warps=config.warps, stages=config.stages, D=D, F=F,
      gathered=bool(row_index), **_constants(config, x.dtype, band=False))
  return dw


def supported(x, w, group_sizes, row_index=None):
  """Return None, or why these kernels cannot run here."""
  reason = triton_call.missing()
  if reason is not None:
    return reason
  if x.dtype.name not in DTYPES:
    return f'it multiplies bfloat16 or float32 and x is {x.dtype}'
  if not (x.size and w.size and (row_index is None or row_index.size)):
    return f'there is nothing to multiply: x is {x.shape} and w {w.shape}'
  capability = common.gpu_target().capability
  if capability not in triton_call.SHARED_LIMIT:
    known = ', '.join(map(str, triton_call.SHARED_LIMIT))
    return f'sm_{capability} is not known; known: {known}'
  return None


def _fwd(x, w, group_sizes, row_index):
  R, (G, _, F) = len(x if row_index is None else row_index), w.shape
  return matmul(
      x, w, group_sizes, best_config('matmul', x.dtype, R / G, F),
      row_index=row_index)


def _bwd(x, w, group_sizes, row_index, dy):
  R, (G, D, F) = len(dy), w.shape
  dx = matmul(
      dy, w, group_sizes, best_config('matmul', x.dtype, R / G, D),
      transposed=True)
  dw = weight_gradient(
      x, dy, group_sizes, best_config('dw', x.dtype, R / G, F),
      row_index=row_index)
  return dx, dw


BACKEND = common.Backend('gpu', supported, _fwd, _bwd)
