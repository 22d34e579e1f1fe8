"""chunk_memory as Pallas kernels for TPU (Mosaic), in chunk form.

The equations are those of xla.py. One kernel runs forward, one backward; each
goes over blocks of n chunks of h heads (`BlockShape`), heads on an axis that
cores may share, blocks in order with the heads' states in fast memory. Terms
that need no state are computed ahead, beside the recurrence of the states:
forward for the next block, which waits in fast memory, backward for the next
chunk. Two streams of independent work hide the latency of the matrix units.
Where a group begins, the state is replaced by the group's initial one, copied
ahead of need; where it ends, its last state is written while the next block
runs. Blocks without used chunks are neither copied nor computed. (The forward
pass still runs the first such block after a used one, to drain the pipeline.)

Rows are read as [R, H X], so heads lie side by side in the lanes; scalars per
row are read as [H, R]. With decay per key channel states are transposed,
[V, K], so that the channels that decay lie in the lanes. Removal keys always
come with decay per channel. Exclusive outputs are those of shifted queries
(exclusive_read.py). Products take operands in the rows' dtype and sum in
float32; with float32 rows all is exact to float32. States, decays and the
inverse are always float32; products with the inverse, and those that compute
it, take float32 operands in split precision.

Residuals for the backward pass, in the rows' dtype: the state before each
chunk, and for the delta rule the updates Y and, in float32, the inverse T:
K V + C V elements and C C per C rows of a head.

Fast memory, with E bytes per element of the rows' dtype, is n h times

  forward   4 C (K + V) E + 12 K V, with residuals 2 (K V + C V) E + 8 C C more
  backward  4 C (2 K + 2 V) E + 2 (K V + C V) E + 8 C C + 12 K V

for double-buffered blocks and states; forward, under the delta rule and one
decay per row, C (2 K + C) E + 4 C C + 1024 C more for what waits between two
steps, with residuals another 4 C C; and about half as much again for values
that do not fit the registers. Decay per channel adds 8 C X, and 16 C X
backward; removal keys as much again.
"""

from __future__ import annotations

import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.chunk_memory import decoding
from mom_jax.pallas.chunk_memory.tpu import (
    backward,
    chunk_algebra,
    decode,
    exclusive_read,
    forward,
    grid,
)
from mom_jax.pallas.chunk_memory.tpu.operands import (
    BlockShape,
    Problem,
    RowOperands,
)

SIZES = (64, 128, 256)  # of K, V and C
DTYPES = (jnp.bfloat16, jnp.float32)
MAX_HEADS = 4  # per step, where they cannot be split

# (chunks, heads) per step of rows in bfloat16, by measured cycles; float32
# takes half the chunks. Larger blocks take longer to compile than they save.
# Wide matrix units need more heads at once to be busy.
FORWARD, FORWARD_WIDE, BACKWARD = (4, 2), (4, 4), (4, 2)
# The same where channels decay, which fills the vector units.
CHANNELS_FORWARD, CHANNELS_BACKWARD = (4, 1), (2, 1)


def _block(problem, chunk, N, dtype, max_block):
  """Return the largest block that fits the operands, up to `max_block`."""
  n, h = max_block
  n = n * 2 // dtype.itemsize * 128 // max(chunk, 128)
  while n > N:
    n //= 2
  heads = _head_counts(problem)
  return BlockShape(chunk, n, max([x for x in heads if x <= h] or heads[:1]))


def _max_forward_block(problem):
  if problem.decay not in ('none', 'head'):
    return CHANNELS_FORWARD
  wide = common.tpu_info().mxu_column_size > chunk_algebra.LANES
  if wide and FORWARD_WIDE[1] in _head_counts(problem):
    return FORWARD_WIDE
  return FORWARD


def _head_counts(problem):
  """Head counts that fill whole lanes."""
  H, width = problem.heads, min(problem.key_dim, problem.value_dim)
  return [
      x for x in range(1, H + 1)
      if H % x == 0 and (x == H or x * width % chunk_algebra.LANES == 0)]


def _problem(q, v, log_decay, beta, removal_key, value_decay):
  decay = 'none' if log_decay is None else 'head'
  if removal_key is not None or log_decay is not None and log_decay.ndim == 3:
    decay = 'key'
  if value_decay is not None:
    decay = 'value'
  return Problem(
      q.shape[1], q.shape[2], v.shape[2], decay, beta is not None,
      removal_key is not None)


