"""grouped_matmul as Mosaic TPU kernels: y and dx by one, dw by another.

x is cut into tiles of rows that know nothing of groups; a tile is visited once
for each group that has rows in it, in order, and a visit computes its group's
rows only. Which visits there are is computed from the group sizes and reaches
the kernels by scalar prefetch: the grid is as long as there are visits, so work
follows the load and empty groups cost nothing but zeros in dw.

Rows: within a visit, blocks of `block` rows, of which half is computed where a
group has rows in no more; what a group border costs is half a block. Matrices:
[D, out] of w lies in VMEM while its group's tiles go by, and the next group's
comes in beside it; D is not cut. In dw a tile [inner, out] is summed in VMEM in
float32 over a group's visits. VMEM, in bytes of an activation b:

  y, dx   2 b (rows D + D out + rows out)
  dw      (4 + 2 b) inner out + 3 b rows (inner + out)

No axis of w need be a multiple of a tile. A TPU keeps whole registers of an
array in HBM, and the last part of w is fetched as such: columns behind its end
are multiplied and not written. The axis that is summed over is never cut and
ends where it ends. Of two matrices side by side the second may then start
within a register, which comes with it: rows move to the left in VMEM, once for
each fetch.

float32 operands are multiplied in full precision, six passes of the MXU.
Visits are those of megablox (jax.experimental.pallas.ops.tpu); what it lacks
are blocks within a tile and a matrix that is on its way for a whole group.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.grouped_matmul.tpu import (
  gather as tpu_gather,
)
from mom_jax.pallas.grouped_matmul.tpu import (
  tiles as tpu_tiles,
)

LANE, SUBLANE = tpu_tiles.LANE, 8
LIMIT = 0.9  # of VMEM


class Visits(NamedTuple):
  """The visits of tiles, V of them at most, and the groups that have any.

  Attributes:
    group_V: its group, G for rows past the last group.
    tile_V: its tile.
    low_V: first row of its group within the tile.
    high_V: first row past its group within the tile.
    run_V: number of its group among those with visits.
    group_U: the groups with visits.
    totals: visits of groups, groups with visits.
  """

  group_V: jax.Array
  tile_V: jax.Array
  low_V: jax.Array
  high_V: jax.Array
  run_V: jax.Array
  group_U: jax.Array
  totals: jax.Array


def visits(group_sizes, R, rows, *, rest):
  """Number of visits and what they are, `rest` for y and dx.

  Args:
    rest: rows past the last group are visited too; else each empty group is,
      once.
  """
  G, T = len(group_sizes), pl.cdiv(R, rows)
  end = jnp.cumsum(group_sizes)
  start = end - group_sizes
  if rest:
    start, end = jnp.append(start, end[-1]), jnp.append(end, R)
  count = jnp.where(
      end > start, pl.cdiv(end, rows) - start // rows, 0 if rest else 1)
  stop = jnp.cumsum(count)
  v = jnp.arange(T + G + 1)
  group = (v[:, None] >= stop[None]).sum(1).clip(max=len(count) - 1)
  tile = ((start // rows - stop + count)[group] + v).clip(0, T - 1)
  within = lambda row_G: (row_G[group] - tile * rows).clip(0, rows)
  used = count[:G] > 0
  run = jnp.cumsum(used) - 1
  group_U = jnp.zeros(G, jnp.int32).at[jnp.where(used, run, G)].set(
      jnp.arange(G, dtype=jnp.int32), mode='drop')
  fields = Visits(
      group, tile, within(start), within(end), run[group.clip(max=G - 1)],
      group_U, jnp.stack([stop[G - 1], used.sum()]))
  return stop[-1].astype(jnp.int32), jax.tree.map(
      lambda a: a.astype(jnp.int32), fields)


def _mine(visit, v, first, count):
  """[count, 1]: which rows from `first` on are the visit's."""
  row = first + jax.lax.broadcasted_iota(jnp.int32, (count, 1), 0)
  return (row >= visit.low_V[v]) & (row < visit.high_V[v])


def _keep(mask, x, other):
  """where in float32: not every TPU selects 16-bit numbers."""
  f32 = lambda a: jnp.asarray(a).astype(jnp.float32)
  return jnp.where(mask, f32(x), f32(other))


