"""grouped_matmul as Mosaic TPU kernels: y and dx by one, dw by another.

x is cut into tiles of rows regardless of groups. A work item is a tile and a
group that has rows in it, in order, and computes that group's rows only. Work
items are computed from the group sizes and reach the kernels by scalar
prefetch: the grid is as long as there are items, so work follows the load and
empty groups cost nothing but zeros in dw.

Rows: within an item, blocks of `block` rows, of which half is computed where a
group has rows in only one half; a group border costs half a block. Matrices:
[D, out] of w lies in VMEM while its group's tiles are processed, and the next
group's is copied meanwhile; D is not cut. For dw a tile [inner, out] is summed
in VMEM in float32 over a group's items. VMEM, with b bytes per activation:

  y, dx   2 b (rows D + D out + rows out)
  dw      (4 + 2 b) inner out + 3 b rows (inner + out)

No axis of w need be a multiple of a tile. A TPU pads arrays in HBM to whole
registers, and the last part of w is copied with its padding: columns past its
end are multiplied and not written. The axis that is summed over is never cut.
Where two matrices lie side by side, the second may start within a register,
which is copied too: its columns are then shifted left in VMEM, once per copy.

float32 operands are multiplied in full precision, six passes of the MXU. Work
items are those of megablox (jax.experimental.pallas.ops.tpu), which lacks
blocks within a tile and a matrix copy that overlaps a whole group.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.grouped_matmul.tpu import gather, tiles

LANE, SUBLANE = tiles.LANE, 8
VMEM_FRACTION = 0.9  # that kernels may take


class WorkItems(NamedTuple):
  """Pairs of a tile and a group, I of them at most, and the groups with any.

  Attributes:
    group_I: the group, G for rows past the last group.
    tile_I: the tile.
    low_I: first row of the group within the tile.
    high_I: first row past the group within the tile.
    run_I: index of the group among those with items.
    group_U: the groups with items.
    totals: number of items of groups, number of groups with items.
  """

  group_I: jax.Array
  tile_I: jax.Array
  low_I: jax.Array
  high_I: jax.Array
  run_I: jax.Array
  group_U: jax.Array
  totals: jax.Array


def work_items(group_sizes, R, rows, *, rest):
  """Return the number of work items and the items.

  Args:
    rest: for y and dx: with items for the rows past the last group. Otherwise,
      for dw, each empty group has one item.
  """
  G, T = len(group_sizes), pl.cdiv(R, rows)
  end = jnp.cumsum(group_sizes)
  start = end - group_sizes
  if rest:
    start, end = jnp.append(start, end[-1]), jnp.append(end, R)
  count = jnp.where(
      end > start, pl.cdiv(end, rows) - start // rows, 0 if rest else 1)
  stop = jnp.cumsum(count)
  item = jnp.arange(T + G + 1)
  group = (item[:, None] >= stop[None]).sum(1).clip(max=len(count) - 1)
  tile = ((start // rows - stop + count)[group] + item).clip(0, T - 1)
  within = lambda row_G: (row_G[group] - tile * rows).clip(0, rows)
  used = count[:G] > 0
  run = jnp.cumsum(used) - 1
  group_U = jnp.zeros(G, jnp.int32).at[jnp.where(used, run, G)].set(
      jnp.arange(G, dtype=jnp.int32), mode='drop')
  fields = WorkItems(
      group, tile, within(start), within(end), run[group.clip(max=G - 1)],
      group_U, jnp.stack([stop[G - 1], used.sum()]))
  return stop[-1].astype(jnp.int32), jax.tree.map(
      lambda a: a.astype(jnp.int32), fields)


def _row_mask(items, item, first, count):
  """[count, 1]: which rows from `first` on belong to the item."""
  row = first + jax.lax.broadcasted_iota(jnp.int32, (count, 1), 0)
  return (row >= items.low_I[item]) & (row < items.high_I[item])


def _select(mask, x, other):
  """jnp.where in float32: not every TPU selects 16-bit values."""
  f32 = lambda a: jnp.asarray(a).astype(jnp.float32)
  return jnp.where(mask, f32(x), f32(other))


def _matmul_kernel(scalars, *refs, t, F, transposed, gated):
  """Compute a work item's rows of y; copy the matrices itself.

  refs are x, w, y (and the two products, if gated and wanted), matrix [2, M, D,
  out] ([2, 1, out, D] if transposed) with M = 2 if gated, and arrived [2]. If
  gated, w's second matrix starts `misaligned` columns within a register, and
  matrix is a register wider where that is not 0. If rows are gathered, their
  index comes first and the scratch of `gather.gather_rows` last.
  """
  items, windows = scalars
  if windows is not None:
    index, *refs, x_rows, buffer, arrived_w = refs
  x, w, *outs, matrix, arrived = refs
  if windows is not None:
    x_hbm, x = x, x_rows
  misaligned = F % LANE if gated else 0
  n, item, N = pl.program_id(0), pl.program_id(1), pl.num_programs(0)
  num_items, runs = items.totals[0], items.totals[1]
  in_group, run, G = item < num_items, items.run_I[item], len(items.group_U)
  slot = (run if t.split else run + n * runs) & 1

  def fetch(ahead, do):
    """Start or await the copy of this run's matrix or the next one's."""
    at_n, u = n, run + ahead
    exists = u < runs
    if not t.split:  # the next run may be the first one of the next columns
      at_n, u = jnp.where(exists, n, n + 1), jnp.where(exists, u, 0)
      exists = at_n < N
    into = (slot + ahead) & 1
    group = items.group_U[jnp.minimum(u, G - 1)]

    def columns(width):
      width = tiles.round_up(width, SUBLANE if transposed else LANE)
      for m in range(2 if gated else 1):
        begin = pl.multiple_of(m * (F - misaligned) + at_n * t.out, LANE)
        count = width + (tiles.round_up(misaligned, LANE) if m else 0)
        at, to = pl.ds(begin, count), pl.ds(0, count)
        if t.out == F and not gated:
          source, goal = w.at[group], matrix.at[into, m]
        elif transposed:
          source, goal = w.at[group, at, :], matrix.at[into, m, to, :]
        else:
          source, goal = w.at[group, :, at], matrix.at[into, m, :, to]
        do(pltpu.make_async_copy(source, goal, arrived.at[into]))

    last, rest = at_n == N - 1, F % t.out
    pl.when(exists & ~last if rest else exists)(lambda: columns(t.out))
    if rest:
      pl.when(exists & last)(lambda: columns(rest))

  first = items.group_I[item] != items.group_I[jnp.maximum(item - 1, 0)]
  first = in_group & (first | (item == 0))
  start, wait = (lambda copy: copy.start()), (lambda copy: copy.wait())
  cold = first & (item == 0) if t.split else first & (item == 0) & (n == 0)
  pl.when(cold)(lambda: fetch(0, start))

  @pl.when(first)
  def _():
    fetch(0, wait)
    fetch(1, start)
    if misaligned:
      _align_left(matrix.at[slot, 1], misaligned, t.out)

  def multiply(row, rows):
    mask = _row_mask(items, item, row, rows)

    def columns(c):
      at = pl.ds(row, rows), pl.ds(c, t.chunk)
      products = [
          jax.lax.dot_general(
              x[pl.ds(row, rows), :],
              matrix[slot, m, pl.ds(c, t.chunk), :] if transposed else
              matrix[slot, m, :, pl.ds(c, t.chunk)],
              (((1,), (1 if transposed else 0,)), ((), ())),
              precision=tiles.precision(x.dtype),
              preferred_element_type=jnp.float32)
          for m in range(2 if gated else 1)]
      if gated:
        gate, up = products
        products = [gate * jax.nn.sigmoid(gate) * up, gate, up]
      for out, y_rc in zip(outs, products):
        out[at] = _select(mask, y_rc.astype(x.dtype), out[at]).astype(x.dtype)

    if t.chunk == t.out:
      columns(0)
    else:
      pl.loop(0, t.out // t.chunk)(
          lambda i: columns(pl.multiple_of(i * t.chunk, t.chunk)))

  low, high, half = items.low_I[item], items.high_I[item], t.block // 2

  @pl.when(in_group)
  def _():
    if windows is not None:
      gather.gather_rows(
          items, windows, item, num_items - 1, index.at[0], x_hbm, 0, x, buffer,
          arrived_w)

    @pl.loop(low // t.block, pl.cdiv(high, t.block))
    def _(i):
      row = pl.multiple_of(i * t.block, t.block)
      middle = pl.multiple_of(row + half, half)
      upper, lower = low < middle, high > middle
      pl.when(upper & lower)(lambda: multiply(row, t.block))
      pl.when(~(upper & lower))(lambda: multiply(
          pl.multiple_of(jnp.where(upper, row, middle), half), half))

  @pl.when(~in_group)
  def _():
    for y in outs:
      mask = _row_mask(items, item, 0, t.rows)
      y[...] = _select(mask, 0, y[...]).astype(y.dtype)


def _align_left(matrix, misaligned, out):
  """Shift columns left by `misaligned`."""
  D = matrix.shape[0]
  rows = LANE if D % LANE == 0 else D

  @pl.loop(0, D // rows)
  def _(i):
    at = pl.ds(pl.multiple_of(i * rows, rows), rows)
    matrix[at, pl.ds(0, out)] = matrix[at, pl.ds(0, out + LANE)][
        :, misaligned:misaligned + out]


def matmul(x, w, group_sizes, t, *, row_index=None, transposed=False):
  """x_r w_g, or x_r w_g^T; with `row_index`, of those rows of x."""
  name = 'grouped_matmul_dx' if transposed else 'grouped_matmul'
  return _matmul(
      x, w, group_sizes, t, name, row_index=row_index, transposed=transposed)[0]


def matmul_swiglu(x, w, group_sizes, t, *, keep):
  """silu(x_r a_g) * (x_r b_g) with w_g = [a_g, b_g]; if keep, both products."""
  return _matmul(
      x, w, group_sizes, t, 'grouped_swiglu', gated=True, outs=3 if keep else 1)


def _matmul(
    x, w, group_sizes, t, name, *, row_index=None, transposed=False,
    gated=False, outs=1):
  R, D = len(x if row_index is None else row_index), x.shape[1]
  F, G = w.shape[1 if transposed else 2] // (2 if gated else 1), len(w)
  margin = tiles.round_up(F % LANE, LANE) if gated else 0
  count, items = work_items(group_sizes, R, t.rows, rest=True)

  def last(item, scalars):
    items, _ = scalars
    return items.tile_I[jnp.clip(item, 0, jnp.maximum(items.totals[0] - 1, 0))]

  windows, operands = gather.plan(x, row_index, items, t.rows, t.inner)
  return pl.pallas_call(
      functools.partial(
          _matmul_kernel, t=t, F=F, transposed=transposed, gated=gated),
      name=name,
      out_shape=[common.shape_like((R, F), x.dtype, x)] * outs,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
          grid=(pl.cdiv(F, t.out), count),
          in_specs=[
              *gather.specs(
                  windows, t.rows, D, lambda n, item, s: (last(item, s), 0)),
              pl.BlockSpec(memory_space=pl.ANY),
          ],
          out_specs=[pl.BlockSpec(
              (t.rows, t.out),
              lambda n, item, s: (s[0].tile_I[item], n))] * outs,
          scratch_shapes=[
              pltpu.VMEM(
                  (2, 1, t.out, D) if transposed else
                  (2, 2 if gated else 1, D, t.out + margin), w.dtype),
              pltpu.SemaphoreType.DMA((2,)),
              *gather.scratch(windows, t.rows, D, x.dtype),
          ],
      ),
      compiler_params=_compiler_params(t, 2),
      cost_estimate=pl.CostEstimate(
          flops=2 * R * w.size // G, transcendentals=R * F if gated else 0,
          bytes_accessed=x.dtype.itemsize * (R * D + outs * R * F + w.size)),
  )((items, windows), *operands, w)


def _weight_gradient_kernel(scalars, *refs, t):
  """Add a work item's x^T dy to its group's tile of dw.

  refs are x, dy, dw, its sum, and this item's rows of dy and x, where gathered
  rows are stored, as in `_matmul_kernel`.
  """
  items, windows = scalars
  if windows is not None:
    index, *refs, x_rows, buffer, arrived_w = refs
  else:
    *refs, x_rows = refs
  x, dy, dw, total, dy_rows = refs
  item = pl.program_id(2)
  group, low, high = items.group_I[item], items.low_I[item], items.high_I[item]
  first = (item == 0) | (group != items.group_I[jnp.maximum(item - 1, 0)])
  if windows is not None:
    column = pl.multiple_of(pl.program_id(1) * t.inner, t.inner)
    gather.gather_rows(
        items, windows, item, pl.num_programs(2) - 1, index.at[0], x, column,
        x_rows, buffer, arrived_w)
    x = x_rows

  def add(x, dy, row, rows, first):

    def part(i):
      at = pl.ds(i, t.chunk), slice(None)
      dw_co = jax.lax.dot_general(
          x[pl.ds(row, rows), pl.ds(i, t.chunk)], dy[pl.ds(row, rows), :],
          (((0,), (0,)), ((), ())), precision=tiles.precision(x.dtype),
          preferred_element_type=jnp.float32)
      dw_co += jnp.where(first, 0.0, total[at])
      total[at] = dw_co
      dw[at] = dw_co.astype(dw.dtype)  # the last item's stays

    if t.chunk == t.inner:
      part(0)
    else:
      pl.loop(0, t.inner // t.chunk)(
          lambda i: part(pl.multiple_of(i * t.chunk, t.chunk)))

  whole = (low == 0) & (high == t.rows)
  pl.when(whole)(lambda: add(x, dy, 0, t.rows, first))

  @pl.when(~whole & (high > low))
  def _():
    mask = _row_mask(items, item, 0, t.rows)
    if windows is None:
      x_rows[...] = _select(mask, x[...], 0).astype(x.dtype)
    dy_rows[...] = _select(mask, dy[...], 0).astype(dy.dtype)
    begin = low // t.block

    @pl.loop(begin, pl.cdiv(high, t.block))
    def _(i):
      add(x_rows, dy_rows, pl.multiple_of(i * t.block, t.block), t.block,
          first & (i == begin))

  @pl.when(high == low)
  def _():
    dw[...] = jnp.zeros_like(dw)


def weight_gradient(x, dy, group_sizes, t, *, row_index=None):
  """Sum of x_r^T dy_r over each group's rows; x indexed by `row_index`."""
  (R, F), D, G = dy.shape, x.shape[1], len(group_sizes)
  count, items = work_items(group_sizes, R, t.rows, rest=False)
  windows, operands = gather.plan(x, row_index, items, t.rows, t.inner)
  return pl.pallas_call(
      functools.partial(_weight_gradient_kernel, t=t),
      name='grouped_matmul_dw',
      out_shape=common.shape_like((G, D, F), x.dtype, x),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
          grid=(pl.cdiv(F, t.out), pl.cdiv(D, t.inner), count),
          in_specs=[
              *gather.specs(
                  windows, t.rows, t.inner,
                  lambda n, k, item, s: (s[0].tile_I[item], k)),
              pl.BlockSpec(
                  (t.rows, t.out),
                  lambda n, k, item, s: (s[0].tile_I[item], n)),
          ],
          out_specs=pl.BlockSpec(
              (None, t.inner, t.out),
              lambda n, k, item, s: (s[0].group_I[item], k, n)),
          scratch_shapes=[
              pltpu.VMEM((t.inner, t.out), jnp.float32),
              pltpu.VMEM((t.rows, t.out), x.dtype),
              *(gather.scratch(windows, t.rows, t.inner, x.dtype)
                or [pltpu.VMEM((t.rows, t.inner), x.dtype)]),
          ],
      ),
      compiler_params=_compiler_params(t, 3),
      cost_estimate=pl.CostEstimate(
          flops=2 * R * D * F, transcendentals=0,
          bytes_accessed=x.dtype.itemsize * (R * D + R * F + G * D * F)),
  )((items, windows), *operands, dy)


