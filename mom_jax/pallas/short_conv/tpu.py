"""short_conv as Mosaic TPU kernels, one per pass.

A grid step takes a block of rows with all columns, and the HALO rows before it;
backward also the HALO rows after it, whose cotangents reach back into the
block. Steps are therefore independent, and each pass reads and writes every
element once. Inside, the columns of one head at a time are copied in float32 to
scratch of LANES columns, in which rows are contiguous: a load may begin at any
row there, and a shift costs nothing. Blocks in which every row sees all taps,
most of them, are computed without masks.

SiLU of c is h (1 + tanh h) with h = c / 2; the taps are halved to give h.

Memory moves 2 elements per column and row forward and 3 backward, which takes
less time than the vector units need: about 14 and 39 operations. VMEM, with b
bytes per activation and rows of a block:

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
from mom_jax.pallas.short_conv.parts import (
    L2_EPS,
    Columns,
    columns,
    num_convolved,
)

HALO = 16  # rows of the smallest tile of any dtype
LANES = 128
REACH = 8  # rows after a block that its rows can contribute to
STEP = 64  # rows that are processed in registers
ROWS = (128, 64)  # of a block, best first
MAX_TAPS = REACH - 1
COPIES = 2  # of scratch, so that a column block does not wait for the last
VMEM = 32 * 2**20  # bytes that a kernel may take


class ColumnBlock(NamedTuple):
  """Columns of a part that are processed together: LANES of them, or a head.

  Attributes:
    columns: location of the part.
    start: first column within the part.
    registers: width in units of LANES.
  """

  columns: Columns
  start: int
  registers: int

  def x(self, i: int) -> slice:
    """Columns of register i in the array."""
    return _register(self.columns.start + self.start, i)

  def y(self, i: int) -> slice:
    """Columns of register i in the part."""
    return _register(self.start, i)

  def tap(self, i: int) -> slice:
    """Columns of register i in the taps."""
    return _register(self.columns.tap + self.start, i)


def _register(start, i):
  return slice(start + i * LANES, start + (i + 1) * LANES)


def _column_blocks(parts):
  """Yield the blocks of all convolved columns."""
  for c in columns(parts):
    if c.part.conv:
      registers = max(c.part.l2_dim // LANES, 1)
      for start in range(0, c.part.width, registers * LANES):
        yield ColumnBlock(c, start, registers)


def _max_registers(parts):
  return max((block.registers for block in _column_blocks(parts)), default=1)


def _passed_through(parts):
  return [c for c in columns(parts) if not c.part.conv]


def _sum_heads(registers, l2_dim):
  """Sum over the columns of each head, [rows, LANES] or [rows, 1].

  Args:
    registers: the values of a column block, LANES columns each.
  """
  if l2_dim >= LANES:
    return sum(registers).sum(1, keepdims=True)
  (a,) = registers
  head = jax.lax.broadcasted_iota(jnp.int32, a.shape, 1) // l2_dim
  total = jnp.zeros_like(a)
  for h in range(LANES // l2_dim):
    mask = head == h
    total = jnp.where(
        mask, jnp.where(mask, a, 0).sum(1, keepdims=True), total)
  return total


def _convolved(ext, reach, w, b, rows):
  """Return c of a slice of a block's rows; `ext` begins HALO rows earlier."""
  n, W = rows.stop - rows.start, len(w)
  shifted = lambda j: ext[pl.ds(HALO + rows.start - j, n), :]
  c = shifted(0) * w[W - 1]
  for j in range(1, W):
    c += _mask(reach, j, shifted(j)) * w[W - 1 - j]
  return c if b is None else c + b


def _copy_in(ext, block, row_blocks):
  """Copy a block's columns to scratch in float32, row blocks in order."""
  for i in range(block.registers):
    start = 0
    for refs in row_blocks:
      x_RL = refs[block.columns.array][:, block.x(i)]
      ext[i, start:start + len(x_RL)] = x_RL.astype(jnp.float32)
      start += len(x_RL)


def _before_norm(ext, block, reach, weights, rows):
  """Return y before the l2 norm and 1 + tanh(c / 2), by register."""
  cs = [_convolved(ext.at[i], reach, *weights(block, i), rows)
        for i in range(block.registers)]
  if not block.columns.part.silu:
    return cs, None
  ss = [1 + jnp.tanh(h) for h in cs]
  return [h * s for h, s in zip(cs, ss)], ss


def _inverse_norms(ys, l2_dim):
  """1 / sqrt(sum y^2 + L2_EPS) of each head."""
  return jax.lax.rsqrt(_sum_heads([y * y for y in ys], l2_dim) + L2_EPS)


def _scratch_of(n, registers, *scratches):
  """Return the copies of scratch that the n-th column block uses."""
  return [s.at[pl.ds(n % COPIES * registers, registers)] for s in scratches]


def _mask(reach, least, a):
  """Return a, zero where reach < least; a reach of None masks nothing."""
  return a if reach is None else jnp.where(reach >= least, a, 0)


