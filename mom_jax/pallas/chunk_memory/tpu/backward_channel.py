"""Chunks of the backward kernel with decay per key or per value channel.

Steps are those of backward.py. A log decay g_i appears in the decays of all
pairs of rows around it, so its cotangent is a sum over the rows from i on: of
q dq + e de - k dk in each key channel (e the removal key), of o do - v dv in
each value channel, and of the next chunk's part.
"""

from __future__ import annotations

import functools

from jax.experimental import pallas as pl
import jax.numpy as jnp

from mom_jax.pallas.chunk_memory.tpu import channel_decay, chunk_algebra, grid
from mom_jax.pallas.chunk_memory.tpu.chunk_algebra import NN, NT, TN


class KeyDecayChunk:
  """One chunk of one head; its state is [V, K]."""

  def __init__(self, ins, j, a, problem, block, dtype, scale):
    C, K, V = block.chunk, problem.key_dim, problem.value_dim
    self.head, self.problem, self.scale = a, problem, scale
    self.dot = functools.partial(chunk_algebra.dot, dtype=dtype)
    self.dot_split = functools.partial(chunk_algebra.dot_split, dtype=dtype)
    self.rows = rows = pl.ds(j * C, C)
    self.keys, self.values = pl.ds(a * K, K), pl.ds(a * V, V)
    self.q, self.k = (
        x[rows, self.keys].astype(jnp.float32) for x in (ins.q, ins.k))
    self.v = self.y = ins.v[rows, self.values]
    self.do = ins.do[rows, self.values]
    self.s = ins.before[j, a]
    self.decay = channel_decay.channel_decay(ins.g[rows, self.keys])
    self.readers = [self.q]
    if problem.solves:
      self.y = ins.y[rows, self.values]
      self.t = ins.inverse[j, a]
    if problem.delta:
      self.beta = chunk_algebra.to_column(
          grid.read_scalars(ins.beta, a, block.heads, rows))
      self.readers.append(self.beta * self.k)
    if problem.removal:
      self.readers.append(ins.removal_key[rows, self.keys])

  def score_cotangents(self):
    """Products of operands and residuals: P and its cotangent, Q from S."""
    self.score, = channel_decay.scores(self.decay, [self.q], self.k, self.dot)
    self.dpairs = [self.scale * self.dot(self.do, self.y, NT)]
    self.dreaders = [
        self.scale * self.dot(self.do, self.s, NN) * self.decay.from_start]

  def local_cotangents(self):
    """Cotangent of Y from outputs of the same chunk."""
    self.dy = self.scale * self.dot_split(self.score, self.do, TN)

  def removal_rows(self):
    """Queries and removal keys, decayed from the start."""
    self.decayed = [x * self.decay.from_start for x in self.readers]

  def update_cotangents(self, ds):
    """Add to dY what the state after the chunk, with cotangent ds, gives."""
    self.ds = ds
    self.dy += self.dot(self.decay.to_end * self.k, ds, NT)
    return ds

  def solve(self, ds):
    """Turn dY into dB."""
    if self.problem.solves:
      self.dy = self.dot_split(self.t, self.dy, TN)
    return ds

  def state_cotangent(self, ds):
    """Return the cotangent of the state before the chunk."""
    readers, rows = self.scale * self.decayed[0], self.do
    if self.problem.solves:
      readers = jnp.concatenate([readers, -self.decayed[1]], 0)
      rows = jnp.concatenate([rows, self.dy.astype(rows.dtype)], 0)
    return self.decay.chunk_decay * ds + self.dot(rows, readers, TN)

  def row_cotangents(self, outs):
    """Store the cotangents of the rows."""
    decay, k = self.decay, self.k
    if self.problem.solves:
      da = -chunk_algebra.masked(
          self.dot(self.dy, self.y, NT), None, strict=True)
      self.dpairs.append(da)
      self.dreaders.append(
          -self.dot(self.dy, self.s, NN) * decay.from_start)
    local = channel_decay.outputs(decay, self.dpairs, k, self.dot)
    dreaders = [x + y for x, y in zip(self.dreaders, local)]
    written = self.dot(self.y, self.ds, NN) * decay.to_end
    dk = written + channel_decay.transposed_outputs(
        decay, self.dpairs, self.readers, self.dot)
    dsum = sum(x * dx for x, dx in zip(self.readers, dreaders)) - k * dk
    dchunk = (written * k).sum(0, keepdims=True) + decay.chunk_decay * (
        self.ds * self.s).sum(0, keepdims=True)
    at = self.rows, self.keys
    dg = channel_decay.log_decay_cotangent(dsum, dchunk)
    dv = self.dy
    if self.problem.delta:
      dv, dk = self.beta * dv, dk + self.beta * dreaders[1]
      dbeta = (dreaders[1] * k).sum(1, keepdims=True) + (
          self.dy * self.v).sum(1, keepdims=True)
      outs.dbeta[0, self.head : self.head + 1, self.rows] = (
          chunk_algebra.to_row(chunk_algebra.beta_cotangent(
              self.beta, self.dy, self.y, dbeta)))
    grid.store(outs.dg, at, dg)
    grid.store(outs.dq, at, dreaders[0])
    if self.problem.removal:
      grid.store(outs.dremoval_key, at, dreaders[1])
    grid.store(outs.dk, at, dk)
    grid.store(outs.dv, (self.rows, self.values), dv)


