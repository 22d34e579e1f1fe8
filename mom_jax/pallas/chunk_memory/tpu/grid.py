"""Which rows and groups a grid step of the TPU kernels works on.

A step takes a block of n chunks of h heads. The first grid axis goes over heads
and may be split over cores; the second goes over blocks of rows, in order, with
states in scratch memory. A block without used chunks repeats the neighbouring
block's index, so nothing is copied for it, and is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

EDGE = 32  # more than the chunks of a block


class Visits(NamedTuple):
  """Scalars of the schedule, int32, prefetched; B blocks of n chunks."""

  block_B: jax.Array  # the block itself, or one before it where unused
  group_N: jax.Array  # -1 if unused; EDGE more before and after all blocks
  enter: jax.Array  # [n B], group whose state is at hand in a place of a block
  leave: jax.Array  # the same, going backwards
  idle_G: jax.Array  # whether a group has no chunk

  def group(self, chunk):
    return self.group_N[chunk + EDGE]

  def first(self, chunk):
    """Whether a chunk is its group's first one."""
    group = self.group(chunk)
    return (group >= 0) & (group != self.group(chunk - 1))

  def last(self, chunk):
    group = self.group(chunk)
    return (group >= 0) & (group != self.group(chunk + 1))

  def used(self, block, n):
    """Whether any of a block's n chunks is used."""
    return functools.reduce(
        jnp.logical_or, [self.group(block * n + j) >= 0 for j in range(n)])


def visits(group_N, num_groups: int, n: int) -> Visits:
  """The schedule of blocks of n chunks.

  Every array is one reduction over all chunks, because XLA makes one small
  operation of it; scans and reshapes took longer than a tenth of the kernel.
  """
  padded_N = jnp.pad(
      group_N, (EDGE, -len(group_N) % n + EDGE), constant_values=-1)
  group_N = padded_N[EDGE:-EDGE]
  change_N = padded_N[EDGE:1 - EDGE] != padded_N[EDGE - 1 : -EDGE]
  used_N, chunk_N = group_N >= 0, jnp.arange(len(group_N))
  at_N, B = chunk_N // n, len(group_N) // n
  place_B = jnp.arange(B)[:, None]
  slot, block = jnp.divmod(jnp.arange(n * B)[:, None], B)  # of enter and leave

  def latest(is_N, met_XN, order_N):
    """Group of the true chunk met last, in each place of a block."""
    key_N = jnp.where(is_N, order_N * num_groups + group_N, 0)
    here_XN = met_XN & (chunk_N[None] % n == slot)
    return jnp.where(here_XN, key_N[None], 0).max(1) % num_groups

  enter = latest(used_N & change_N[:-1], at_N[None] <= block, at_N)
  leave = latest(used_N & change_N[1:], at_N[None] >= block, B - 1 - at_N)
  block_B = jnp.where(
      (at_N[None] <= place_B) & used_N[None], at_N[None], 0).max(1)
  idle_G = ~(jnp.arange(num_groups)[:, None] == group_N[None]).any(1)
  return Visits(*(x.astype(jnp.int32) for x in (
      block_B, padded_N, enter, leave, idle_G)))


def spec(block, index) -> pl.BlockSpec:
  """A block whose index is a function of both grid axes and the schedule."""
  return pl.BlockSpec(block, lambda a, b, *seen: index(a, b, Visits(*seen)))


def wide(tile, X: int, at) -> pl.BlockSpec:
  """Rows with X channels a head; `at` gives a grid step's block of rows."""
  return spec(
      (tile.rows, tile.heads * X),
      lambda a, b, seen: (seen.block_B[at(b)], a))


def narrow(tile, H: int, at) -> pl.BlockSpec:
  """Rows in the lanes of [H, R], eight heads at once or all; see `lane`."""
  some = _some(H)
  return spec(
      (some, tile.rows), lambda a, b, seen: (
          a * tile.heads // some, seen.block_B[at(b)]))


def rates(tile, form, at) -> pl.BlockSpec:
  """Log decays, one a row and head or one a channel."""
  if form.decay == 'key':
    return wide(tile, form.key, at)
  if form.decay == 'value':
    return wide(tile, form.value, at)
  return narrow(tile, form.heads, at)


def lane(ref, a: int, h: int, rows):
  """[1, C] of the a-th of a step's h heads, of what `narrow` describes."""
  every = ref[:, rows]
  head = (pl.program_id(0) * h + a) % len(every)
  row = jax.lax.broadcasted_iota(jnp.int32, every.shape, 0)
  return jnp.where(row == head, every, 0.0).sum(0, keepdims=True)


def _some(H):
  return H if H % 8 else 8


def by_chunk(tile, X: int, Y: int, at) -> pl.BlockSpec:
  """An [X, Y] matrix a chunk and head."""
  return spec(
      (tile.chunks, tile.heads, X, Y),
      lambda a, b, seen: (seen.block_B[at(b)], a, 0, 0))


def products(form, chunk: int, chunks: int) -> int:
  """FLOPs of the matrix products of a forward pass over that many chunks.

  Each counts once, in however many parts it is made.
  """
  C, K, V = chunk, form.key, form.value
  macs = C * C * (K + V) + 2 * C * K * V
  if form.solves:  # keys among themselves, the inverse, and it applied
    macs += C * C * (K + V + C) + C * K * V
  return 2 * form.heads * chunks * macs


def call(kernel, seen, ins, in_specs, outs, out_specs, *, scratch, grid, name,
         vmem, flops):
  """`pallas_call` with operands and results by name.

  Args:
    kernel: takes the schedule, operands and results by name, and scratch.
    vmem: limit of fast memory, bytes.
    flops: of its matrix products, for those who plan with them.
  """
  moved = sum(
      x.size * x.dtype.itemsize
      for x in (*{id(x): x for x in ins.values()}.values(), *outs.values()))

  def named(*refs):
    refs = list(refs)
    take = lambda n: [refs.pop(0) for _ in range(n)]
    kernel(
        Visits(*take(len(seen))), dict(zip(ins, take(len(ins)))),
        dict(zip(outs, take(len(outs)))), refs)

  out = pl.pallas_call(
      named,
      out_shape=list(outs.values()),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=len(seen), grid=grid,
          in_specs=[in_specs[name] for name in ins],
          out_specs=[out_specs[name] for name in outs],
          scratch_shapes=scratch),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary'),
          vmem_limit_bytes=vmem),
      cost_estimate=pl.CostEstimate(
          flops=flops, transcendentals=0, bytes_accessed=moved),
      name=name,
  )(*seen, *ins.values())
  return dict(zip(outs, out))


