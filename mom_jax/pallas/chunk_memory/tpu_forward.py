"""The forward kernel: states go through the chunks of their groups."""

from __future__ import annotations

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.chunk_memory import tpu_chunk, tpu_grid
from mom_jax.pallas.chunk_memory.tpu_chunk import NN, NT, TN, dot


def kernel(seen, ins, outs, scratch, *, form, tile, dtype, scale):
  """One block of rows of a few heads; see forward for the operands."""
  C, n, h = tile.chunk, tile.chunks, tile.heads
  K, V = form.key, form.value
  head, b = pl.program_id(0) * h, pl.program_id(1)
  state, stage, sem, pending = scratch
  tiles = [(j, a) for j in range(n) for a in range(h)]
  rows = lambda j: pl.ds(j * C, C)

  @pl.when(b == 0)
  def _():
    pending[0] = 0
    tpu_grid.copy_idle(
        seen.idle_G, ins['initial'], outs['final'], sem, head, h)

  @pl.when(seen.used(b, n))
  def _():
    q, k = (
        [ins[x][rows(j), pl.ds(a * K, K)] for j, a in tiles] for x in 'qk')
    v = [ins['v'][rows(j), pl.ds(a * V, V)] for j, a in tiles]
    line = lambda x: [ins[x][0, a : a + 1, rows(j)] for j, a in tiles]
    decay = [None] * len(tiles)
    if form.decay:
      decay = [tpu_chunk.decays(g) for g in line('g')]
    score = [dot(x, y, NT, dtype) for x, y in zip(q, k)]
    score = [tpu_chunk.masked(x, d) for x, d in zip(score, decay)]
    inverse = None
    if form.delta:
      used = [seen.group(b * n + j) >= 0 for j, _ in tiles]
      inverse, u, w = _writes(k, v, decay, line('beta'), used, dtype)
    for i, (j, a) in enumerate(tiles):
      d = decay[i]
      s = state[j, a]
      s = jnp.where(seen.first(b * n + j), ins[f'enter{j}'][0, a], s)
      y = v[i]
      if form.delta:
        y = u[i] - dot(w[i], s, NN, dtype)
      o = dot(q[i], s, NN, dtype)
      if d is not None:
        o *= d.from_start
      o += dot(score[i], y, NN, dtype)
      outs['o'][rows(j), pl.ds(a * V, V)] = (scale * o).astype(
          outs['o'].dtype)
      after = dot(
          k[i], y if d is None else d.to_end * y, TN, dtype)
      after += s if d is None else d.whole * s
      state[(j + 1) % n, a] = after
      if 'before' in outs:
        outs['before'][j, a] = s.astype(dtype)
        if form.delta:
          outs['inverse'][j, a] = inverse[i].astype(dtype)
          outs['y'][rows(j), pl.ds(a * V, V)] = y.astype(dtype)
    for j in range(n):
      _leave(seen, outs, scratch, b * n + j, (j + 1) % n, head)

  tpu_grid.clear_unused(seen, [outs['o']], b, tile)

  @pl.when(b == pl.num_programs(1) - 1)
  def _():
    tpu_grid.finish(outs['final'], stage, sem, pending)


def _leave(seen, outs, scratch, chunk, at, head):
  """Writes the state after a group's last chunk."""
  state, *writing = scratch

  @pl.when(seen.last(chunk))
  def _():
    tpu_grid.write(
        outs['final'], state.at[at], *writing, seen.group(chunk), head)


def _writes(k, v, decay, beta, used, dtype):
  """T of each tile, and T beta V and T beta (decayed from the start) K."""
  a = [dot(x, x, NT, dtype) for x in k]
  a = [tpu_chunk.masked(x, d, strict=True) for x, d in zip(a, decay)]
  a = [tpu_chunk.column(x) * y for x, y in zip(beta, a)]
  # Chunks may share a product, so what unused ones hold may not be NaN.
  a = [jnp.where(x, y, 0.0) for x, y in zip(used, a)]
  inverse = tpu_chunk.inverses(a, dtype)
  t = [x * y for x, y in zip(inverse, beta)]
  u = [dot(x, y, NN, dtype) for x, y in zip(t, v)]
  if decay[0] is not None:
    t = [x * tpu_chunk.line(d.from_start) for x, d in zip(t, decay)]
  return inverse, u, [dot(x, y, NN, dtype) for x, y in zip(t, k)]


def forward(rows, state_GHKV, seen, *, form, tile, dtype, scale, keep):
  """Runs the kernel.

  Args:
    rows: q, k and v with heads side by side, [R, H X]; g and beta by heads,
      [H / h, h, R].
    keep: also answer what the backward pass needs.
  Returns:
    dict of o, final, and if keep of before, inverse and y.
  """
  C, n, h, H = tile.chunk, tile.chunks, tile.heads, form.heads
  K, V = form.key, form.value
  R, N, G = len(rows['q']), len(rows['q']) // C, len(state_GHKV)
  like = functools.partial(common.shape_like, like=rows['q'])
  states = pl.BlockSpec(memory_space=pl.ANY)
  ins = rows | {'initial': state_GHKV}
  in_specs = {
      'q': tpu_grid.wide(tile, K), 'k': tpu_grid.wide(tile, K),
      'v': tpu_grid.wide(tile, V), 'g': tpu_grid.narrow(tile),
      'beta': tpu_grid.narrow(tile), 'initial': states}
  for j in range(n):
    ins[f'enter{j}'] = state_GHKV
    in_specs[f'enter{j}'] = tpu_grid.spec(
        (1, h, K, V),
        lambda a, b, seen, j=j: (seen.enter_N[b * n + j], a, 0, 0))
  outs = {
      'o': like((R, H * V), rows['v'].dtype),
      'final': like((G, H, K, V), jnp.float32)}
  out_specs = {
      'o': tpu_grid.spec((n * C, h * V), lambda a, b, seen: (b, a)),
      'final': states}
  if keep:
    outs['before'] = like((N, H, K, V), dtype)
    out_specs['before'] = tpu_grid.by_chunk(tile, K, V)
  if keep and form.delta:
    outs['inverse'] = like((N, H, C, C), dtype)
    out_specs['inverse'] = tpu_grid.by_chunk(tile, C, C)
    outs['y'] = like((R, H * V), dtype)
    out_specs['y'] = tpu_grid.wide(tile, V)
  return tpu_grid.call(
      functools.partial(
          kernel, form=form, tile=tile, dtype=dtype, scale=scale),
      seen, ins, in_specs, outs, out_specs,
      scratch=[
          pltpu.VMEM((n, h, K, V), jnp.float32), *tpu_grid.writing(form, tile)],
      grid=(H // h, -(-N // n)), vmem=tile.vmem, name='chunk_memory_forward')
