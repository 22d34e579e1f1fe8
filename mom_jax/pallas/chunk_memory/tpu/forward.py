"""The forward kernel: states go through the chunks of their groups.

A step of the grid prepares what needs no state for one block of rows while the
states pass through the block before it, whose own preparations wait in fast
memory: two streams of independent work, side by side.
"""

from __future__ import annotations

import functools
import itertools

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.chunk_memory.tpu import (
  channel_decay as tpu_channel,
)
from mom_jax.pallas.chunk_memory.tpu import (
  chunk_algebra as tpu_chunk,
)
from mom_jax.pallas.chunk_memory.tpu import (
  grid as tpu_grid,
)
from mom_jax.pallas.chunk_memory.tpu.chunk_algebra import (
  LANES,
  NN,
  NT,
  TN,
)


def kernel(seen, ins, outs, scratch, *, form, tile, dtype, scale):
  """Two blocks of rows of a few heads; see forward for the operands."""
  n, h = tile.chunks, tile.heads
  head, b = pl.program_id(0) * h, pl.program_id(1)
  state, stage, sem, pending, *ready = scratch
  ready = dict(zip(_waits(form, tile, dtype, 'inverse' in outs), ready))
  last = b - 1  # the block that the states pass through

  @pl.when(b == 0)
  def _():
    pending[0] = 0
    tpu_grid.copy_idle(
        seen.idle_G, ins['initial'], outs['final'], sem, head, h)

  @pl.when(seen.first(last * n))
  def _():
    state[0] = ins['enter0'][0]

  @pl.when(seen.used(last, n) | seen.used(b, n))
  def _():
    places = list(itertools.product(range(n), range(h)))
    turns, parts = tpu_grid.turns(places, h, stages=4), {}

    def prepare():
      """What needs no state."""
      for at in places:
        used = seen.group(b * n + at[0]) >= 0
        parts[at] = _Part(ins, *at, form, tile, dtype, used)
        yield
      if form.solves:
        inverses = yield from tpu_chunk.inverses(
            [x.a for x in parts.values()], dtype)
        for x, inverse in zip(parts.values(), inverses):
          x.solve(inverse)

    def enter(j, a):
      if j == 0:
        return state[0, a]
      return jnp.where(
          seen.first(last * n + j), ins[f'enter{j}'][0, a], state[j, a])

    def visit():
      """The states pass through."""
      run = {at: _Passage(ins, outs, ready, *at, form, tile, dtype, scale)
             for at in places}
      for now in turns:
        for (j, a), stage in now:
          x = run[j, a]
          if stage == 0:
            x.look(enter(j, a))
          elif stage == 1:
            x.write()
          elif stage == 2:
            state[(j + 1) % n, a] = x.advance()
          else:
            x.answer()
        yield

    steps = len(places) + form.solves * tpu_chunk.inverse_steps(tile.chunk)
    tpu_grid.together((prepare(), steps), (visit(), len(turns)))
    tpu_grid.keep(ready, parts)
    for j in range(n):
      _leave(seen, outs, scratch[:4], last * n + j, (j + 1) % n, head)

  tpu_grid.clear_unused(seen, [outs['o']], last, tile)

  @pl.when(b == pl.num_programs(1) - 1)
  def _():
    tpu_grid.finish(outs['final'], stage, sem, pending)


def _waits(form, tile, dtype, keep):
  """Shapes and types of what waits, by name, for a chunk and head."""
  C, K, V = tile.chunk, form.key, form.value
  lookers = 1 + form.delta + form.erase
  ready = {'lookers': ((lookers * C, K), dtype)}
  if form.decay == 'key' or not form.delta:
    ready['k'] = (C, K), dtype
  if form.decay == 'value':
    ready['own'] = ((C, V), jnp.float32)
  else:
    ready['score'] = ((C, C), dtype)
  if form.solves:
    ready['solution'] = ((C, C), jnp.float32)
    if keep:
      ready['inverse'] = ((C, C), jnp.float32)
  wide = {'head': LANES, 'key': K, 'value': V}.get(form.decay)
  if wide:
    ready['whole'] = ((1, wide), jnp.float32)
  if form.decay in ('head', 'value'):
    ready |= dict.fromkeys(('start', 'end'), ((C, wide), jnp.float32))
  return ready


