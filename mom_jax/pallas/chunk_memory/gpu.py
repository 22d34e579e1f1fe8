"""chunk_memory as Triton kernels for NVIDIA GPUs, in chunk form.

The equations are those of xla.py, with B = diag(beta) (V - decay to the row *
K S) and Y = T B in place of U and W: what a chunk keeps is T and Y alone.

  solve        every chunk    T
  states       every group    S before each chunk, Y, the last states, in turn
  reads        every chunk    O
  local        every chunk    what reads add to dY
  states_back  every group    dS after each chunk, dB, in reverse
  pairs_back   every chunk    cotangents of pairs of rows; dV
  rows_back    every chunk    dQ, dK

each for all heads at once. A state [K, V] is divided by value channels among
programs, which hold their part in float32 registers; a program goes through one
group, so groups run side by side and may have any length. Everything else is
computed for all chunks at once. Chunks are 64 rows; a longer chunk is several.

Products take operands in the rows' dtype (float32 ones as three products in
tf32, which leaves about 2^-21) and sum in float32; states, decays and the
solution are float32 always. Kept for the backward pass, in the rows' dtype: the
state before each chunk, T and Y: K V + C (C + V) numbers for C rows of a head.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mom_jax.pallas import common, gpu_call

CHUNK = 64
SIZES = (64, 128, 256)  # of K and V
DTYPES = (jnp.bfloat16, jnp.float32)
KERNELS = (
    'solve', 'states', 'reads', 'local', 'states_back', 'pairs_back',
    'rows_back')


@dataclasses.dataclass(frozen=True)
class Tile:
  """What a program works on.

  Attributes:
    key: key channels a step or program.
    value: value channels a step or program.
    warps: warps of 32 threads.
    stages: depth of the pipeline of loads.
  """

  key: int = 64
  value: int = 64
  warps: int = 4
  stages: int = 2


def tile(kernel: str, K: int, V: int, itemsize: int) -> Tile:
  """The tile of that kernel for rows of `itemsize` bytes a number."""
  del K, V, itemsize
  return Tile()


class _Run:
  """Calls the kernels with what is common to all."""

  def __init__(self, rows, group_N, *, scale, chunk):
    from mom_jax.pallas.chunk_memory import gpu_kernels, gpu_kernels_backward
    self._files = gpu_kernels, gpu_kernels_backward
    self.q, self.k, self.v, self.g, self.beta = rows
    self.group_N = jnp.repeat(group_N, chunk // CHUNK)
    self.R, self.H, self.K = self.q.shape
    self.V, self.N = self.v.shape[2], len(self.group_N)
    self.kind, self.scale = self.q.dtype, scale

  def shape(self, *shape, dtype=None):
    return jax.ShapeDtypeStruct(shape, dtype or self.kind)

  def number(self, *before):
    """Shape of one number a row, float32."""
    return self.shape(*before, self.R, self.H, dtype=jnp.float32)

  def matrix(self, *last):
    return self.shape(self.N, self.H, *last)

  def spans(self, groups):
    """First chunk and number of chunks of each group."""
    of_GN = self.group_N[None] == jnp.arange(groups)[:, None]
    first_G = jnp.argmax(of_GN, 1).astype(jnp.int32)
    return first_G, of_GN.sum(1, dtype=jnp.int32)

  def __call__(self, name, *arrays, out, grid, drop=(), **constants):
    """Runs a kernel; `grid` is a function of its tile."""
    t = tile(name, self.K, self.V, self.kind.itemsize)
    kernel = next(
        getattr(f, name) for f in reversed(self._files) if hasattr(f, name))
    sizes = dict(
        N=self.N, H=self.H, K=self.K, V=self.V, C=CHUNK, BK=t.key, BV=t.value,
        scale=self.scale, decays=self.g is not None,
        solves=self.beta is not None,
        precision='tf32x3' if self.kind == jnp.float32 else 'tf32')
    known = kernel.arg_names
    # Pointers that a kernel does not follow, such as that of no decay.
    arrays = [self.group_N if x is None else x for x in arrays]
    return gpu_call.call(
        kernel, *arrays, out=out, grid=grid(t), warps=t.warps, stages=t.stages,
        **{n: x for n, x in sizes.items() if n in known}, **constants)


def _fwd(
    q, k, v, log_decay, beta, erase, value_decay, state, group_N, *, scale,
    chunk, read_before, keep,
):
  del erase, value_decay, read_before
  run = _Run((q, k, v, log_decay, beta), group_N, scale=scale, chunk=chunk)
  H, V, N, G = run.H, run.V, run.N, len(state)
  solved = None
  if beta is not None:
    solved, = run(
        'solve', k, log_decay, beta, run.group_N,
        out=[run.matrix(CHUNK, CHUNK)], grid=lambda t: (N, H))
  # Without the delta rule rows write V and nothing is put in place of Y.
  written = run.shape(*(v.shape if beta is not None else (1, 1, 1)))
  before, y, final = run(
      'states', k, v, log_decay, beta, solved, *run.spans(G), state,
      out=[run.matrix(run.K, V), written,
           run.shape(*state.shape, dtype=jnp.float32)],
      grid=lambda t: (V // t.value, H, G))
  if beta is None:
    y = v
  o_RHV, = run(
      'reads', q, k, log_decay, y, before, run.group_N,
      out=[run.shape(*v.shape)], grid=lambda t: (N, H, V // t.value))
  kept = (before, y if beta is not None else None, solved) if keep else None
  return (o_RHV, final), kept


def _bwd(
    q, k, v, log_decay, beta, erase, value_decay, state, group_N, kept, do_RHV,
    dstate_GHKV, *, scale, chunk, read_before,
):
  del erase, value_decay, read_before
  run = _Run((q, k, v, log_decay, beta), group_N, scale=scale, chunk=chunk)
  H, K, V, N, G = run.H, run.K, run.V, run.N, len(state)
  before, y, solved = kept
  y = v if y is None else y
  rows_V = run.shape(*v.shape)
  dlocal, = run(
      'local', q, k, log_decay, do_RHV, run.group_N, out=[rows_V],
      grid=lambda t: (N, H))
  after, db, dinitial = run(
      'states_back', q, k, log_decay, beta, solved, do_RHV, dlocal,
      *run.spans(G), dstate_GHKV,
      out=[run.matrix(K, V), rows_V,
           run.shape(*state.shape, dtype=jnp.float32)],
      grid=lambda t: (V // t.value, H, G))
  dscore, dsolve, dv, dgamma, dbeta = run(
      'pairs_back', q, k, v, log_decay, beta, y, do_RHV, db, run.group_N,
      out=[run.matrix(CHUNK, CHUNK), run.matrix(CHUNK, CHUNK), rows_V,
           run.number(), run.number()],
      grid=lambda t: (N, H))
  parts = K // tile('rows_back', K, V, run.kind.itemsize).key
  dq, dk, more_dgamma, dend, more_dbeta = run(
      'rows_back', q, k, log_decay, beta, before, after, y, do_RHV, db, dscore,
      dsolve, run.group_N,
      out=[run.shape(*q.shape), run.shape(*q.shape), run.number(parts),
           run.shape(parts, N, H, dtype=jnp.float32), run.number(parts)],
      grid=lambda t: (N, H, parts))
  dg = None
  if log_decay is not None:
    sums_NCH = (dgamma + more_dgamma.sum(0)).reshape(N, CHUNK, H)
    later_NCH = jnp.cumsum(sums_NCH[:, ::-1], 1)[:, ::-1]
    dg = (later_NCH + dend.sum(0)[:, None]).reshape(-1, H)
  if beta is not None:
    dbeta += more_dbeta.sum(0)
  return (
      dq, dk, dv, dg, dbeta if beta is not None else None, None, None,
      dinitial)


def _supported(
    q, k, v, log_decay, beta, erase, value_decay, state, group_N, *, scale,
    chunk, read_before,
):
  del state, group_N, scale
  reason = gpu_call.missing()
  if reason is not None:
    return reason
  dtypes = {x.dtype for x in (q, k, v)}
  if len(dtypes) > 1 or q.dtype not in DTYPES:
    return f'q, k and v must all be bfloat16 or float32; got {dtypes}.'
  for name, size in (('K', q.shape[2]), ('V', v.shape[2])):
    if size not in SIZES:
      return f'{name}={size} must be one of {SIZES}.'
  if chunk % CHUNK:
    return f'chunk={chunk} must be a multiple of {CHUNK}.'
  forms = {
      'log_decay by key channel': log_decay is not None and log_decay.ndim == 3,
      'erase_RHK': erase is not None,
      'value_decay_RHV': value_decay is not None,
      'read_before': read_before}
  for name, asked in forms.items():
    if asked:
      return f'no GPU kernel has {name} yet.'
  return None


BACKEND = common.Backend('gpu', _supported, _fwd, _bwd)
