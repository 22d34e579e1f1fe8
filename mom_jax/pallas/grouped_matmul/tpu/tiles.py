"""How the TPU kernels of grouped products cut their operands."""

from __future__ import annotations

import dataclasses

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from mom_jax.pallas import common

LANE = 128
ROWS = 512
# By width of the MXU: rows of a matmul in y and dx, and of one in dw where a
# group has part of a tile. Fewer cost more in filling the MXU, more in rows
# that border on another group.
BLOCK = {128: 128, 256: 256}
# Longest matmul in cycles: longer ones hide more, and make code longer.
LONGEST = {'y': 6_000, 'dw': 12_000}
# Shares of VMEM for the two matrices of y and dx, for all of dw.
MATRICES, SUMS = 0.375, 0.6


@dataclasses.dataclass(frozen=True)
class Tiles:
  """How a matmul is cut.

  Attributes:
    rows: rows of a tile of x.
    block: rows of a matmul.
    inner: D for y and dx; rows of a tile of dw.
    out: columns of a tile of the result.
    chunk: columns of a matmul in y and dx, rows of the result in dw.
    split: two cores take half of the columns each.
  """

  rows: int
  block: int
  inner: int
  out: int
  chunk: int
  split: bool


def whole(size, step):
  """The next multiple."""
  return pl.cdiv(size, step) * step


def _cuts(size, count, step=LANE):
  """Width of `count` tiles that cover `size`, in whole steps.

  What is less than a register stays as it is.
  """
  if size <= LANE:
    return size
  return min(whole(size, LANE), whole(pl.cdiv(size, count), step))


def _chunk(width, cycles, longest):
  """Largest part of `width` that takes no longer than that."""
  if width % LANE:
    return width
  sizes = [s for s in range(LANE, width + 1, LANE) if width % s == 0]
  return max([s for s in sizes if cycles * s <= longest] or sizes[:1])


def _machine(dtype):
  """(MXU's width, multiply-adds a cycle, whether two cores share the work)."""
  info = common.tpu_info()
  width = info.mxu_column_size
  macs = info.num_mxus * width**2 * (1 if width == LANE else 2)
  passes = 6 if dtype == jnp.float32 else 1
  return width, macs / passes, info.num_cores > 1


def precision(dtype):
  """Of a product: float32 in full, in the six passes counted above."""
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _rows(R, block):
  return min(ROWS, whole(R, block))


def times(R, D, F, dtype, gated=False):
  """Tiles of y and dx, the latter with D and F exchanged; None: none fit."""
  held, outs = (2, 3) if gated else (1, 1)
  info, size = common.tpu_info(), jnp.dtype(dtype).itemsize
  width, macs, cores = _machine(dtype)
  block = BLOCK[width]
  rows, best = _rows(R, block), None
  for count in range(1, pl.cdiv(F, LANE) + 1):
    split = cores and count % 2 == 0
    if cores and not split and F > LANE:
      continue
    out = _cuts(F, count, width)
    matrices = 2 * size * held * D * out
    total = matrices + 2 * size * rows * (D + outs * out)
    if (matrices <= MATRICES * info.vmem_capacity_bytes
        and total <= SUMS * info.vmem_capacity_bytes):
      cycles = held * block * D / macs  # of a column
      chunk = _chunk(out, cycles, LONGEST['y'])
      # Wide tiles read x less often, but not for the price of short matmuls.
      long = LONGEST['y'] / 2
      long = long if chunk == out else min(chunk * cycles, long)
      if best is None or long > best[0]:
        best = long, Tiles(rows, block, D, out, chunk, split)
  return best and best[1]


def outer(R, D, F, dtype):
  """Tiles of dw that move least; None: none fit."""
  info, size = common.tpu_info(), jnp.dtype(dtype).itemsize
  width, macs, cores = _machine(dtype)
  block = BLOCK[width]
  rows, best = _rows(R, block), None
  for n in range(1, pl.cdiv(F, LANE) + 1):
    split = cores and n % 2 == 0
    if cores and not split and F > LANE:
      continue
    for k in range(1, pl.cdiv(D, LANE) + 1):
      inner, out = _cuts(D, k), _cuts(F, n, width)
      if D % LANE == 0 and D % inner:
        continue
      total = (4 + 2 * size) * inner * out + 3 * size * rows * (inner + out)
      moved = n * D + k * F
      if (total <= SUMS * info.vmem_capacity_bytes
          and (best is None or moved < best[0])):
        chunk = _chunk(inner, rows * out / macs, LONGEST['dw'])
        best = moved, Tiles(rows, block, inner, out, chunk, split)
  return best and best[1]
