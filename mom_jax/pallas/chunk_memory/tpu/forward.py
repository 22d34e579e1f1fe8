"""The forward kernel: states pass through the chunks of their groups.

Two streams of independent work run side by side in every grid step: `prepare`
computes the terms of block b that need no state, while `recur` takes the states
through block b - 1, whose prepared terms wait in fast memory.

  grid step      0        1        2        3
  block 0        prepare  recur
  block 1                 prepare  recur
  block 2                          prepare  recur

Symbols are those of xla.py: T = (I + A)^-1, Y the updates (fla: `v_new`), P the
scores.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.chunk_memory.tpu import (
    channel_decay,
    chunk_algebra,
    grid,
    operands,
)
from mom_jax.pallas.chunk_memory.tpu.chunk_algebra import LANES, NN, NT, TN


class Inputs(NamedTuple):
  """Operands of the kernel; v is of block b - 1, other rows of block b."""

  q: Any
  k: Any
  v: Any
  g: Any
  beta: Any
  removal_key: Any
  initial: Any  # states of all groups, in HBM
  v_next: Any  # v of block b, where value channels decay
  entering: Any  # for each chunk of a block, the state that may enter there


class Outputs(NamedTuple):
  """Results of the kernel, of block b - 1."""

  o: Any
  final: Any  # states of all groups, in HBM
  before: Any
  inverse: Any
  y: Any


class Prepared(NamedTuple):
  """Terms of a chunk of a head that need no state; None is absent.

  As values in registers, or as buffers [n, h, ...] in fast memory.
  """

  readers: Any = None  # stacked rows that read the state: Q, then removal keys
  k: Any = None  # K, decayed to the end per channel; delta rule: in `readers`
  local: Any = None  # output from the same chunk, where value channels decay
  score: Any = None  # P, otherwise
  solution: Any = None  # T diag(beta)
  inverse: Any = None  # T
  chunk_decay: Any = None
  from_start: Any = None  # decays that are applied late, to outputs and updates
  to_end: Any = None


def _buffers(problem, block, dtype, keep) -> Prepared:
  """Shapes and dtypes of the prepared terms of a chunk and head."""
  C, K, V = block.chunk, problem.key_dim, problem.value_dim
  shape = jax.ShapeDtypeStruct
  width = {'head': LANES, 'key': K, 'value': V}.get(problem.decay)
  late = shape((C, width), jnp.float32) if (
      problem.decay in ('head', 'value')) else None
  by_value, solves = problem.decay == 'value', problem.solves
  k_apart = problem.decay == 'key' or not problem.delta
  square = shape((C, C), jnp.float32)
  return Prepared(
      readers=shape(((1 + solves) * C, K), dtype),
      k=shape((C, K), dtype) if k_apart else None,
      local=shape((C, V), jnp.float32) if by_value else None,
      score=None if by_value else shape((C, C), dtype),
      solution=square if solves else None,
      inverse=square if solves and keep else None,
      chunk_decay=shape((1, width), jnp.float32) if width else None,
      from_start=late, to_end=late)


def kernel(schedule, ins, outs, scratch, *, problem, block, dtype, scale):
  """Block b of the rows of a few heads is prepared, block b - 1 is finished."""
  n, h = block.chunks, block.heads
  head, b = pl.program_id(0) * h, pl.program_id(1)
  state, stage, sem, pending, *buffers = scratch
  treedef = jax.tree.structure(
      _buffers(problem, block, dtype, outs.inverse is not None))
  buffers = treedef.unflatten(buffers)
  last = b - 1  # the block that the states pass through

  @pl.when(b == 0)
  def _():
    pending[0] = 0
    grid.copy_idle_states(
        schedule.idle_G, ins.initial, outs.final, sem, head, h)

  @pl.when(schedule.is_first(last * n))
  def _():
    state[0] = ins.entering[0][0]

  @pl.when(schedule.any_used(last, n) | schedule.any_used(b, n))
  def _():
    chunks = list(itertools.product(range(n), range(h)))
    pipeline = grid.pipeline_schedule(chunks, h, stages=4)
    prepared = {}

    def prepare():
      """Compute the terms of block b."""
      unsolved = {}
      for j, a in chunks:
        used = schedule.group(b * n + j) >= 0
        unsolved[j, a] = _prepare(ins, j, a, problem, block, dtype, used)
        yield
      inverses = [None] * len(chunks)
      if problem.solves:
        inverses = yield from chunk_algebra.inverses(
            [x.a for x in unsolved.values()], dtype)
      for (at, x), inverse in zip(unsolved.items(), inverses):
        prepared[at] = _with_inverse(x, inverse)

    def enter(j, a):
      """State before chunk j of block b - 1."""
      if j == 0:
        return state[0, a]
      return jnp.where(
          schedule.is_first(last * n + j), ins.entering[j][0, a], state[j, a])

    def leave(j, a, s):
      state[(j + 1) % n, a] = s

    def recur():
      """Take the states through block b - 1."""
      streams = {
          (j, a): _recur(
              ins, outs, buffers, j, a, functools.partial(enter, j, a),
              functools.partial(leave, j, a), problem, block, dtype, scale)
          for j, a in chunks}
      for step in pipeline:
        for at in step:
          next(streams[at], None)
        yield

    steps = len(chunks) + problem.solves * chunk_algebra.num_inverse_steps(
        block.chunk)
    grid.interleave((prepare(), steps), (recur(), len(pipeline)))
    for at, values in prepared.items():
      for buffer, x in zip(buffers, values):
        if buffer is not None:
          buffer[at] = jnp.broadcast_to(
              x.astype(buffer.dtype), buffer.shape[2:])
    for j in range(n):
      _write_final(
          schedule, outs, scratch[:4], last * n + j, (j + 1) % n, head)

  grid.clear_unused(schedule, [outs.o], last, block)

  @pl.when(b == pl.num_programs(1) - 1)
  def _():
    grid.finish_write(outs.final, stage, sem, pending)


def _write_final(schedule, outs, scratch, chunk, slot, head):
  """Write the state after a group's last chunk."""
  state, *writing = scratch

  @pl.when(schedule.is_last(chunk))
  def _():
    grid.start_write(
        outs.final, state.at[slot], *writing, schedule.group(chunk), head)