def _masked_if_needed(full_ref, body):
  """Run body(masked); without masks where every row sees all taps."""
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
  weights = functools.partial(_weights_at, w_ref, b_ref if bias else None)

  def body(masked):
    if masked:
      _copy_reach(reach_s, reach_ref, 0)
    for n, block in enumerate(_column_blocks(parts)):
      part, y_ref = block.columns.part, out[_part_index(parts, block.columns)]
      (scratch,) = _scratch_of(n, _max_registers(parts), ext)
      _copy_in(scratch, block, (before, x))
      for step in _steps(rows):
        reach = reach_s[step] if masked else None
        ys, _ = _before_norm(scratch, block, reach, weights, step)
        if part.l2_dim:
          inverse_norm = _inverse_norms(ys, part.l2_dim)
          ys = [y * inverse_norm for y in ys]
        for i, y in enumerate(ys):
          y_ref[step, block.y(i)] = _mask(reach, 0, y).astype(y_ref.dtype)

  _masked_if_needed(full_ref, body)
  for c in _passed_through(parts):
    out[_part_index(parts, c)][...] = x[c.array][:, c.span]


def _backward(full_ref, *refs, parts, taps, bias):
  refs = list(refs)
  take = lambda n: [refs.pop(0) for _ in range(n)]
  arrays, num_parts = len(parts), sum(map(len, parts))
  x, before, after = take(arrays), take(arrays), take(arrays)
  dy, dy_after = take(num_parts), take(num_parts)
  reach_ref, reach_after, w_ref, b_ref = take(4)
  dx, (dw_ref,) = take(arrays), take(1)
  ext, dcs, reach_s = refs
  rows = reach_ref.shape[2]
  weights = functools.partial(_weights_at, w_ref, b_ref if bias else None)

  def body(masked):
    if masked:
      _copy_reach(reach_s, reach_ref, 0)
      _copy_reach(reach_s, reach_after, rows, HALO)

      @pl.when(pl.program_id(0) == pl.num_programs(0) - 1)
      def _():
        reach_s[rows:] = jnp.full((HALO, LANES), -1, jnp.int32)

    reach_of = lambda at: reach_s[at, :] if masked else None
    for n, block in enumerate(_column_blocks(parts)):
      scratch = _scratch_of(n, _max_registers(parts), ext, dcs)
      conv_cotangents(block, reach_of, *scratch)
      for i in range(block.registers):
        input_cotangents(block, i, reach_of, *scratch)

  def conv_cotangents(block, reach_of, ext, dcs):
    """Cotangents of c, of this block's rows and those after it."""
    part, p = block.columns.part, _part_index(parts, block.columns)
    _copy_in(ext, block, (before, x, after))
    for step in [*_steps(rows), slice(rows, rows + REACH)]:
      reach = reach_of(step)
      d_ref, at = (dy, step) if step.start < rows else (
          dy_after, slice(0, HALO))
      ds = [d_ref[p][at, block.y(i)].astype(jnp.float32)
            for i in range(block.registers)]
      ds = [d[:step.stop - step.start] for d in ds]
      ys, ss = _before_norm(ext, block, reach, weights, step)
      if part.l2_dim:
        inverse_norm = _inverse_norms(ys, part.l2_dim)
        along = inverse_norm * inverse_norm * inverse_norm * _sum_heads(
            [d * y for d, y in zip(ds, ys)], part.l2_dim)
        ds = [inverse_norm * d - along * y for d, y in zip(ds, ys)]
      if part.silu:
        ds = [d * (s + y * (2 - s)) for d, y, s in zip(ds, ys, ss)]
      for i, d in enumerate(ds):
        dcs[i, step] = _mask(reach, 0, d)

  def input_cotangents(block, i, reach_of, ext, dcs):
    """Cotangents of x and of the taps, of register i."""
    array, (w, _) = block.columns.array, weights(block, i)
    dw = [jnp.zeros((8, LANES), jnp.float32) for _ in range(taps + bias)]
    for step in _steps(rows):
      n = step.stop - step.start
      x_r = ext[i, pl.ds(HALO + step.start, n)]
      du = jnp.zeros((n, LANES), jnp.float32)
      for j in range(taps):
        at, k = pl.ds(step.start + j, n), taps - 1 - j
        dc = dcs[i, at]
        if j:
          dc = _mask(reach_of(at), j, dc)
        elif bias:
          dw[taps] += _by_eight(dc)
        du += dc * w[k]
        dw[k] += _by_eight(dc * x_r)
      dx[array][step, block.x(i)] = du.astype(dx[array].dtype)
    for k, sums in enumerate(dw):
      dw_ref[0, k:k + 1, block.tap(i)] = sums.sum(0, keepdims=True)

  _masked_if_needed(full_ref, body)
  for c in _passed_through(parts):
    dx[c.array][:, c.span] = dy[_part_index(parts, c)][...]