def _compiler_params(t, axes):
  first = 'parallel' if t.split else 'arbitrary'
  return pltpu.CompilerParams(
      dimension_semantics=(first,) + ('arbitrary',) * (axes - 1),
      vmem_limit_bytes=int(
          VMEM_FRACTION * common.tpu_info().vmem_capacity_bytes))


def supported(x, w, group_sizes, row_index=None):
  """Return None, or why these kernels cannot run here."""
  if common.platform() != 'tpu':
    return f'it needs a TPU and this is a {common.platform()}'
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f'it multiplies bfloat16 or float32 and x is {x.dtype}'
  R = len(x if row_index is None else row_index)
  D, F = x.shape[1], w.shape[2]
  if not (R and len(x) and D and F and len(w)):
    return f'there is nothing to multiply: x is {x.shape} and w {w.shape}'
  if None in (tiles.matmul_tiles(R, D, F, x.dtype),
              tiles.matmul_tiles(R, F, D, x.dtype),
              tiles.weight_gradient_tiles(R, D, F, x.dtype)):
    return f'no tile of w, {w.shape}, fits the memory of a core'
  return None


def _index_or_gather(x, row_index, groups):
  """Return x and the index that kernels gather by, or x gathered and None."""
  if row_index is None or gather.is_faster(x, row_index, groups):
    return x, row_index
  return x.at[row_index].get(mode='clip'), None


def _fwd(x, w, group_sizes, row_index):
  R, (D, F) = len(x if row_index is None else row_index), w.shape[1:]
  x, row_index = _index_or_gather(x, row_index, len(w))
  t = tiles.matmul_tiles(R, D, F, x.dtype)
  return matmul(x, w, group_sizes, t, row_index=row_index)


def _bwd(x, w, group_sizes, row_index, dy):
  (R, F), D = dy.shape, x.shape[1]
  x, row_index = _index_or_gather(x, row_index, len(w))
  dx = matmul(dy, w, group_sizes, tiles.matmul_tiles(R, F, D, x.dtype),
              transposed=True)
  t = tiles.weight_gradient_tiles(R, D, F, x.dtype)
  return dx, weight_gradient(x, dy, group_sizes, t, row_index=row_index)


BACKEND = common.Backend('tpu', supported, _fwd, _bwd)
