"""Triton kernels of chunk_memory, backward; conventions of kernels.py."""

from typing import no_type_check

import triton
import triton.language as tl

from mom_jax.pallas.chunk_memory.triton.kernels import (
  at_channels,
  at_rows,
  at_square,
  at_state,
  at_tile,
  at_transposed,
  pair_decay,
  pair_decay_transposed,
  to_chunk_end,
)


@triton.jit
@no_type_check
def chunk_dy_local(
    q, k, g, scores, do, group_N, dy_local, H: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    scale: tl.constexpr, decays: tl.constexpr, channels: tl.constexpr,
    precision: tl.constexpr,
):
  """Compute P^T dO: the part of dY from outputs of the same chunk."""
  n, h = tl.program_id(0), tl.program_id(1)
  dtype = q.dtype.element_ty
  if tl.load(group_N + n) >= 0:
    rows = at_rows(n, h, H, C)
    # Transposed: [written row, reading row].
    if channels:
      p_CC = tl.load(scores + at_transposed(n, h, H, C)).to(tl.float32)
    else:
      p_CC = tl.zeros((C, C), tl.float32)
      for first_k in range(0, K, BK):
        q_CB = tl.load(q + at_tile(rows, K, first_k, BK))
        k_CB = tl.load(k + at_tile(rows, K, first_k, BK))
        p_CC = tl.dot(k_CB, tl.trans(q_CB), p_CC, input_precision=precision)
      if decays:
        p_CC *= pair_decay_transposed(tl.load(g + rows), C)
      else:
        i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        p_CC = tl.where(j >= i, p_CC, 0.0)
    p_CC = (p_CC * scale).to(dtype)
    for first_v in range(0, V, BV):
      do_CB = tl.load(do + at_tile(rows, V, first_v, BV))
      d_CB = tl.dot(p_CC, do_CB, input_precision=precision)
      tl.store(dy_local + at_tile(rows, V, first_v, BV), d_CB.to(dtype))


@triton.jit
@no_type_check
def chunk_dstates(
    q, k, k_start, g, chunk_decay, beta, inverse, do, dy_local, first_G,
    count_G, dfinal, dafter, db, dinitial, H: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, scale: tl.constexpr,
    decays: tl.constexpr, channels: tl.constexpr, solves: tl.constexpr,
    precision: tl.constexpr,
):
  """Compute cotangents of the state after each chunk, B, the initial state.

  Without the delta rule B is V.
  """
  first_v, h, group = tl.program_id(0) * BV, tl.program_id(1), tl.program_id(2)
  dtype = k.dtype.element_ty
  state_at = at_state(group, h, H, K, V, 0, K, first_v, BV)
  ds_KB = tl.load(dfinal + state_at)
  start, count = tl.load(first_G + group), tl.load(count_G + group)
  for step in range(0, count):
    n = start + count - 1 - step
    rows = at_rows(n, h, H, C)
    tl.store(
        dafter + at_state(n, h, H, K, V, 0, K, first_v, BV), ds_KB.to(dtype))
    k_CK = tl.load(k + at_tile(rows, K, 0, K))
    dy_CB = tl.dot(k_CK, ds_KB.to(dtype), input_precision=precision)
    if decays:
      dy_CB *= to_chunk_end(g, rows, H, C)[:, None]
    dy_CB += tl.load(dy_local + at_tile(rows, V, first_v, BV)).to(tl.float32)
    do_CB = tl.load(do + at_tile(rows, V, first_v, BV)).to(tl.float32) * scale
    if decays:
      g_C = tl.load(g + rows)
      to_row_C = tl.exp(tl.cumsum(g_C, 0))
      do_CB *= to_row_C[:, None]
      ds_KB *= tl.exp(tl.sum(g_C, 0))
    if channels:
      ds_KB *= tl.load(chunk_decay + at_channels(n, h, H, K, 0, K))[:, None]
    q_CK = tl.load(q + at_tile(rows, K, 0, K))
    ds_KB = tl.dot(
        tl.trans(q_CK), do_CB.to(dtype), ds_KB, input_precision=precision)
    if solves:
      t_CC = tl.load(inverse + at_transposed(n, h, H, C))
      dy_CB = tl.dot(t_CC, dy_CB.to(dtype), input_precision=precision)
      dstored_CB = dy_CB * -tl.load(beta + rows)[:, None]
      if decays:
        dstored_CB *= to_row_C[:, None]
      if channels:
        k_CK = tl.load(k_start + at_tile(rows, K, 0, K))
      ds_KB = tl.dot(
          tl.trans(k_CK), dstored_CB.to(dtype), ds_KB,
          input_precision=precision)
    tl.store(db + at_tile(rows, V, first_v, BV), dy_CB.to(dtype))
  tl.store(dinitial + state_at, ds_KB)


