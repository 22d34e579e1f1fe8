"""The backward kernel's chunks under decay by key or by value channel.

The stages are those of tpu_backward. A log decay g_i stands in the decays of
all pairs of rows around it, so its cotangent is a sum over the rows from i on:
of q dq + e de - k dk in each key channel (e what is erased under), of o do -
v dv in each value channel, and of what goes on to the next chunk.
"""

from __future__ import annotations

import functools

from jax.experimental import pallas as pl
import jax.numpy as jnp

from mom_jax.pallas.chunk_memory import tpu_channel, tpu_chunk, tpu_grid
from mom_jax.pallas.chunk_memory.tpu_chunk import NN, NT, TN


class KeyPrepare:
  """What needs no cotangent of a state, of one chunk of one head."""

  NEEDS = 'q', 'k', 'do', 'g'

  @staticmethod
  def waits(form, tile, dtype):
    """Shapes and types of what waits, by name, for a chunk and head."""
    del dtype
    C, K, V = tile.chunk, form.key, form.value
    names = tpu_channel.names(C)
    return {
        'dy': ((C, V), jnp.float32), 'whole': ((1, K), jnp.float32),
        **dict.fromkeys(names, ((C, K), jnp.float32))}

  def __init__(self, ins, j, a, form, tile, dtype, scale):
    C, K, V = tile.chunk, form.key, form.value
    self.scale = scale
    self.sure = functools.partial(tpu_chunk.dot_twice, dtype=dtype)
    dot = functools.partial(tpu_chunk.dot, dtype=dtype)
    rows, keys = pl.ds(j * C, C), pl.ds(a * K, K)
    q, k = (ins['early ' + x][rows, keys].astype(jnp.float32) for x in 'qk')
    self.do = ins['early do'][rows, pl.ds(a * V, V)]
    decay = tpu_channel.decays(ins['early g'][rows, keys])
    self.score, = tpu_channel.pairs(decay, [q], k, dot)
    self.values = tpu_channel.named(decay)

  def score_read(self):
    """What follows from reads inside the chunk."""
    self.values['dy'] = self.scale * self.sure(self.score, self.do, TN)


class KeyPassage:
  """One chunk of one head; its state is [V, K]."""

  NEEDS = 'q', 'k', 'v', 'y', 'do', 'erase', 'beta', 'before', 'inverse'

  def __init__(self, ins, ready, j, a, form, tile, dtype, scale):
    C, K, V = tile.chunk, form.key, form.value
    self.head, self.form, self.scale, self.C = a, form, scale, C
    self.dot = functools.partial(tpu_chunk.dot, dtype=dtype)
    self.sure = functools.partial(tpu_chunk.dot_twice, dtype=dtype)
    self.rows = rows = pl.ds(j * C, C)
    self.keys, self.values = pl.ds(a * K, K), pl.ds(a * V, V)
    self.ready = lambda name: ready[name][j, a]
    wide = dict.fromkeys(('q', 'k', 'erase'), self.keys)
    self.row = lambda x: ins[x][rows, wide.get(x, self.values)]
    self.saved = lambda x: ins[x][j, a]
    self.beta = lambda: tpu_chunk.column(
        tpu_grid.lane(ins['beta'], a, tile.heads, rows))
    self.written = 'y' if form.solves else 'v'

  def lookers(self):
    """Queries and what is erased under."""
    rows = [self.row('q').astype(jnp.float32)]
    if self.form.delta:
      rows.append(self.beta() * self.row('k'))
    if self.form.erase:
      rows.append(self.row('erase').astype(jnp.float32))
    return rows

  def write(self, ds):
    """Takes the cotangent of the state after the chunk."""
    self.ds = ds
    self.dy = self.ready('dy') + self.dot(
        self.ready('end') * self.row('k'), ds, NT)

  def solve(self):
    if self.form.solves:
      self.dy = self.sure(self.saved('inverse'), self.dy, TN, split=1)

  def retreat(self):
    """The cotangent of the state before the chunk."""
    start, signs = self.ready('start'), (self.scale, -1.0)
    read = [sign * x * start for sign, x in zip(signs, self.lookers())]
    self.both = rows = self.row('do')
    if self.form.solves:
      self.both = rows = jnp.concatenate([rows, self.dy.astype(rows.dtype)], 0)
    return self.ready('whole') * self.ds + self.dot(
        rows, jnp.concatenate(read, 0), TN)

  def read(self):
    """Products with what the rows wrote and with states."""
    self.dpairs = self.dot(self.both, self.row(self.written), NT)
    self.dlookers = self.dot(self.both, self.saved('before'), NN)
    self.dk = self.dot(self.row(self.written), self.ds, NN)

  def after_states(self, outs):
    """Cotangents of the rows."""
    C, decay = self.C, tpu_channel.from_names(self.ready, self.C)
    k, lookers = self.row('k').astype(jnp.float32), self.lookers()
    dpairs = [self.scale * self.dpairs[:C]]
    dlookers = [self.scale * self.dlookers[:C] * decay.from_start]
    if self.form.solves:
      dpairs.append(-tpu_chunk.masked(self.dpairs[C:], None, strict=True))
      dlookers.append(-self.dlookers[C:] * decay.from_start)
    more = tpu_channel.reads(decay, dpairs, k, self.dot)
    dlookers = [x + y for x, y in zip(dlookers, more)]
    written = self.dk * decay.to_end
    dk = written + tpu_channel.back(decay, dpairs, lookers, self.dot)
    dsum = sum(x * dx for x, dx in zip(lookers, dlookers)) - k * dk
    end = (written * k).sum(0, keepdims=True) + decay.whole * (
        self.ds * self.saved('before')).sum(0, keepdims=True)
    grads = {'dg': tpu_channel.rates(dsum, end), 'dq': dlookers[0]}
    dv = self.dy
    if self.form.erase:
      grads['derase'] = dlookers[1]
    if self.form.delta:
      beta = self.beta()
      dv, dk = beta * dv, dk + beta * dlookers[1]
      dbeta = (dlookers[1] * k).sum(1, keepdims=True) + (
          self.dy * self.row('v')).sum(1, keepdims=True)
      outs['dbeta'][0, self.head : self.head + 1, self.rows] = tpu_chunk.line(
          tpu_chunk.strength(beta, self.dy, self.row('y'), dbeta))
    for name, x in (grads | {'dk': dk}).items():
      outs[name][self.rows, self.keys] = x.astype(outs[name].dtype)
    outs['dv'][self.rows, self.values] = dv.astype(outs['dv'].dtype)


