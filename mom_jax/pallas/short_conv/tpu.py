"""short_conv as Mosaic TPU kernels, one for each pass.

A visit takes a block of rows with all columns, and the HALO rows before it;
backward, those after it too, whose cotangents reach back into the block. So
visits are independent, and each pass reads and writes a number once. Inside,
the columns of a head after those of the other are laid out in float32 in
scratch of LANES columns, in which row follows row: there a load may begin at
any row, and a shift costs nothing. Blocks in which all rows see all taps, most
of them, are computed without comparing.

SiLU of c is h (1 + tanh h) with h = c / 2, which taps of half the size make.

Memory moves 2 numbers for one of the F columns forward and 3 backward, which
takes less time than what vector units do: about 14 and 39 operations. VMEM, in
bytes of an activation b and rows of a block:

  2 b (2 rows + HALO) X forward,  2 b (3 rows + 3 HALO) X backward
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from mom_jax.pallas import common
from mom_jax.pallas.short_conv.parts import UNIT_EPS, Place, convolved, places

HALO = 16  # rows of the smallest tile of any dtype
LANES = 128
REACHED = 8  # rows after a block that its own can reach
STEP = 64  # rows that are worked on in registers
ROWS = (128, 64)  # of a block, best first
MOST_TAPS = REACHED - 1
COPIES = 2  # of scratch, so that a tile need not wait for the one before
VMEM = 32 * 2**20  # bytes that a kernel may take


class Tile(NamedTuple):
  """Columns that are worked on together: of a part, LANES of them, or a head.
  """

  place: Place
  start: int  # in the part
  lanes: int  # times LANES

  def x(self, lane: int) -> slice:
    return _lane(self.place.start + self.start, lane)

  def y(self, lane: int) -> slice:
    return _lane(self.start, lane)

  def tap(self, lane: int) -> slice:
    return _lane(self.place.tap + self.start, lane)


def _lane(start, lane):
  return slice(start + lane * LANES, start + (lane + 1) * LANES)


def _tiles(parts):
  """All that is convolved."""
  for place in places(parts):
    if place.part.conv:
      lanes = max(place.part.unit // LANES, 1)
      for start in range(0, place.part.width, lanes * LANES):
        yield Tile(place, start, lanes)


def _most_lanes(parts):
  return max((t.lanes for t in _tiles(parts)), default=1)


def _passed(parts):
  return [p for p in places(parts) if not p.part.conv]


def _sum_heads(tile, unit):
  """Sums over the columns of each head, at all lanes or [rows, 1].

  Args:
    tile: its numbers, LANES by LANES.
  """
  if unit >= LANES:
    return sum(tile).sum(1, keepdims=True)
  (a,) = tile
  head = jax.lax.broadcasted_iota(jnp.int32, a.shape, 1) // unit
  total = jnp.zeros_like(a)
  for h in range(LANES // unit):
    mine = head == h
    total = jnp.where(
        mine, jnp.where(mine, a, 0).sum(1, keepdims=True), total)
  return total


def _convolved(ext, reach, w, b, rows):
  """c of the rows `rows` of a block, a slice, from `ext`, HALO rows earlier."""
  n, W = rows.stop - rows.start, len(w)
  at = lambda j: ext[pl.ds(HALO + rows.start - j, n), :]
  c = at(0) * w[W - 1]
  for j in range(1, W):
    c += _where(reach, j, at(j)) * w[W - 1 - j]
  return c if b is None else c + b


def _lay(ext, t, blocks):
  """A tile's columns in float32, blocks of rows one after another."""
  for lane in range(t.lanes):
    start = 0
    for refs in blocks:
      x_RL = refs[t.place.array][:, t.x(lane)]
      ext[lane, start:start + len(x_RL)] = x_RL.astype(jnp.float32)
      start += len(x_RL)


def _before_unit(ext, t, reach, weights, rows):
  """Of each LANES columns y before heads get unit length, and 1 + tanh(c / 2).
  """
  cs = [_convolved(ext.at[lane], reach, *weights(t, lane), rows)
        for lane in range(t.lanes)]
  if not t.place.part.silu:
    return cs, None
  ss = [1 + jnp.tanh(h) for h in cs]
  return [h * s for h, s in zip(cs, ss)], ss


def _sizes(ys, unit):
  """What makes unit heads of them."""
  return jax.lax.rsqrt(_sum_heads([y * y for y in ys], unit) + UNIT_EPS)


