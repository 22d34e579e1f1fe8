"""Signature, checks and gradient of chunk_memory; backends do the work."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mom_jax.pallas import common
from mom_jax.pallas.chunk_memory import reference, schedule, tpu, triton, xla

# Best first.
BACKENDS = {b.name: b for b in (
    tpu.BACKEND, triton.BACKEND, xla.BACKEND, reference.BACKEND)}


class _Settings(NamedTuple):
  backend: common.Backend
  scale: float
  chunk: int
  exclusive: bool

  @property
  def static(self):
    return dict(
        scale=self.scale, chunk=self.chunk, exclusive=self.exclusive)


@common.takes_numpy
def chunk_memory(
    q: Float[Array, 'R H K'],
    k: Float[Array, 'R H K'],
    v: Float[Array, 'R H V'],
    log_decay: Float[Array, 'R H'] | Float[Array, 'R H K'] | None,
    beta: Float[Array, 'R H'] | None,
    *,
    group_N: Int[Array, ' N'],
    initial_state_GHKV: Float[Array, 'G H K V'] | None = None,
    segment_R: Int[Array, ' R'] | None = None,
    num_groups: int | None = None,
    removal_key_RHK: Float[Array, 'R H K'] | None = None,
    value_decay_RHV: Float[Array, 'R H V'] | None = None,
    exclusive: bool = False,
    scale: float | None = None,
    chunk: int = 64,
    backend: str = 'auto',
) -> tuple[Float[Array, 'R H V'], Float[Array, 'G H K V']]:
  """Run a linear memory over grouped rows: an output per row, the last states.

    S = exp(g_t) S;  u = beta_t (v_t - k_t S);  S = S + k_t^T u
    o_t = scale * q_t S

  with u = v_t if beta is None. Three variants for rules that need them:

    u = v_t - e_t S              removal_key_RHK: the removed value is looked up
                                 under another key than the new one is written
    S = S exp(h_t)               value_decay_RHV: value channels decay
    o_t = scale * q_t S_{t-1}    exclusive: row t reads the state before its own
                                 decay and update

  Rows of a group are contiguous, in time order, padded to whole chunks with
  identity rows (k = v = 0, beta = 0, g = 0).

  Args:
    q: queries.
    k: keys; the delta rule expects them l2-normalised.
    v: values.
    log_decay: g <= 0, natural log per token and head, or per key channel; None
      is 0.
    beta: update strength of the delta rule; None is the additive update.
    group_N: group of each chunk. A group's chunks are consecutive; -1 marks an
      unused chunk, whose output is zero.
    initial_state_GHKV: state before each group's first row; None is zeros.
    segment_R: document of each row; the state is reset where it changes inside
      a group. Rows of segment 0 are padding: they never change it. The initial
      state belongs to the document of the group's first row.
    num_groups: G, required without an initial state.
    removal_key_RHK: e, replaces beta; beta_t k_t gives the delta rule, with
      beta_t v_t as values. Zero on padding.
    value_decay_RHV: h <= 0, natural log; replaces log_decay, and goes with the
      additive update alone.
    exclusive: the output of a row excludes the row itself.
    scale: factor of the output; None is K^-0.5.
    chunk: C, rows per chunk, a power of two; N * C = R.
    backend: a key of BACKENDS, or 'auto' for the best that can run here.

  Returns:
    (o, state): o in v's dtype; each group's last state, float32, which is the
    initial one for a group without chunks.

  Raises:
    ValueError: shapes, chunk or groups do not fit together.
    NotImplementedError: the named backend cannot run this.

  Differentiable once, in reverse, in every float argument.

  Example, two sequences of 100 rows, padded to two chunks each:

    >>> import jax.numpy as jnp
    >>> from mom_jax import pallas
    >>> rows = lambda *shape: jnp.ones((256, *shape)) / 8
    >>> o, state = pallas.chunk_memory(
    ...     rows(2, 32), rows(2, 32), rows(2, 16), -rows(2), rows(2),
    ...     group_N=jnp.array([0, 0, 1, 1]), num_groups=2)
    >>> o.shape, state.shape
    ((256, 2, 16), (2, 2, 32, 16))

  Source: arXiv 2412.06464 (gated delta rule) and 2406.06484 (its chunk form);
  states here are K x V.
  """
  groups = _check(
      q, k, v, log_decay, beta, group_N, initial_state_GHKV, num_groups, chunk
  )
  _check_variants(q, v, log_decay, beta, removal_key_RHK, value_decay_RHV)
  R, H, K = q.shape
  if segment_R is not None and segment_R.shape != (R,):
    raise ValueError(f'segment_R must be {(R,)}; got {segment_R.shape}.')
  if segment_R is not None:
    start_R = schedule.document_starts(segment_R, group_N)

    def reset(log_decay):
      start = start_R.reshape(R, *[1] * (log_decay.ndim - 1))
      return jnp.where(start, schedule.RESET, _float32(log_decay))

    if value_decay_RHV is not None:
      value_decay_RHV = reset(value_decay_RHV)
    else:
      log_decay = reset(jnp.zeros((R, H)) if log_decay is None else log_decay)
    if exclusive:  # a document's first row reads nothing of the one before
      q = jnp.where(start_R[:, None, None], 0, q)
  if initial_state_GHKV is None:
    initial_state_GHKV = jnp.zeros((groups, H, K, v.shape[2]), jnp.float32)
  settings = dict(
      scale=K**-0.5 if scale is None else scale, chunk=chunk,
      exclusive=exclusive)
  operands = common.vary_alike(
      q, k, v, *map(_float32, (
          log_decay, beta, removal_key_RHK, value_decay_RHV,
          initial_state_GHKV)), group_N)
  chosen = common.select(
      'chunk_memory', BACKENDS, backend, *operands, **settings
  )
  return _run(_Settings(chosen, **settings), *operands)


def _float32(x):
  return None if x is None else x.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(settings, *operands):
  out, _ = settings.backend.fwd(*operands, **settings.static, keep=False)
  return out


def _fwd(settings, *operands):
  out, kept = settings.backend.fwd(*operands, **settings.static, keep=True)
  return out, (operands, kept)


def _bwd(settings, residuals, cotangents):
  operands, kept = residuals
  grads = settings.backend.bwd(
      *operands, kept, *cotangents, **settings.static
  )
  grads = (
      None if x is None else dx.astype(x.dtype)
      for x, dx in zip(operands, grads)
  )
  return (*grads, None)  # no gradient for group_N


_run.defvjp(_fwd, _bwd)


def _check_variants(q, v, log_decay, beta, removal_key, value_decay):
  if removal_key is not None and (
      beta is not None or removal_key.shape != q.shape):
    raise ValueError(
        f'removal_key_RHK must be {q.shape} and replaces beta; got'
        f' {removal_key.shape}' + (' and a beta.' if beta is not None else '.')
    )
  others = (log_decay, beta, removal_key)
  if value_decay is not None and (
      value_decay.shape != v.shape or any(x is not None for x in others)):
    raise ValueError(
        f'value_decay_RHV must be {v.shape} without log_decay, beta and'
        f' removal_key_RHK; got {value_decay.shape}'
        + (' and one of them.' if any(x is not None for x in others) else '.')
    )


def _check(q, k, v, log_decay, beta, group_N, state, num_groups, chunk):
  """Raise for operands that do not fit; return the number of groups."""
  if q.ndim != 3 or k.shape != q.shape or v.shape[:2] != q.shape[:2]:
    raise ValueError(
        'q and k must be [R, H, K] and v [R, H, V];'
        f' got {q.shape}, {k.shape}, {v.shape}.'
    )
  R, H, K = q.shape
  if log_decay is not None and log_decay.shape not in ((R, H), (R, H, K)):
    raise ValueError(
        f'log_decay must be {(R, H)} or {(R, H, K)}; got {log_decay.shape}.'
    )
  if beta is not None and beta.shape != (R, H):
    raise ValueError(f'beta must be {(R, H)}; got {beta.shape}.')
  if chunk < 1 or chunk & (chunk - 1):
    raise ValueError(f'chunk={chunk} must be a power of two.')
  if len(group_N) * chunk != R:
    raise ValueError(
        f'{len(group_N)} chunks of {chunk} rows are not the {R} rows given;'
        ' pad each group to whole chunks with k = v = beta = log_decay = 0.'
    )
  if state is None and num_groups is None:
    raise ValueError('pass num_groups or initial_state_GHKV.')
  groups = num_groups if state is None else len(state)
  if num_groups not in (None, groups):
    raise ValueError(
        f'num_groups={num_groups}, but the initial state has {groups}.'
    )
  if state is not None and state.shape != (groups, H, K, v.shape[2]):
    raise ValueError(
        f'initial_state_GHKV must be {(groups, H, K, v.shape[2])};'
        f' got {state.shape}.'
    )
  return groups
