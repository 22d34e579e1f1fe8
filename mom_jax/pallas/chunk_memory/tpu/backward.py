"""The backward kernel: cotangents of states pass back through the chunks.

Updates solve (I + A) Y = B with B = beta (V - decayed K S). So with
dB = T^T dY everything else follows without the parts of T: dA = -dB Y^T, and
the cotangent of the decayed beta K is -dB S^T.

The chunks of a block overlap in three phases, from the last chunk to the first.
All heads of a chunk take each of a phase's three steps together:

  chunk n - 1    prepare  recur    finish
  chunk n - 2             prepare  recur    finish
  chunk n - 3                      prepare  recur    finish

  prepare   score_cotangents, local_cotangents, removal_rows
  recur     update_cotangents, solve, state_cotangent     needs dS, passes it on
  finish    row_cotangents                                stores the results
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.chunk_memory.tpu import (
    backward_channel,
    chunk_algebra,
    grid,
)
from mom_jax.pallas.chunk_memory.tpu.chunk_algebra import NN, NT, TN


class Inputs(NamedTuple):
  """Operands of the kernel."""

  q: Any
  k: Any
  v: Any
  g: Any
  beta: Any
  removal_key: Any
  before: Any
  inverse: Any
  y: Any
  do: Any
  dfinal: Any  # cotangents of all groups' last states, in HBM
  leaving: Any  # for each chunk of a block, the cotangent that may enter there


class Outputs(NamedTuple):
  """Cotangents of the rows and of the initial states."""

  dq: Any
  dk: Any
  dv: Any
  dg: Any
  dbeta: Any
  dremoval_key: Any
  dinitial: Any


def kernel(schedule, ins, outs, scratch, *, problem, block, dtype, scale):
  """One block of rows of a few heads."""
  n, h = block.chunks, block.heads
  chunk_type = {
      'key': backward_channel.KeyDecayChunk,
      'value': backward_channel.ValueDecayChunk,
  }.get(problem.decay, RowDecayChunk)
  head = pl.program_id(0) * h
  b = pl.num_programs(1) - 1 - pl.program_id(1)
  dstate, *writing = scratch

  @pl.when(pl.program_id(1) == 0)
  def _():
    writing[-1][0] = 0
    grid.copy_idle_states(
        schedule.idle_G, ins.dfinal, outs.dinitial, writing[1], head, h)

  @pl.when(schedule.any_used(b, n))
  def _():
    heads_of = {}

    def prepare(j):
      """Compute the terms that need no cotangent of a state."""
      heads = heads_of[j] = [
          chunk_type(ins, j, a, problem, block, dtype, scale) for a in range(h)]
      for step in (
          chunk_type.score_cotangents, chunk_type.local_cotangents,
          chunk_type.removal_rows):
        for x in heads:
          step(x)
        yield

    def recur(j):
      """Take the states' cotangents through the chunk."""
      last = schedule.is_last(b * n + j)
      states = [
          jnp.where(last, ins.leaving[j][0, a], dstate[j, a])
          for a in range(h)]
      for step in (
          chunk_type.update_cotangents, chunk_type.solve,
          chunk_type.state_cotangent):
        states = [step(*x) for x in zip(heads_of[j], states)]
        yield
      for a in range(h):
        dstate[(j - 1) % n, a] = states[a]

    def finish(j):
      for x in heads_of.pop(j):
        x.row_cotangents(outs)
        yield

    phases = [prepare, recur, finish]
    for j in range(n - 1, -len(phases), -1):
      grid.interleave(*(
          (phase(j + i), len(phases))
          for i, phase in enumerate(phases) if 0 <= j + i < n))
    for j in range(n):
      @pl.when(schedule.is_first(b * n + j))
      def _(j=j):
        grid.start_write(
            outs.dinitial, dstate.at[(j - 1) % n], *writing,
            schedule.group(b * n + j), head)

  rows = [ref for ref in outs[:-1] if ref is not None]
  grid.clear_unused(schedule, rows, b, block)

  @pl.when(b == 0)
  def _():
    grid.finish_write(outs.dinitial, *writing)


