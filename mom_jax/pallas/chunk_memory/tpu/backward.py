"""The backward kernel: cotangents of states go back through the chunks.

What rows write solves (I + A) Y = B with B = beta (V - decayed K S). So with
dB = T^T dY everything else follows without the parts of T: dA = -dB Y^T, and
the cotangent of the decayed beta K is -dB S^T.
"""

from __future__ import annotations

import functools

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.chunk_memory.tpu import (
  backward_channel as tpu_backward_channel,
)
from mom_jax.pallas.chunk_memory.tpu import (
  chunk_algebra as tpu_chunk,
)
from mom_jax.pallas.chunk_memory.tpu import (
  grid as tpu_grid,
)
from mom_jax.pallas.chunk_memory.tpu.chunk_algebra import NN, NT, TN


def kernel(seen, ins, outs, scratch, *, form, tile, dtype, scale):
  """One block of rows of a few heads; see backward for the operands."""
  n, h = tile.chunks, tile.heads
  part = tpu_backward_channel.PARTS.get(form.decay, _Part)
  head = pl.program_id(0) * h
  b = pl.num_programs(1) - 1 - pl.program_id(1)
  dstate, *writing = scratch

  @pl.when(pl.program_id(1) == 0)
  def _():
    writing[-1][0] = 0
    tpu_grid.copy_idle(
        seen.idle_G, ins['dfinal'], outs['dinitial'], writing[1], head, h)

  @pl.when(seen.used(b, n))
  def _():
    parts = {}

    def prepare(j):
      """What needs no cotangent of a state."""
      parts[j] = [
          part(ins, j, a, form, tile, dtype, scale) for a in range(h)]
      for step in (part.read, part.score_read, part.erased):
        for x in parts[j]:
          step(x)
        yield

    def visit(j):
      """The states' cotangents pass through the chunk."""
      last = seen.last(b * n + j)
      states = [
          jnp.where(last, ins[f'leave{j}'][0, a], dstate[j, a])
          for a in range(h)]
      for step in (part.write, part.solve, part.retreat):
        states = [step(*x) for x in zip(parts[j], states)]
        yield
      for a in range(h):
        dstate[(j - 1) % n, a] = states[a]

    def complete(j):
      for x in parts.pop(j):
        x.after_states(outs)
        yield

    steps = [prepare, visit, complete]
    for j in range(n - 1, -len(steps), -1):
      tpu_grid.together(*(
          (step(j + i), len(steps))
          for i, step in enumerate(steps) if 0 <= j + i < n))
    for j in range(n):
      @pl.when(seen.first(b * n + j))
      def _(j=j):
        tpu_grid.write(
            outs['dinitial'], dstate.at[(j - 1) % n], *writing,
            seen.group(b * n + j), head)

  rows = [outs[name] for name in outs if name != 'dinitial']
  tpu_grid.clear_unused(seen, rows, b, tile)

  @pl.when(b == 0)
  def _():
    tpu_grid.finish(outs['dinitial'], *writing)