class ValuePrepare:
  """What needs no state, of one chunk of one head."""

  NEEDS = 'q', 'k', 'v', 'do', 'g'

  @staticmethod
  def waits(form, tile, dtype):
    """Shapes and types of what waits, by name, for a chunk and head."""
    C, V = tile.chunk, form.value
    return {
        'whole': ((1, V), jnp.float32), 'dscore': ((C, C), dtype),
        **dict.fromkeys(('start', 'end', 'own', 'dv'), ((C, V), jnp.float32))}

  def __init__(self, ins, j, a, form, tile, dtype, scale):
    C, K, V = tile.chunk, form.key, form.value
    self.dot = functools.partial(tpu_chunk.dot, dtype=dtype)
    rows, keys, values = pl.ds(j * C, C), pl.ds(a * K, K), pl.ds(a * V, V)
    self.v, self.do = (
        ins['early ' + x][rows, values].astype(jnp.float32)
        for x in ('v', 'do'))
    self.do *= scale
    self.decay = decay = tpu_channel.decays(ins['early g'][rows, values])
    self.score = tpu_chunk.masked(self.dot(
        ins['early q'][rows, keys], ins['early k'][rows, keys], NT), None)
    self.values = {
        'whole': decay.whole, 'start': decay.from_start, 'end': decay.to_end}

  def score_read(self):
    """What follows from reads inside the chunk."""
    score, decay = [self.score], self.decay
    self.values['own'], = tpu_channel.reads(decay, score, self.v, self.dot)
    self.values['dv'] = tpu_channel.back(decay, score, [self.do], self.dot)
    self.values['dscore'], = tpu_channel.pairs(
        decay, [self.do], self.v, self.dot)


class ValuePassage:
  """One chunk of one head; rows write their values as they are."""

  NEEDS = 'q', 'k', 'v', 'do', 'before'

  def __init__(self, ins, ready, j, a, form, tile, dtype, scale):
    C, K, V = tile.chunk, form.key, form.value
    self.scale = scale
    self.dot = functools.partial(tpu_chunk.dot, dtype=dtype)
    self.rows = rows = pl.ds(j * C, C)
    self.keys, self.values = pl.ds(a * K, K), pl.ds(a * V, V)
    self.ready = lambda name: ready[name][j, a]
    wide = {'q': self.keys, 'k': self.keys}
    self.row = lambda x: ins[x][rows, wide.get(x, self.values)]
    self.saved = lambda x: ins[x][j, a]

  def write(self, ds):
    """Takes the cotangent of the state after the chunk."""
    self.ds = ds

  def solve(self):
    """What the rows write hangs on no state."""

  def retreat(self):
    """The cotangent of the state before the chunk."""
    self.do = self.scale * self.row('do')
    self.started = self.do * self.ready('start')
    return self.ready('whole') * self.ds + self.dot(
        self.row('q'), self.started, TN)

  def read(self):
    """Products with states."""
    self.o = self.dot(self.row('q'), self.saved('before'), NN)
    self.dq = self.dot(self.started, self.saved('before'), NT)
    self.written = self.dot(self.row('k'), self.ds, NN) * self.ready('end')
    self.dk = self.dot(self.row('v') * self.ready('end'), self.ds, NT)

  def after_states(self, outs):
    """Cotangents of the rows."""
    dscore, v = self.ready('dscore'), self.row('v')
    o = self.o * self.ready('start') + self.ready('own')
    dq = self.dq + self.dot(dscore, self.row('k'), NN)
    dk = self.dk + self.dot(dscore, self.row('q'), TN)
    dv = self.ready('dv') + self.written
    end = (self.written * v).sum(0, keepdims=True) + self.ready('whole') * (
        self.ds * self.saved('before')).sum(0, keepdims=True)
    dg = tpu_channel.rates(self.do * o - v * dv, end)
    for name, x, at in (
        ('dq', dq, self.keys), ('dk', dk, self.keys),
        ('dv', dv, self.values), ('dg', dg, self.values)):
      outs[name][self.rows, at] = x.astype(outs[name].dtype)


PARTS = {
    'key': (KeyPrepare, KeyPassage), 'value': (ValuePrepare, ValuePassage)}