class _Unsolved(NamedTuple):
  """Prepared terms before A is inverted."""

  values: Prepared
  a: jax.Array | None
  beta: jax.Array | None


def _prepare(ins, j, a, problem, block, dtype, used) -> _Unsolved:
  """Compute the terms of chunk j of head a that need no state, and A."""
  C, K, V = block.chunk, problem.key_dim, problem.value_dim
  rows, keys, values = pl.ds(j * C, C), pl.ds(a * K, K), pl.ds(a * V, V)
  dot = functools.partial(chunk_algebra.dot, dtype=dtype)
  q, k = ins.q[rows, keys], ins.k[rows, keys]
  decay = beta = gamma = None
  if problem.decay == 'head':
    gamma = decay = chunk_algebra.row_decay(
        grid.read_scalars(ins.g, a, block.heads, rows))
  elif problem.decay != 'none':
    channels = keys if problem.decay == 'key' else values
    decay = channel_decay.channel_decay(ins.g[rows, channels])
  readers = [q]
  if problem.delta:
    beta = grid.read_scalars(ins.beta, a, block.heads, rows)
    readers.append(k)
  if problem.removal:
    readers.append(ins.removal_key[rows, keys])
  if problem.decay == 'key':
    readers = [x.astype(jnp.float32) for x in readers]
    k = k.astype(jnp.float32)
    score, *couplings = channel_decay.scores(decay, readers, k, dot)
    below = couplings[0] if couplings else None
    readers = [x * decay.from_start for x in readers]
    k *= decay.to_end
  readers = jnp.concatenate(readers, 0)
  if problem.decay != 'key':
    pairs = dot(readers, k, NT)
    below = pairs[C:]
    score = chunk_algebra.masked(pairs[:C], gamma)
  terms = Prepared(readers=readers, k=k, score=score.astype(dtype))
  a_CC = _a(below, gamma, beta, used) if problem.solves else None
  if problem.decay == 'value':
    local, = channel_decay.outputs(
        decay, [score], ins.v_next[rows, values].astype(jnp.float32), dot)
    terms = terms._replace(local=local)
  if decay is not None:
    terms = terms._replace(
        chunk_decay=decay.chunk_decay, from_start=decay.from_start,
        to_end=decay.to_end)
  return _Unsolved(terms, a_CC, beta)


def _a(pairs, gamma, beta, used):
  """The matrix A."""
  a_CC = chunk_algebra.masked(pairs, gamma, strict=True)
  if beta is not None:
    a_CC = chunk_algebra.to_column(beta) * a_CC
  # Chunks may share a product, so NaN in unused ones must not spread.
  return jnp.where(used, a_CC, 0.0) if len(a_CC) < LANES else a_CC


def _with_inverse(unsolved, inverse) -> Prepared:
  if inverse is None:
    return unsolved.values
  solution = inverse
  if unsolved.beta is not None:
    solution = inverse * unsolved.beta
  return unsolved.values._replace(inverse=inverse, solution=solution)


