"""chunk_memory with its gradients as one function, for tests of backends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mom_jax import pallas
from mom_jax.pallas.chunk_memory import cases

ROWS = ('q', 'k', 'v', 'log_decay', 'beta')
NAMED = ('initial_state_GHKV', 'removal_key_RHK', 'value_decay_RHV')
Case = functools.partial(cases.Case, heads=1, key=64, value=64, chunk=64)


def program(case, dtype, backend):
  """(outputs, gradients) by name as a function of the float operands."""
  args, kw = case.operands(dtype=dtype)
  kw = {n: x for n, x in kw.items() if x is not None}
  floats = dict(zip(ROWS, args)) | {n: kw.pop(n) for n in NAMED if n in kw}
  floats = {n: x for n, x in floats.items() if x is not None}
  group_N, segment_R = kw.pop('group_N'), kw.pop('segment_R', None)
  (R, H, K), V = args[0].shape, case.value
  weights = np.random.default_rng(7).normal(
      size=R * H * V + len(case.lengths) * H * K * V)

  def run(floats, group_N, segment_R, weights):
    def loss(floats):
      rows = [floats.get(n) for n in ROWS]
      named = {n: floats[n] for n in NAMED if n in floats}
      o, state = pallas.chunk_memory(
          *rows, **named, group_N=group_N, segment_R=segment_R,
          backend=backend, **kw)
      flat = jnp.concatenate([o.astype(jnp.float32).ravel(), state.ravel()])
      return flat @ weights, {'o': o, 'state': state}
    return jax.grad(loss, has_aux=True)(floats)

  return run, (floats, group_N, segment_R, jnp.asarray(weights, jnp.float32))


def run(case, dtype, backend):
  """(outputs, gradients) by name, jitted."""
  fn, args = program(case, dtype, backend)
  grads, out = jax.block_until_ready(jax.jit(fn)(*args))
  return out, grads


# Two halves of as many chunks each, so that two devices may have one each.
HALVES = Case(heads=2, lengths=(70, 1, 0, 130), unused=0)


def whole_and_shards(dtype, mesh=None):
  """(on one device, over the axes 'batch' and 'heads' of `mesh`, operands).

  Both functions answer results and gradients of HALVES in the GPU backend.
  """
  args, kw = HALVES.operands(dtype=jnp.dtype(dtype))
  floats = dict(zip(ROWS, args)) | {NAMED[0]: kw[NAMED[0]]}
  half = len(HALVES.lengths) // 2

  def run(floats, group_N):
    def op(floats):
      state = floats[NAMED[0]]
      return pallas.chunk_memory(
          *(floats[n] for n in ROWS), initial_state_GHKV=state,
          group_N=group_N, backend='gpu')

    out, pull = jax.vjp(op, floats)
    return out, pull(jax.tree.map(jnp.sin, out))[0]

  P = jax.sharding.PartitionSpec
  by_both = P('batch', 'heads')
  shards = jax.shard_map(
      lambda floats, group_N: run(floats, group_N % half), mesh=mesh,
      in_specs=({n: by_both for n in floats}, P('batch')), out_specs=by_both)
  return run, shards, (floats, kw['group_N'])
