"""chunk_memory as Pallas kernels for TPU (Mosaic), in chunk form.

The equations are those of xla.py. One kernel runs forward, one backward; each
goes over blocks of n chunks of h heads (`Tile`), heads on an axis that cores
may share, blocks in order with the heads' states in fast memory. What needs no
state is computed ahead, beside the passage of the states: forward for the next
block, which waits in fast memory, backward for the next chunk. Two streams of
independent work hide the latency of the matrix units. Where a group begins, the
state is replaced by the group's initial one, copied ahead of need; where it
ends, its last state is written while the next block runs. Blocks without used
chunks are neither copied nor computed, but forward for the first after a used
one.

Rows are read as [R, H X], so heads lie side by side in the lanes; what has one
number a row is read as [H, R]. Under decay by key channel states are turned,
[V, K], so that the channels that decay lie in the lanes. Erasing under keys of
its own always decays by channel. A read before the write is the read of the row
before, moved (`tpu_early`). Products take operands in the rows' dtype and
sum in float32; with float32 rows all is exact to float32. States, decays and
the inverse are float32 always; products with the inverse, and those that make
it, take float32 operands in two parts each.

Kept for the backward pass, in the rows' dtype: the state before each chunk, and
for the delta rule what the rows write, Y, and in float32 the inverse T:
K V + C V numbers and C C for C rows of a head.

Fast memory, with E bytes a number of the rows' dtype, is n h times

  forward   4 C (K + V) E + 12 K V, if keeping also 2 (K V + C V) E + 8 C C
  backward  4 C (2 K + 2 V) E + 2 (K V + C V) E + 8 C C + 12 K V

for blocks in flight twice and states; forward, under the delta rule and one
decay a row, C (2 K + C) E + 4 C C + 1024 C more for what waits between two
steps, if keeping also 4 C C; and about half as much again for values that do
not fit the registers. Decay by channel adds 8 C X, and 16 C X backward; erasing
as much again.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.chunk_memory import decoding
from mom_jax.pallas.chunk_memory.tpu import (
  backward as tpu_backward,
)
from mom_jax.pallas.chunk_memory.tpu import (
  chunk_algebra as tpu_chunk,
)
from mom_jax.pallas.chunk_memory.tpu import (
  decode as tpu_decode,
)
from mom_jax.pallas.chunk_memory.tpu import (
  exclusive_read as tpu_early,
)
from mom_jax.pallas.chunk_memory.tpu import (
  forward as tpu_forward,
)
from mom_jax.pallas.chunk_memory.tpu import (
  grid as tpu_grid,
)

SIZES = (64, 128, 256)  # of K, V and C
DTYPES = (jnp.bfloat16, jnp.float32)
MOST_HEADS = 4  # a step, where they cannot be split


class Form(NamedTuple):
  """What is static about the operands."""

  heads: int
  key: int
  value: int
  decay: str  # 'none', or by 'head', 'key' or 'value'
  delta: bool
  erase: bool

  @property
  def solves(self):
    """Whether what a row writes depends on what it finds."""
    return self.delta or self.erase

  @property
  def state(self):
    """Shape of a head's state."""
    if self.decay == 'key':
      return self.value, self.key
    return self.key, self.value


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
# half the chunks. Larger blocks take longer to compile than they save. Wide
# matrix units need more heads at once to be busy.
FORWARD, FORWARD_WIDE, BACKWARD = (4, 2), (4, 4), (4, 2)
# The same where channels decay, which fills the vector units.
CHANNELS_FORWARD, CHANNELS_BACKWARD = (4, 1), (2, 1)


def _tile(form, chunk, N, dtype, most):
  """The largest block that fits the operands and is not above `most`."""
  n, h = most
  n = n * 2 // dtype.itemsize * 128 // max(chunk, 128)
  while n > N:
    n //= 2
  heads = _heads(form)
  return Tile(chunk, n, max([x for x in heads if x <= h] or heads[:1]))


def _most_forward(form):
  if form.decay not in ('none', 'head'):
    return CHANNELS_FORWARD
  wide = common.tpu_info().mxu_column_size > tpu_chunk.LANES
  if wide and FORWARD_WIDE[1] in _heads(form):
    return FORWARD_WIDE
  return FORWARD


def _heads(form):
  """Numbers of heads that make blocks of whole lanes."""
  H, width = form.heads, min(form.key, form.value)
  return [
      x for x in range(1, H + 1)
      if H % x == 0 and (x == H or x * width % tpu_chunk.LANES == 0)]


def _form(q, v, log_decay, beta, erase, value_decay):
  decay = 'none' if log_decay is None else 'head'
  if erase is not None or log_decay is not None and log_decay.ndim == 3:
    decay = 'key'
  if value_decay is not None:
    decay = 'value'
  return Form(
      q.shape[1], q.shape[2], v.shape[2], decay, beta is not None,
      erase is not None)


