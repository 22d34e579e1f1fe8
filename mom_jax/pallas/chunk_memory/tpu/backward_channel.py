"""The backward kernel's chunks under decay by key or by value channel.

The steps are those of tpu_backward. A log decay g_i stands in the decays of all
pairs of rows around it, so its cotangent is a sum over the rows from i on: of
q dq + e de - k dk in each key channel (e what is erased under), of
o do - v dv in each value channel, and of what goes on to the next chunk.
"""

from __future__ import annotations

import functools

from jax.experimental import pallas as pl
import jax.numpy as jnp

from mom_jax.pallas.chunk_memory.tpu import (
  channel_decay as tpu_channel,
)
from mom_jax.pallas.chunk_memory.tpu import (
  chunk_algebra as tpu_chunk,
)
from mom_jax.pallas.chunk_memory.tpu import (
  grid as tpu_grid,
)
from mom_jax.pallas.chunk_memory.tpu.chunk_algebra import NN, NT, TN


class ByKey:
  """One chunk of one head; its state is [V, K]."""

  def __init__(self, ins, j, a, form, tile, dtype, scale):
    C, K, V = tile.chunk, form.key, form.value
    self.head, self.form, self.scale = a, form, scale
    self.dot = functools.partial(tpu_chunk.dot, dtype=dtype)
    self.sure = functools.partial(tpu_chunk.dot_twice, dtype=dtype)
    self.rows = rows = pl.ds(j * C, C)
    self.keys, self.values = pl.ds(a * K, K), pl.ds(a * V, V)
    self.q, self.k = (
        ins[x][rows, self.keys].astype(jnp.float32) for x in 'qk')
    self.v = self.y = ins['v'][rows, self.values]
    self.do = ins['do'][rows, self.values]
    self.s = ins['before'][j, a]
    self.decay = tpu_channel.decays(ins['g'][rows, self.keys])
    self.lookers = [self.q]
    if form.solves:
      self.y = ins['y'][rows, self.values]
      self.t = ins['inverse'][j, a]
    if form.delta:
      self.beta = tpu_chunk.column(
          tpu_grid.lane(ins['beta'], a, tile.heads, rows))
      self.lookers.append(self.beta * self.k)
    if form.erase:
      self.lookers.append(ins['erase'][rows, self.keys])

  def read(self):
    """Products of what is given."""
    self.score, = tpu_channel.pairs(self.decay, [self.q], self.k, self.dot)
    self.dpairs = [self.scale * self.dot(self.do, self.y, NT)]
    self.dlookers = [
        self.scale * self.dot(self.do, self.s, NN) * self.decay.from_start]

  def score_read(self):
    """What follows from reads inside the chunk."""
    self.dy = self.scale * self.sure(self.score, self.do, TN)

  def erased(self):
    """Queries and erased keys, decayed from the start."""
    self.started = [x * self.decay.from_start for x in self.lookers]

  def write(self, ds):
    """Takes the cotangent of the state after the chunk."""
    self.ds = ds
    self.dy += self.dot(self.decay.to_end * self.k, ds, NT)
    return ds

  def solve(self, ds):
    if self.form.solves:
      self.dy = self.sure(self.t, self.dy, TN)
    return ds

  def retreat(self, ds):
    """The cotangent of the state before the chunk."""
    read, rows = self.scale * self.started[0], self.do
    if self.form.solves:
      read = jnp.concatenate([read, -self.started[1]], 0)
      rows = jnp.concatenate([rows, self.dy.astype(rows.dtype)], 0)
    return self.decay.whole * ds + self.dot(rows, read, TN)

  def after_states(self, outs):
    """Cotangents of the rows."""
    decay, k = self.decay, self.k
    if self.form.solves:
      da = -tpu_chunk.masked(self.dot(self.dy, self.y, NT), None, strict=True)
      self.dpairs.append(da)
      self.dlookers.append(
          -self.dot(self.dy, self.s, NN) * decay.from_start)
    more = tpu_channel.reads(decay, self.dpairs, k, self.dot)
    dlookers = [x + y for x, y in zip(self.dlookers, more)]
    written = self.dot(self.y, self.ds, NN) * decay.to_end
    dk = written + tpu_channel.back(
        decay, self.dpairs, self.lookers, self.dot)
    dsum = sum(x * dx for x, dx in zip(self.lookers, dlookers)) - k * dk
    end = (written * k).sum(0, keepdims=True) + decay.whole * (
        self.ds * self.s).sum(0, keepdims=True)
    grads = {'dg': tpu_channel.rates(dsum, end), 'dq': dlookers[0]}
    dv = self.dy
    if self.form.erase:
      grads['derase'] = dlookers[1]
    if self.form.delta:
      dv, dk = self.beta * dv, dk + self.beta * dlookers[1]
      dbeta = (dlookers[1] * k).sum(1, keepdims=True) + (
          self.dy * self.v).sum(1, keepdims=True)
      outs['dbeta'][0, self.head : self.head + 1, self.rows] = tpu_chunk.line(
          tpu_chunk.strength(self.beta, self.dy, self.y, dbeta))
    for name, x in (grads | {'dk': dk}).items():
      outs[name][self.rows, self.keys] = x.astype(outs[name].dtype)
    outs['dv'][self.rows, self.values] = dv.astype(outs['dv'].dtype)


