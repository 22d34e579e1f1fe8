"""grouped_matmul as Triton kernels: y and dx by one, dw by another.

x is cut into tiles of rows, each group's from its own first row on, so a tile
knows one matrix and a row's result does not depend on its place. How many tiles
there are depends on the load and is known on the device only: the grid has as
many programs as any load needs, XLA makes three numbers for each tile (group,
first row, last row of its group), and a program without a tile ends at once.
Rows past the last group are tiles of no group, which become zeros. In dw a
program takes a tile [inner, width] of one group's matrix and goes over its
rows.

Sums are float32. bfloat16 operands go to the tensor cores; float32 ones too, as
three products of TF32 halves, which keep float32's accuracy. Shared memory, in
bytes of an activation b:

  y, dx, dw   stages b (rows inner + inner width), or rows width for rows inner
  swiglu      stages b (rows inner + 2 inner width)

Batched calls (`jax.vmap`) are one launch with more groups. Kernels are in
kernels.py, which alone needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas import triton_call as gpu_call

DTYPES = ('bfloat16', 'float32')


@dataclasses.dataclass(frozen=True)
class Tile:
  """What a program works on.

  Attributes:
    rows: rows of x; in dw, of a product.
    width: columns of the result.
    inner: of D, of a product; in dw, rows of the result.
    warps: of 32 threads.
    stages: tiles of operands on their way at once.
    band: tiles of rows that run side by side.
    least: compute capability below which it needs too many registers.
  """

  rows: int
  width: int
  inner: int
  warps: int
  stages: int
  band: int = 8
  least: int = 80

  def shared(self, op: str, size: int) -> int:
    """Bytes of shared memory for operands of `size` bytes."""
    return self.stages * size * {
        'times': self.inner * (self.rows + self.width),
        'swiglu': self.inner * (self.rows + 2 * self.width),
        'outer': self.rows * (self.inner + self.width),
    }[op]


# Best first; the last one fits every GPU.
TILES = {
    ('times', 'bfloat16'): (
        Tile(128, 256, 64, warps=8, stages=3),
        Tile(64, 128, 64, warps=4, stages=4)),
    ('times', 'float32'): (Tile(64, 64, 32, warps=4, stages=3),),
    ('swiglu', 'bfloat16'): (
        Tile(128, 128, 64, warps=8, stages=3, least=90),
        Tile(64, 64, 64, warps=4, stages=4)),
    ('swiglu', 'float32'): (Tile(64, 64, 32, warps=8, stages=3),),
    ('outer', 'bfloat16'): (
        Tile(64, 256, 128, warps=8, stages=3),
        Tile(64, 128, 64, warps=4, stages=4)),
    ('outer', 'float32'): (Tile(32, 64, 64, warps=4, stages=3),),
}


def tile(op: str, dtype, rows: float, out: int) -> Tile:
  """The best tile for groups of so many rows on the GPU in scope."""
  size = jnp.dtype(dtype).itemsize
  tiles = TILES[op, jnp.dtype(dtype).name]
  capability = common.gpu_target().capability
  room = gpu_call.SHARED_LIMIT[capability]
  for t in tiles[:-1]:
    if (capability >= t.least and t.shared(op, size) <= room
        and rows >= t.rows and out >= t.width):
      return t
  return tiles[-1]


class Tiles(NamedTuple):
  """Tiles of rows, P of them at most.

  Attributes:
    group_P: whose rows, counted over the batch; -1 for rows past the last
      group.
    first_P: first row.
    last_P: first row past its group; not after `first_P` where there is no
      tile.
  """

  group_P: jax.Array
  first_P: jax.Array
  last_P: jax.Array


def edges(group_sizes_BG, R):
  """First row of each group of a batch and first row past it, [B, G]."""
  at_B1 = R * jnp.arange(len(group_sizes_BG))[:, None]
  end_BG = jnp.minimum(jnp.cumsum(group_sizes_BG, 1), R)
  start_BG = jnp.pad(end_BG[:, :-1], ((0, 0), (1, 0)))
  return start_BG + at_B1, end_BG + at_B1


def tiles(group_sizes_BG, R, rows):
  """The tiles of all groups and of the rows past the last one."""
  B, G = group_sizes_BG.shape
  start, end = edges(group_sizes_BG, R)
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
  return Tiles(*(
      a.astype(jnp.int32)
      for a in (group, jnp.where(used, first, 0), jnp.where(
          used, end[which], 0))))


def batched(op: Callable, shared: tuple[int, ...] = ()) -> Callable:
  """op, whose operands and results have a leading axis, for others without.

  `jax.vmap` makes that axis longer. The operands numbered in `shared` may have
  a shorter one, A of B entries, of which b takes number b % A.
  """
  run = jax.custom_batching.custom_vmap(op)

  @run.def_vmap
  def _(size, is_batched, *operands):
    B = max(x.shape[1 if b else 0] for x, b in zip(operands, is_batched))

    def merged(i, x, b):
      if not b:
        if i in shared:
          return x
        x = jnp.broadcast_to(x[None], (size, *x.shape))
      x = jnp.broadcast_to(x, (size, B, *x.shape[2:]))
      return x.reshape(size * B, *x.shape[2:])

    out = run(*(
        merged(i, x, b)
        for i, (x, b) in enumerate(zip(operands, is_batched))))
    apart = lambda y: y.reshape(size, B, *y.shape[1:])
    return jax.tree.map(apart, out), jax.tree.map(lambda _: True, out)

  def alone(*operands):
    return jax.tree.map(lambda y: y[0], run(*(x[None] for x in operands)))

  return alone


def _constants(t, dtype, *, band=True):
  out = dict(
      rows=t.rows, width=t.width, inner=t.inner,
      precision='tf32x3' if dtype == jnp.float32 else 'tf32')
  return out | dict(band=t.band) if band else out


def times(x, w, group_sizes, t, *, rows=None, transposed=False):
  """x_r w_g, or x_r w_g^T; of the rows of x with those numbers, if any."""
  return batched(
      functools.partial(_times, t=t, transposed=transposed), shared=(1,))(
          x, w, group_sizes, *_some(rows))


def _some(rows):
  return () if rows is None else (rows,)


def _numbers(x, rows):
  """In all of a batch's x, of each row; nothing without `rows`."""
  if not rows:
    return ()
  (B, N, _), (rows_BR,) = x.shape, rows
  at_B1 = N * jnp.arange(B, dtype=jnp.int32)[:, None]
  return (jnp.clip(rows_BR.astype(jnp.int32), 0, N - 1) + at_B1,)