class RowDecayChunk:
  """One chunk of one head, with one decay per row or none.

  Its methods run in the order of the phases above.
  """

  def __init__(self, ins, j, a, problem, block, dtype, scale):
    C, K, V = block.chunk, problem.key_dim, problem.value_dim
    self.head, self.problem, self.scale = a, problem, scale
    self.dot = functools.partial(chunk_algebra.dot, dtype=dtype)
    self.dot_split = functools.partial(chunk_algebra.dot_split, dtype=dtype)
    self.rows = rows = pl.ds(j * C, C)
    self.keys, self.values = pl.ds(a * K, K), pl.ds(a * V, V)
    self.q, self.k = ins.q[rows, self.keys], ins.k[rows, self.keys]
    self.v = ins.v[rows, self.values]
    self.do = ins.do[rows, self.values]
    self.s = ins.before[j, a]
    self.decay = self.beta = None
    if problem.decay == 'head':
      self.decay = chunk_algebra.row_decay(
          grid.read_scalars(ins.g, a, block.heads, rows))
    self.y = self.v
    if problem.delta:
      self.y = ins.y[rows, self.values]
      self.t = ins.inverse[j, a]
      self.beta = chunk_algebra.to_column(
          grid.read_scalars(ins.beta, a, block.heads, rows))

  def score_cotangents(self):
    """Products of operands and residuals: P and its cotangent, Q from S."""
    rows, C = self.q, len(self.q)
    if self.problem.delta:
      rows = jnp.concatenate([self.q, self.k], 0)
    pairs = self.dot(rows, self.k, NT)
    self.score = chunk_algebra.masked(pairs[:C], self.decay)
    self.key_pairs = pairs[C:]
    dscore = self.scale * self.dot(self.do, self.y, NT)
    self.dpair = chunk_algebra.masked(dscore, self.decay)
    self.dq = self.scale * self.dot(self.do, self.s, NT)
    self.dsum = 0.0  # cotangent of the log decays summed up to each row
    if self.decay is not None:
      self.dq *= self.decay.from_start
      self.dbetween = dscore * self.score
      self.dsum = (self.dq * self.q).sum(1, keepdims=True)

  def local_cotangents(self):
    """Cotangents of Y, Q and K from outputs of the same chunk."""
    self.dy = self.scale * self.dot_split(self.score, self.do, TN)
    self.dq += self.dot(self.dpair, self.k, NN)
    self.dk = self.dot(self.dpair, self.q, TN)

  def removal_rows(self):
    """A, and the removal keys beta K decayed from the start."""
    if not self.problem.delta:
      return
    self.a = chunk_algebra.masked(self.key_pairs, self.decay, strict=True)
    self.removal = self.beta * self.k
    if self.decay is not None:
      self.removal *= self.decay.from_start

  def update_cotangents(self, ds):
    """Add to dY what the state after the chunk, with cotangent ds, gives."""
    self.ds = ds
    dy = self.dot(self.k, ds, NN)
    if self.decay is not None:
      dy *= self.decay.to_end
    self.dy += dy
    return ds

  def solve(self, ds):
    """Turn dY into dB."""
    if self.problem.delta:
      self.dy = self.dot_split(self.t, self.dy, TN)
    return ds

  def state_cotangent(self, ds):
    """Return the cotangent of the state before the chunk."""
    readers, rows = self.scale * self.q, self.do
    if self.decay is not None:
      readers *= self.decay.from_start
      ds = self.decay.chunk_decay * ds
    if self.problem.delta:
      readers = jnp.concatenate([readers, -self.removal], 0)
      rows = jnp.concatenate([rows, self.dy.astype(rows.dtype)], 0)
    return ds + self.dot(readers, rows, TN)

  def row_cotangents(self, outs):
    """Store the cotangents of the rows."""
    written = self.dot(self.y, self.ds, NT)
    if self.decay is not None:
      written *= self.decay.to_end
      ended = (written * self.k).sum(1, keepdims=True)
      self.dsum -= ended
    self.dk += written
    dv = self.dy
    scalars = 0, slice(self.head, self.head + 1), self.rows
    if self.problem.delta:
      dv = self.beta * dv
      outs.dbeta[scalars] = self.solve_cotangents()
    if self.decay is not None:
      dchunk = ended.sum(0, keepdims=True) + self.decay.chunk_decay * (
          (self.ds * self.s).sum(1, keepdims=True).sum(0, keepdims=True))
      outs.dg[scalars] = self.log_decay_cotangent(dchunk)
    grid.store(outs.dq, (self.rows, self.keys), self.dq)
    grid.store(outs.dk, (self.rows, self.keys), self.dk)
    grid.store(outs.dv, (self.rows, self.values), dv)

  def solve_cotangents(self):
    """Cotangents through A and the removal keys; returns that of beta."""
    da = -self.dot(self.dy, self.y, NT)
    dbeta = (da * self.a).sum(1, keepdims=True)
    dpair = chunk_algebra.masked(self.beta * da, self.decay, strict=True)
    dremoval = -self.dot(self.dy, self.s, NT)
    if self.decay is not None:
      dremoval *= self.decay.from_start
      self.dbetween += self.beta * da * self.a
    removed = (dremoval * self.k).sum(1, keepdims=True)
    self.dsum += self.beta * removed
    self.dk += self.beta * dremoval + self.dot(dpair, self.k, NN)
    self.dk += self.dot(dpair, self.k, TN)
    dbeta += removed + (self.dy * self.v).sum(1, keepdims=True)
    return chunk_algebra.to_row(
        chunk_algebra.beta_cotangent(self.beta, self.dy, self.y, dbeta))

  def log_decay_cotangent(self, dchunk):
    """Cotangent of the log decays, [1, C]."""
    dsum = self.dsum + self.dbetween.sum(1, keepdims=True)
    dsum -= chunk_algebra.to_column(self.dbetween.sum(0, keepdims=True))
    C = len(dsum)
    i, j = chunk_algebra.iota((C, C), 0), chunk_algebra.iota((C, C), 1)
    return jnp.where(i >= j, dsum, 0.0).sum(0, keepdims=True) + dchunk