@triton.jit
@no_type_check
def _scores(
    a, b, rows, X: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    precision: tl.constexpr,
):
  """Return a_i . b_j of a chunk's rows."""
  sum_CC = tl.zeros((C, C), tl.float32)
  for first in range(0, X, B):
    a_CB = tl.load(a + at_tile(rows, X, first, B))
    b_CB = tl.load(b + at_tile(rows, X, first, B))
    sum_CC = tl.dot(a_CB, tl.trans(b_CB), sum_CC, input_precision=precision)
  return sum_CC


@triton.jit
@no_type_check
def chunk_dpairs(
    q, k, v, g, keys, beta, y, do, db, group_N, dscore, dkeys, dv, dsum, dbeta,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, scale: tl.constexpr,
    decays: tl.constexpr, channels: tl.constexpr, solves: tl.constexpr,
    precision: tl.constexpr,
):
  """Compute cotangents from pairs of rows of a chunk; zero in unused ones.

  Those of q_i . k_j (lower) and k_i . k_j (strictly lower), of V, and the
  pairs' parts of those of the summed log decay and of beta.
  """
  n, h = tl.program_id(0), tl.program_id(1)
  dtype = q.dtype.element_ty
  rows = at_rows(n, h, H, C)
  i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
  zero_C = tl.zeros((C,), tl.float32)
  if tl.load(group_N + n) >= 0:
    if decays:
      decay_CC = pair_decay(tl.load(g + rows), C)
    else:
      decay_CC = tl.where(i >= j, 1.0, 0.0)
    d_CC = _scores(do, y, rows, V, BV, C, precision) * decay_CC * scale
    tl.store(dscore + at_square(n, h, H, C), d_CC.to(dtype))
    if decays:
      d_CC *= _scores(q, k, rows, K, BK, C, precision)
      dsum_C = tl.sum(d_CC, 1) - tl.sum(d_CC, 0)
    if solves:
      b_C = tl.load(beta + rows)
      d_CC = _scores(db, y, rows, V, BV, C, precision) * -decay_CC
      d_CC = tl.where(i > j, d_CC, 0.0)
      tl.store(
          dkeys + at_square(n, h, H, C), (d_CC * b_C[:, None]).to(dtype))
      if channels:
        d_CC *= tl.load(keys + at_square(n, h, H, C))
      else:
        d_CC *= _scores(k, k, rows, K, BK, C, precision)
      db_C = tl.sum(d_CC, 1)
      if decays:
        dsum_C += db_C * b_C - tl.sum(d_CC * b_C[:, None], 0)
      for first_v in range(0, V, BV):
        tile_at = at_tile(rows, V, first_v, BV)
        db_CB = tl.load(db + tile_at).to(tl.float32)
        db_C += tl.sum(db_CB * tl.load(v + tile_at).to(tl.float32), 1)
        tl.store(dv + tile_at, (db_CB * b_C[:, None]).to(dtype))
      tl.store(dbeta + rows, db_C)
    else:
      for first_v in range(0, V, BV):
        tile_at = at_tile(rows, V, first_v, BV)
        tl.store(dv + tile_at, tl.load(db + tile_at))
    if decays:
      tl.store(dsum + rows, dsum_C)
  else:
    for first_v in range(0, V, BV):
      tl.store(dv + at_tile(rows, V, first_v, BV), tl.zeros((C, BV), dtype))
    if decays:
      tl.store(dsum + rows, zero_C)
    if solves:
      tl.store(dbeta + rows, zero_C)


