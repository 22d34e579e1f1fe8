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

and where key channels decay,

  channel_scores      every chunk  P, decayed Q and K, decay of the whole chunk
  channel_keys        every chunk  K K^T, K as the delta rule reads
  channel_solve_back  every chunk  what T and B add to dK, with the delta rule
  channel_back        every chunk  dQ, dK, in place of rows_back

each for all heads at once. A state [K, V] is divided by value channels among
programs, which hold their part in float32 registers; a program goes through one
group, so groups run side by side and may have any length. Where a part does not
fit the registers it lies in memory, and a block of key channels at a time is
loaded (kernels_blocks.py). Everything else is computed for all chunks at
once. Chunks are 64 rows, or 32 (SHORT); a longer chunk is several; chunks of
one row are another kernel's (`gpu_decode`).

Products take operands in the rows' dtype (float32 ones as three products in
tf32, which leaves about 2^-21) and sum in float32; states, decays and the
solution are float32 always. Kept for the backward pass, in the rows' dtype: the
state before each chunk, T and Y: K V + C (C + V) numbers for C rows of a head.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas import triton_call as gpu_call
from mom_jax.pallas.chunk_memory import decoding
from mom_jax.pallas.chunk_memory.triton import decode as gpu_decode

CHUNK = 64
SIZES = (64, 128, 256)  # of K and V
# Compute capabilities: everything compiles within limits for all known ones.
CAPABILITIES = tuple(gpu_call.SHARED_LIMIT)
# Releases of Triton before these cannot compile for that capability.
LEAST_TRITON = {100: (3, 9)}
# Four warps make a product together there, which leave its operands in shared
# memory; elsewhere each warp does, and takes them to its registers.
TOGETHER = (90, 100)
# Rows of the blocks that are solved by substitution, without products.
SOLVED = {'bfloat16': 16, 'float32': CHUNK}
# What makes products and dtype of the rows where, under decay by key channel,
# chunks of 64 rows do not fit the registers: of 32 rows they do, and twice as
# many states are kept.
SHORT = (('warp', 'float32'),)


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


def _every(**tile):
  return dict.fromkeys(SIZES, Tile(**tile))


_GROUP = {
    'solve': _every(),
    'states': _every() | {256: Tile(value=32)},
    'reads': _every(),
    'local': _every(),
    'states_back': _every() | {256: Tile(value=32)},
    'pairs_back': _every(),
    'rows_back': _every(),
}
_CHANNEL = {
    'channel_scores': _every(key=16, warps=8, stages=1),
    'channel_back': _every(key=16, value=32, warps=8, stages=1),
    'channel_keys': _every(key=16, warps=8, stages=1),
    'channel_solve_back': _every(key=16, value=32, warps=8, stages=1),
}
# Of float32 rows, whose states lie in memory.
_LARGE = {K: Tile(value=32, stages=1) for K in (128, 256)}
# By kernel, what makes products, dtype of the rows and K: the largest that fit
# registers and shared memory. Where none was found, a kernel is missing, and
# states lie in memory.
TILES = {
    (kernel, products, dtype, K): t
    for (products, dtype), kernels in {
        ('group', 'bfloat16'): _GROUP | _CHANNEL,
        ('warp', 'bfloat16'): _GROUP | {
            'states': _every() | {256: Tile(value=16, stages=1)},
            'states_back': _every(value=32, stages=1) | {
                256: Tile(value=32, warps=8, stages=1)},
            'pairs_back': _every() | {64: Tile(key=32, value=32)},
            'rows_back': _every(key=32),
            'channel_scores': _every(key=16, stages=1),
            'channel_back': _every(key=16, stages=1) | {
                128: Tile(key=16, warps=8, stages=1)},
            'channel_keys': _every(key=16, stages=1),
            'channel_solve_back': _every(key=16, value=32, stages=1),
        },
        ('group', 'float32'): {
            'solve': _every(),
            'states': {64: Tile(value=32)},
            'states_by_blocks': _LARGE,
            'reads': _every(),
            'local': _every(),
            'states_back': {64: Tile(value=32)},
            'states_back_by_blocks': _LARGE,
            'pairs_back': _every(key=32, value=32),
            'rows_back': _every(key=32, value=32),
            **_CHANNEL,
        },
        ('warp', 'float32'): {
            'solve': _every(key=32, warps=8, stages=1),
            'states': {64: Tile(value=32, stages=1)},
            'states_by_blocks': _LARGE,
            'reads': _every(key=32, value=32, warps=8, stages=1),
            'local': _every(key=32, value=32, warps=8, stages=1),
            'states_back': {64: Tile(value=16, stages=1)},
            'states_back_by_blocks': {
                K: Tile(key=32, value=32, stages=1) for K in _LARGE},
            'pairs_back': _every(key=16, value=16, stages=1),
            'rows_back': _every(key=16, value=32, warps=8, stages=1),
            **{k: _every(key=16, value=32, stages=1) for k in _CHANNEL},
        },
    }.items()
    for kernel, tiles in kernels.items()
    for K, t in tiles.items()
}
# In place of those, by kernel, capability, `_form` and K: the keys as the delta
# rule reads are one more operand in shared memory there.
TILES['states_back', 90, 'bfloat16 channel delta', 256] = Tile(value=16)