def _times(x, w, group_sizes, *rows, t, transposed):
  from mom_jax.pallas.grouped_matmul.triton import kernels as gpu_kernels
  (B, R), D = (rows[0] if rows else x).shape[:2], x.shape[2]
  F, G = w.shape[2 if transposed else 3], w.shape[1]
  seen = tiles(group_sizes, R, t.rows)
  P = len(seen.group_P)
  (y,) = gpu_call.call(
      gpu_kernels.grouped_matmul, x, *(_numbers(x, rows) or seen[1:2]), w,
      _matrix(seen, w, B, G), *seen[1:],
      out=[jax.ShapeDtypeStruct((B, R, F), x.dtype)],
      grid=(P * -(-F // t.width),), warps=t.warps, stages=t.stages, D=D, F=F,
      P=P, transposed=transposed, gathered=bool(rows), **_constants(t, x.dtype))
  return y


def times_gated(x, w, group_sizes, t, *, keep):
  """silu(x_r a_g) * (x_r b_g) with w_g = [a_g, b_g]; if keep, both products."""
  return batched(
      functools.partial(_times_gated, t=t, keep=keep), shared=(1,))(
          x, w, group_sizes)


def _times_gated(x, w, group_sizes, *, t, keep):
  from mom_jax.pallas.grouped_matmul.triton import kernels as gpu_kernels
  B, R, D = x.shape
  F, G = w.shape[3] // 2, w.shape[1]
  seen = tiles(group_sizes, R, t.rows)
  P = len(seen.group_P)
  kernel = (
      gpu_kernels.grouped_swiglu_keep if keep else gpu_kernels.grouped_swiglu)
  return gpu_call.call(
      kernel, x, w, _matrix(seen, w, B, G), *seen[1:],
      out=[jax.ShapeDtypeStruct((B, R, F), x.dtype)] * (3 if keep else 1),
      grid=(P * -(-F // t.width),), warps=t.warps, stages=t.stages,
      D=D, F=F, P=P, **_constants(t, x.dtype))


def _matrix(seen, w, B, G):
  """Numbers of the matrices: the batch may share them."""
  if len(w) == B:
    return seen.group_P
  return jnp.where(seen.group_P < 0, -1, seen.group_P % (len(w) * G))


def outer(x, dy, group_sizes, t, *, rows=None):
  """Sum of x_r^T dy_r over each group's rows, of x those numbered `rows`."""
  return batched(functools.partial(_outer, t=t))(
      x, dy, group_sizes, *_some(rows))


def _outer(x, dy, group_sizes, *rows, t):
  from mom_jax.pallas.grouped_matmul.triton import kernels as gpu_kernels
  (B, R, F), D, G = dy.shape, x.shape[2], group_sizes.shape[1]
  bounds = [a.ravel().astype(jnp.int32) for a in edges(group_sizes, R)]
  (dw,) = gpu_call.call(
      gpu_kernels.grouped_matmul_dw, x, *(_numbers(x, rows) or bounds[:1]), dy,
      *bounds,
      out=[jax.ShapeDtypeStruct((B, G, D, F), x.dtype)],
      grid=(-(-D // t.inner) * -(-F // t.width), B * G), warps=t.warps,
      stages=t.stages, D=D, F=F, gathered=bool(rows),
      **_constants(t, x.dtype, band=False))
  return dw


def supported(x, w, group_sizes, rows=None):
  """None, or why these kernels cannot run here."""
  reason = gpu_call.missing()
  if reason is not None:
    return reason
  if x.dtype.name not in DTYPES:
    return f'it multiplies bfloat16 or float32 and x is {x.dtype}'
  if not (x.size and w.size and (rows is None or rows.size)):
    return f'there is nothing to multiply: x is {x.shape} and w {w.shape}'
  capability = common.gpu_target().capability
  if capability not in gpu_call.SHARED_LIMIT:
    known = ', '.join(map(str, gpu_call.SHARED_LIMIT))
    return f'sm_{capability} is not known; known: {known}'
  return None


def _fwd(x, w, group_sizes, rows):
  R, (G, _, F) = len(x if rows is None else rows), w.shape
  return times(
      x, w, group_sizes, tile('times', x.dtype, R / G, F), rows=rows)


def _bwd(x, w, group_sizes, rows, dy):
  R, (G, D, F) = len(dy), w.shape
  dx = times(
      dy, w, group_sizes, tile('times', x.dtype, R / G, D), transposed=True)
  dw = outer(
      x, dy, group_sizes, tile('outer', x.dtype, R / G, F), rows=rows)
  return dx, dw


BACKEND = common.Backend('gpu', supported, _fwd, _bwd)