def _rows(problem, q, k, v, log_decay, beta, removal_key, value_decay):
  """Return the kernels' operands, with heads side by side, or first."""
  flat = lambda x: x.reshape(len(x), -1)
  rows = RowOperands(flat(q), flat(k), flat(v))
  if problem.decay == 'head':
    rows = rows._replace(g=log_decay.T)
  if problem.decay == 'key':
    rows = rows._replace(g=flat(_per_channel(log_decay, q)))
  if problem.decay == 'value':
    rows = rows._replace(g=flat(value_decay))
  if beta is not None:
    rows = rows._replace(beta=beta.T)
  if removal_key is not None:
    rows = rows._replace(removal_key=flat(removal_key))
  return rows


def _per_channel(log_decay, q):
  if log_decay is None:
    return jnp.zeros_like(q, jnp.float32)
  if log_decay.ndim == 2:
    return jnp.broadcast_to(log_decay[..., None], q.shape)
  return log_decay


def _to_kernel_layout(problem, state_GHKV):
  """Arrange states as the kernels do, or back."""
  return state_GHKV.mT if problem.decay == 'key' else state_GHKV


def _fwd(
    q, k, v, log_decay, beta, removal_key, value_decay, state, group_N, *,
    scale, chunk, exclusive, keep,
):
  problem = _problem(q, v, log_decay, beta, removal_key, value_decay)
  block = _block(
      problem, chunk, len(group_N), q.dtype, _max_forward_block(problem))
  schedule = grid.grid_schedule(group_N, len(state), block.chunks)
  q_in = exclusive_read.shift_up(q, group_N) if exclusive else q
  o, final, residuals = forward.forward(
      _rows(problem, q_in, k, v, log_decay, beta, removal_key, value_decay),
      _to_kernel_layout(problem, state), schedule, problem=problem, block=block,
      dtype=q.dtype, scale=scale, keep=keep)
  o_RHV = o.reshape(v.shape)
  if exclusive:
    o_RHV = exclusive_read.outputs(o_RHV, q, state, group_N, scale)
  return (o_RHV, _to_kernel_layout(problem, final)), residuals


def _bwd(
    q, k, v, log_decay, beta, removal_key, value_decay, state, group_N,
    residuals, do_RHV, dstate_GHKV, *, scale, chunk, exclusive,
):
  problem = _problem(q, v, log_decay, beta, removal_key, value_decay)
  max_block = (
      BACKWARD if problem.decay in ('none', 'head') else CHANNELS_BACKWARD)
  block = _block(problem, chunk, len(group_N), q.dtype, max_block)
  schedule = grid.grid_schedule(group_N, len(state), block.chunks)
  q_in, do_in = q, do_RHV
  if exclusive:
    q_in, do_in = (
        exclusive_read.shift_up(x, group_N) for x in (q, do_RHV))
  rows = _rows(problem, q_in, k, v, log_decay, beta, removal_key, value_decay)
  grads = backward.backward(
      rows, residuals, do_in.reshape(len(q), -1),
      _to_kernel_layout(problem, dstate_GHKV), schedule, problem=problem,
      block=block, dtype=q.dtype, scale=scale)

  def per_row(x):
    return x.reshape(problem.heads, -1).T

  def like(x, grad):
    return None if x is None else grad.reshape(x.shape)

  dq, dstate = like(q, grads.dq), _to_kernel_layout(problem, grads.dinitial)
  if exclusive:
    dq, dstate = exclusive_read.cotangents(
        dq, dstate, do_RHV, q, state, group_N, scale)
  dlog_decay = dvalue_decay = None
  if problem.decay == 'value':
    dvalue_decay = like(value_decay, grads.dg)
  elif log_decay is not None and problem.decay == 'key':
    dlog_decay = grads.dg.reshape(q.shape)
    if log_decay.ndim == 2:
      dlog_decay = dlog_decay.sum(2)
  elif problem.decay == 'head':
    dlog_decay = per_row(grads.dg)
  return (
      dq, like(k, grads.dk), like(v, grads.dv), dlog_decay,
      per_row(grads.dbeta) if problem.delta else None,
      like(removal_key, grads.dremoval_key), dvalue_decay, dstate)


def _supported(
    q, k, v, log_decay, beta, removal_key, value_decay, state, group_N, *,
    scale, chunk, exclusive,
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
  heads = _head_counts(_problem(
      q, v, log_decay, beta, removal_key, value_decay))[0]
  if heads > MAX_HEADS:
    return (
        f'{q.shape[1]} heads of 64 cannot be split into blocks of whole lanes;'
        ' take an even number of heads.')
  return None


BACKEND = decoding.with_decoding(
    common.Backend('tpu', _supported, _fwd, _bwd), decode.decode)
