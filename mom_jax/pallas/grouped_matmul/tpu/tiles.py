"""Tile sizes of the TPU kernels of grouped products."""

from __future__ import annotations

import dataclasses

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from mom_jax.pallas import common

LANE = 128
ROWS = 512
# By width of the MXU: rows of a matmul for y and dx, and of one for dw where a
# group has part of a tile. Fewer rows cost more in filling the MXU, more rows
# cost more at the borders of groups.
BLOCK = {128: 128, 256: 256}
# Longest matmul in cycles: longer ones hide more latency, but make longer code.
MAX_CYCLES = {'y': 6_000, 'dw': 12_000}
# Fractions of VMEM for the matrices of y and dx, and for everything.
MATRICES_VMEM, TOTAL_VMEM = 0.375, 0.6


@dataclasses.dataclass(frozen=True)
class TileSizes:
  """Tile sizes of a grouped product.

  Attributes:
    rows: rows of a tile of x.
    block: rows of a matmul.
    inner: D for y and dx; rows of a tile of dw.
    out: columns of a tile of the result.
    chunk: columns of a matmul for y and dx; rows of the result for dw.
    split: two cores take half of the columns each.
  """

  rows: int
  block: int
  inner: int
  out: int
  chunk: int
  split: bool


def round_up(size, step):
  """Round up to a multiple of `step`."""
  return pl.cdiv(size, step) * step


def _tile_width(size, count, step=LANE):
  """Width of `count` tiles that cover `size`, in multiples of `step`.

  A size below a register's width is one tile.
  """
  if size <= LANE:
    return size
  return min(round_up(size, LANE), round_up(pl.cdiv(size, count), step))


def _chunk(width, cycles, max_cycles):
  """Largest divisor of `width` that takes at most `max_cycles`.

  Args:
    cycles: per column.
  """
  if width % LANE:
    return width
  sizes = [s for s in range(LANE, width + 1, LANE) if width % s == 0]
  return max([s for s in sizes if cycles * s <= max_cycles] or sizes[:1])


def _machine(dtype):
  """Return (MXU width, multiply-adds per cycle, whether two cores share)."""
  info = common.tpu_info()
  width = info.mxu_column_size
  macs = info.num_mxus * width**2 * (1 if width == LANE else 2)
  passes = 6 if dtype == jnp.float32 else 1
  return width, macs / passes, info.num_cores > 1


def precision(dtype):
  """Precision of products: full for float32, in the six passes of `_machine`.
  """
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _rows(R, block):
  return min(ROWS, round_up(R, block))


def matmul_tiles(R, D, F, dtype, gated=False):
  """Tile sizes for y, or dx with D and F exchanged; None if none fit."""
  held, outs = (2, 3) if gated else (1, 1)
  info, size = common.tpu_info(), jnp.dtype(dtype).itemsize
  width, macs, cores = _machine(dtype)
  block = BLOCK[width]
  rows, best = _rows(R, block), None
  for count in range(1, pl.cdiv(F, LANE) + 1):
    split = cores and count % 2 == 0
    if cores and not split and F > LANE:
      continue
    out = _tile_width(F, count, width)
    matrices = 2 * size * held * D * out
    total = matrices + 2 * size * rows * (D + outs * out)
    if (matrices <= MATRICES_VMEM * info.vmem_capacity_bytes
        and total <= TOTAL_VMEM * info.vmem_capacity_bytes):
      cycles = held * block * D / macs  # of a column
      chunk = _chunk(out, cycles, MAX_CYCLES['y'])
      # Wide tiles read x less often, but not for the price of short matmuls.
      long = MAX_CYCLES['y'] / 2
      long = long if chunk == out else min(chunk * cycles, long)
      if best is None or long > best[0]:
        best = long, TileSizes(rows, block, D, out, chunk, split)
  return best and best[1]


def weight_gradient_tiles(R, D, F, dtype):
  """Tile sizes for dw that move the fewest bytes; None if none fit."""
  info, size = common.tpu_info(), jnp.dtype(dtype).itemsize
  width, macs, cores = _machine(dtype)
  block = BLOCK[width]
  rows, best = _rows(R, block), None
  for n in range(1, pl.cdiv(F, LANE) + 1):
    split = cores and n % 2 == 0
    if cores and not split and F > LANE:
      continue
    for k in range(1, pl.cdiv(D, LANE) + 1):
      inner, out = _tile_width(D, k), _tile_width(F, n, width)
      if D % LANE == 0 and D % inner:
        continue
      total = (4 + 2 * size) * inner * out + 3 * size * rows * (inner + out)
      moved = n * D + k * F
      if (total <= TOTAL_VMEM * info.vmem_capacity_bytes
          and (best is None or moved < best[0])):
        chunk = _chunk(inner, rows * out / macs, MAX_CYCLES['dw'])
        best = moved, TileSizes(rows, block, inner, out, chunk, split)
  return best and best[1]