def _times_kernel(scalars, *refs, t, F, transposed, gated):
  """A visit's rows of y; fetches the matrices itself.

  refs are x, w, y (and the two products, if gated and wanted), matrix [2, M, D,
  out] ([2, 1, out, D] if transposed) with M = 2 if gated, and arrived [2]. If
  gated, w's second matrix starts `late` columns within a register, and matrix
  has one more where that is not 0. If rows are gathered, their numbers come
  first and what `tpu_gather.fill` needs last.
  """
  visit, seen = scalars
  if seen is not None:
    index, *refs, x_mine, window, came = refs
  x, w, *outs, matrix, arrived = refs
  if seen is not None:
    x_hbm, x = x, x_mine
  late = F % LANE if gated else 0
  n, v, N = pl.program_id(0), pl.program_id(1), pl.num_programs(0)
  visited, runs = visit.totals[0], visit.totals[1]
  real, run, G = v < visited, visit.run_V[v], len(visit.group_U)
  slot = (run if t.split else run + n * runs) & 1

  def fetch(ahead, do):
    """Starts or awaits the matrix of this run or of the next, if any."""
    at_n, u = n, run + ahead
    exists = u < runs
    if not t.split:  # the next run may be the first one of the next columns
      at_n, u = jnp.where(exists, n, n + 1), jnp.where(exists, u, 0)
      exists = at_n < N
    into = (slot + ahead) & 1
    group = visit.group_U[jnp.minimum(u, G - 1)]

    def columns(width):
      width = tpu_tiles.whole(width, SUBLANE if transposed else LANE)
      for m in range(2 if gated else 1):
        begin = pl.multiple_of(m * (F - late) + at_n * t.out, LANE)
        count = width + (tpu_tiles.whole(late, LANE) if m else 0)
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

  first = visit.group_V[v] != visit.group_V[jnp.maximum(v - 1, 0)]
  first = real & (first | (v == 0))
  start, wait = (lambda copy: copy.start()), (lambda copy: copy.wait())
  cold = first & (v == 0) if t.split else first & (v == 0) & (n == 0)
  pl.when(cold)(lambda: fetch(0, start))

  @pl.when(first)
  def _():
    fetch(0, wait)
    fetch(1, start)
    if late:
      _move_left(matrix.at[slot, 1], late, t.out)

  def multiply(row, rows):
    mine = _mine(visit, v, row, rows)

    def columns(c):
      at = pl.ds(row, rows), pl.ds(c, t.chunk)
      products = [
          jax.lax.dot_general(
              x[pl.ds(row, rows), :],
              matrix[slot, m, pl.ds(c, t.chunk), :] if transposed else
              matrix[slot, m, :, pl.ds(c, t.chunk)],
              (((1,), (1 if transposed else 0,)), ((), ())),
              precision=tpu_tiles.precision(x.dtype),
              preferred_element_type=jnp.float32)
          for m in range(2 if gated else 1)]
      if gated:
        gate, up = products
        products = [gate * jax.nn.sigmoid(gate) * up, gate, up]
      for out, y_rc in zip(outs, products):
        out[at] = _keep(mine, y_rc.astype(x.dtype), out[at]).astype(x.dtype)

    if t.chunk == t.out:
      columns(0)
    else:
      pl.loop(0, t.out // t.chunk)(
          lambda i: columns(pl.multiple_of(i * t.chunk, t.chunk)))

  low, high, half = visit.low_V[v], visit.high_V[v], t.block // 2

  @pl.when(real)
  def _():
    if seen is not None:
      tpu_gather.fill(
          visit, seen, v, visited - 1, index.at[0], x_hbm, 0, x, window, came)

    @pl.loop(low // t.block, pl.cdiv(high, t.block))
    def _(i):
      row = pl.multiple_of(i * t.block, t.block)
      middle = pl.multiple_of(row + half, half)
      upper, lower = low < middle, high > middle
      pl.when(upper & lower)(lambda: multiply(row, t.block))
      pl.when(~(upper & lower))(lambda: multiply(
          pl.multiple_of(jnp.where(upper, row, middle), half), half))

  @pl.when(~real)
  def _():
    for y in outs:
      y[...] = _keep(_mine(visit, v, 0, t.rows), 0, y[...]).astype(y.dtype)


def _move_left(matrix, late, out):
  """Columns late to late + out to the front."""
  D = matrix.shape[0]
  rows = LANE if D % LANE == 0 else D

  @pl.loop(0, D // rows)
  def _(i):
    at = pl.ds(pl.multiple_of(i * rows, rows), rows)
    matrix[at, pl.ds(0, out)] = matrix[at, pl.ds(0, out + LANE)][
        :, late:late + out]


def times(x, w, group_sizes, t, *, rows=None, transposed=False):
  """x_r w_g, or x_r w_g^T; of the rows of x with those numbers, if any."""
  name = 'grouped_matmul_dx' if transposed else 'grouped_matmul'
  return _times(
      x, w, group_sizes, t, name, rows=rows, transposed=transposed)[0]


def times_gated(x, w, group_sizes, t, *, keep):
  """silu(x_r a_g) * (x_r b_g) with w_g = [a_g, b_g]; if keep, both products."""
  return _times(
      x, w, group_sizes, t, 'grouped_swiglu', gated=True, outs=3 if keep else 1)


def _times(
    x, w, group_sizes, t, name, *, rows=None, transposed=False, gated=False,
    outs=1):
  R, D = len(x if rows is None else rows), x.shape[1]
  F, G = w.shape[1 if transposed else 2] // (2 if gated else 1), len(w)
  more = tpu_tiles.whole(F % LANE, LANE) if gated else 0
  count, visit = visits(group_sizes, R, t.rows, rest=True)

  def last(v, scalars):
    visit, _ = scalars
    return visit.tile_V[jnp.clip(v, 0, jnp.maximum(visit.totals[0] - 1, 0))]

  seen, operands = tpu_gather.source(x, rows, visit, t.rows, t.inner)
  return pl.pallas_call(
      functools.partial(
          _times_kernel, t=t, F=F, transposed=transposed, gated=gated),
      name=name,
      out_shape=[common.shape_like((R, F), x.dtype, x)] * outs,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
          grid=(pl.cdiv(F, t.out), count),
          in_specs=[
              *tpu_gather.specs(
                  seen, t.rows, D, lambda n, v, s: (last(v, s), 0)),
              pl.BlockSpec(memory_space=pl.ANY),
          ],
          out_specs=[pl.BlockSpec(
              (t.rows, t.out), lambda n, v, s: (s[0].tile_V[v], n))] * outs,
          scratch_shapes=[
              pltpu.VMEM(
                  (2, 1, t.out, D) if transposed else
                  (2, 2 if gated else 1, D, t.out + more), w.dtype),
              pltpu.SemaphoreType.DMA((2,)),
              *tpu_gather.scratch(seen, t.rows, D, x.dtype),
          ],
      ),
      compiler_params=_compiler_params(t, 2),
      cost_estimate=pl.CostEstimate(
          flops=2 * R * w.size // G, transcendentals=R * F if gated else 0,
          bytes_accessed=x.dtype.itemsize * (R * D + outs * R * F + w.size)),
  )((visit, seen), *operands, w)


def _outer_kernel(scalars, *refs, t):
  """Adds a visit's x^T dy to its group's tile of dw.

  refs are x, dy, dw, its sum and dy of this visit alone; and x of this visit
  alone, which is where gathered rows come, as in `_times_kernel`.
  """
  visit, seen = scalars
  if seen is not None:
    index, *refs, x_mine, window, came = refs
  else:
    *refs, x_mine = refs
  x, dy, dw, total, dy_mine = refs
  v = pl.program_id(2)
  group, low, high = visit.group_V[v], visit.low_V[v], visit.high_V[v]
  first = (v == 0) | (group != visit.group_V[jnp.maximum(v - 1, 0)])
  if seen is not None:
    column = pl.multiple_of(pl.program_id(1) * t.inner, t.inner)
    tpu_gather.fill(
        visit, seen, v, pl.num_programs(2) - 1, index.at[0], x, column, x_mine,
        window, came)
    x = x_mine

  def add(x, dy, row, rows, first):

    def part(i):
      at = pl.ds(i, t.chunk), slice(None)
      dw_co = jax.lax.dot_general(
          x[pl.ds(row, rows), pl.ds(i, t.chunk)], dy[pl.ds(row, rows), :],
          (((0,), (0,)), ((), ())), precision=tpu_tiles.precision(x.dtype),
          preferred_element_type=jnp.float32)
      dw_co += jnp.where(first, 0.0, total[at])
      total[at] = dw_co
      dw[at] = dw_co.astype(dw.dtype)  # the last visit's stays

    if t.chunk == t.inner:
      part(0)
    else:
      pl.loop(0, t.inner // t.chunk)(
          lambda i: part(pl.multiple_of(i * t.chunk, t.chunk)))

  whole = (low == 0) & (high == t.rows)
  pl.when(whole)(lambda: add(x, dy, 0, t.rows, first))

  @pl.when(~whole & (high > low))
  def _():
    mine = _mine(visit, v, 0, t.rows)
    if seen is None:
      x_mine[...] = _keep(mine, x[...], 0).astype(x.dtype)
    dy_mine[...] = _keep(mine, dy[...], 0).astype(dy.dtype)
    begin = low // t.block

    @pl.loop(begin, pl.cdiv(high, t.block))
    def _(i):
      add(x_mine, dy_mine, pl.multiple_of(i * t.block, t.block), t.block,
          first & (i == begin))

  @pl.when(high == low)
  def _():
    dw[...] = jnp.zeros_like(dw)


def outer(x, dy, group_sizes, t, *, rows=None):
  """Sum of x_r^T dy_r over each group's rows, of x those numbered `rows`."""
  (R, F), D, G = dy.shape, x.shape[1], len(group_sizes)
  count, visit = visits(group_sizes, R, t.rows, rest=False)
  seen, operands = tpu_gather.source(x, rows, visit, t.rows, t.inner)
  return pl.pallas_call(
      functools.partial(_outer_kernel, t=t),
      name='grouped_matmul_dw',
      out_shape=common.shape_like((G, D, F), x.dtype, x),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
          grid=(pl.cdiv(F, t.out), pl.cdiv(D, t.inner), count),
          in_specs=[
              *tpu_gather.specs(
                  seen, t.rows, t.inner,
                  lambda n, k, v, s: (s[0].tile_V[v], k)),
              pl.BlockSpec(
                  (t.rows, t.out), lambda n, k, v, s: (s[0].tile_V[v], n)),
          ],
          out_specs=pl.BlockSpec(
              (None, t.inner, t.out),
              lambda n, k, v, s: (s[0].group_V[v], k, n)),
          scratch_shapes=[
              pltpu.VMEM((t.inner, t.out), jnp.float32),
              pltpu.VMEM((t.rows, t.out), x.dtype),
              *(tpu_gather.scratch(seen, t.rows, t.inner, x.dtype)
                or [pltpu.VMEM((t.rows, t.inner), x.dtype)]),
          ],
      ),
      compiler_params=_compiler_params(t, 3),
      cost_estimate=pl.CostEstimate(
          flops=2 * R * D * F, transcendentals=0,
          bytes_accessed=x.dtype.itemsize * (R * D + R * F + G * D * F)),
  )((visit, seen), *operands, dy)


