"""The backward kernel: cotangents of states go back through the chunks.

What rows write solves (I + A) Y = B with B = beta (V - decayed K S). So with
dB = T^T dY everything else follows without the parts of T: dA = -dB Y^T, and
the cotangent of the decayed beta K is -dB S^T.

As in the forward kernel, a step of the grid prepares one block of rows while
cotangents pass through the block prepared in the step before.
"""

from __future__ import annotations

import functools
import itertools

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.chunk_memory import (
    tpu_backward_channel,
    tpu_chunk,
    tpu_grid,
)
from mom_jax.pallas.chunk_memory.tpu_chunk import LANES, NN, NT, TN


def kernel(seen, ins, outs, scratch, *, form, tile, dtype, scale):
  """Two blocks of rows of a few heads; see backward for the operands."""
  n, h = tile.chunks, tile.heads
  head = pl.program_id(0) * h
  b = pl.num_programs(1) - 1 - pl.program_id(1)  # cotangents pass through it
  dstate, *writing = scratch[:4]
  prepare, passage = _parts(form)
  ready = dict(zip(prepare.waits(form, tile, dtype), scratch[4:]))

  @pl.when(pl.program_id(1) == 0)
  def _():
    writing[-1][0] = 0
    tpu_grid.copy_idle(
        seen.idle_G, ins['dfinal'], outs['dinitial'], writing[1], head, h)

  @pl.when(seen.last(b * n + n - 1))
  def _():
    dstate[n - 1] = ins[f'leave{n - 1}'][0]

  @pl.when(seen.used(b, n) | seen.used(b - 1, n))
  def _():
    places = list(itertools.product(reversed(range(n)), range(h)))

    def enter(j, a):
      if j == n - 1:
        return dstate[j, a]
      return jnp.where(
          seen.last(b * n + j), ins[f'leave{j}'][0, a], dstate[j, a])

    def visit():
      run = {at: passage(ins, ready, *at, form, tile, dtype, scale)
             for at in places}
      for now in turns:
        for (j, a), stage in now:
          x = run[j, a]
          if stage == 0:
            x.write(enter(j, a))
          elif stage == 1:
            x.solve()
          elif stage == 2:
            dstate[(j - 1) % n, a] = x.retreat()
          elif stage == 3:
            x.read()
          else:
            x.after_states(outs)
        yield

    turns, prepared = tpu_grid.turns(places, h, stages=5), {}

    def early():
      for at in places:
        prepared[at] = prepare(ins, *at, form, tile, dtype, scale)
        yield
        prepared[at].score_read()
        yield

    tpu_grid.together((early(), 2 * len(places)), (visit(), len(turns)))
    tpu_grid.keep(ready, prepared)
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


def _parts(form):
  return tpu_backward_channel.PARTS.get(form.decay, (_Prepare, _Passage))