class _Part:
  """One chunk of one head, with one decay a row or none."""

  def __init__(self, ins, j, a, form, tile, dtype, scale):
    C, K, V = tile.chunk, form.key, form.value
    self.head, self.form, self.scale = a, form, scale
    self.dot = functools.partial(tpu_chunk.dot, dtype=dtype)
    self.sure = functools.partial(tpu_chunk.dot_twice, dtype=dtype)
    self.rows = rows = pl.ds(j * C, C)
    self.keys, self.values = pl.ds(a * K, K), pl.ds(a * V, V)
    self.q, self.k = (ins[x][rows, self.keys] for x in 'qk')
    self.v = ins['v'][rows, self.values]
    self.do = ins['do'][rows, self.values]
    self.s = ins['before'][j, a]
    self.decay = self.beta = None
    if form.decay == 'head':
      self.decay = tpu_chunk.decays(
          tpu_grid.lane(ins['g'], a, tile.heads, rows))
    self.y = self.v
    if form.delta:
      self.y = ins['y'][rows, self.values]
      self.t = ins['inverse'][j, a]
      self.beta = tpu_chunk.column(
          tpu_grid.lane(ins['beta'], a, tile.heads, rows))

  def read(self):
    """Products of what is given."""
    rows, C = self.q, len(self.q)
    if self.form.delta:
      rows = jnp.concatenate([self.q, self.k], 0)
    pairs = self.dot(rows, self.k, NT)
    self.score, self.pairs = tpu_chunk.masked(pairs[:C], self.decay), pairs[C:]
    dscore = self.scale * self.dot(self.do, self.y, NT)
    self.dpair = tpu_chunk.masked(dscore, self.decay)
    self.dq = self.scale * self.dot(self.do, self.s, NT)
    self.moved = 0.0
    if self.decay is not None:
      self.dq *= self.decay.from_start
      self.dbetween = dscore * self.score
      self.moved = (self.dq * self.q).sum(1, keepdims=True)

  def score_read(self):
    """What follows from reads inside the chunk."""
    self.dy = self.scale * self.sure(self.score, self.do, TN)
    self.dq += self.dot(self.dpair, self.k, NN)
    self.dk = self.dot(self.dpair, self.q, TN)

  def erased(self):
    """Of the delta rule: A, and the erased keys decayed from the start."""
    if not self.form.delta:
      return
    self.pair = tpu_chunk.masked(self.pairs, self.decay, strict=True)
    self.erase = self.beta * self.k
    if self.decay is not None:
      self.erase *= self.decay.from_start

  def write(self, ds):
    """Takes the cotangent of the state after the chunk."""
    self.ds = ds
    write = self.dot(self.k, ds, NN)
    if self.decay is not None:
      write *= self.decay.to_end
    self.dy += write
    return ds

  def solve(self, ds):
    if self.form.delta:
      self.dy = self.sure(self.t, self.dy, TN)
    return ds

  def retreat(self, ds):
    """The cotangent of the state before the chunk."""
    read, rows = self.scale * self.q, self.do
    if self.decay is not None:
      read *= self.decay.from_start
      ds = self.decay.whole * ds
    if self.form.delta:
      read = jnp.concatenate([read, -self.erase], 0)
      rows = jnp.concatenate([rows, self.dy.astype(rows.dtype)], 0)
    return ds + self.dot(read, rows, TN)

  def after_states(self, outs):
    """Cotangents of the rows."""
    written = self.dot(self.y, self.ds, NT)
    if self.decay is not None:
      written *= self.decay.to_end
      ended = (written * self.k).sum(1, keepdims=True)
      self.moved -= ended
    self.dk += written
    dv = self.dy
    if self.form.delta:
      dv = self.beta * dv
      outs['dbeta'][0, self.head : self.head + 1, self.rows] = (
          self.solve_end())
    if self.decay is not None:
      end = ended.sum(0, keepdims=True) + self.decay.whole * (
          (self.ds * self.s).sum(1, keepdims=True).sum(0, keepdims=True))
      outs['dg'][0, self.head : self.head + 1, self.rows] = (
          self.rates(end))
    for name, x, at in (
        ('dq', self.dq, self.keys), ('dk', self.dk, self.keys),
        ('dv', dv, self.values)):
      outs[name][self.rows, at] = x.astype(outs[name].dtype)

  def solve_end(self):
    """Cotangents through A and the erased keys; answers that of beta."""
    da = -self.dot(self.dy, self.y, NT)
    dbeta = (da * self.pair).sum(1, keepdims=True)
    dpair = tpu_chunk.masked(self.beta * da, self.decay, strict=True)
    derase = -self.dot(self.dy, self.s, NT)
    if self.decay is not None:
      derase *= self.decay.from_start
      self.dbetween += self.beta * da * self.pair
    erased = (derase * self.k).sum(1, keepdims=True)
    self.moved += self.beta * erased
    self.dk += self.beta * derase + self.dot(dpair, self.k, NN)
    self.dk += self.dot(dpair, self.k, TN)
    dbeta += erased + (self.dy * self.v).sum(1, keepdims=True)
    return tpu_chunk.line(tpu_chunk.strength(self.beta, self.dy, self.y, dbeta))

  def rates(self, end):
    """Cotangent of the log decays."""
    dsum = self.moved + self.dbetween.sum(1, keepdims=True)
    dsum -= tpu_chunk.column(self.dbetween.sum(0, keepdims=True))
    C = len(dsum)
    i, j = tpu_chunk.iota((C, C), 0), tpu_chunk.iota((C, C), 1)
    return jnp.where(i >= j, dsum, 0.0).sum(0, keepdims=True) + end


