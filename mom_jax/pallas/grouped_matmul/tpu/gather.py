"""Rows of x by their numbers, inside the TPU kernels of grouped products.

A copy for each row would cost more than the products: issuing it alone takes
the scalar unit some twenty cycles. So windows of x are copied, SIZE rows that
follow each other, while the visit before is multiplied. Where a visit's rows
follow each other too, they are those of windows. Else a block of rows is a
product of zeros and ones with the windows from that of its least number to that
of its largest, which is exact for finite x: with the first three or four at
once, and no others where the rows of a group are in the order of x and about
each second row of x is one of them. In any other order the result is the same
and costs more, at most all of x for each block.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.grouped_matmul.tpu import tiles as tpu_tiles

SIZE = 128  # rows of a window and of a block
SPAN = {128: 3, 256: 4}  # windows of one product, by width of the MXU
HELD = 12, 6 * 2**20  # windows that wait for a visit, and their bytes
NONE, STRAIGHT, NEAR, FAR = range(4)


class Windows(NamedTuple):
  """Windows that V visits meet, with B blocks in each.

  Attributes:
    low_VB, high_VB: first window of a block of the visit's rows, first one past
      it, visit by visit; both 0 where the block has no rows.
    low_V, high_V: the same of the visit.
    kind_V: NONE meets no window, and FAR more than wait at once; of the others
      in STRAIGHT a block is a window.
  """

  low_VB: jax.Array
  high_VB: jax.Array
  low_V: jax.Array
  high_V: jax.Array
  kind_V: jax.Array


def pays(x, rows, groups):
  """Whether this takes no longer than a gather by XLA before.

  Not where there are SparseCores: XLA has them gather. Nor where a group that
  takes its share of the rows has so few of x that blocks meet many windows.
  """
  return (
      x.shape[1] % tpu_tiles.LANE == 0 and common.tpu_info().sparse_core is None
      and len(x) * groups <= _span() * len(rows))


def _held(columns, dtype):
  """Windows of as many columns that wait for a visit."""
  most, size = HELD
  size //= SIZE * columns * jnp.dtype(dtype).itemsize
  return max(_span(), min(most, size))


def _span():
  return SPAN[common.tpu_info().mxu_column_size]


def _windows(index_TBR, visit, held) -> Windows:
  """What each visit meets of x, whose rows a tile's blocks are in index_TBR."""
  _, B, R = index_TBR.shape
  row_BR = jnp.arange(B * R).reshape(1, B, R)
  per_V = lambda a: a[:, None, None]
  index_VBR = index_TBR[visit.tile_V]
  mine = (
      (row_BR >= per_V(visit.low_V)) & (row_BR < per_V(visit.high_V))
      & per_V(visit.group_V < len(visit.group_U)) & (index_VBR >= 0))
  most = jnp.iinfo(jnp.int32).max
  least = lambda a, axis: jnp.where(mine, a, most).min(axis)
  largest = lambda a, axis: jnp.where(mine, a, -most).max(axis)
  some_VB = mine.any(2)
  low_VB = jnp.where(some_VB, least(index_VBR, 2) // SIZE, 0)
  high_VB = jnp.where(some_VB, largest(index_VBR, 2) // SIZE + 1, 0)
  low_V = jnp.where(some_VB, low_VB, most).min(1)
  high_V, some_V = high_VB.max(1), some_VB.any(1)
  low_V = jnp.where(some_V, low_V, 0)
  moved_VBR = index_VBR - row_BR
  moved_V = least(moved_VBR, (1, 2))
  straight_V = (moved_V == largest(moved_VBR, (1, 2))) & (moved_V % SIZE == 0)
  all_held = high_V - low_V <= held
  kind_V = jnp.where(
      ~some_V, NONE, jnp.where(
          ~all_held, FAR, jnp.where(straight_V, STRAIGHT, NEAR)))
  fields = Windows(
      low_VB.reshape(-1), high_VB.reshape(-1), low_V, high_V, kind_V)
  return jax.tree.map(lambda a: a.astype(jnp.int32), fields)


def source(x, rows, visit, tile, columns):
  """What the visits of tiles of so many rows meet, and operands for `specs`.

  Without numbers of rows that is x itself, and nothing is known of windows.

  Args:
    columns: that are multiplied at a time.
  """
  if rows is None:
    return None, [x]
  N = len(x)
  index_R = jnp.where((rows >= 0) & (rows < N), rows, -1).astype(jnp.int32)
  index_R = jnp.pad(index_R, (0, -len(rows) % tile), constant_values=-1)
  index_TBR = index_R.reshape(-1, tile // SIZE, SIZE)
  missing = -N % SIZE
  if missing:
    x = jnp.pad(x, ((0, missing), (0, 0)))
  held = _held(columns, x.dtype)
  return _windows(index_TBR, visit, held), [index_TBR, x]


def specs(seen, tile, columns, at):
  """Of the operands; `at` says which tile and which columns of the grid."""
  if seen is None:
    return [pl.BlockSpec((tile, columns), at)]
  return [
      pl.BlockSpec((1, tile // SIZE, SIZE), lambda *grid: (at(*grid)[0], 0, 0)),
      pl.BlockSpec(memory_space=pl.ANY),
  ]


def scratch(seen, tile, columns, dtype):
  """Memory for `fill`: the rows, windows of two visits, their arrival."""
  if seen is None:
    return []
  held = _held(columns, dtype)
  return [
      pltpu.VMEM((tile, columns), dtype),
      pltpu.VMEM((2, held * SIZE, columns), dtype),
      pltpu.SemaphoreType.DMA((2, held)),
  ]


def fill(visit, seen, v, last, index, x, column, rows, window, arrived):
  """Brings a visit's rows of x into `rows`, which hold other numbers elsewhere.

  Args:
    visit, seen: Visits and Windows, in SMEM.
    v, last: the visit and the last one; they come in order, from 0.
    index: [B, SIZE], of its tile.
    x: [N, D] in HBM.
    column: first of the columns to bring.
  """
  B, columns = index.shape[0], rows.shape[1]
  held, span = arrived.shape[1], _span()
  low, high, kind = seen.low_V[v], seen.high_V[v], seen.kind_V[v]
  part = lambda i, count=1: pl.ds(
      i * SIZE if isinstance(i, int) else pl.multiple_of(i * SIZE, SIZE),
      count * SIZE)

  def copy(v, w):
    place = jax.lax.rem(w - seen.low_V[v], held)
    return pltpu.make_async_copy(
        x.at[part(w), pl.ds(column, columns)],
        window.at[v & 1, part(place), :], arrived.at[v & 1, place])

  def start(v):
    low = seen.low_V[v]
    pl.loop(low, jnp.minimum(low + held, seen.high_V[v]))(
        lambda w: copy(v, w).start())

  def product(b, place, first, count):
    """Rows of block b that are among `count` windows from `first` on."""
    row = b * SIZE + jax.lax.broadcasted_iota(jnp.int32, (1, SIZE), 1)
    mine = (row >= visit.low_V[v]) & (row < visit.high_V[v])
    index_1R = jnp.where(mine, index[b:b + 1, :], -1) - first * SIZE
    index_RL = jnp.broadcast_to(index_1R, (SIZE, SIZE)).T
    lane = jax.lax.broadcasted_iota(jnp.int32, (SIZE, SIZE), 1)
    hot = jnp.concatenate([
        jnp.where(index_RL == lane + i * SIZE, 1.0, 0.0).astype(x.dtype)
        for i in range(count)], 1)
    return jax.lax.dot_general(
        hot, window[v & 1, part(place, count), :], (((1,), (0,)), ((), ())),
        precision=tpu_tiles.precision(x.dtype),
        preferred_element_type=jnp.float32)

  def add(b, w):
    """To block b its rows that are in window w."""
    new = product(b, jax.lax.rem(w - low, held), w, 1)
    new += rows[part(b), :].astype(jnp.float32)
    rows[part(b), :] = new.astype(rows.dtype)

  @pl.when(v == 0)
  def _():  # what has not come yet is multiplied by zeros
    window[...] = jnp.zeros_like(window)
    start(v)

  pl.when(v < last)(lambda: start(v + 1))

  @pl.when((kind == STRAIGHT) | (kind == NEAR))
  def _():
    pl.loop(low, high)(lambda w: copy(v, w).wait())

  @pl.when(kind == STRAIGHT)
  def _():
    for b in range(B):
      place = jnp.maximum(seen.low_VB[v * B + b] - low, 0)
      rows[part(b), :] = window[v & 1, part(place), :]

  @pl.when(kind == NEAR)
  def _():
    places = [jnp.clip(seen.low_VB[v * B + b] - low, 0, held - span)
              for b in range(B)]
    for b, place in enumerate(places):
      rows[part(b), :] = product(b, place, low + place, span).astype(rows.dtype)
    for b, place in enumerate(places):
      pl.loop(low + place + span, seen.high_VB[v * B + b])(
          lambda w, b=b: add(b, w))

  @pl.when((kind == NONE) | (kind == FAR))
  def _():
    rows[...] = jnp.zeros_like(rows)

    @pl.loop(low, high)
    def _(w):
      copy(v, w).wait()
      for b in range(B):
        @pl.when((w >= seen.low_VB[v * B + b]) & (w < seen.high_VB[v * B + b]))
        def _(b=b):
          add(b, w)
      pl.when(w + held < high)(lambda: copy(v, w + held).start())
