"""chunk_memory as Triton kernels for NVIDIA GPUs, in chunk form.

The equations are those of xla.py, with B = diag(beta) (V - decay to the row *
K S) and Y = T B in place of U and W: T and Y are all that a chunk keeps.

  kernel          programs   result                              in fla
  chunk_inverse   per chunk  T                                   solve_tril: A
  chunk_states    per group  S before each chunk, Y, last states h, v_new
  chunk_outputs   per chunk  O                                   o
  chunk_dy_local  per chunk  dY from outputs of the same chunk   dv_local
  chunk_dstates   per group  dS after each chunk, dB, reversed   dh, dv
  chunk_dpairs    per chunk  cotangents of pairs of rows; dV
  chunk_dqk       per chunk  dQ, dK                              dq, dk

and with decay per key channel

  channel_scores      per chunk  P, decayed Q and K, chunk decay
  channel_keys        per chunk  K K^T, K decayed from the chunk's start
  channel_dk_inverse  per chunk  part of dK from T and B, with the delta rule
  channel_dqk         per chunk  dQ, dK, in place of chunk_dqk

each for all heads at once. A state [K, V] is divided by value channels among
programs, which hold their part in float32 registers; a program goes through one
group, so groups run side by side and may have any length. Where a part does not
fit the registers it stays in HBM, and a block of key channels at a time is
loaded (kernels_hbm_state.py). Everything else is computed for all chunks at
once. Chunks are 64 rows, or 32 (SHORT_CHUNKS); a longer chunk is several;
chunks of one row have a kernel of their own (decode.py).

Products take operands in the rows' dtype (float32 ones as three products in
tf32, which leaves about 2^-21) and sum in float32; states, decays and the
solution are always float32. Residuals for the backward pass, in the rows'
dtype: the state before each chunk, T and Y: K V + C (C + V) elements per C rows
of a head.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mom_jax.pallas import common, triton_call
from mom_jax.pallas.chunk_memory import decoding
from mom_jax.pallas.chunk_memory.triton import decode

CHUNK = 64
SIZES = (64, 128, 256)  # of K and V
# Compute capabilities: everything compiles within limits for all known ones.
CAPABILITIES = tuple(triton_call.SHARED_LIMIT)
# The first release of Triton that compiles for that capability.
MIN_TRITON = {100: (3, 9)}
# Products are made by a warpgroup (four warps), which leaves operands in shared
# memory; elsewhere by each warp, which takes them to its registers.
WARPGROUP_MMA = (90, 100)
# Rows of the blocks that are inverted by substitution, without products.
SUBSTITUTION = {'bfloat16': 16, 'float32': CHUNK}
# (product unit, dtype of the rows) where, with decay per key channel, chunks of
# 64 rows do not fit the registers: 32 rows do, and twice as many states are
# kept.
SHORT_CHUNKS = (('warp', 'float32'),)


@dataclasses.dataclass(frozen=True)
class KernelConfig:
  """Block sizes and launch settings of a kernel.

  Attributes:
    block_k: key channels per step or program.
    block_v: value channels per step or program.
    warps: warps of 32 threads.
    stages: depth of the pipeline of loads.
  """

  block_k: int = 64
  block_v: int = 64
  warps: int = 4
  stages: int = 2


def _every(**config):
  return dict.fromkeys(SIZES, KernelConfig(**config))


_WARPGROUP = {
    'chunk_inverse': _every(),
    'chunk_states': _every() | {256: KernelConfig(block_v=32)},
    'chunk_outputs': _every(),
    'chunk_dy_local': _every(),
    'chunk_dstates': _every() | {256: KernelConfig(block_v=32)},
    'chunk_dpairs': _every(),
    'chunk_dqk': _every(),
}
_CHANNEL = {
    'channel_scores': _every(block_k=16, warps=8, stages=1),
    'channel_dqk': _every(block_k=16, block_v=32, warps=8, stages=1),
    'channel_keys': _every(block_k=16, warps=8, stages=1),
    'channel_dk_inverse': _every(block_k=16, block_v=32, warps=8, stages=1),
}
# Of float32 rows, whose states stay in HBM.
_HBM = {K: KernelConfig(block_v=32, stages=1) for K in (128, 256)}
# By kernel, product unit, dtype of the rows and K: the largest that fit
# registers and shared memory. Where none was found, a kernel is missing, and
# states stay in HBM.
CONFIGS = {
    (kernel, unit, dtype, K): config
    for (unit, dtype), kernels in {
        ('warpgroup', 'bfloat16'): _WARPGROUP | _CHANNEL,
        ('warp', 'bfloat16'): _WARPGROUP | {
            'chunk_states': _every() | {
                256: KernelConfig(block_v=16, stages=1)},
            'chunk_dstates': _every(block_v=32, stages=1) | {
                256: KernelConfig(block_v=32, warps=8, stages=1)},
            'chunk_dpairs': _every() | {
                64: KernelConfig(block_k=32, block_v=32)},
            'chunk_dqk': _every(block_k=32),
            'channel_scores': _every(block_k=16, stages=1),
            'channel_dqk': _every(block_k=16, stages=1) | {
                128: KernelConfig(block_k=16, warps=8, stages=1)},
            'channel_keys': _every(block_k=16, stages=1),
            'channel_dk_inverse': _every(block_k=16, block_v=32, stages=1),
        },
        ('warpgroup', 'float32'): {
            'chunk_inverse': _every(),
            'chunk_states': {64: KernelConfig(block_v=32)},
            'chunk_states_hbm': _HBM,
            'chunk_outputs': _every(),
            'chunk_dy_local': _every(),
            'chunk_dstates': {64: KernelConfig(block_v=32)},
            'chunk_dstates_hbm': _HBM,
            'chunk_dpairs': _every(block_k=32, block_v=32),
            'chunk_dqk': _every(block_k=32, block_v=32),
            **_CHANNEL,
        },
        ('warp', 'float32'): {
            'chunk_inverse': _every(block_k=32, warps=8, stages=1),
            'chunk_states': {64: KernelConfig(block_v=32, stages=1)},
            'chunk_states_hbm': _HBM,
            'chunk_outputs': _every(block_k=32, block_v=32, warps=8, stages=1),
            'chunk_dy_local': _every(block_k=32, block_v=32, warps=8, stages=1),
            'chunk_dstates': {64: KernelConfig(block_v=16, stages=1)},
            'chunk_dstates_hbm': {
                K: KernelConfig(block_k=32, block_v=32, stages=1)
                for K in _HBM},
            'chunk_dpairs': _every(block_k=16, block_v=16, stages=1),
            'chunk_dqk': _every(block_k=16, block_v=32, warps=8, stages=1),
            **{k: _every(block_k=16, block_v=32, stages=1) for k in _CHANNEL},
        },
    }.items()
    for kernel, configs in kernels.items()
    for K, config in configs.items()
}
# Exceptions by kernel, capability, variant and K: `k_start` is one more operand
# in shared memory there.
CONFIGS['chunk_dstates', 90, 'bfloat16 channel delta', 256] = KernelConfig(
    block_v=16)


def _product_unit():
  warpgroup = common.gpu_target().capability in WARPGROUP_MMA
  return 'warpgroup' if warpgroup else 'warp'


def _variant(dtype, channels, solves):
  """Name dtype, decay per key channel and delta rule."""
  return dtype + ' channel' * channels + ' delta' * solves


def config_key(kernel: str, variant: str, K: int) -> tuple:
  """Key in CONFIGS of a kernel's config on the GPU in scope."""
  exception = kernel, common.gpu_target().capability, variant, K
  if exception in CONFIGS:
    return exception
  return kernel, _product_unit(), variant.split()[0], K


