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
  """grouped_matmul as dense algebra: every row meets every matrix."""
  end_G = jnp.cumsum(group_sizes)
  row_R1 = jnp.arange(len(x))[:, None]
  own_RG = (row_R1 >= (end_G - group_sizes)[None]) & (row_R1 < end_G[None])
  return jnp.einsum('rg,rd,gdf->rf', own_RG.astype(x.dtype), x, w)