class _Prepare:
  """What needs no cotangent of a state: one decay a row, or none."""

  NEEDS = 'q', 'k', 'do', 'g', 'beta'

  @staticmethod
  def waits(form, tile, dtype):
    """Shapes and types of what waits, by name, for a chunk and head."""
    C, K, V = tile.chunk, form.key, form.value
    square, column = ((C, C), jnp.float32), ((C, LANES), jnp.float32)
    ready = {'score': square, 'dy': ((C, V), jnp.float32)}
    if form.decay == 'head':
      ready |= {'between': square, 'start': column, 'end': column,
                'whole': ((1, LANES), jnp.float32)}
    if form.delta:
      ready |= {'pair': square, 'beta': column}
    return ready | {'read': (((1 + form.delta) * C, K), dtype)}

  def __init__(self, ins, j, a, form, tile, dtype, scale):
    C, K, V = tile.chunk, form.key, form.value
    self.scale = scale
    self.sure = functools.partial(tpu_chunk.dot_twice, dtype=dtype)
    rows, keys = pl.ds(j * C, C), pl.ds(a * K, K)
    q, k = (ins['early ' + x][rows, keys] for x in 'qk')
    self.do = ins['early do'][rows, pl.ds(a * V, V)]
    lookers = jnp.concatenate([q, k], 0) if form.delta else q
    pairs = tpu_chunk.dot(lookers, k, NT, dtype)
    decay, self.values, read = None, {}, [scale * q]
    if form.decay == 'head':
      decay = tpu_chunk.decays(
          tpu_grid.lane(ins['early g'], a, tile.heads, rows))
      self.values |= {
          'between': decay.between, 'start': decay.from_start,
          'end': decay.to_end, 'whole': decay.whole}
    self.values['score'] = tpu_chunk.masked(pairs[:C], decay)
    if form.delta:
      beta = tpu_chunk.column(
          tpu_grid.lane(ins['early beta'], a, tile.heads, rows))
      read.append(-beta * k)
      self.values['beta'] = beta
      self.values['pair'] = tpu_chunk.masked(pairs[C:], decay, strict=True)
    if decay is not None:
      read = [x * decay.from_start for x in read]
    self.values['read'] = jnp.concatenate(read, 0)

  def score_read(self):
    """What follows from reads inside the chunk."""
    self.values['dy'] = self.scale * self.sure(
        self.values['score'], self.do, TN)


class _Passage:
  """One chunk of one head, with one decay a row or none."""

  NEEDS = 'q', 'k', 'v', 'y', 'do', 'before', 'inverse'

  def __init__(self, ins, ready, j, a, form, tile, dtype, scale):
    C, K, V = tile.chunk, form.key, form.value
    self.head, self.form, self.scale = a, form, scale
    self.dot = functools.partial(tpu_chunk.dot, dtype=dtype)
    self.sure = functools.partial(tpu_chunk.dot_twice, dtype=dtype)
    self.rows = rows = pl.ds(j * C, C)
    self.keys, self.values = pl.ds(a * K, K), pl.ds(a * V, V)
    self.ready = lambda name: ready[name][j, a]
    wide = {'q': self.keys, 'k': self.keys}
    self.row = lambda x: ins[x][rows, wide.get(x, self.values)]
    self.written = 'y' if form.delta else 'v'
    self.saved = lambda x: ins[x][j, a]

  def decayed(self, name, x):
    if self.form.decay == 'none':
      return x
    return tpu_chunk.scaled(x, self.ready(name))

  def write(self, ds):
    """Takes the cotangent of the state after the chunk."""
    self.ds = ds
    self.dy = self.ready('dy') + self.decayed(
        'end', self.dot(self.row('k'), ds, NN))

  def solve(self):
    if self.form.delta:
      self.dy = self.sure(self.saved('inverse'), self.dy, TN, split=1)

  def retreat(self):
    """The cotangent of the state before the chunk."""
    self.both = rows = self.row('do')
    if self.form.delta:
      self.both = rows = jnp.concatenate([rows, self.dy.astype(rows.dtype)], 0)
    return self.decayed('whole', self.ds) + self.dot(
        self.ready('read'), rows, TN)

  def read(self):
    """Products with what the rows wrote and with states."""
    self.dpairs = self.dot(self.both, self.row(self.written), NT)
    self.dlookers = self.dot(self.both, self.saved('before'), NT)
    self.dk = self.dot(self.row(self.written), self.ds, NT)

  def after_states(self, outs):
    """Cotangents of the rows."""
    C, q, k = len(self.dk), self.row('q'), self.row('k')
    decays, delta = self.form.decay == 'head', self.form.delta
    dk = self.decayed('end', self.dk)
    dq = self.decayed('start', self.scale * self.dlookers[:C])
    dscore = self.scale * self.dpairs[:C]
    if decays:
      ended = (dk * k).sum(1, keepdims=True)
      moved = (dq * q).sum(1, keepdims=True) - ended
      dbetween = dscore * self.ready('score')
    dpairs, lookers = [self.masked(dscore)], q
    if delta:
      beta = self.ready('beta')[:, :1]
      derase = self.decayed('start', -self.dlookers[C:])
      erased = (derase * k).sum(1, keepdims=True)
      da, pair = -self.dpairs[C:], self.ready('pair')
      dbeta = (da * pair).sum(1, keepdims=True) + erased + (
          self.dy * self.row('v')).sum(1, keepdims=True)
      da *= beta
      if decays:
        moved += beta * erased
        dbetween += da * pair
      dpairs.append(self.masked(da, strict=True))
      lookers = jnp.concatenate([q, k], 0)
      dk += beta * derase
      outs['dbeta'][0, self.head : self.head + 1, self.rows] = tpu_chunk.line(
          tpu_chunk.strength(beta, self.dy, self.row('y'), dbeta))
      self.dy *= beta
    dpairs = jnp.concatenate(dpairs, 0)
    looked = self.dot(dpairs, k, NN)
    dq += looked[:C]
    dk += self.dot(dpairs, lookers, TN)
    if delta:
      dk += looked[C:]
    if decays:
      end = ended.sum(0, keepdims=True) + self.ready('whole')[:, :1] * (
          (self.ds * self.saved('before')).sum(1, keepdims=True).sum(
              0, keepdims=True))
      outs['dg'][0, self.head : self.head + 1, self.rows] = (
          _rates(moved, dbetween, end))
    for name, x, at in (
        ('dq', dq, self.keys), ('dk', dk, self.keys),
        ('dv', self.dy, self.values)):
      outs[name][self.rows, at] = x.astype(outs[name].dtype)

  def masked(self, x, strict=False):
    if self.form.decay == 'head':
      x = x * self.ready('between')
    return tpu_chunk.masked(x, None, strict)


