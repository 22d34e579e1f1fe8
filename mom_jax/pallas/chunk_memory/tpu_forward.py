"""The forward kernel: states go through the chunks of their groups."""

from __future__ import annotations

import functools
import itertools

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.chunk_memory import tpu_channel, tpu_chunk, tpu_grid
from mom_jax.pallas.chunk_memory.tpu_chunk import NN, NT, TN

AHEAD = 2  # chunks that are prepared while states pass through others


def kernel(seen, ins, outs, scratch, *, form, tile, dtype, scale):
  """One block of rows of a few heads; see forward for the operands."""
  n, h = tile.chunks, tile.heads
  head, b = pl.program_id(0) * h, pl.program_id(1)
  state, stage, sem, pending = scratch

  @pl.when(b == 0)
  def _():
    pending[0] = 0
    tpu_grid.copy_idle(
        seen.idle_G, ins['initial'], outs['final'], sem, head, h)

  @pl.when(seen.used(b, n))
  def _():
    parts = {}

    def prepare(places):
      """What needs no state, for a few chunks."""
      new = []
      for j, a in itertools.product(places, range(h)):
        new.append(_Part(ins, j, a, form, tile, dtype))
        yield
      if form.solves:
        a = [x.equations(seen.group(b * n + x.place) >= 0) for x in new]
        inverses = yield from tpu_chunk.inverses(a, dtype)
        for x, inverse in zip(new, inverses):
          x.solve(inverse)
      parts.update({(x.place, x.head): x for x in new})

    def visit(places):
      """The states pass through those chunks."""
      for j in places:
        heads = [parts.pop((j, a)) for a in range(h)]
        first = seen.first(b * n + j)
        states = [
            jnp.where(first, ins[f'enter{j}'][0, a], state[j, a])
            for a in range(h)]
        for step in (_Part.look, _Part.write, _Part.advance):
          states = [step(*x) for x in zip(heads, states)]
          yield
        for a in range(h):
          state[(j + 1) % n, a] = states[a]
        for x in heads:
          x.store(outs, scale)
        yield

    some = [range(j, min(j + AHEAD, n)) for j in range(0, n, AHEAD)]
    for visited, prepared in zip([None, *some], [*some, None]):
      tpu_grid.together(
          visit(visited or ()), prepare(prepared) if prepared else iter(()))
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


