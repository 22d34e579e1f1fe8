"""chunk_memory as Pallas kernels for TPU (Mosaic), in chunk form.

The equations are those of xla.py. One kernel runs forward, one backward; each
goes over blocks of n chunks of h heads (`Tile`), heads on an axis that cores
may share, blocks in order with the heads' states in fast memory. What needs no
state is computed for some chunks ahead, beside the passage of the states
through others, for all heads of the step at once: this hides the latency of the
matrix units. Where a group begins, the state is replaced by the group's initial
one, copied ahead of need; where it ends, its last state is written while the
next block runs. Blocks without used chunks are neither copied nor computed.

Rows are read as [R, H X], so heads lie side by side in the lanes; what has one
number a row is read as [H, R]. Products take operands in the rows' dtype and
sum in float32; with float32 rows all is exact to float32. States, decays and
the inverse's substitution are float32 always.

Kept for the backward pass, in the rows' dtype: the state before each chunk, and
for the delta rule the inverse T and what the rows write, Y: K V + C (C + V)
numbers for C rows of a head.

Fast memory, with E bytes a number of the rows' dtype, is n h times

  forward   4 C (K + V) E + 12 K V,   if keeping also 2 (K V + C C + C V) E
  backward  4 C (2 K + 2 V) E + 2 (K V + C C + C V) E + 12 K V

for blocks in flight twice and states, and about half as much again for values
that do not fit the registers.

In bfloat16 the gradient of beta is less exact than elsewhere where beta is 1
and all keys of a chunk nearly equal: 8e-2 of its largest value was seen, where
other inputs stay below 1e-2. In float32 it is exact there too.

Not covered, and said by `supported`: decay by key or value channel, erasing
under keys of their own, reads before the write.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.chunk_memory import (
    tpu_backward,
    tpu_chunk,
    tpu_forward,
    tpu_grid,
)

SIZES = (64, 128, 256)  # of K, V and C
DTYPES = (jnp.bfloat16, jnp.float32)
MOST_HEADS = 4  # a step, where they cannot be split


class Form(NamedTuple):
  """What is static about the operands."""

  heads: int
  key: int
  value: int
  decay: bool
  delta: bool


@dataclasses.dataclass(frozen=True)
class Tile:
  """What a grid step works on.

  Attributes:
    chunk: C, rows of a chunk.
    chunks: n, chunks a step.
    heads: h, heads a step.
    vmem: limit of fast memory, bytes; v5p and 7x have 64 MiB a core.
  """

  chunk: int
  chunks: int
  heads: int
  vmem: int = 56 * 2**20

  @property
  def rows(self):
    return self.chunk * self.chunks


# (chunks, heads) a step of rows in bfloat16, by measured cycles; float32 takes
# half the chunks. Larger blocks take longer to compile than they save.
FORWARD, BACKWARD = (8, 2), (4, 2)


def _tile(form, chunk, N, dtype, most):
  """The largest block that fits the operands and is not above `most`."""
  n, h = most
  n = n * 2 // dtype.itemsize * 128 // max(chunk, 128)
  while n > N:
    n //= 2
  heads = _heads(form)
  return Tile(chunk, n, max([x for x in heads if x <= h] or heads[:1]))


def _heads(form):
  """Numbers of heads that make blocks of whole lanes."""
  H, width = form.heads, min(form.key, form.value)
  return [
      x for x in range(1, H + 1)
      if H % x == 0 and (x == H or x * width % tpu_chunk.LANES == 0)]


def _form(q, v, log_decay, beta):
  return Form(
      q.shape[1], q.shape[2], v.shape[2], log_decay is not None,
      beta is not None)


def _rows(q, k, v, log_decay, beta):
  """The kernels' operands by name, with heads side by side, or first."""
  flat = lambda x: x.reshape(len(x), -1)
  rows = {'q': flat(q), 'k': flat(k), 'v': flat(v)}
  if log_decay is not None:
    rows['g'] = log_decay.T
  if beta is not None:
    rows['beta'] = beta.T
  return rows


def _fwd(
    q, k, v, log_decay, beta, erase, value_decay, state, group_N, *, scale,
    chunk, read_before, keep,
):
  del erase, value_decay, read_before
  form = _form(q, v, log_decay, beta)
  tile = _tile(form, chunk, len(group_N), q.dtype, FORWARD)
  seen = tpu_grid.visits(group_N, len(state), tile.chunks)
  out = tpu_forward.forward(
      _rows(q, k, v, log_decay, beta), state, seen, form=form,
      tile=tile, dtype=q.dtype, scale=scale, keep=keep)
  o_RHV = out.pop('o').reshape(v.shape)
  return (o_RHV, out.pop('final')), out if keep else None


def _bwd(
    q, k, v, log_decay, beta, erase, value_decay, state, group_N, kept, do_RHV,
    dstate_GHKV, *, scale, chunk, read_before,
):
  del erase, value_decay, read_before
  form = _form(q, v, log_decay, beta)
  tile = _tile(form, chunk, len(group_N), q.dtype, BACKWARD)
  seen = tpu_grid.visits(group_N, len(state), tile.chunks)
  out = tpu_backward.backward(
      _rows(q, k, v, log_decay, beta), kept,
      do_RHV.reshape(len(q), -1), dstate_GHKV, seen, form=form, tile=tile,
      dtype=q.dtype, scale=scale)
  by_row = lambda x: x.reshape(form.heads, -1).T
  return (
      *(out['d' + n].reshape(x.shape) for n, x in zip('qkv', (q, k, v))),
      by_row(out['dg']) if form.decay else None,
      by_row(out['dbeta']) if form.delta else None,
      None, None, out['dinitial'],
  )


def _supported(
    q, k, v, log_decay, beta, erase, value_decay, state, group_N, *, scale,
    chunk, read_before,
):
  del state, group_N, scale
  if common.platform() != 'tpu':
    return f'it needs a TPU; programs here are for {common.platform()}.'
  if log_decay is not None and log_decay.ndim == 3:
    return 'decay by key channel is not covered; use xla.'
  if erase is not None or value_decay is not None or read_before:
    return (
        'erase_RHK, value_decay_RHV and read_before are not covered; use xla.')
  dtypes = {x.dtype for x in (q, k, v)}
  if len(dtypes) > 1 or q.dtype not in DTYPES:
    return f'q, k and v must all be bfloat16 or float32; got {dtypes}.'
  sizes = {'K': q.shape[2], 'V': v.shape[2], 'chunk': chunk}
  for name, size in sizes.items():
    if size not in SIZES:
      return f'{name}={size} must be one of {SIZES}.'
  heads = _heads(_form(q, v, log_decay, beta))[0]
  if heads > MOST_HEADS:
    return (
        f'{q.shape[1]} heads of 64 cannot be split in blocks of whole lanes;'
        ' take an even number of heads.')
  return None


BACKEND = common.Backend('tpu', _supported, _fwd, _bwd)