def _recur(
    ins, outs, prepared, j, a, enter, leave, problem, block, dtype, scale):
  """Take the state through chunk j of head a; a generator of four stages.

    1 look up   E S           what the state holds under the removal keys
    2 update    Y = T (V - E S)
    3 advance   S' = chunk decay S + K^T Y
    4 output    O = scale (Q S + P Y)

  with all decays from the chunk's start or to its end. Decay per key channel
  has the state [V, K].
  """
  C, V = block.chunk, problem.value_dim
  rows, values, at = pl.ds(j * C, C), pl.ds(a * V, V), (j, a)
  dot = functools.partial(chunk_algebra.dot, dtype=dtype)
  dims = NT if problem.decay == 'key' else NN

  def decayed(decay, x):
    if problem.decay not in ('head', 'value'):
      return x
    return chunk_algebra.scaled(x, decay[at])

  s = enter()
  if problem.solves:
    known = decayed(
        prepared.from_start, dot(prepared.readers[at][C:], s, dims))
  yield
  y = ins.v[rows, values]
  if problem.solves:
    error = (y - known).astype(dtype)
    y = chunk_algebra.dot_split(prepared.solution[at], error, NN, dtype)
  yield
  if problem.decay == 'key':
    leave(prepared.chunk_decay[at] * s + dot(y, prepared.k[at], TN))
  else:
    k = prepared.readers[at][C:] if problem.delta else prepared.k[at]
    advanced = decayed(prepared.chunk_decay, s)
    leave(advanced + dot(k, decayed(prepared.to_end, y), TN))
  yield
  o = dot(prepared.readers[at][:C], s, dims)
  if problem.decay == 'value':
    local = prepared.local[at]
  else:
    local = dot(prepared.score[at], y, NN)
  grid.store(
      outs.o, (rows, values), scale * (decayed(prepared.from_start, o) + local))
  if outs.y is not None:
    grid.store(outs.y, (rows, values), y)
  if outs.before is not None:
    grid.store(outs.before, at, s)
  if outs.inverse is not None:
    outs.inverse[at] = prepared.inverse[at]


def forward(
    rows, state_GHKV, schedule, *, problem, block, dtype, scale, keep):
  """Run the kernel.

  Args:
    rows: operands.RowOperands.
    state_GHKV: initial states, [G, H, *problem.state_shape].
    keep: also return residuals for the backward pass.
  Returns:
    (o, last states, operands.Residuals or None).
  """
  C, n, h, H = block.chunk, block.chunks, block.heads, problem.heads
  K, V = problem.key_dim, problem.value_dim
  X, Y = problem.state_shape
  R, N, G = len(rows.q), len(rows.q) // C, len(state_GHKV)
  B = -(-N // n)
  this = lambda b: jnp.minimum(b, B - 1)  # the last step prepares nothing new
  previous = lambda b: jnp.maximum(b - 1, 0)
  like = functools.partial(common.shape_like, like=rows.q)
  in_hbm = pl.BlockSpec(memory_space=pl.ANY)

  def operand(x, spec):
    return None if x is None else grid.Operand(x, spec)

  def wide(x, size, at):
    return operand(x, grid.rows_spec(block, size, at))

  def entering(j):
    return grid.Operand(state_GHKV, grid.spec(
        (1, h, X, Y), lambda a, b, schedule: (
            schedule.entering[j * B + previous(b)], a, 0, 0)))

  inputs = Inputs(
      q=wide(rows.q, K, this), k=wide(rows.k, K, this),
      v=wide(rows.v, V, previous),
      g=operand(rows.g, grid.decay_spec(block, problem, this)),
      beta=operand(rows.beta, grid.scalars_spec(block, H, this)),
      removal_key=wide(rows.removal_key, K, this),
      initial=grid.Operand(state_GHKV, in_hbm),
      v_next=wide(rows.v, V, this) if problem.decay == 'value' else None,
      entering=tuple(map(entering, range(n))))
  per_chunk = lambda X, Y: grid.chunk_spec(block, X, Y, previous)
  keep_solved = keep and problem.solves
  outputs = Outputs(
      o=grid.Operand(
          like((R, H * V), rows.v.dtype),
          grid.spec((n * C, h * V), lambda a, b, schedule: (previous(b), a))),
      final=grid.Operand(like((G, H, X, Y), jnp.float32), in_hbm),
      before=grid.Operand(
          like((N, H, X, Y), dtype), per_chunk(X, Y)) if keep else None,
      inverse=grid.Operand(
          like((N, H, C, C), jnp.float32),
          per_chunk(C, C)) if keep_solved else None,
      y=wide(like((R, H * V), dtype), V, previous) if keep_solved else None)
  buffers = jax.tree.leaves(_buffers(problem, block, dtype, keep))
  results = grid.call(
      functools.partial(
          kernel, problem=problem, block=block, dtype=dtype, scale=scale),
      schedule, inputs, outputs,
      scratch=[
          pltpu.VMEM((n, h, X, Y), jnp.float32),
          *grid.write_scratch(problem, block),
          *(pltpu.VMEM((n, h, *x.shape), x.dtype) for x in buffers)],
      grid=(H // h, B + 1), vmem=block.vmem, name='chunk_memory_forward',
      flops=grid.forward_flops(problem, C, N))
  residuals = operands.Residuals(results.before, results.inverse, results.y)
  return results.o, results.final, residuals if keep else None
