"""Blocks of rows, groups and states of the TPU kernels' grid steps.

A step takes a block of n chunks of h heads. The first grid axis goes over heads
and may be split over cores; the second goes over blocks of rows, in order, with
states in scratch memory. A block without used chunks repeats the neighbouring
block's index, so nothing is copied for it, and is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
import functools
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

GUARD = 32  # unused chunks at both ends; more than the chunks of a block


class GridSchedule(NamedTuple):
  """Scalars that steer the grid, int32, prefetched; B blocks of n chunks."""

  block_B: jax.Array  # the block itself, or one before it where unused
  group_N: jax.Array  # -1 if unused; GUARD more before and after all blocks
  entering: jax.Array  # [n B], group whose state is loaded for a block's chunk
  leaving: jax.Array  # the same, going backwards
  idle_G: jax.Array  # whether a group has no chunk

  def group(self, chunk):
    return self.group_N[chunk + GUARD]

  def is_first(self, chunk):
    """True for the first chunk of a group."""
    group = self.group(chunk)
    return (group >= 0) & (group != self.group(chunk - 1))

  def is_last(self, chunk):
    """True for the last chunk of a group."""
    group = self.group(chunk)
    return (group >= 0) & (group != self.group(chunk + 1))

  def any_used(self, block, n):
    """True if any of a block's n chunks is used."""
    return functools.reduce(
        jnp.logical_or, [self.group(block * n + j) >= 0 for j in range(n)])


def grid_schedule(group_N, num_groups: int, n: int) -> GridSchedule:
  """Return the schedule of blocks of n chunks.

  Every array is one reduction over all chunks, which XLA compiles to one small
  operation; scans and reshapes took longer than a tenth of the kernel.
  """
  padded_N = jnp.pad(
      group_N, (GUARD, -len(group_N) % n + GUARD), constant_values=-1)
  group_N = padded_N[GUARD:-GUARD]
  change_N = padded_N[GUARD:1 - GUARD] != padded_N[GUARD - 1 : -GUARD]
  used_N, chunk_N = group_N >= 0, jnp.arange(len(group_N))
  block_N, B = chunk_N // n, len(group_N) // n
  index_B = jnp.arange(B)[:, None]
  # Of entering and leaving: chunk within a block, and block.
  within, block = jnp.divmod(jnp.arange(n * B)[:, None], B)

  def latest(is_N, met_XN, order_N):
    """Group of the marked chunk met last, for each chunk of a block."""
    key_N = jnp.where(is_N, order_N * num_groups + group_N, 0)
    here_XN = met_XN & (chunk_N[None] % n == within)
    return jnp.where(here_XN, key_N[None], 0).max(1) % num_groups

  entering = latest(used_N & change_N[:-1], block_N[None] <= block, block_N)
  leaving = latest(
      used_N & change_N[1:], block_N[None] >= block, B - 1 - block_N)
  block_B = jnp.where(
      (block_N[None] <= index_B) & used_N[None], block_N[None], 0).max(1)
  idle_G = ~(jnp.arange(num_groups)[:, None] == group_N[None]).any(1)
  return GridSchedule(*(x.astype(jnp.int32) for x in (
      block_B, padded_N, entering, leaving, idle_G)))


def spec(block, index) -> pl.BlockSpec:
  """A block whose index is a function of both grid axes and the schedule."""
  return pl.BlockSpec(
      block, lambda a, b, *scalars: index(a, b, GridSchedule(*scalars)))


def rows_spec(block, X: int, at) -> pl.BlockSpec:
  """Rows with X channels per head; `at` maps a grid step to a block of rows."""
  return spec(
      (block.rows, block.heads * X),
      lambda a, b, schedule: (schedule.block_B[at(b)], a))