class _Part:
  """One chunk of one head; decay by key channel has the state [V, K]."""

  def __init__(self, ins, j, a, form, tile, dtype):
    C, K, V = tile.chunk, form.key, form.value
    self.place, self.head, self.rows = j, a, pl.ds(j * C, C)
    keys, self.values = pl.ds(a * K, K), pl.ds(a * V, V)
    self.kind = form.decay
    self.dot = functools.partial(tpu_chunk.dot, dtype=dtype)
    self.q, self.k = (ins[x][self.rows, keys] for x in 'qk')
    self.v = ins['v'][self.rows, self.values]
    self.decay = self.beta = self.gamma = None
    if self.kind == 'head':
      self.gamma = self.decay = tpu_chunk.decays(
          tpu_grid.lane(ins['g'], a, tile.heads, self.rows))
    elif self.kind != 'none':
      channels = keys if self.kind == 'key' else self.values
      self.decay = tpu_channel.decays(ins['g'][self.rows, channels])
    lookers = [self.q]
    if form.delta:
      self.beta = tpu_grid.lane(ins['beta'], a, tile.heads, self.rows)
      lookers.append(self.k)
    if form.erase:
      lookers.append(ins['erase'][self.rows, keys])
    if self.kind == 'key':
      lookers = [x.astype(jnp.float32) for x in lookers]
      self.k = self.k.astype(jnp.float32)
      self.score, *pairs = tpu_channel.pairs(
          self.decay, lookers, self.k, self.dot)
      self.pairs = pairs[0] if pairs else None
      lookers = [x * self.decay.from_start for x in lookers]
    self.lookers = jnp.concatenate(lookers, 0)
    if self.kind != 'key':
      pairs = self.dot(self.lookers, self.k, NT)
      self.pairs = pairs[C:]
      self.score = tpu_chunk.masked(pairs[:C], self.gamma)

  def equations(self, used):
    """The matrix A."""
    a = tpu_chunk.masked(self.pairs, self.gamma, strict=True)
    if self.beta is not None:
      a = tpu_chunk.column(self.beta) * a
    # Chunks may share a product, so what unused ones hold may not be NaN.
    return jnp.where(used, a, 0.0)

  def solve(self, inverse):
    self.inverse = self.solution = inverse
    if self.beta is not None:
      self.solution = inverse * self.beta

  def look(self, s):
    """What the state before the chunk answers to queries and keys."""
    self.before, C = s, len(self.q)
    found = self.dot(self.lookers, s, NT if self.kind == 'key' else NN)
    if self.kind in ('head', 'value'):
      starts = [self.decay.from_start] * (len(found) // C)
      found *= jnp.concatenate(starts, 0)
    self.o, self.known = found[:C], found[C:]
    return s

  def write(self, s):
    """What the rows write."""
    self.y = self.v
    if len(self.known):
      self.y = self.dot(self.solution, self.v - self.known, NN)
    return s

  def advance(self, s):
    """The state after the chunk."""
    if self.kind == 'key':
      ended = self.decay.to_end * self.k
      return self.decay.whole * s + self.dot(self.y, ended, TN)
    y = self.y
    if self.decay is not None:
      y, s = self.decay.to_end * y, self.decay.whole * s
    return s + self.dot(self.k, y, TN)

  def store(self, outs, scale):
    if self.kind == 'value':
      own, = tpu_channel.reads(
          self.decay, [self.score], self.v.astype(jnp.float32), self.dot)
    else:
      own = self.dot(self.score, self.y, NN)
    keep = {'o': scale * (self.o + own), 'y': self.y}
    for name in keep.keys() & outs.keys():
      outs[name][self.rows, self.values] = keep[name].astype(
          outs[name].dtype)
    keep = {'before': self.before}
    if len(self.known):
      keep['inverse'] = self.inverse
    for name in keep.keys() & outs.keys():
      outs[name][self.place, self.head] = keep[name].astype(outs[name].dtype)


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
  like = functools.partial(common.shape_like, like=rows['q'])
  states = pl.BlockSpec(memory_space=pl.ANY)
  ins = rows | {'initial': state_GHKV}
  in_specs = {
      'q': tpu_grid.wide(tile, K), 'k': tpu_grid.wide(tile, K),
      'v': tpu_grid.wide(tile, V), 'beta': tpu_grid.narrow(tile, H),
      'g': tpu_grid.rates(tile, form), 'erase': tpu_grid.wide(tile, K),
      'initial': states}
  for j in range(n):
    ins[f'enter{j}'] = state_GHKV
    in_specs[f'enter{j}'] = tpu_grid.spec(
        (1, h, X, Y),
        lambda a, b, seen, j=j: (seen.enter[j * B + b], a, 0, 0))
  outs = {
      'o': like((R, H * V), rows['v'].dtype),
      'final': like((G, H, X, Y), jnp.float32)}
  out_specs = {
      'o': tpu_grid.spec((n * C, h * V), lambda a, b, seen: (b, a)),
      'final': states}
  if keep:
    outs['before'] = like((N, H, X, Y), dtype)
    out_specs['before'] = tpu_grid.by_chunk(tile, X, Y)
  if keep and form.solves:
    outs['inverse'] = like((N, H, C, C), dtype)
    out_specs['inverse'] = tpu_grid.by_chunk(tile, C, C)
    outs['y'] = like((R, H * V), dtype)
    out_specs['y'] = tpu_grid.wide(tile, V)
  return tpu_grid.call(
      functools.partial(
          kernel, form=form, tile=tile, dtype=dtype, scale=scale),
      seen, ins, in_specs, outs, out_specs,
      scratch=[
          pltpu.VMEM((n, h, X, Y), jnp.float32), *tpu_grid.writing(form, tile)],
      grid=(H // h, B), vmem=tile.vmem, name='chunk_memory_forward',
      flops=tpu_grid.products(form, C, N))