def _compiler_params(t, axes):
  first = 'parallel' if t.split else 'arbitrary'
  return pltpu.CompilerParams(
      dimension_semantics=(first,) + ('arbitrary',) * (axes - 1),
      vmem_limit_bytes=int(LIMIT * common.tpu_info().vmem_capacity_bytes))


def supported(x, w, group_sizes, rows=None):
  """None, or why these kernels cannot run here."""
  if common.platform() != 'tpu':
    return f'it needs a TPU and this is a {common.platform()}'
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f'it multiplies bfloat16 or float32 and x is {x.dtype}'
  R, D, F = len(x if rows is None else rows), x.shape[1], w.shape[2]
  if not (R and len(x) and D and F and len(w)):
    return f'there is nothing to multiply: x is {x.shape} and w {w.shape}'
  if None in (tpu_tiles.times(R, D, F, x.dtype),
              tpu_tiles.times(R, F, D, x.dtype),
              tpu_tiles.outer(R, D, F, x.dtype)):
    return f'no tile of w, {w.shape}, fits the memory of a core'
  return None


def _gather(x, rows, groups):
  """x and the numbers that kernels gather by; what they do not is gathered."""
  if rows is None or tpu_gather.pays(x, rows, groups):
    return x, rows
  return x.at[rows].get(mode='clip'), None


def _fwd(x, w, group_sizes, rows):
  R, (D, F) = len(x if rows is None else rows), w.shape[1:]
  x, rows = _gather(x, rows, len(w))
  tiles = tpu_tiles.times(R, D, F, x.dtype)
  return times(x, w, group_sizes, tiles, rows=rows)


def _bwd(x, w, group_sizes, rows, dy):
  (R, F), D = dy.shape, x.shape[1]
  x, rows = _gather(x, rows, len(w))
  dx = times(dy, w, group_sizes, tpu_tiles.times(R, F, D, x.dtype),
             transposed=True)
  return dx, outer(
      x, dy, group_sizes, tpu_tiles.outer(R, D, F, x.dtype), rows=rows)


BACKEND = common.Backend('tpu', supported, _fwd, _bwd)
