"""Gather of indexed rows of x inside the TPU kernels of grouped products.

A copy per row would cost more than the products: issuing it alone takes the
scalar unit some twenty cycles. So windows of x, WINDOW consecutive rows, are
copied while the work item before is multiplied. Where an item's rows are
consecutive too, blocks of rows are windows. Otherwise a block of rows is a
product of a 0/1 matrix with the windows from that of its smallest index to that
of its largest, which is exact for finite x: the first three or four windows in
one product, and the others one by one. There are no others where the rows of a
group are in the order of x and about every second row of x is one of them. In
any other order the result is the same and costs more, at most all of x for each
block.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.grouped_matmul.tpu import tiles

WINDOW = 128  # rows of a window and of a block
# Windows of one product, by width of the MXU.
WINDOWS_PER_PRODUCT = {128: 3, 256: 4}
BUFFERED = 12, 6 * 2**20  # most windows that wait for an item, and their bytes
EMPTY, CONTIGUOUS, NEAR, FAR = range(4)


class Windows(NamedTuple):
  """Windows of x that I work items need, with B blocks of rows in each.

  Attributes:
    low_IB, high_IB: first window of a block of the item's rows and first one
      past it, item by item; both 0 where the block has no rows.
    low_I, high_I: the same of the item.
    kind_I: EMPTY needs no window, FAR more than wait at once; of the others,
      in CONTIGUOUS a block is a window.
  """

  low_IB: jax.Array
  high_IB: jax.Array
  low_I: jax.Array
  high_I: jax.Array
  kind_I: jax.Array


def is_faster(x, row_index, groups):
  """True if gathering here is at least as fast as by XLA beforehand.

  Not where there are SparseCores, with which XLA gathers. Nor where a group
  with an average number of rows uses so few of x that blocks need many windows.
  """
  return (
      x.shape[1] % tiles.LANE == 0 and common.tpu_info().sparse_core is None
      and len(x) * groups <= _windows_per_product() * len(row_index))


def _num_buffered(columns, dtype):
  """Number of windows of so many columns that wait for an item."""
  max_windows, size = BUFFERED
  size //= WINDOW * columns * jnp.dtype(dtype).itemsize
  return max(_windows_per_product(), min(max_windows, size))


def _windows_per_product():
  return WINDOWS_PER_PRODUCT[common.tpu_info().mxu_column_size]


def _windows(index_TBR, items, buffered) -> Windows:
  """Return the windows of all items; index_TBR is by tile, block and row."""
  _, B, R = index_TBR.shape
  row_BR = jnp.arange(B * R).reshape(1, B, R)
  per_item = lambda a: a[:, None, None]
  index_IBR = index_TBR[items.tile_I]
  mask = (
      (row_BR >= per_item(items.low_I)) & (row_BR < per_item(items.high_I))
      & per_item(items.group_I < len(items.group_U)) & (index_IBR >= 0))
  max_int = jnp.iinfo(jnp.int32).max
  smallest = lambda a, axis: jnp.where(mask, a, max_int).min(axis)
  largest = lambda a, axis: jnp.where(mask, a, -max_int).max(axis)
  any_IB = mask.any(2)
  low_IB = jnp.where(any_IB, smallest(index_IBR, 2) // WINDOW, 0)
  high_IB = jnp.where(any_IB, largest(index_IBR, 2) // WINDOW + 1, 0)
  low_I = jnp.where(any_IB, low_IB, max_int).min(1)
  high_I, any_I = high_IB.max(1), any_IB.any(1)
  low_I = jnp.where(any_I, low_I, 0)
  shift_IBR = index_IBR - row_BR
  shift_I = smallest(shift_IBR, (1, 2))
  contiguous_I = (shift_I == largest(shift_IBR, (1, 2))) & (
      shift_I % WINDOW == 0)
  all_buffered = high_I - low_I <= buffered
  kind_I = jnp.where(
      ~any_I, EMPTY, jnp.where(
          ~all_buffered, FAR, jnp.where(contiguous_I, CONTIGUOUS, NEAR)))
  fields = Windows(
      low_IB.reshape(-1), high_IB.reshape(-1), low_I, high_I, kind_I)
  return jax.tree.map(lambda a: a.astype(jnp.int32), fields)


def plan(x, row_index, items, tile, columns):
  """Return the windows of all items, and operands for `specs`.

  Without `row_index`, None and x itself.

  Args:
    tile: rows of a tile.
    columns: columns that are multiplied at a time.
  """
  if row_index is None:
    return None, [x]
  N = len(x)
  index_R = jnp.where(
      (row_index >= 0) & (row_index < N), row_index, -1).astype(jnp.int32)
  index_R = jnp.pad(index_R, (0, -len(row_index) % tile), constant_values=-1)
  index_TBR = index_R.reshape(-1, tile // WINDOW, WINDOW)
  missing = -N % WINDOW
  if missing:
    x = jnp.pad(x, ((0, missing), (0, 0)))
  buffered = _num_buffered(columns, x.dtype)
  return _windows(index_TBR, items, buffered), [index_TBR, x]


def specs(windows, tile, columns, at):
  """Block specs of the operands; `at` maps the grid to a tile and columns."""
  if windows is None:
    return [pl.BlockSpec((tile, columns), at)]
  return [
      pl.BlockSpec(
          (1, tile // WINDOW, WINDOW), lambda *grid: (at(*grid)[0], 0, 0)),
      pl.BlockSpec(memory_space=pl.ANY),
  ]


def scratch(windows, tile, columns, dtype):
  """Scratch of `gather_rows`: rows, windows of two items, semaphores."""
  if windows is None:
    return []
  buffered = _num_buffered(columns, dtype)
  return [
      pltpu.VMEM((tile, columns), dtype),
      pltpu.VMEM((2, buffered * WINDOW, columns), dtype),
      pltpu.SemaphoreType.DMA((2, buffered)),
  ]


def gather_rows(
    items, windows, item, last, index, x, column, rows, buffer, arrived):
  """Gather a work item's rows of x into `rows`, undefined elsewhere.

  Args:
    items, windows: WorkItems and Windows, in SMEM.
    item, last: the item and the last one; they come in order, from 0.
    index: [B, WINDOW], of the item's tile.
    x: [N, D] in HBM.
    column: first of the columns to gather.
  """
  B, columns = index.shape[0], rows.shape[1]
  buffered, per_product = arrived.shape[1], _windows_per_product()
  low, high = windows.low_I[item], windows.high_I[item]
  kind = windows.kind_I[item]
  part = lambda i, count=1: pl.ds(
      i * WINDOW if isinstance(i, int) else pl.multiple_of(i * WINDOW, WINDOW),
      count * WINDOW)

  def copy(item, w):
    slot = jax.lax.rem(w - windows.low_I[item], buffered)
    return pltpu.make_async_copy(
        x.at[part(w), pl.ds(column, columns)],
        buffer.at[item & 1, part(slot), :], arrived.at[item & 1, slot])

  def start(item):
    low = windows.low_I[item]
    pl.loop(low, jnp.minimum(low + buffered, windows.high_I[item]))(
        lambda w: copy(item, w).start())

  def product(b, slot, first, count):
    """Rows of block b that are among `count` windows from `first` on."""
    row = b * WINDOW + jax.lax.broadcasted_iota(jnp.int32, (1, WINDOW), 1)
    mask = (row >= items.low_I[item]) & (row < items.high_I[item])
    index_1R = jnp.where(mask, index[b:b + 1, :], -1) - first * WINDOW
    index_RL = jnp.broadcast_to(index_1R, (WINDOW, WINDOW)).T
    lane = jax.lax.broadcasted_iota(jnp.int32, (WINDOW, WINDOW), 1)
    one_hot = jnp.concatenate([
        jnp.where(index_RL == lane + i * WINDOW, 1.0, 0.0).astype(x.dtype)
        for i in range(count)], 1)
    return jax.lax.dot_general(
        one_hot, buffer[item & 1, part(slot, count), :],
        (((1,), (0,)), ((), ())), precision=tiles.precision(x.dtype),
        preferred_element_type=jnp.float32)

  def add(b, w):
    """Add to block b its rows that are in window w."""
    new = product(b, jax.lax.rem(w - low, buffered), w, 1)
    new += rows[part(b), :].astype(jnp.float32)
    rows[part(b), :] = new.astype(rows.dtype)

  @pl.when(item == 0)
  def _():  # windows that have not arrived are multiplied by zeros
    buffer[...] = jnp.zeros_like(buffer)
    start(item)

  pl.when(item < last)(lambda: start(item + 1))

  @pl.when((kind == CONTIGUOUS) | (kind == NEAR))
  def _():
    pl.loop(low, high)(lambda w: copy(item, w).wait())

  @pl.when(kind == CONTIGUOUS)
  def _():
    for b in range(B):
      slot = jnp.maximum(windows.low_IB[item * B + b] - low, 0)
      rows[part(b), :] = buffer[item & 1, part(slot), :]

  @pl.when(kind == NEAR)
  def _():
    slots = [
        jnp.clip(windows.low_IB[item * B + b] - low, 0, buffered - per_product)
        for b in range(B)]
    for b, slot in enumerate(slots):
      rows[part(b), :] = product(
          b, slot, low + slot, per_product).astype(rows.dtype)
    for b, slot in enumerate(slots):
      pl.loop(low + slot + per_product, windows.high_IB[item * B + b])(
          lambda w, b=b: add(b, w))

  @pl.when((kind == EMPTY) | (kind == FAR))
  def _():
    rows[...] = jnp.zeros_like(rows)

    @pl.loop(low, high)
    def _(w):
      copy(item, w).wait()
      for b in range(B):
        @pl.when((w >= windows.low_IB[item * B + b])
                 & (w < windows.high_IB[item * B + b]))
        def _(b=b):
          add(b, w)
      pl.when(w + buffered < high)(lambda: copy(item, w + buffered).start())