def config(kernel: str, variant: str, K: int) -> KernelConfig:
  """Return a kernel's config for such rows on the GPU in scope."""
  return CONFIGS[config_key(kernel, variant, K)]


class _Launcher:
  """Calls the kernels with the arguments that they share."""

  def __init__(self, rows, group_N, *, scale, chunk):
    self.q, self.k, self.v, self.g, self.beta = rows
    self.dtype, self.scale = self.q.dtype, scale
    self.channels = self.g is not None and self.g.ndim == 3
    self.decays = self.g is not None and not self.channels
    self.solves = self.beta is not None
    self.variant = _variant(self.dtype.name, self.channels, self.solves)
    short = self.channels and (
        _product_unit(), self.dtype.name) in SHORT_CHUNKS
    self.C = CHUNK // 2 if short else CHUNK
    self.group_N = jnp.repeat(group_N, chunk // self.C)
    self.R, self.H, self.K = self.q.shape
    self.V, self.N = self.v.shape[2], len(self.group_N)

  def shape(self, *shape, dtype=None):
    return jax.ShapeDtypeStruct(shape, dtype or self.dtype)

  def per_row(self, *leading):
    """Shape of one scalar per row and head, float32."""
    return self.shape(*leading, self.R, self.H, dtype=jnp.float32)

  def per_chunk(self, *shape, dtype=None):
    return self.shape(self.N, self.H, *shape, dtype=dtype)

  def group_spans(self, groups):
    """First chunk and number of chunks of each group."""
    of_GN = self.group_N[None] == jnp.arange(groups)[:, None]
    first_G = jnp.argmax(of_GN, 1).astype(jnp.int32)
    return first_G, of_GN.sum(1, dtype=jnp.int32)

  def config(self, kernel):
    return config(kernel, self.variant, self.K)

  def first_configured(self, *kernels):
    """The first of the kernels that has a config for these rows."""
    return next(
        kernel for kernel in kernels
        if config_key(kernel.__name__, self.variant, self.K) in CONFIGS)

  def __call__(self, kernel, *arrays, out, grid=()):
    """Run a kernel on all chunks and heads, or on `grid`."""
    config = self.config(kernel.__name__)
    substitution = min(SUBSTITUTION[self.dtype.name], self.C)
    constants = dict(
        N=self.N, H=self.H, K=self.K, V=self.V, C=self.C,
        LEVELS=self.C.bit_length() - 1, B=substitution, BK=config.block_k,
        BV=config.block_v, scale=self.scale, decays=self.decays,
        channels=self.channels, solves=self.solves,
        precision='tf32x3' if self.dtype == jnp.float32 else 'tf32')
    # A pointer for operands that are absent and never loaded.
    arrays = [self.group_N if x is None else x for x in arrays]
    return triton_call.call(
        kernel, *arrays, out=out, grid=grid or (self.N, self.H),
        warps=config.warps, stages=config.stages,
        **{n: x for n, x in constants.items() if n in kernel.arg_names})

  def decayed(self):
    """Return q and k as the other kernels take them, with their decays."""
    from mom_jax.pallas.chunk_memory.triton import kernels_channel as kernels
    if not self.channels:
      return _Decayed(self.q, self.k)
    rows = self.shape(*self.q.shape)
    scores, q, k, chunk_decay = self(
        kernels.channel_scores, self.q, self.k, self.g, self.group_N,
        out=[self.per_chunk(self.C, self.C), rows, rows,
             self.per_chunk(self.K, dtype=jnp.float32)])
    keys = k_start = None
    if self.solves:
      keys, k_start = self(
          kernels.channel_keys, self.k, self.g, self.group_N,
          out=[self.per_chunk(self.C, self.C, dtype=jnp.float32), rows])
    return _Decayed(q, k, k_start, chunk_decay, scores, keys)


class _Decayed(NamedTuple):
  """Rows with decay per key channel applied; see kernels.py."""

  q: jax.Array
  k: jax.Array
  k_start: jax.Array | None = None
  chunk_decay: jax.Array | None = None
  scores: jax.Array | None = None
  keys: jax.Array | None = None


class _Residuals(NamedTuple):
  """Arrays kept for the backward pass; y and inverse of the delta rule."""

  before: jax.Array
  y: jax.Array | None
  inverse: jax.Array | None


def _fwd(
    q, k, v, log_decay, beta, removal_key, value_decay, state, group_N, *,
    scale, chunk, exclusive, keep,
):
  from mom_jax.pallas.chunk_memory.triton import kernels, kernels_hbm_state
  launch = _Launcher((q, k, v, log_decay, beta), group_N, scale=scale,
                     chunk=chunk)
  H, V, N, G = launch.H, launch.V, launch.N, len(state)
  inverse = None
  rows = launch.decayed()
  if launch.solves:
    inverse, = launch(
        kernels.chunk_inverse, rows.k, log_decay, rows.keys, beta,
        launch.group_N, out=[launch.per_chunk(launch.C, launch.C)])
  # Without the delta rule Y is V, and a dummy takes the place of the result.
  y_shape = launch.shape(*(v.shape if launch.solves else (1, 1, 1)))
  states = launch.first_configured(
      kernels.chunk_states, kernels_hbm_state.chunk_states_hbm)
  before, y, final = launch(
      states, rows.k, rows.k_start, v, log_decay, rows.chunk_decay, beta,
      inverse, *launch.group_spans(G), state,
      out=[launch.per_chunk(launch.K, V), y_shape,
           launch.shape(*state.shape, dtype=jnp.float32)],
      grid=(V // launch.config(states.__name__).block_v, H, G))
  y = y if launch.solves else None
  o_RHV, = launch(
      kernels.chunk_outputs, rows.q, rows.k, log_decay, rows.scores,
      v if y is None else y, before, launch.group_N,
      out=[launch.shape(*v.shape)],
      grid=(N, H, V // launch.config('chunk_outputs').block_v))
  return (o_RHV, final), _Residuals(before, y, inverse) if keep else None


def _bwd(
    q, k, v, log_decay, beta, removal_key, value_decay, state, group_N,
    residuals, do_RHV, dstate_GHKV, *, scale, chunk, exclusive,
):
  from mom_jax.pallas.chunk_memory.triton import kernels_backward as kernels
  from mom_jax.pallas.chunk_memory.triton import kernels_hbm_state
  launch = _Launcher((q, k, v, log_decay, beta), group_N, scale=scale,
                     chunk=chunk)
  K, V = launch.K, launch.V
  before, y, inverse = residuals
  y = v if y is None else y
  values = launch.shape(*v.shape)
  pairs = launch.per_chunk(launch.C, launch.C)
  rows = launch.decayed()
  dy_local, = launch(
      kernels.chunk_dy_local, q, k, log_decay, rows.scores, do_RHV,
      launch.group_N, out=[values])
  dstates = launch.first_configured(
      kernels.chunk_dstates, kernels_hbm_state.chunk_dstates_hbm)
  dafter, db, dinitial = launch(
      dstates, rows.q, rows.k, rows.k_start, log_decay, rows.chunk_decay, beta,
      inverse, do_RHV, dy_local, *launch.group_spans(len(state)), dstate_GHKV,
      out=[launch.per_chunk(K, V), values,
           launch.shape(*state.shape, dtype=jnp.float32)],
      grid=(V // launch.config(dstates.__name__).block_v, launch.H, len(state)))
  dscore, dkeys, dv, dsum, dbeta = launch(
      kernels.chunk_dpairs, q, k, v, log_decay, rows.keys, beta, y, do_RHV, db,
      launch.group_N,
      out=[pairs, pairs, values, launch.per_row(), launch.per_row()])
  arrays = _ChunkCotangents(before, dafter, y, do_RHV, db, dscore, dkeys)
  dq, dk, dlog_decay, dbeta_rows = (
      _channel_dqk(launch, arrays) if launch.channels
      else _chunk_dqk(launch, arrays, dsum))
  return (
      dq, dk, dv, None if log_decay is None else dlog_decay,
      dbeta + dbeta_rows if launch.solves else None, None, None, dinitial)


class _ChunkCotangents(NamedTuple):
  """Arrays from which the cotangents of rows are computed."""

  before: jax.Array
  dafter: jax.Array
  y: jax.Array
  do: jax.Array
  db: jax.Array
  dscore: jax.Array
  dkeys: jax.Array


def _channel_dqk(launch, arrays):
  from mom_jax.pallas.chunk_memory.triton import kernels_channel as kernels
  rows = launch.shape(*launch.q.shape)
  wide = launch.shape(*launch.q.shape, dtype=jnp.float32)
  dk_inverse, dg_inverse, dbeta = None, None, None
  if launch.solves:
    parts = launch.K // launch.config('channel_dk_inverse').block_k
    dk_inverse, dg_inverse, dbeta = launch(
        kernels.channel_dk_inverse, launch.k, launch.g, launch.beta,
        arrays.before, arrays.db, arrays.dkeys, launch.group_N,
        out=[wide, wide, launch.per_row(parts)],
        grid=(launch.N, launch.H, parts))
    dbeta = dbeta.sum(0)
  dq, dk, dg = launch(
      kernels.channel_dqk, launch.q, launch.k, launch.g, arrays.before,
      arrays.dafter, arrays.y, arrays.do, arrays.dscore, dk_inverse, dg_inverse,
      launch.group_N, out=[rows, rows, wide],
      grid=(launch.N, launch.H,
            launch.K // launch.config('channel_dqk').block_k))
  return dq, dk, dg, dbeta


def _chunk_dqk(launch, arrays, dsum):
  from mom_jax.pallas.chunk_memory.triton import kernels_backward as kernels
  rows = launch.shape(*launch.q.shape)
  parts = launch.K // launch.config('chunk_dqk').block_k
  dq, dk, dsum_parts, dchunk, dbeta = launch(
      kernels.chunk_dqk, launch.q, launch.k, launch.g, launch.beta,
      arrays.before, arrays.dafter, arrays.y, arrays.do, arrays.db,
      arrays.dscore, arrays.dkeys, launch.group_N,
      out=[rows, rows, launch.per_row(parts),
           launch.shape(parts, launch.N, launch.H, dtype=jnp.float32),
           launch.per_row(parts)],
      grid=(launch.N, launch.H, parts))
  dsum_NCH = (dsum + dsum_parts.sum(0)).reshape(
      launch.N, launch.C, launch.H)
  later_NCH = jnp.cumsum(dsum_NCH[:, ::-1], 1)[:, ::-1]
  dg_NCH = later_NCH + dchunk.sum(0)[:, None]
  return dq, dk, dg_NCH.reshape(launch.R, launch.H), dbeta.sum(0)


def triton_too_old(capability: int) -> str | None:
  """Return None, or why the installed Triton cannot compile for a GPU."""
  found, required = triton_call.triton_version(), MIN_TRITON.get(capability)
  if required is None or found is None:
    return None
  if tuple(int(n) for n in found.split('.')[:2]) >= required:
    return None
  return (
      f'Triton {found} cannot compile for sm_{capability}; take'
      f' {".".join(map(str, required))} or newer.')


def _supported(
    q, k, v, log_decay, beta, removal_key, value_decay, state, group_N, *,
    scale, chunk, exclusive,
):
  del state, group_N, scale
  reason = triton_call.missing()
  if reason is not None:
    return reason
  if chunk == 1:
    return decode.supported(q, k, v)
  dtypes = {x.dtype.name for x in (q, k, v)}
  if len(dtypes) > 1 or q.dtype.name not in SUBSTITUTION:
    return f'q, k and v must all be one of {tuple(SUBSTITUTION)}; got {dtypes}.'
  for name, size in (('K', q.shape[2]), ('V', v.shape[2])):
    if size not in SIZES:
      return f'{name}={size} must be one of {SIZES}.'
  capability = common.gpu_target().capability
  if capability not in CAPABILITIES:
    return f'sm_{capability} has no configs; known: {CAPABILITIES}.'
  reason = triton_too_old(capability)
  if reason is not None:
    return reason
  if chunk % CHUNK:
    return f'chunk={chunk} must be a multiple of {CHUNK}.'
  variants = {
      'removal_key_RHK': removal_key is not None,
      'value_decay_RHV': value_decay is not None,
      'exclusive': exclusive}
  for name, given in variants.items():
    if given:
      return f'no GPU kernel has {name} yet.'
  return None


BACKEND = decoding.with_decoding(
    common.Backend('gpu', _supported, _fwd, _bwd), decode.decode)