class ValueDecayChunk:
  """One chunk of one head; updates are the values themselves."""

  def __init__(self, ins, j, a, problem, block, dtype, scale):
    C, K, V = block.chunk, problem.key_dim, problem.value_dim
    self.scale = scale
    self.dot = functools.partial(chunk_algebra.dot, dtype=dtype)
    self.rows = rows = pl.ds(j * C, C)
    self.keys, self.values = pl.ds(a * K, K), pl.ds(a * V, V)
    self.q, self.k = ins.q[rows, self.keys], ins.k[rows, self.keys]
    self.v, self.do = (
        x[rows, self.values].astype(jnp.float32) for x in (ins.v, ins.do))
    self.do *= scale
    self.s = ins.before[j, a]
    self.decay = channel_decay.channel_decay(ins.g[rows, self.values])

  def score_cotangents(self):
    """Products of operands and residuals: P, outputs and Q from S."""
    self.score = chunk_algebra.masked(self.dot(self.q, self.k, NT), None)
    self.o = self.dot(self.q, self.s, NN) * self.decay.from_start
    self.decayed_do = self.do * self.decay.from_start
    self.dq = self.dot(self.decayed_do, self.s, NT)

  def local_cotangents(self):
    """Outputs from the same chunk, and their cotangent of V."""
    local, = channel_decay.outputs(
        self.decay, [self.score], self.v, self.dot)
    self.o += local
    self.dv = channel_decay.transposed_outputs(
        self.decay, [self.score], [self.do], self.dot)

  def removal_rows(self):
    """Cotangent of P."""
    dscore, = channel_decay.scores(self.decay, [self.do], self.v, self.dot)
    self.dq += self.dot(dscore, self.k, NN)
    self.dk = self.dot(dscore, self.q, TN)

  def update_cotangents(self, ds):
    """Take the cotangent of the state after the chunk."""
    self.ds = ds
    return ds

  def solve(self, ds):
    """Return `ds`: there is nothing to solve."""
    return ds

  def state_cotangent(self, ds):
    """Return the cotangent of the state before the chunk."""
    return self.decay.chunk_decay * ds + self.dot(self.q, self.decayed_do, TN)

  def row_cotangents(self, outs):
    """Store the cotangents of the rows."""
    decay = self.decay
    written = self.dot(self.k, self.ds, NN) * decay.to_end
    dv = self.dv + written
    self.dk += self.dot(self.v * decay.to_end, self.ds, NT)
    dchunk = (written * self.v).sum(0, keepdims=True) + decay.chunk_decay * (
        self.ds * self.s).sum(0, keepdims=True)
    dg = channel_decay.log_decay_cotangent(
        self.do * self.o - self.v * dv, dchunk)
    grid.store(outs.dq, (self.rows, self.keys), self.dq)
    grid.store(outs.dk, (self.rows, self.keys), self.dk)
    grid.store(outs.dv, (self.rows, self.values), dv)
    grid.store(outs.dg, (self.rows, self.values), dg)