def _own(n, lanes, *scratches):
  """The copies of scratch that the n-th tile uses."""
  return [s.at[pl.ds(n % COPIES * lanes, lanes)] for s in scratches]


def _where(reach, least, a):
  """a, zero where reach is less; None reaches all that it is asked for."""
  return a if reach is None else jnp.where(reach >= least, a, 0)


def _either(full_ref, body):
  """body(whether reach matters): where all rows see all taps it does not."""
  full = full_ref[pl.program_id(0)] > 0
  pl.when(full)(lambda: body(False))
  pl.when(jnp.logical_not(full))(lambda: body(True))


def _steps(rows):
  return [slice(r, min(r + STEP, rows)) for r in range(0, rows, STEP)]


def _forward(full_ref, *refs, parts, taps, bias):
  arrays = len(parts)
  x, before = refs[:arrays], refs[arrays:2 * arrays]
  reach_ref, w_ref = refs[2 * arrays], refs[2 * arrays + 1]
  b_ref = refs[2 * arrays + 2]
  out = refs[2 * arrays + 3:-2]
  ext, reach_s = refs[-2:]
  rows = reach_ref.shape[2]
  weights = functools.partial(_at_lane, w_ref, b_ref if bias else None)

  def body(masked):
    if masked:
      _lay_reach(reach_s, reach_ref, 0)
    for n, t in enumerate(_tiles(parts)):
      p, y_ref = t.place.part, out[_number(parts, t.place)]
      (own,) = _own(n, _most_lanes(parts), ext)
      _lay(own, t, (before, x))
      for step in _steps(rows):
        reach = reach_s[step] if masked else None
        ys, _ = _before_unit(own, t, reach, weights, step)
        if p.unit:
          size = _sizes(ys, p.unit)
          ys = [y * size for y in ys]
        for lane, y in enumerate(ys):
          y_ref[step, t.y(lane)] = _where(reach, 0, y).astype(y_ref.dtype)

  _either(full_ref, body)
  for place in _passed(parts):
    out[_number(parts, place)][...] = x[place.array][:, place.columns]


def _backward(full_ref, *refs, parts, taps, bias):
  refs = list(refs)
  take = lambda n: [refs.pop(0) for _ in range(n)]
  arrays, every = len(parts), sum(map(len, parts))
  x, before, after = take(arrays), take(arrays), take(arrays)
  dy, dy_after = take(every), take(every)
  reach_ref, reach_after, w_ref, b_ref = take(4)
  dx, (dw_ref,) = take(arrays), take(1)
  ext, dcs, reach_s = refs
  rows = reach_ref.shape[2]
  weights = functools.partial(_at_lane, w_ref, b_ref if bias else None)

  def body(masked):
    if masked:
      _lay_reach(reach_s, reach_ref, 0)
      _lay_reach(reach_s, reach_after, rows, HALO)

      @pl.when(pl.program_id(0) == pl.num_programs(0) - 1)
      def _():
        reach_s[rows:] = jnp.full((HALO, LANES), -1, jnp.int32)

    reach_of = lambda at: reach_s[at, :] if masked else None
    for n, t in enumerate(_tiles(parts)):
      own = _own(n, _most_lanes(parts), ext, dcs)
      cotangents(t, reach_of, *own)
      for lane in range(t.lanes):
        pull(t, lane, reach_of, *own)

  def cotangents(t, reach_of, ext, dcs):
    """Of c, of this block's rows and those after it."""
    p, number = t.place.part, _number(parts, t.place)
    _lay(ext, t, (before, x, after))
    for step in [*_steps(rows), slice(rows, rows + REACHED)]:
      reach = reach_of(step)
      d_ref, at = (dy, step) if step.start < rows else (
          dy_after, slice(0, HALO))
      ds = [d_ref[number][at, t.y(lane)].astype(jnp.float32)
            for lane in range(t.lanes)]
      ds = [d[:step.stop - step.start] for d in ds]
      ys, ss = _before_unit(ext, t, reach, weights, step)
      if p.unit:
        size = _sizes(ys, p.unit)
        along = size * size * size * _sum_heads(
            [d * y for d, y in zip(ds, ys)], p.unit)
        ds = [size * d - along * y for d, y in zip(ds, ys)]
      if p.silu:
        ds = [d * (s + y * (2 - s)) for d, y, s in zip(ds, ys, ss)]
      for lane, d in enumerate(ds):
        dcs[lane, step] = _where(reach, 0, d)

  def pull(t, lane, reach_of, ext, dcs):
    """Cotangents of x and of the taps."""
    i, (w, _) = t.place.array, weights(t, lane)
    dw = [jnp.zeros((8, LANES), jnp.float32) for _ in range(taps + bias)]
    for step in _steps(rows):
      n = step.stop - step.start
      x_r = ext[lane, pl.ds(HALO + step.start, n)]
      du = jnp.zeros((n, LANES), jnp.float32)
      for j in range(taps):
        at, k = pl.ds(step.start + j, n), taps - 1 - j
        dc = dcs[lane, at]
        if j:
          dc = _where(reach_of(at), j, dc)
        elif bias:
          dw[taps] += _by_eight(dc)
        du += dc * w[k]
        dw[k] += _by_eight(dc * x_r)
      dx[i][step, t.x(lane)] = du.astype(dx[i].dtype)
    for k, sums in enumerate(dw):
      dw_ref[0, k:k + 1, t.tap(lane)] = sums.sum(0, keepdims=True)

  _either(full_ref, body)
  for place in _passed(parts):
    dx[place.array][:, place.columns] = dy[_number(parts, place)][...]