@triton.jit
@no_type_check
def chunk_dqk(
    q, k, g, beta, before, dafter, y, do, db, dscore, dkeys, group_N, dq, dk,
    dsum, dchunk, dbeta, N: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    scale: tl.constexpr, decays: tl.constexpr, solves: tl.constexpr,
    precision: tl.constexpr,
):
  """Compute dQ and dK, and parts of other cotangents per block of channels.

  Those, [K / BK, ...], are of the summed log decay, of its sum over the chunk,
  and of beta.
  """
  n, h, partial = tl.program_id(0), tl.program_id(1), tl.program_id(2)
  dtype = q.dtype.element_ty
  rows = at_rows(n, h, H, C)
  tile_at = at_tile(rows, K, partial * BK, BK)
  partial_at = rows + partial.to(tl.int64) * (N * C * H)
  chunk = (partial * N + n) * H + h
  if tl.load(group_N + n) >= 0:
    dq_CB = tl.zeros((C, BK), tl.float32)
    dk_CB = tl.zeros((C, BK), tl.float32)
    dstored_CB = tl.zeros((C, BK), tl.float32)
    dchunk_sum = 0.0
    for first_v in range(0, V, BV):
      values_at = at_tile(rows, V, first_v, BV)
      state_at = at_state(n, h, H, K, V, partial * BK, BK, first_v, BV)
      s_BB, ds_BB = tl.load(before + state_at), tl.load(dafter + state_at)
      dq_CB = tl.dot(
          tl.load(do + values_at), tl.trans(s_BB), dq_CB,
          input_precision=precision)
      dk_CB = tl.dot(
          tl.load(y + values_at), tl.trans(ds_BB), dk_CB,
          input_precision=precision)
      if solves:
        dstored_CB = tl.dot(
            tl.load(db + values_at), tl.trans(s_BB), dstored_CB,
            input_precision=precision)
      if decays:
        dchunk_sum += tl.sum(s_BB.to(tl.float32) * ds_BB.to(tl.float32))
    q_CB, k_CB = tl.load(q + tile_at), tl.load(k + tile_at)
    dq_CB *= scale
    if decays:
      g_C = tl.load(g + rows)
      to_row_C = tl.exp(tl.cumsum(g_C, 0))
      dq_CB *= to_row_C[:, None]
      dk_CB *= to_chunk_end(g, rows, H, C)[:, None]
      dend_C = tl.sum(dk_CB * k_CB.to(tl.float32), 1)
      dsum_C = tl.sum(dq_CB * q_CB.to(tl.float32), 1) - dend_C
      tl.store(
          dchunk + chunk,
          tl.sum(dend_C, 0) + dchunk_sum * tl.exp(tl.sum(g_C, 0)))
    if solves:
      b_C = tl.load(beta + rows)
      if decays:
        dstored_CB *= to_row_C[:, None]
      dbeta_C = -tl.sum(dstored_CB * k_CB.to(tl.float32), 1)
      tl.store(dbeta + partial_at, dbeta_C)
      dk_CB -= dstored_CB * b_C[:, None]
      if decays:
        dsum_C += dbeta_C * b_C
      both_CC = tl.load(dkeys + at_square(n, h, H, C)).to(tl.float32)
      both_CC += tl.load(dkeys + at_transposed(n, h, H, C)).to(tl.float32)
      dk_CB = tl.dot(both_CC.to(dtype), k_CB, dk_CB, input_precision=precision)
    if decays:
      tl.store(dsum + partial_at, dsum_C)
    dscore_CC = tl.load(dscore + at_square(n, h, H, C))
    dq_CB = tl.dot(dscore_CC, k_CB, dq_CB, input_precision=precision)
    transposed_CC = tl.load(dscore + at_transposed(n, h, H, C))
    dk_CB = tl.dot(transposed_CC, q_CB, dk_CB, input_precision=precision)
    tl.store(dq + tile_at, dq_CB.to(dtype))
    tl.store(dk + tile_at, dk_CB.to(dtype))
  else:
    tl.store(dq + tile_at, tl.zeros((C, BK), dtype))
    tl.store(dk + tile_at, tl.zeros((C, BK), dtype))
    if decays:
      tl.store(dsum + partial_at, tl.zeros((C,), tl.float32))
      tl.store(dchunk + chunk, 0.0)
    if solves:
      tl.store(dbeta + partial_at, tl.zeros((C,), tl.float32))