def _rows(form, q, k, v, log_decay, beta, erase, value_decay):
  """The kernels' operands by name, with heads side by side, or first."""
  flat = lambda x: x.reshape(len(x), -1)
  rows = {'q': flat(q), 'k': flat(k), 'v': flat(v)}
  if form.decay == 'head':
    rows['g'] = log_decay.T
  if form.decay == 'key':
    rows['g'] = flat(_by_channel(log_decay, q))
  if form.decay == 'value':
    rows['g'] = flat(value_decay)
  if beta is not None:
    rows['beta'] = beta.T
  if erase is not None:
    rows['erase'] = flat(erase)
  return rows


def _by_channel(log_decay, q):
  if log_decay is None:
    return jnp.zeros_like(q, jnp.float32)
  if log_decay.ndim == 2:
    return jnp.broadcast_to(log_decay[..., None], q.shape)
  return log_decay


def _turned(form, state_GHKV):
  """To the kernels' form of states, or back."""
  return state_GHKV.mT if form.decay == 'key' else state_GHKV


def _fwd(
    q, k, v, log_decay, beta, erase, value_decay, state, group_N, *, scale,
    chunk, exclusive, keep,
):
  form = _form(q, v, log_decay, beta, erase, value_decay)
  most = _most_forward(form)
  tile = _tile(form, chunk, len(group_N), q.dtype, most)
  seen = tpu_grid.visits(group_N, len(state), tile.chunks)
  early_q = tpu_early.up(q, group_N) if exclusive else q
  out = tpu_forward.forward(
      _rows(form, early_q, k, v, log_decay, beta, erase, value_decay),
      _turned(form, state), seen, form=form, tile=tile, dtype=q.dtype,
      scale=scale, keep=keep)
  o_RHV, final = out.pop('o').reshape(v.shape), out.pop('final')
  if exclusive:
    o_RHV = tpu_early.reads(o_RHV, q, state, group_N, scale)
  return (o_RHV, _turned(form, final)), out if keep else None


def _bwd(
    q, k, v, log_decay, beta, erase, value_decay, state, group_N, kept, do_RHV,
    dstate_GHKV, *, scale, chunk, exclusive,
):
  form = _form(q, v, log_decay, beta, erase, value_decay)
  most = BACKWARD if form.decay in ('none', 'head') else CHANNELS_BACKWARD
  tile = _tile(form, chunk, len(group_N), q.dtype, most)
  seen = tpu_grid.visits(group_N, len(state), tile.chunks)
  early_q, early_do = q, do_RHV
  if exclusive:
    early_q, early_do = (tpu_early.up(x, group_N) for x in (q, do_RHV))
  rows = _rows(form, early_q, k, v, log_decay, beta, erase, value_decay)
  out = tpu_backward.backward(
      rows, kept, early_do.reshape(len(q), -1), _turned(form, dstate_GHKV),
      seen, form=form, tile=tile, dtype=q.dtype, scale=scale)
  by_row = lambda x: x.reshape(form.heads, -1).T
  like = lambda n, x: None if x is None else out['d' + n].reshape(x.shape)
  dq, dstate = like('q', q), _turned(form, out['dinitial'])
  if exclusive:
    dq, dstate = tpu_early.reads_back(
        dq, dstate, do_RHV, q, state, group_N, scale)
  dg = dh = None
  if form.decay == 'value':
    dh = like('g', value_decay)
  elif log_decay is not None and form.decay == 'key':
    dg = out['dg'].reshape(q.shape)
    dg = dg.sum(2) if log_decay.ndim == 2 else dg
  elif form.decay == 'head':
    dg = by_row(out['dg'])
  return (
      dq, like('k', k), like('v', v), dg,
      by_row(out['dbeta']) if form.delta else None, like('erase', erase), dh,
      dstate)


def _supported(
    q, k, v, log_decay, beta, erase, value_decay, state, group_N, *, scale,
    chunk, exclusive,
):
  del state, group_N, scale, exclusive
  if common.platform() != 'tpu':
    return f'it needs a TPU; programs here are for {common.platform()}.'
  dtypes = {x.dtype for x in (q, k, v)}
  if len(dtypes) > 1 or q.dtype not in DTYPES:
    return f'q, k and v must all be bfloat16 or float32; got {dtypes}.'
  sizes = {'K': q.shape[2], 'V': v.shape[2]}
  if chunk > 1:
    sizes['chunk'] = chunk
  for name, size in sizes.items():
    if size not in SIZES:
      return f'{name}={size} must be one of {SIZES}.'
  if chunk == 1:
    return None
  heads = _heads(_form(
      q, v, log_decay, beta, erase, value_decay))[0]
  if heads > MOST_HEADS:
    return (
        f'{q.shape[1]} heads of 64 cannot be split in blocks of whole lanes;'
        ' take an even number of heads.')
  return None


BACKEND = decoding.with_decoding(
    common.Backend('tpu', _supported, _fwd, _bwd), tpu_decode.decode)