def _leave(seen, outs, scratch, chunk, at, head):
  """Writes the state after a group's last chunk."""
  state, *writing = scratch

  @pl.when(seen.last(chunk))
  def _():
    tpu_grid.write(
        outs['final'], state.at[at], *writing, seen.group(chunk), head)


class _Part:
  """What needs no state of one chunk of one head."""

  def __init__(self, ins, j, a, form, tile, dtype, used):
    C, K, V = tile.chunk, form.key, form.value
    rows, keys, values = pl.ds(j * C, C), pl.ds(a * K, K), pl.ds(a * V, V)
    dot = functools.partial(tpu_chunk.dot, dtype=dtype)
    q, k = (ins[x][rows, keys] for x in 'qk')
    decay = self.beta = gamma = None
    if form.decay == 'head':
      gamma = decay = tpu_chunk.decays(
          tpu_grid.lane(ins['g'], a, tile.heads, rows))
    elif form.decay != 'none':
      channels = keys if form.decay == 'key' else values
      decay = tpu_channel.decays(ins['g'][rows, channels])
    lookers = [q]
    if form.delta:
      self.beta = tpu_grid.lane(ins['beta'], a, tile.heads, rows)
      lookers.append(k)
    if form.erase:
      lookers.append(ins['erase'][rows, keys])
    self.values = {}
    if form.decay == 'key':
      lookers = [x.astype(jnp.float32) for x in lookers]
      k = k.astype(jnp.float32)
      score, *pairs = tpu_channel.pairs(decay, lookers, k, dot)
      below = pairs[0] if pairs else None
      lookers = [x * decay.from_start for x in lookers]
      k *= decay.to_end
    self.values['lookers'] = lookers = jnp.concatenate(lookers, 0)
    self.values['k'] = k
    if form.decay != 'key':
      pairs = dot(lookers, k, NT)
      below = pairs[C:]
      score = tpu_chunk.masked(pairs[:C], gamma)
    self.values['score'] = score.astype(dtype)
    if form.solves:
      self.a = self.equations(below, gamma, used)
    if form.decay == 'value':
      own, = tpu_channel.reads(
          decay, [score], ins['early v'][rows, values].astype(jnp.float32), dot)
      self.values['own'] = own
    if decay is not None:
      self.values |= {'whole': decay.whole, 'start': decay.from_start,
                     'end': decay.to_end}

  def equations(self, pairs, gamma, used):
    """The matrix A."""
    a = tpu_chunk.masked(pairs, gamma, strict=True)
    if self.beta is not None:
      a = tpu_chunk.column(self.beta) * a
    # Chunks may share a product, so what unused ones hold may not be NaN.
    return jnp.where(used, a, 0.0) if len(a) < LANES else a

  def solve(self, inverse):
    self.values['inverse'] = self.values['solution'] = inverse
    if self.beta is not None:
      self.values['solution'] = inverse * self.beta


class _Passage:
  """One chunk of one head; decay by key channel has the state [V, K]."""

  def __init__(self, ins, outs, ready, j, a, form, tile, dtype, scale):
    self.ins, self.outs, self.scale = ins, outs, scale
    self.rows = pl.ds(j * tile.chunk, tile.chunk)
    self.values = pl.ds(a * form.value, form.value)
    self.at, self.form, self.C = (j, a), form, tile.chunk
    self.ready = lambda name: ready[name][j, a]
    self.dtype = dtype
    self.dot = functools.partial(tpu_chunk.dot, dtype=dtype)
    self.dims = NT if form.decay == 'key' else NN

  def decayed(self, name, x):
    """x times a decay of one number a row or a channel."""
    if self.form.decay not in ('head', 'value'):
      return x
    return tpu_chunk.scaled(x, self.ready(name))

  def look(self, s):
    """What the state before the chunk answers to keys."""
    self.s = s
    if self.form.solves:
      known = self.dot(self.ready('lookers')[self.C :], s, self.dims)
      self.known = self.decayed('start', known)

  def write(self):
    """What the rows write."""
    self.y = self.ins['v'][self.rows, self.values]
    if self.form.solves:
      missing = (self.y - self.known).astype(self.dtype)
      self.y = tpu_chunk.dot_twice(
          self.ready('solution'), missing, NN, self.dtype)

  def advance(self):
    """The state after the chunk."""
    s, y = self.s, self.y
    if self.form.decay == 'key':
      return self.ready('whole') * s + self.dot(y, self.ready('k'), TN)
    k = self.ready('lookers')[self.C :] if self.form.delta else self.ready('k')
    s = self.decayed('whole', s)
    return s + self.dot(k, self.decayed('end', y), TN)

  def answer(self):
    """What the state and the rows answer to queries."""
    found = self.dot(self.ready('lookers')[: self.C], self.s, self.dims)
    if self.form.decay == 'value':
      own = self.ready('own')
    else:
      own = self.dot(self.ready('score'), self.y, NN)
    o = self.scale * (self.decayed('start', found) + own)
    for name, x in (('o', o), ('y', self.y)):
      if name in self.outs:
        self.outs[name][self.rows, self.values] = x.astype(
            self.outs[name].dtype)
    if 'before' in self.outs:
      self.outs['before'][self.at] = self.s.astype(self.outs['before'].dtype)
    if 'inverse' in self.outs:
      self.outs['inverse'][self.at] = self.ready('inverse')