def _products():
  together = common.gpu_target().capability in TOGETHER
  return 'group' if together else 'warp'


def _form(dtype, channels, solves):
  """dtype, and whether key channels decay and the delta rule writes."""
  return dtype + ' channel' * channels + ' delta' * solves


def _key(kernel, form, K):
  own = kernel, common.gpu_target().capability, form, K
  return own if own in TILES else (kernel, _products(), form.split()[0], K)


def tile(kernel: str, form: str, K: int) -> Tile:
  """The tile of that kernel for such rows on the GPU in scope."""
  return TILES[_key(kernel, form, K)]


class _Run:
  """Calls the kernels with what is common to all."""

  def __init__(self, rows, group_N, *, scale, chunk):
    self.q, self.k, self.v, self.g, self.beta = rows
    self.kind, self.scale = self.q.dtype, scale
    self.channels = self.g is not None and self.g.ndim == 3
    self.decays = self.g is not None and not self.channels
    self.solves = self.beta is not None
    self.form = _form(self.kind.name, self.channels, self.solves)
    short = self.channels and (_products(), self.kind.name) in SHORT
    self.C = CHUNK // 2 if short else CHUNK
    self.group_N = jnp.repeat(group_N, chunk // self.C)
    self.R, self.H, self.K = self.q.shape
    self.V, self.N = self.v.shape[2], len(self.group_N)

  def shape(self, *shape, dtype=None):
    return jax.ShapeDtypeStruct(shape, dtype or self.kind)

  def number(self, *before):
    """Shape of one number a row, float32."""
    return self.shape(*before, self.R, self.H, dtype=jnp.float32)

  def matrix(self, *last, dtype=None):
    return self.shape(self.N, self.H, *last, dtype=dtype)

  def spans(self, groups):
    """First chunk and number of chunks of each group."""
    of_GN = self.group_N[None] == jnp.arange(groups)[:, None]
    first_G = jnp.argmax(of_GN, 1).astype(jnp.int32)
    return first_G, of_GN.sum(1, dtype=jnp.int32)

  def tile(self, name):
    return tile(name, self.form, self.K)

  def fitting(self, *kernels):
    """The first of the kernels that has a tile for these rows."""
    return next(
        kernel for kernel in kernels
        if _key(kernel.__name__, self.form, self.K) in TILES)

  def __call__(self, kernel, *arrays, out, grid=()):
    """Runs a kernel on all chunks and heads, `grid` its last axis."""
    t = self.tile(kernel.__name__)
    sizes = dict(
        N=self.N, H=self.H, K=self.K, V=self.V, C=self.C,
        LEVELS=self.C.bit_length() - 1, B=min(SOLVED[self.kind.name], self.C),
        BK=t.key, BV=t.value, scale=self.scale,
        decays=self.decays, channels=self.channels, solves=self.solves,
        precision='tf32x3' if self.kind == jnp.float32 else 'tf32')
    # Pointers that a kernel does not follow, such as that of no decay.
    arrays = [self.group_N if x is None else x for x in arrays]
    return gpu_call.call(
        kernel, *arrays, out=out, grid=grid or (self.N, self.H),
        warps=t.warps, stages=t.stages,
        **{n: x for n, x in sizes.items() if n in kernel.arg_names})

  def decayed(self):
    """(q, k, k_read, end, scores, keys) as other kernels take them."""
    from mom_jax.pallas.chunk_memory.triton import kernels_channel as kernels
    if not self.channels:
      return self.q, self.k, None, None, None, None
    rows = self.shape(*self.q.shape)
    scores, q, k, end = self(
        kernels.channel_scores, self.q, self.k, self.g, self.group_N,
        out=[self.matrix(self.C, self.C), rows, rows,
             self.matrix(self.K, dtype=jnp.float32)])
    keys = k_read = None
    if self.solves:
      keys, k_read = self(
          kernels.channel_keys, self.k, self.g, self.group_N,
          out=[self.matrix(self.C, self.C, dtype=jnp.float32), rows])
    return q, k, k_read, end, scores, keys


def _fwd(
    q, k, v, log_decay, beta, erase, value_decay, state, group_N, *, scale,
    chunk, exclusive, keep,
):
  from mom_jax.pallas.chunk_memory.triton import kernels
  from mom_jax.pallas.chunk_memory.triton import kernels_blocks as blocks
  run = _Run((q, k, v, log_decay, beta), group_N, scale=scale, chunk=chunk)
  H, V, N, G = run.H, run.V, run.N, len(state)
  solved = None
  q, k, k_read, end, scores, keys = run.decayed()
  if run.solves:
    solved, = run(
        kernels.solve, k, log_decay, keys, beta, run.group_N,
        out=[run.matrix(run.C, run.C)])
  # Without the delta rule rows write V and nothing is put in place of Y.
  written = run.shape(*(v.shape if run.solves else (1, 1, 1)))
  states = run.fitting(kernels.states, blocks.states_by_blocks)
  before, y, final = run(
      states, k, k_read, v, log_decay, end, beta, solved, *run.spans(G), state,
      out=[run.matrix(run.K, V), written,
           run.shape(*state.shape, dtype=jnp.float32)],
      grid=(V // run.tile(states.__name__).value, H, G))
  y = y if run.solves else None
  o_RHV, = run(
      kernels.reads, q, k, log_decay, scores, v if y is None else y, before,
      run.group_N, out=[run.shape(*v.shape)],
      grid=(N, H, V // run.tile('reads').value))
  return (o_RHV, final), (before, y, solved) if keep else None


def _bwd(
    q, k, v, log_decay, beta, erase, value_decay, state, group_N, kept, do_RHV,
    dstate_GHKV, *, scale, chunk, exclusive,
):
  from mom_jax.pallas.chunk_memory.triton import kernels_backward as kernels
  from mom_jax.pallas.chunk_memory.triton import kernels_blocks as blocks
  run = _Run((q, k, v, log_decay, beta), group_N, scale=scale, chunk=chunk)
  K, V = run.K, run.V
  before, y, solved = kept
  y = v if y is None else y
  rows_V, pairs = run.shape(*v.shape), run.matrix(run.C, run.C)
  q_decayed, k_decayed, k_read, end, scores, keys = run.decayed()
  dlocal, = run(
      kernels.local, q, k, log_decay, scores, do_RHV, run.group_N, out=[rows_V])
  states_back = run.fitting(kernels.states_back, blocks.states_back_by_blocks)
  after, db, dinitial = run(
      states_back, q_decayed, k_decayed, k_read, log_decay, end, beta, solved,
      do_RHV, dlocal, *run.spans(len(state)), dstate_GHKV,
      out=[run.matrix(K, V), rows_V,
           run.shape(*state.shape, dtype=jnp.float32)],
      grid=(V // run.tile(states_back.__name__).value, run.H, len(state)))
  dscore, dsolve, dv, dgamma, dbeta = run(
      kernels.pairs_back, q, k, v, log_decay, keys, beta, y, do_RHV, db,
      run.group_N, out=[pairs, pairs, rows_V, run.number(), run.number()])
  rest = (before, after, y, do_RHV), db, dscore, dsolve
  dq, dk, dg, more_dbeta = (
      _channel_back(run, *rest) if run.channels
      else _rows_back(run, *rest, dgamma))
  return (
      dq, dk, dv, None if log_decay is None else dg,
      dbeta + more_dbeta if run.solves else None, None, None, dinitial)


def _channel_back(run, states, db, dscore, dsolve):
  from mom_jax.pallas.chunk_memory.triton import kernels_channel as kernels
  rows = run.shape(*run.q.shape)
  wide = run.shape(*run.q.shape, dtype=jnp.float32)
  more_dk, more_dg, dbeta = None, None, None
  if run.solves:
    parts = run.K // run.tile('channel_solve_back').key
    more_dk, more_dg, dbeta = run(
        kernels.channel_solve_back, run.k, run.g, run.beta, states[0], db,
        dsolve, run.group_N, out=[wide, wide, run.number(parts)],
        grid=(run.N, run.H, parts))
    dbeta = dbeta.sum(0)
  dq, dk, dg = run(
      kernels.channel_back, run.q, run.k, run.g, *states, dscore, more_dk,
      more_dg, run.group_N, out=[rows, rows, wide],
      grid=(run.N, run.H, run.K // run.tile('channel_back').key))
  return dq, dk, dg, dbeta


def _rows_back(run, states, db, dscore, dsolve, dgamma):
  from mom_jax.pallas.chunk_memory.triton import kernels_backward as kernels
  rows, parts = run.shape(*run.q.shape), run.K // run.tile('rows_back').key
  dq, dk, more_dgamma, dend, dbeta = run(
      kernels.rows_back, run.q, run.k, run.g, run.beta, *states, db, dscore,
      dsolve, run.group_N,
      out=[rows, rows, run.number(parts),
           run.shape(parts, run.N, run.H, dtype=jnp.float32),
           run.number(parts)],
      grid=(run.N, run.H, parts))
  sums_NCH = (dgamma + more_dgamma.sum(0)).reshape(run.N, run.C, run.H)
  later_NCH = jnp.cumsum(sums_NCH[:, ::-1], 1)[:, ::-1]
  dg_NCH = later_NCH + dend.sum(0)[:, None]
  return dq, dk, dg_NCH.reshape(run.R, run.H), dbeta.sum(0)


def _too_old(capability):
  """None, or why the Triton at hand is not enough for such a GPU."""
  found, least = gpu_call.triton_version(), LEAST_TRITON.get(capability)
  if least is None or found is None:
    return None
  if tuple(int(n) for n in found.split('.')[:2]) >= least:
    return None
  return (
      f'Triton {found} cannot compile for sm_{capability}; take'
      f' {".".join(map(str, least))} or newer.')


def _supported(
    q, k, v, log_decay, beta, erase, value_decay, state, group_N, *, scale,
    chunk, exclusive,
):
  del state, group_N, scale
  reason = gpu_call.missing()
  if reason is not None:
    return reason
  if chunk == 1:
    return gpu_decode.supported(q, k, v)
  dtypes = {x.dtype.name for x in (q, k, v)}
  if len(dtypes) > 1 or q.dtype.name not in SOLVED:
    return f'q, k and v must all be one of {tuple(SOLVED)}; got {dtypes}.'
  for name, size in (('K', q.shape[2]), ('V', v.shape[2])):
    if size not in SIZES:
      return f'{name}={size} must be one of {SIZES}.'
  capability = common.gpu_target().capability
  if capability not in CAPABILITIES:
    return f'sm_{capability} has no tiles; known: {CAPABILITIES}.'
  reason = _too_old(capability)
  if reason is not None:
    return reason
  if chunk % CHUNK:
    return f'chunk={chunk} must be a multiple of {CHUNK}.'
  forms = {
      'removal_key_RHK': erase is not None,
      'value_decay_RHV': value_decay is not None,
      'exclusive': exclusive}
  for name, asked in forms.items():
    if asked:
      return f'no GPU kernel has {name} yet.'
  return None


BACKEND = decoding.with_decoding(
    common.Backend('gpu', _supported, _fwd, _bwd), gpu_decode.decode)
