"""Naive ways to compute the operations of mom_jax/pallas, to compare with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def places(group_N: np.ndarray, lengths: tuple[int, ...], chunk: int):
  """[T, G]: slot of row t of memory g, the number of slots past its last."""
  group_R = np.repeat(np.asarray(group_N), chunk)
  slot_TG = np.full((max(lengths), len(lengths)), len(group_R), np.int32)
  for group, length in enumerate(lengths):
    slot_TG[:length, group] = np.flatnonzero(group_R == group)[:length]
  return slot_TG


def scan_over_time(q, k, v, log_decay, beta, state_GHKV, slot_TG):
  """chunk_memory in a loop over time, one row of every memory a turn.

  In float32, without documents inside a memory; `places` gives `slot_TG`.
  """

  def by_time(x_R):
    if x_R is None:
      return None
    x_TG = x_R.at[slot_TG].get(mode='fill', fill_value=0)
    return x_TG.astype(jnp.float32)

  def step(s_GHKV, row):
    q_GHK, k_GHK, v_GHV, g, beta_GH = row
    if g is not None:
      s_GHKV *= jnp.exp(g.reshape(*g.shape, *[1] * (4 - g.ndim)))
    if beta_GH is not None:
      read_GHV = jnp.einsum('ghk,ghkv->ghv', k_GHK, s_GHKV)
      v_GHV = beta_GH[..., None] * (v_GHV - read_GHV)
    s_GHKV += k_GHK[..., None] * v_GHV[:, :, None]
    return s_GHKV, jnp.einsum('ghk,ghkv->ghv', q_GHK, s_GHKV)

  rows = tuple(by_time(x) for x in (q, k, v, log_decay, beta))
  o_TGHV = jax.lax.scan(step, state_GHKV, rows)[1] * q.shape[2] ** -0.5
  o_RHV = jnp.zeros(v.shape, jnp.float32)
  return o_RHV.at[slot_TG].set(o_TGHV, mode='drop').astype(v.dtype)


def one_hot_einsum(x, w, group_sizes):
  """grouped_matmul as dense algebra: every row times every matrix."""
  end_G = jnp.cumsum(group_sizes)
  row_R1 = jnp.arange(len(x))[:, None]
  own_RG = (row_R1 >= (end_G - group_sizes)[None]) & (row_R1 < end_G[None])
  return jnp.einsum('rg,rd,gdf->rf', own_RG.astype(x.dtype), x, w)


def chunks_by_solve(q, k, v, log_decay, beta, chunk=64):
  """Gated delta rule in chunks with a triangular solve, one sequence a row.

  The form MaxText trains Qwen3-Next with: everything within chunks at once,
  then a scan over them. q, k, v [B T H D], log_decay, beta [B T H].
  """
  B, T, H, D = q.shape
  N, C = T // chunk, chunk

  def cut(x):  # [N, B, H, C, ...]
    x = x.astype(jnp.float32).reshape(B, N, C, H, *x.shape[3:])
    return jnp.moveaxis(x, (1, 3), (0, 2))

  q, k, v, g, beta = (cut(x) for x in (q, k, v, log_decay, beta))
  g = jnp.cumsum(g, -1)
  row, column = jnp.arange(C)[:, None], jnp.arange(C)[None]
  before = jnp.broadcast_to(row > column, (N, B, H, C, C))
  decay = jnp.exp(jnp.where(before, g[..., :, None] - g[..., None, :], 0))
  A = jnp.einsum('nbhik,nbhjk->nbhij', k * beta[..., None], k)
  A = jnp.where(before, A * decay, 0) + jnp.broadcast_to(
      (row == column).astype(jnp.float32), A.shape)
  solve = lambda b: jax.scipy.linalg.solve_triangular(A, b, lower=True)
  u = solve(v * beta[..., None])
  w = solve(k * (beta * jnp.exp(g))[..., None])
  scores = jnp.einsum('nbhik,nbhjk->nbhij', q, k) * decay
  scores = jnp.where(before | (row == column)[None, None, None], scores, 0)

  def step(s_BHKV, chunk):
    q, k, u, w, g, scores = chunk
    new = u - jnp.einsum('bhck,bhkv->bhcv', w, s_BHKV)
    read = jnp.einsum('bhck,bhkv->bhcv', q * jnp.exp(g)[..., None], s_BHKV)
    out = read + jnp.einsum('bhij,bhjv->bhiv', scores, new)
    last = g[..., -1:]
    s_BHKV *= jnp.exp(last)[..., None]
    k *= jnp.exp(last - g)[..., None]
    return s_BHKV + jnp.einsum('bhck,bhcv->bhkv', k, new), out

  zeros = jnp.zeros((B, H, D, v.shape[-1]), jnp.float32)
  out = jax.lax.scan(step, zeros, (q, k, u, w, g, scores))[1] * D**-0.5
  return jnp.moveaxis(out, (0, 2), (1, 3)).reshape(B, T, H, -1)