def _by_eight(a):
  return a.reshape(-1, 8, a.shape[1]).sum(0)


def _at_lane(w_ref, b_ref, t, lane):
  """Taps of a tile's columns, and their bias."""
  w = [w_ref[k:k + 1, t.tap(lane)] for k in range(len(w_ref))]
  return w, None if b_ref is None else b_ref[:, t.tap(lane)]


def _number(parts, place):
  """Of a part, among all."""
  return list(places(parts)).index(place)


def _lay_reach(scratch, reach_ref, first, rows=None):
  """Reach of rows on sublanes, at all lanes."""
  reach_1R = reach_ref[0]
  n = reach_1R.shape[1]
  reach_RL = jnp.broadcast_to(reach_1R, (LANES, n)).T
  rows = n if rows is None else rows
  scratch[first:first + rows] = reach_RL[:rows]


def _blocks(xs, parts):
  """Rows of a block, or None if nothing fits."""
  R, b = len(xs[0]), xs[0].dtype.itemsize
  X = sum(x.shape[1] for x in xs)
  for rows in ROWS:
    if R % rows == 0 and 2 * b * 3 * (rows + HALO) * X + 2**22 <= VMEM:
      return rows
  return None


def _scratch(parts, *rows):
  """Copies for those numbers of rows in float32; the last is for reach."""
  lanes = _most_lanes(parts)
  return [
      *(pltpu.VMEM((COPIES * lanes, n, LANES), jnp.float32)
        for n in rows[:-1]),
      pltpu.VMEM((rows[-1], LANES), jnp.int32)]


def _specs(rows, total):
  """Blocks of an array's columns: the rows, those before, those after."""
  each = rows // HALO
  last = total // HALO - 1
  return (
      lambda X: pl.BlockSpec((rows, X), lambda i, _: (i, 0)),
      lambda X: pl.BlockSpec(
          (HALO, X), lambda i, _: (jnp.maximum(i * each - 1, 0), 0)),
      lambda X: pl.BlockSpec(
          (HALO, X), lambda i, _: (jnp.minimum((i + 1) * each, last), 0)),
  )


def _weights(conv_WF, bias_F, parts):
  """Taps and bias as the kernels take them, in float32."""
  F = convolved(parts)
  taps = jnp.ones((1, F)) if conv_WF is None else conv_WF
  bias = jnp.zeros(F) if bias_F is None else bias_F
  return [w.astype(jnp.float32) * _halves(parts) for w in (taps, bias[None])]


def _halves(parts):
  """[1, F], 1/2 where SiLU follows: kernels make c / 2 there."""
  return np.concatenate([
      np.full((1, p.width), 0.5 if p.silu else 1, np.float32)
      for ps in parts for p in ps if p.conv], 1)


def _full(reach_R, rows, taps, after):
  """Of each block, whether all its rows, and those after it, see all taps."""
  reach_BR = reach_R.reshape(-1, rows)
  full_B = reach_BR.min(1) >= taps - 1
  if after:
    full_B &= jnp.append(reach_BR[1:, :HALO].min(1) >= taps - 1, False)
  return full_B.astype(jnp.int32)


