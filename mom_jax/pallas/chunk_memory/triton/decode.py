"""chunk_memory for chunks of one row, as in decoding: states change in place.

A program takes some value channels of a head's state: it loads them once, runs
all rows of their group in registers, in float32, and stores them once in place.
Groups without rows are not touched. The kernel reads the operands as they are;
only the number of rows of each group is computed for it. A state moves once
each way, 8 K V bytes, and takes K block_v registers of a program.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from mom_jax.pallas import triton_call

SIZES = (64, 128, 256)  # of K and V
DTYPES = (jnp.bfloat16, jnp.float32)
BLOCK_V = {64: 64, 128: 64, 256: 32}  # value channels of a program, by K
WARPS = 4


def decode(
    q, k, v, log_decay, beta, removal_key, value_decay, state, group_N, *,
    scale, exclusive,
):
  """(o, state) of rows that are chunks by themselves."""
  optional = (log_decay, beta, removal_key, value_decay)
  given = [x is not None for x in optional]
  run = triton_call.batched(functools.partial(
      _decode, given=given, scale=scale, exclusive=exclusive))
  return run(
      q, k, v, *(x for x in optional if x is not None), state, group_N)


def _decode(*operands, given, scale, exclusive):
  *rows, state, group_N = operands
  (B, N, H, K), (_, G, _, _, V) = rows[0].shape, state.shape
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  q, k, v, *present = map(flat, rows)
  optional = [present.pop(0) if there else None for there in given]
  log_decay, beta, removal_key, value_decay = optional
  group_N = flat(jnp.where(
      group_N < 0, -1, group_N + G * jnp.arange(B)[:, None])).astype(jnp.int32)
  o, state = _call(
      q, k, v, *(q if x is None else x for x in optional), flat(state), group_N,
      lengths(group_N),
      decay=0 if log_decay is None else log_decay.ndim,
      delta=beta is not None, removes=removal_key is not None,
      by_value=value_decay is not None, scale=scale, exclusive=exclusive)
  return o.reshape(B, N, H, V), state.reshape(B, G, H, K, V)


def _call(*operands, **constants):
  from mom_jax.pallas.chunk_memory.triton import kernels_decode
  v, state = operands[2], operands[7]
  (N, H, V), K = v.shape, state.shape[2]
  block_v = BLOCK_V[K]
  return triton_call.call(
      kernels_decode.chunk_memory_decode, *operands,
      out=[jax.ShapeDtypeStruct(v.shape, v.dtype),
           jax.ShapeDtypeStruct(state.shape, jnp.float32)],
      grid=(N * H * (V // block_v),), warps=WARPS, stages=1, aliases={7: 1},
      H=H, K=K, V=V, block_v=block_v, **constants)


def lengths(group_N):
  """Number of rows of a group at its first row; 0 elsewhere."""
  N = len(group_N)
  at_N = jnp.arange(N)
  first_N = jnp.concatenate([jnp.ones(1, bool), group_N[1:] != group_N[:-1]])
  next_N = jax.lax.cummin(
      jnp.append(jnp.where(first_N, at_N, N)[1:], N), reverse=True)
  return jnp.where(
      first_N & (group_N >= 0), next_N - at_N, 0).astype(jnp.int32)


def supported(q, k, v):
  """Return None, or why `decode` does not support such rows."""
  dtypes = {x.dtype for x in (q, k, v)}
  if len(dtypes) > 1 or q.dtype not in DTYPES:
    return f'q, k and v must all be bfloat16 or float32; got {dtypes}.'
  for name, size in (('K', q.shape[2]), ('V', v.shape[2])):
    if size not in SIZES:
      return f'{name}={size} must be one of {SIZES}.'
  return None