def scalars_spec(block, H: int, at) -> pl.BlockSpec:
  """Scalars per row and head, [H, R], of eight heads at once or all.

  `read_scalars` picks those of one head.
  """
  heads = H if H % 8 else 8
  return spec(
      (heads, block.rows), lambda a, b, schedule: (
          a * block.heads // heads, schedule.block_B[at(b)]))


def decay_spec(block, problem, at) -> pl.BlockSpec:
  """Log decays, one per row and head or one per channel."""
  if problem.decay == 'key':
    return rows_spec(block, problem.key_dim, at)
  if problem.decay == 'value':
    return rows_spec(block, problem.value_dim, at)
  return scalars_spec(block, problem.heads, at)


def read_scalars(ref, a: int, h: int, rows):
  """[1, C] of the a-th of a step's h heads, from a block of `scalars_spec`."""
  heads = ref[:, rows]
  head = (pl.program_id(0) * h + a) % len(heads)
  row = jax.lax.broadcasted_iota(jnp.int32, heads.shape, 0)
  return jnp.where(row == head, heads, 0.0).sum(0, keepdims=True)


def chunk_spec(block, X: int, Y: int, at) -> pl.BlockSpec:
  """An [X, Y] matrix per chunk and head."""
  return spec(
      (block.chunks, block.heads, X, Y),
      lambda a, b, schedule: (schedule.block_B[at(b)], a, 0, 0))


def forward_flops(problem, chunk: int, chunks: int) -> int:
  """FLOPs of the matrix products of a forward pass over that many chunks.

  A split product counts once.
  """
  C, K, V = chunk, problem.key_dim, problem.value_dim
  macs = C * C * (K + V) + 2 * C * K * V
  if problem.solves:  # scores of keys, the inverse, and its application
    macs += C * C * (K + V + C) + C * K * V
  return 2 * problem.heads * chunks * macs


class Operand(NamedTuple):
  """An array, or the shape of a result, and its blocks."""

  array: Any
  spec: pl.BlockSpec


def call(
    kernel, schedule, inputs, outputs, *, scratch, grid, name, vmem, flops):
  """`pallas_call` with named operands and results.

  Args:
    kernel: takes the schedule, and `inputs` and `outputs` with references in
      place of operands, and scratch.
    inputs, outputs: named tuples of `Operand`; None is absent.
    vmem: limit of fast memory, bytes.
    flops: of its matrix products, for the planner.
  Returns:
    `outputs` with arrays.
  """
  is_operand = lambda x: isinstance(x, Operand)
  ins, in_tree = jax.tree.flatten(inputs, is_leaf=is_operand)
  outs, out_tree = jax.tree.flatten(outputs, is_leaf=is_operand)
  distinct = {id(x.array): x.array for x in ins}.values()
  moved = sum(
      x.size * x.dtype.itemsize for x in (*distinct, *(x.array for x in outs)))

  def named(*refs):
    refs = list(refs)
    take = lambda n: [refs.pop(0) for _ in range(n)]
    kernel(
        GridSchedule(*take(len(schedule))), in_tree.unflatten(take(len(ins))),
        out_tree.unflatten(take(len(outs))), refs)

  results = pl.pallas_call(
      named,
      out_shape=[x.array for x in outs],
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=len(schedule), grid=grid,
          in_specs=[x.spec for x in ins],
          out_specs=[x.spec for x in outs],
          scratch_shapes=scratch),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary'),
          vmem_limit_bytes=vmem),
      cost_estimate=pl.CostEstimate(
          flops=flops, transcendentals=0, bytes_accessed=moved),
      name=name,
  )(*schedule, *(x.array for x in ins))
  return out_tree.unflatten(results)


def store(ref, at, x) -> None:
  """Store x in the reference's dtype."""
  ref[at] = x.astype(ref.dtype)


def write_scratch(problem, block):
  """Scratch for writing states of groups: the state, a semaphore, a flag."""
  return [
      pltpu.VMEM((block.heads, *problem.state_shape), jnp.float32),
      pltpu.SemaphoreType.DMA, pltpu.SMEM((1,), jnp.int32)]


def start_write(states_GHKV, state, stage, sem, pending, group, head):
  """Start to write one group's state, after the last write has finished."""
  finish_write(states_GHKV, stage, sem, pending)
  stage[...] = state[...]
  _copy(states_GHKV, stage, sem, group, head).start()
  pending[0] = 1


def finish_write(states_GHKV, stage, sem, pending):
  """Wait for the write that has been started, if any."""

  @pl.when(pending[0] != 0)
  def _():
    _copy(states_GHKV, stage, sem, 0, 0).wait()
    pending[0] = 0


def _copy(states_GHKV, stage, sem, group, head):
  return pltpu.make_async_copy(
      stage, states_GHKV.at[group, pl.ds(head, stage.shape[0])], sem)


def copy_idle_states(idle_G, source_GHKV, states_GHKV, sem, head, h):
  """Copy the states of groups without chunks."""

  @pl.loop(0, states_GHKV.shape[0])
  def _(g):
    @pl.when(idle_G[g] != 0)
    def _():
      heads = pl.ds(head, h)
      copy = pltpu.make_async_copy(
          source_GHKV.at[g, heads], states_GHKV.at[g, heads], sem)
      copy.start()
      copy.wait()


def clear_unused(schedule, refs, b, block):
  """Set rows of unused chunks to zero, in [rows, X] and [1, h, rows]."""
  for j in range(block.chunks):
    @pl.when(schedule.group(b * block.chunks + j) < 0)
    def _(j=j):
      rows = pl.ds(j * block.chunk, block.chunk)
      for ref in refs:
        at = (rows,) if len(ref.shape) == 2 else (0, slice(None), rows)
        ref[at] = jnp.zeros_like(ref[at])


def interleave(*streams: tuple[Iterator[None], int]) -> None:
  """Run streams of work, evenly mixed; each comes with its number of steps.

  The compiler keeps roughly to the order of the program, so work that may
  overlap has to be written side by side.
  """
  steps = sorted(
      ((n + 1) / total, i) for i, (_, total) in enumerate(streams)
      for n in range(total))
  for _, i in steps:
    next(streams[i][0], None)
  for stream, _ in streams:
    for _ in stream:
      pass


def pipeline_schedule(chunks, h: int, stages: int):
  """Return lists of (chunk, head), each of which then takes its next stage.

  Heads follow each other through the stages of a chunk, each a little behind
  the one before, so that few values are alive at a time. All h heads of a chunk
  come before those of the next in `chunks`; a chunk begins when the third stage
  of the one before, which hands the state on, is done. Within a column of this
  picture, for two heads and stages 1 to 4, later stages go first:

    chunk 0, head 0    1 2 3 4
    chunk 0, head 1      1 2 3 4
    chunk 1, head 0        1 2 3 4
    chunk 1, head 1          1 2 3 4
  """
  apart = max(1, h // 2)
  begin = [
      n // h * max(h, 2 * apart) + n % h for n in range(len(chunks))]
  return [[
      chunk for stage in reversed(range(stages))
      for start, chunk in zip(begin, chunks) if start + stage * apart == t]
          for t in range(begin[-1] + (stages - 1) * apart + 1)]