def _call(kernel, name, xs, conv_WF, bias_F, reach_R, dys, outs, *, parts):
  """One pass; backward there are `dys`, and what lies after a block counts."""
  R, back = len(xs[0]), bool(dys)
  rows = _blocks(xs, parts)
  here, before, after = _specs(rows, R)
  weights = _weights(conv_WF, bias_F, parts)
  taps, last = len(weights[0]), R // rows - 1
  reach = reach_R.astype(jnp.int32).reshape(-1, 1, rows)
  reach_at = lambda block: (
      reach, pl.BlockSpec((1, 1, rows), lambda i, _: (block(i), 0, 0)))
  ins = [
      *((x, spec(x.shape[1])) for spec in (here, before, after)[:2 + back]
        for x in xs),
      *((dy, spec(dy.shape[1])) for spec in (here, after) for dy in dys),
      reach_at(lambda i: i),
      *[reach_at(lambda i: jnp.minimum(i + 1, last))] * back,
      *((w, pl.BlockSpec(w.shape, lambda i, _: (0, 0))) for w in weights)]
  scratch = _scratch(
      parts, (1 + back) * HALO + rows, *[HALO + rows] * back,
      back * HALO + rows)
  return pl.pallas_call(
      functools.partial(
          kernel, parts=parts, taps=taps, bias=bias_F is not None),
      out_shape=outs,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(R // rows,),
          in_specs=[spec for _, spec in ins],
          out_specs=[
              here(x.shape[1]) if x.ndim == 2 else pl.BlockSpec(
                  (1, *x.shape[1:]), lambda i, _: (i, 0, 0)) for x in outs],
          scratch_shapes=scratch),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel',), vmem_limit_bytes=VMEM),
      cost_estimate=pl.CostEstimate(
          flops=0, transcendentals=0, bytes_accessed=(2 + back) * sum(
              x.size * x.dtype.itemsize for x in xs)),
      name=name,
  )(_full(reach_R, rows, taps, back), *(x for x, _ in ins))


def _fwd(xs, conv_WF, bias_F, reach_R, *, parts):
  like = lambda p: common.shape_like(
      (len(xs[0]), p.part.width), xs[p.array].dtype, xs[p.array])
  return tuple(_call(
      _forward, 'short_conv_forward', xs, conv_WF, bias_F, reach_R, (),
      [like(p) for p in places(parts)], parts=parts))


def _bwd(xs, conv_WF, bias_F, reach_R, dys, *, parts):
  blocks = len(xs[0]) // _blocks(xs, parts)
  sums = common.shape_like(
      (blocks, 8, convolved(parts)), jnp.float32, xs[0])
  *dxs, sums = _call(
      _backward, 'short_conv_backward', xs, conv_WF, bias_F, reach_R, dys,
      [*(common.shape_like(x.shape, x.dtype, x) for x in xs), sums],
      parts=parts)
  sums_8F = sums.sum(0) * _halves(parts)
  like = lambda w, d: None if w is None else d.astype(w.dtype)
  W = 1 if conv_WF is None else len(conv_WF)
  return (tuple(dxs), like(conv_WF, sums_8F[:W]), like(bias_F, sums_8F[W]))


def _supported(xs, conv_WF, bias_F, reach_R, *, parts):
  del bias_F, reach_R
  if common.platform() != 'tpu':
    return f'it needs a TPU; programs here are for {common.platform()}.'
  if any(x.dtype not in (jnp.bfloat16, jnp.float32) for x in xs):
    return f'it takes bfloat16 or float32; got {[x.dtype for x in xs]}.'
  if conv_WF is not None and len(conv_WF) > MOST_TAPS:
    return f'{len(conv_WF)} taps are more than {MOST_TAPS}.'
  for p, _, start, _ in places(parts):
    if p.conv and (p.width % LANES or start % LANES):
      return (f'{p.width} columns from {start} are convolved; both must be'
              f' multiples of {LANES}.')
    if p.unit and p.unit not in (64, 128, 256):
      return f'unit={p.unit} must be 64, 128 or 256.'
  if _blocks(xs, parts) is None:
    return (f'{len(xs[0])} rows of {[x.shape[1] for x in xs]} columns make no'
            f' blocks of {" or ".join(map(str, ROWS))} rows in'
            f' {VMEM >> 20} MiB.')
  return None


BACKEND = common.Backend('tpu', _supported, _fwd, _bwd)