def writing(form, tile):
  """Scratch for writing states of groups: the state, a semaphore, a flag."""
  return [
      pltpu.VMEM((tile.heads, *form.state), jnp.float32),
      pltpu.SemaphoreType.DMA, pltpu.SMEM((1,), jnp.int32)]


def write(states_GHKV, state, stage, sem, pending, group, head):
  """Starts to write one group's state; ends before the next one starts."""
  finish(states_GHKV, stage, sem, pending)
  stage[...] = state[...]
  _copy(states_GHKV, stage, sem, group, head).start()
  pending[0] = 1


def finish(states_GHKV, stage, sem, pending):
  """Waits for the write that has been started, if any."""

  @pl.when(pending[0] != 0)
  def _():
    _copy(states_GHKV, stage, sem, 0, 0).wait()
    pending[0] = 0


def _copy(states_GHKV, stage, sem, group, head):
  return pltpu.make_async_copy(
      stage, states_GHKV.at[group, pl.ds(head, stage.shape[0])], sem)


def copy_idle(idle_G, source_GHKV, states_GHKV, sem, head, h):
  """States of groups without chunks stay as they are."""

  @pl.loop(0, states_GHKV.shape[0])
  def _(g):
    @pl.when(idle_G[g] != 0)
    def _():
      heads = pl.ds(head, h)
      copy = pltpu.make_async_copy(
          source_GHKV.at[g, heads], states_GHKV.at[g, heads], sem)
      copy.start()
      copy.wait()


def clear_unused(seen, refs, b, tile):
  """Rows of unused chunks become zero, in [rows, X] and [1, h, rows]."""
  for j in range(tile.chunks):
    @pl.when(seen.group(b * tile.chunks + j) < 0)
    def _(j=j):
      rows = pl.ds(j * tile.chunk, tile.chunk)
      for ref in refs:
        at = (rows,) if len(ref.shape) == 2 else (0, slice(None), rows)
        ref[at] = jnp.zeros_like(ref[at])


def together(*runs: tuple[Iterator[None], int]) -> None:
  """Takes steps of all runs, evenly mixed: each with its number of steps.

  The compiler keeps roughly to the order of the program, so what may run at the
  same time has to be written side by side.
  """
  steps = sorted(
      ((n + 1) / total, i) for i, (_, total) in enumerate(runs)
      for n in range(total))
  for _, i in steps:
    next(runs[i][0], None)
  for run, _ in runs:
    for _ in run:
      pass


def turns(places, h: int, stages: int):
  """Lists of ((chunk, head), stage) in the order of the program.

  Heads follow each other through the stages of a chunk, each a little behind
  the one before, so that few values are alive at a time. Chunks come in the
  order of `places`, all h heads of one after those of another; a chunk begins
  when the third stage, which hands the state on, of the one before is done.
  """
  apart = max(1, h // 2)
  begin = [
      n // h * max(h, 2 * apart) + n % h for n in range(len(places))]
  return [[
      (place, stage) for stage in reversed(range(stages))
      for start, place in zip(begin, places) if start + stage * apart == t]
          for t in range(begin[-1] + (stages - 1) * apart + 1)]


def waiting(tile, waits):
  """Scratch for what waits for the next grid step: (shape, type) by name."""
  return [
      pltpu.VMEM((tile.chunks, tile.heads, *shape), kind)
      for shape, kind in waits.values()]


def keep(ready, parts):
  """Stores `values` of parts, by chunk and head, for the next grid step.

  To be called when the block before has been read.
  """
  for at, part in parts.items():
    for name, ref in ready.items():
      x = part.values[name].astype(ref.dtype)
      ref[at] = jnp.broadcast_to(x, ref.shape[2:])