def backward(
    rows, residuals, do, dstate_GHKV, schedule, *, problem, block, dtype,
    scale):
  """Run the kernel.

  Args:
    rows, residuals: operands.RowOperands and operands.Residuals.
    do: [R, H V].
    dstate_GHKV: cotangents of the last states, [G, H, *problem.state_shape].
  Returns:
    Outputs, shaped like the operands; scalars per row are [H / h, h, R].
  """
  n, h, H = block.chunks, block.heads, problem.heads
  C, K, V = block.chunk, problem.key_dim, problem.value_dim
  X, Y = problem.state_shape
  R = len(do)
  B = -(-(R // C) // n)
  reverse = lambda b: B - 1 - b
  like = functools.partial(common.shape_like, like=do)
  in_hbm = pl.BlockSpec(memory_space=pl.ANY)

  def operand(x, spec):
    return None if x is None else grid.Operand(x, spec)

  def wide(x, size):
    return operand(x, grid.rows_spec(block, size, reverse))

  def per_chunk(x, X, Y):
    return operand(x, grid.chunk_spec(block, X, Y, reverse))

  def leaving(j):
    return grid.Operand(dstate_GHKV, grid.spec(
        (1, h, X, Y), lambda a, b, schedule: (
            schedule.leaving[j * B + B - 1 - b], a, 0, 0)))

  inputs = Inputs(
      q=wide(rows.q, K), k=wide(rows.k, K), v=wide(rows.v, V),
      g=operand(rows.g, grid.decay_spec(block, problem, reverse)),
      beta=operand(rows.beta, grid.scalars_spec(block, H, reverse)),
      removal_key=wide(rows.removal_key, K),
      before=per_chunk(residuals.before, X, Y),
      inverse=per_chunk(residuals.inverse, C, C), y=wide(residuals.y, V),
      do=wide(do, V), dfinal=grid.Operand(dstate_GHKV, in_hbm),
      leaving=tuple(map(leaving, range(n))))

  def wide_out(x, size):
    """Every block is written, also those without used chunks."""
    return None if x is None else grid.Operand(
        like(x.shape, x.dtype), grid.spec(
            (block.rows, h * size), lambda a, b, schedule: (B - 1 - b, a)))

  def scalars_out(x):
    return None if x is None else grid.Operand(
        like((H // h, h, R), jnp.float32), grid.spec(
            (1, h, block.rows), lambda a, b, schedule: (a, 0, B - 1 - b)))

  channels = {'key': K, 'value': V}.get(problem.decay)
  outputs = Outputs(
      dq=wide_out(rows.q, K), dk=wide_out(rows.k, K), dv=wide_out(rows.v, V),
      dg=wide_out(rows.g, channels) if channels else scalars_out(rows.g),
      dbeta=scalars_out(rows.beta), dremoval_key=wide_out(rows.removal_key, K),
      dinitial=grid.Operand(like(dstate_GHKV.shape, jnp.float32), in_hbm))
  return grid.call(
      functools.partial(
          kernel, problem=problem, block=block, dtype=dtype, scale=scale),
      schedule, inputs, outputs,
      scratch=[
          pltpu.VMEM((n, h, X, Y), jnp.float32),
          *grid.write_scratch(problem, block)],
      grid=(H // h, B), vmem=block.vmem, name='chunk_memory_backward',
      # Two products for each of the forward pass, and Q K^T and K K^T again.
      flops=2 * grid.forward_flops(problem, C, R // C) + 4 * H * R * C * K)