class ByValue:
  """One chunk of one head; rows write their values as they are."""

  def __init__(self, ins, j, a, form, tile, dtype, scale):
    C, K, V = tile.chunk, form.key, form.value
    self.scale = scale
    self.dot = functools.partial(tpu_chunk.dot, dtype=dtype)
    self.rows = rows = pl.ds(j * C, C)
    self.keys, self.values = pl.ds(a * K, K), pl.ds(a * V, V)
    self.q, self.k = (ins[x][rows, self.keys] for x in 'qk')
    self.v, self.do = (
        ins[x][rows, self.values].astype(jnp.float32) for x in ('v', 'do'))
    self.do *= scale
    self.s = ins['before'][j, a]
    self.decay = tpu_channel.decays(ins['g'][rows, self.values])

  def read(self):
    """Products of what is given."""
    self.score = tpu_chunk.masked(self.dot(self.q, self.k, NT), None)
    self.o = self.dot(self.q, self.s, NN) * self.decay.from_start
    self.started = self.do * self.decay.from_start
    self.dq = self.dot(self.started, self.s, NT)

  def score_read(self):
    """What follows from reads inside the chunk."""
    own, = tpu_channel.reads(self.decay, [self.score], self.v, self.dot)
    self.o += own
    self.dv = tpu_channel.back(self.decay, [self.score], [self.do], self.dot)

  def erased(self):
    """Cotangent of the score."""
    dscore, = tpu_channel.pairs(self.decay, [self.do], self.v, self.dot)
    self.dq += self.dot(dscore, self.k, NN)
    self.dk = self.dot(dscore, self.q, TN)

  def write(self, ds):
    """Takes the cotangent of the state after the chunk."""
    self.ds = ds
    return ds

  def solve(self, ds):
    return ds

  def retreat(self, ds):
    """The cotangent of the state before the chunk."""
    return self.decay.whole * ds + self.dot(self.q, self.started, TN)

  def after_states(self, outs):
    """Cotangents of the rows."""
    decay = self.decay
    written = self.dot(self.k, self.ds, NN) * decay.to_end
    dv = self.dv + written
    self.dk += self.dot(self.v * decay.to_end, self.ds, NT)
    end = (written * self.v).sum(0, keepdims=True) + decay.whole * (
        self.ds * self.s).sum(0, keepdims=True)
    dg = tpu_channel.rates(self.do * self.o - self.v * dv, end)
    for name, x, at in (
        ('dq', self.dq, self.keys), ('dk', self.dk, self.keys),
        ('dv', dv, self.values), ('dg', dg, self.values)):
      outs[name][self.rows, at] = x.astype(outs[name].dtype)


PARTS = {'key': ByKey, 'value': ByValue}