def _rates(moved, dbetween, end):
  """Cotangent of the log decays."""
  dsum = moved + dbetween.sum(1, keepdims=True)
  dsum -= tpu_chunk.column(dbetween.sum(0, keepdims=True))
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
  early = lambda b: jnp.maximum(B - 1 - b, 0)
  at = lambda b: jnp.minimum(B - b, B - 1)
  prepare, passage = _parts(form)
  given, ins, in_specs = rows | kept | {'do': do}, {}, {}
  for name, at_b, needs in (
      ('early ', early, prepare.NEEDS), ('', at, passage.NEEDS)):
    wide = functools.partial(tpu_grid.wide, tile, at=at_b)
    every = {
        'q': wide(K), 'k': wide(K), 'v': wide(V), 'y': wide(V), 'do': wide(V),
        'erase': wide(K), 'g': tpu_grid.rates(tile, form, at_b),
        'beta': tpu_grid.narrow(tile, H, at_b),
        'before': tpu_grid.by_chunk(tile, X, Y, at_b),
        'inverse': tpu_grid.by_chunk(tile, C, C, at_b)}
    for x in needs:
      if x in given:
        ins[name + x], in_specs[name + x] = given[x], every[x]
  ins['dfinal'] = dstate_GHKV
  in_specs['dfinal'] = states = pl.BlockSpec(memory_space=pl.ANY)
  for j in range(n):
    ins[f'leave{j}'] = dstate_GHKV
    in_specs[f'leave{j}'] = tpu_grid.spec(
        (1, h, X, Y), lambda a, b, seen, j=j: (
            seen.leave[j * B + at(b)], a, 0, 0))
  every = lambda X: tpu_grid.spec(
      (tile.rows, h * X), lambda a, b, seen: (at(b), a))
  each = tpu_grid.spec(
      (1, h, tile.rows), lambda a, b, seen: (a, 0, at(b)))
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
          pltpu.VMEM((n, h, X, Y), jnp.float32), *tpu_grid.writing(form, tile),
          *tpu_grid.waiting(tile, prepare.waits(form, tile, dtype))],
      grid=(H // h, B + 1), vmem=tile.vmem, name='chunk_memory_backward',
      # Two for each of the forward pass, and q and k with k once more.
      flops=2 * tpu_grid.products(form, C, len(do) // C)
      + 4 * H * len(do) * C * K)