def forward(rows, state_GHKV, seen, *, form, tile, dtype, scale, keep):
  """Runs the kernel.

  Args:
    rows: q, k, v, erase and g by channel with heads side by side, [R, H X]; g
      by head and beta, [H, R].
    state_GHKV: or [G, H, V, K], as `form.state` says.
    keep: also answer what the backward pass needs.
  Returns:
    dict of o, final, and if keep of before, inverse and y.
  """
  C, n, h, H = tile.chunk, tile.chunks, tile.heads, form.heads
  K, V = form.key, form.value
  X, Y = form.state
  R, N, G = len(rows['q']), len(rows['q']) // C, len(state_GHKV)
  B = -(-N // n)
  ahead = lambda b: jnp.minimum(b, B - 1)
  after = lambda b: jnp.maximum(b - 1, 0)
  wide = functools.partial(tpu_grid.wide, tile)
  like = functools.partial(common.shape_like, like=rows['q'])
  states = pl.BlockSpec(memory_space=pl.ANY)
  ins = rows | {'initial': state_GHKV}
  in_specs = {
      'q': wide(K, ahead), 'k': wide(K, ahead), 'erase': wide(K, ahead),
      'v': wide(V, after), 'early v': wide(V, ahead),
      'beta': tpu_grid.narrow(tile, H, ahead),
      'g': tpu_grid.rates(tile, form, ahead), 'initial': states}
  if form.decay == 'value':
    ins['early v'] = rows['v']
  for j in range(n):
    ins[f'enter{j}'] = state_GHKV
    in_specs[f'enter{j}'] = tpu_grid.spec(
        (1, h, X, Y),
        lambda a, b, seen, j=j: (seen.enter[j * B + after(b)], a, 0, 0))
  outs = {
      'o': like((R, H * V), rows['v'].dtype),
      'final': like((G, H, X, Y), jnp.float32)}
  out_specs = {
      'o': tpu_grid.spec((n * C, h * V), lambda a, b, seen: (after(b), a)),
      'final': states}
  if keep:
    outs['before'] = like((N, H, X, Y), dtype)
    out_specs['before'] = tpu_grid.by_chunk(tile, X, Y, after)
  if keep and form.solves:
    outs['inverse'] = like((N, H, C, C), jnp.float32)
    out_specs['inverse'] = tpu_grid.by_chunk(tile, C, C, after)
    outs['y'] = like((R, H * V), dtype)
    out_specs['y'] = wide(V, after)
  return tpu_grid.call(
      functools.partial(
          kernel, form=form, tile=tile, dtype=dtype, scale=scale),
      seen, ins, in_specs, outs, out_specs,
      scratch=[
          pltpu.VMEM((n, h, X, Y), jnp.float32), *tpu_grid.writing(form, tile),
          *tpu_grid.waiting(tile, _waits(form, tile, dtype, keep))],
      grid=(H // h, B + 1), vmem=tile.vmem, name='chunk_memory_forward',
      flops=tpu_grid.products(form, C, N))