def _by_eight(a):
  return a.reshape(-1, 8, a.shape[1]).sum(0)


def _weights_at(w_ref, b_ref, block, i):
  """Return the taps and the bias of register i of a column block."""
  w = [w_ref[k:k + 1, block.tap(i)] for k in range(len(w_ref))]
  return w, None if b_ref is None else b_ref[:, block.tap(i)]


def _part_index(parts, c):
  """Index of a part among all."""
  return list(columns(parts)).index(c)


def _copy_reach(scratch, reach_ref, first, rows=None):
  """Copy the reach of rows to sublanes, repeated over all lanes."""
  reach_1R = reach_ref[0]
  n = reach_1R.shape[1]
  reach_RL = jnp.broadcast_to(reach_1R, (LANES, n)).T
  rows = n if rows is None else rows
  scratch[first:first + rows] = reach_RL[:rows]


def _block_rows(xs):
  """Rows of a block, or None if no block fits."""
  R, b = len(xs[0]), xs[0].dtype.itemsize
  X = sum(x.shape[1] for x in xs)
  for rows in ROWS:
    if R % rows == 0 and 2 * b * 3 * (rows + HALO) * X + 2**22 <= VMEM:
      return rows
  return None


def _scratch(parts, *rows):
  """Scratch in float32 for these numbers of rows; the last is for reach."""
  registers = _max_registers(parts)
  return [
      *(pltpu.VMEM((COPIES * registers, n, LANES), jnp.float32)
        for n in rows[:-1]),
      pltpu.VMEM((rows[-1], LANES), jnp.int32)]


def _specs(rows, total):
  """Block specs by width: of the rows, the halo before, the halo after."""
  halos = rows // HALO
  last = total // HALO - 1
  return (
      lambda X: pl.BlockSpec((rows, X), lambda i, _: (i, 0)),
      lambda X: pl.BlockSpec(
          (HALO, X), lambda i, _: (jnp.maximum(i * halos - 1, 0), 0)),
      lambda X: pl.BlockSpec(
          (HALO, X), lambda i, _: (jnp.minimum((i + 1) * halos, last), 0)),
  )


def _weights(conv_WF, bias_F, parts):
  """Taps and bias as the kernels take them, in float32."""
  F = num_convolved(parts)
  taps = jnp.ones((1, F)) if conv_WF is None else conv_WF
  bias = jnp.zeros(F) if bias_F is None else bias_F
  return [w.astype(jnp.float32) * _halves(parts) for w in (taps, bias[None])]


def _halves(parts):
  """[1, F], 1/2 where SiLU follows: kernels compute c / 2 there."""
  return np.concatenate([
      np.full((1, p.width), 0.5 if p.silu else 1, np.float32)
      for ps in parts for p in ps if p.conv], 1)


def _sees_all_taps(reach_R, rows, taps, after):
  """Mark the blocks whose rows, and those after it, all see all taps."""
  reach_BR = reach_R.reshape(-1, rows)
  full_B = reach_BR.min(1) >= taps - 1
  if after:
    full_B &= jnp.append(reach_BR[1:, :HALO].min(1) >= taps - 1, False)
  return full_B.astype(jnp.int32)


def _call(kernel, name, xs, conv_WF, bias_F, reach_R, dys, outs, *, parts):
  """Run one pass; `dys` is empty forward."""
  R, back = len(xs[0]), bool(dys)
  rows = _block_rows(xs)
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
  )(_sees_all_taps(reach_R, rows, taps, back), *(x for x, _ in ins))


def _fwd(xs, conv_WF, bias_F, reach_R, *, parts):
  like = lambda c: common.shape_like(
      (len(xs[0]), c.part.width), xs[c.array].dtype, xs[c.array])
  return tuple(_call(
      _forward, 'short_conv_forward', xs, conv_WF, bias_F, reach_R, (),
      [like(c) for c in columns(parts)], parts=parts))


def _bwd(xs, conv_WF, bias_F, reach_R, dys, *, parts):
  blocks = len(xs[0]) // _block_rows(xs)
  sums = common.shape_like(
      (blocks, 8, num_convolved(parts)), jnp.float32, xs[0])
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
  if conv_WF is not None and len(conv_WF) > MAX_TAPS:
    return f'{len(conv_WF)} taps are more than {MAX_TAPS}.'
  for p, _, start, _ in columns(parts):
    if p.conv and (p.width % LANES or start % LANES):
      return (f'{p.width} columns from {start} are convolved; both must be'
              f' multiples of {LANES}.')
    if p.l2_dim and p.l2_dim not in (64, 128, 256):
      return f'l2_dim={p.l2_dim} must be 64, 128 or 256.'
  if _block_rows(xs) is None:
    return (f'{len(xs[0])} rows of {[x.shape[1] for x in xs]} columns make no'
            f' blocks of {" or ".join(map(str, ROWS))} rows in'
            f' {VMEM >> 20} MiB.')
  return None


BACKEND = common.Backend('tpu', _supported, _fwd, _bwd)
