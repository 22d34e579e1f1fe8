"""Which rows and groups a grid step of the TPU kernels works on.

A step takes a block of n chunks of h heads. The first grid axis goes over heads
and may be split over cores; the second goes over blocks of rows, in order, with
states in scratch memory. A block without used chunks repeats the neighbouring
block's index, so nothing is copied for it, and is skipped.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp


class Visits(NamedTuple):
  """Scalars of the schedule, int32, prefetched; B blocks of n chunks."""

  block_B: jax.Array  # the block itself, or one before it where unused
  group_N: jax.Array  # -1 if unused; one more before and after all blocks
  enter_N: jax.Array  # group whose state is at hand in each place of a block
  leave_N: jax.Array  # the same, going backwards
  idle_G: jax.Array  # whether a group has no chunk

  def group(self, chunk):
    return self.group_N[chunk + 1]

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

  Sums over all pairs of blocks, because these are few and XLA makes one small
  operation of each; a scan takes longer than everything else here.
  """
  padded_N = jnp.pad(
      group_N, (1, -len(group_N) % n + 1), constant_values=-1)
  group_N = padded_N[1:-1]
  change_N = padded_N[1:] != padded_N[:-1]
  group_Bn, used_N = group_N.reshape(-1, n), group_N >= 0
  place_B = jnp.arange(len(group_Bn))
  upto_BB = place_B[:, None] >= place_B[None]
  used_B = used_N.reshape(-1, n).any(1)
  block_B = jnp.where(upto_BB & used_B[None], place_B[None], 0).max(1)

  def latest(is_N, upto_BB, order_B):
    """Group of the true chunk met last, in each place of a block."""
    key_Bn = jnp.where(
        is_N.reshape(-1, n), order_B[:, None] * num_groups + group_Bn, 0)
    met_BBn = jnp.where(upto_BB[:, :, None], key_Bn[None], 0)
    return (met_BBn.max(1) % num_groups).reshape(-1)

  idle_G = ~(jnp.arange(num_groups)[:, None] == group_N[None]).any(1)
  return Visits(*(x.astype(jnp.int32) for x in (
      block_B, padded_N,
      latest(used_N & change_N[:-1], upto_BB, place_B),
      latest(used_N & change_N[1:], upto_BB.T, place_B[::-1]), idle_G)))


def spec(block, index) -> pl.BlockSpec:
  """A block whose index is a function of both grid axes and the schedule."""
  return pl.BlockSpec(block, lambda a, b, *seen: index(a, b, Visits(*seen)))


def _at(b, last):
  return b if last is None else last - b


def wide(tile, X: int, last: int | None = None) -> pl.BlockSpec:
  """Rows with X channels a head; from block `last` backwards if given."""
  return spec(
      (tile.rows, tile.heads * X),
      lambda a, b, seen: (seen.block_B[_at(b, last)], a))


def narrow(tile, last: int | None = None) -> pl.BlockSpec:
  """Rows in the lanes, with one number a head."""
  return spec(
      (1, tile.heads, tile.rows),
      lambda a, b, seen: (a, 0, seen.block_B[_at(b, last)]))


def by_chunk(tile, X: int, Y: int, last: int | None = None) -> pl.BlockSpec:
  """An [X, Y] matrix a chunk and head."""
  return spec(
      (tile.chunks, tile.heads, X, Y),
      lambda a, b, seen: (seen.block_B[_at(b, last)], a, 0, 0))


def call(kernel, seen, ins, in_specs, outs, out_specs, *, scratch, grid, name,
         vmem):
  """`pallas_call` with operands and results by name.

  Args:
    kernel: takes the schedule, operands and results by name, and scratch.
    vmem: limit of fast memory, bytes.
  """

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
      name=name,
  )(*seen, *ins.values())
  return dict(zip(outs, out))


def writing(form, tile):
  """Scratch for writing states of groups: the state, a semaphore, a flag."""
  return [
      pltpu.VMEM((tile.heads, form.key, form.value), jnp.float32),
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