def backward(rows, kept, do, dstate_GHKV, seen, *, form, tile, dtype, scale):
  """Runs the kernel.

  Args:
    rows: as in tpu_forward.forward.
    kept: what that kept.
    do: [R, H V].
    dstate_GHKV: or [G, H, V, K], as `form.state` says.
  Returns:
    dict of the rows' cotangents, shaped as they are but for what has one number
    a row and head, [H / h, h, R], and dinitial.
  """
  n, h, H = tile.chunks, tile.heads, form.heads
  C, K, V = tile.chunk, form.key, form.value
  X, Y = form.state
  B = -(-(len(do) // C) // n)
  ins = rows | kept | {'do': do, 'dfinal': dstate_GHKV}
  at = lambda b: B - 1 - b
  wide = lambda X: tpu_grid.wide(tile, X, at)
  narrow = tpu_grid.narrow(tile, H, at)
  by_chunk = lambda X, Y: tpu_grid.by_chunk(tile, X, Y, at)
  states = pl.BlockSpec(memory_space=pl.ANY)
  in_specs = {
      'q': wide(K), 'k': wide(K), 'v': wide(V), 'y': wide(V), 'do': wide(V),
      'g': tpu_grid.rates(tile, form, at), 'beta': narrow,
      'erase': wide(K), 'before': by_chunk(X, Y),
      'inverse': by_chunk(C, C), 'dfinal': states}
  for j in range(n):
    ins[f'leave{j}'] = dstate_GHKV
    in_specs[f'leave{j}'] = tpu_grid.spec(
        (1, h, X, Y), lambda a, b, seen, j=j: (
            seen.leave[j * B + B - 1 - b], a, 0, 0))
  every = lambda X: tpu_grid.spec(
      (tile.rows, h * X), lambda a, b, seen: (B - 1 - b, a))
  each = tpu_grid.spec(
      (1, h, tile.rows), lambda a, b, seen: (a, 0, B - 1 - b))
  specs = {
      'q': every(K), 'k': every(K), 'v': every(V), 'erase': every(K),
      'g': {'key': every(K), 'value': every(V)}.get(form.decay, each),
      'beta': each}
  like = functools.partial(common.shape_like, like=do)
  outs = {'d' + x: like(rows[x].shape, rows[x].dtype) for x in rows}
  for x in rows:
    if specs[x] is each:
      outs['d' + x] = like((H // h, h, len(do)), jnp.float32)
  outs['dinitial'] = like(dstate_GHKV.shape, jnp.float32)
  out_specs = {'d' + x: specs[x] for x in rows} | {'dinitial': states}
  return tpu_grid.call(
      functools.partial(
          kernel, form=form, tile=tile, dtype=dtype, scale=scale),
      seen, ins, in_specs, outs, out_specs,
      scratch=[
          pltpu.VMEM((n, h, X, Y), jnp.float32), *tpu_grid.writing(form, tile)],
      grid=(H // h, B), vmem=tile.vmem, name='chunk_memory_backward',
      # Two for each of the forward pass, and q and k with k once more.
      flops=2 * tpu_grid.products(form, C, len(do) // C)
      + 4 * H * len(do) * C * K)
