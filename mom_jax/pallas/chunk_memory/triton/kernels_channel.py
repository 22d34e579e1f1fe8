"""Triton kernels of chunk_memory with decay per key channel.

Conventions of kernels.py; g is [R, H, K]. For each h = 1, 2, ..., C / 2, rows
are paired where j and i lie in two neighbouring runs of h rows: q_i takes the
decay from the start of its run, k_j that to the end of its run. Both are sums
of log decays over rows in between, so nothing overflows or cancels, and each h
is one product.
"""

from typing import no_type_check

import triton
import triton.language as tl

from mom_jax.pallas.chunk_memory.triton.kernels import (
  at_channels,
  at_diagonal,
  at_rows,
  at_square,
  at_state,
  at_tile,
  at_transposed,
)


@triton.jit
@no_type_check
def from_run_start(
    g, tile_at, h: tl.constexpr, C: tl.constexpr, B: tl.constexpr,
):
  """Decay from the start of each run of h rows to each of its rows."""
  g_CB = tl.load(g + tile_at)
  runs = tl.cumsum(tl.reshape(g_CB, (C // h, h, B)), 1)
  return tl.exp(tl.reshape(runs, (C, B)))


@triton.jit
@no_type_check
def to_run_end(
    g, tile_at, row_stride: tl.constexpr, h: tl.constexpr, C: tl.constexpr,
    B: tl.constexpr,
):
  """Decay from each row of a run of h rows to the run's end."""
  not_last = (tl.arange(0, C) % h < h - 1)[:, None]
  g_CB = tl.load(g + tile_at + row_stride, mask=not_last, other=0.0)
  runs = tl.cumsum(tl.reshape(g_CB, (C // h, h, B)), 1, reverse=True)
  return tl.exp(tl.reshape(runs, (C, B)))


@triton.jit
@no_type_check
def neighbours(h: tl.constexpr, C: tl.constexpr, transposed: tl.constexpr):
  """Mask of pairs (i, j) with i in an odd run of h rows, j in the run before.
  """
  i, j = tl.arange(0, C)[:, None] // h, tl.arange(0, C)[None, :] // h
  if transposed:
    i, j = j, i
  return (i % 2 == 1) & (i == j + 1)


@triton.jit
@no_type_check
def channel_scores(
    q, k, g, group_N, scores, q_decayed, k_decayed, chunk_decay,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, precision: tl.constexpr,
):
  """Compute P, decayed Q and K, and the decay of the whole chunk."""
  n, h = tl.program_id(0), tl.program_id(1)
  dtype = q.dtype.element_ty
  i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
  if tl.load(group_N + n) >= 0:
    rows = at_rows(n, h, H, C)
    p_CC = tl.zeros((C, C), tl.float32)
    for first_k in range(0, K, BK):
      tile_at = at_tile(rows, K, first_k, BK)
      q_CB = tl.load(q + tile_at).to(tl.float32)
      k_CB = tl.load(k + tile_at).to(tl.float32)
      p_CC += tl.where(i == j, tl.sum(q_CB * k_CB, 1)[:, None], 0.0)
      for level in tl.static_range(LEVELS):
        later_CB = q_CB * from_run_start(g, tile_at, 2**level, C, BK)
        later_CB = later_CB.to(dtype)
        earlier_CB = k_CB * to_run_end(g, tile_at, H * K, 2**level, C, BK)
        earlier_CB = earlier_CB.to(dtype)
        pairs_CC = tl.dot(
            later_CB, tl.trans(earlier_CB), input_precision=precision)
        p_CC += tl.where(neighbours(2**level, C, False), pairs_CC, 0.0)
      q_CB *= from_run_start(g, tile_at, C, C, BK)
      k_CB *= to_run_end(g, tile_at, H * K, C, C, BK)
      tl.store(q_decayed + tile_at, q_CB.to(dtype))
      tl.store(k_decayed + tile_at, k_CB.to(dtype))
      sum_B = tl.sum(tl.load(g + tile_at), 0)
      tl.store(
          chunk_decay + at_channels(n, h, H, K, first_k, BK), tl.exp(sum_B))
    tl.store(scores + at_square(n, h, H, C), p_CC.to(dtype))


@triton.jit
@no_type_check
def channel_keys(
    k, g, group_N, keys, k_start, H: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr,
    precision: tl.constexpr,
):
  """Compute K K^T under the diagonal, decayed, and K from the chunk's start.
  """
  n, h = tl.program_id(0), tl.program_id(1)
  dtype = k.dtype.element_ty
  if tl.load(group_N + n) >= 0:
    rows = at_rows(n, h, H, C)
    a_CC = tl.zeros((C, C), tl.float32)
    for first_k in range(0, K, BK):
      tile_at = at_tile(rows, K, first_k, BK)
      k_CB = tl.load(k + tile_at).to(tl.float32)
      for level in tl.static_range(LEVELS):
        later_CB = k_CB * from_run_start(g, tile_at, 2**level, C, BK)
        later_CB = later_CB.to(dtype)
        earlier_CB = k_CB * to_run_end(g, tile_at, H * K, 2**level, C, BK)
        earlier_CB = earlier_CB.to(dtype)
        pairs_CC = tl.dot(
            later_CB, tl.trans(earlier_CB), input_precision=precision)
        a_CC += tl.where(neighbours(2**level, C, False), pairs_CC, 0.0)
      k_CB *= from_run_start(g, tile_at, C, C, BK)
      tl.store(k_start + tile_at, k_CB.to(dtype))
    tl.store(keys + at_square(n, h, H, C), a_CC)


@triton.jit
@no_type_check
def channel_dqk(
    q, k, g, before, dafter, y, do, dscore, dk_inverse, dg_inverse, group_N, dq,
    dk, dg, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    scale: tl.constexpr, solves: tl.constexpr, precision: tl.constexpr,
):
  """Compute dQ, dK and the cotangent of log decay; zero in unused chunks.

  Where it solves, the parts `dk_inverse` and `dg_inverse` are added.
  """
  n, h, partial = tl.program_id(0), tl.program_id(1), tl.program_id(2)
  dtype = q.dtype.element_ty
  rows = at_rows(n, h, H, C)
  tile_at = at_tile(rows, K, partial * BK, BK)
  if tl.load(group_N + n) >= 0:
    dq_CB = tl.zeros((C, BK), tl.float32)
    dk_CB = tl.zeros((C, BK), tl.float32)
    dchunk_B = tl.zeros((BK,), tl.float32)
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
      dchunk_B += tl.sum(s_BB.to(tl.float32) * ds_BB.to(tl.float32), 1)
    dq_CB *= from_run_start(g, tile_at, C, C, BK) * scale
    dk_CB *= to_run_end(g, tile_at, H * K, C, C, BK)
    sum_B = tl.sum(tl.load(g + tile_at), 0)
    k_CB = tl.load(k + tile_at).to(tl.float32)
    dchunk_B = dchunk_B * tl.exp(sum_B) + tl.sum(dk_CB * k_CB, 0)
    dscore_CC = tl.load(dscore + at_square(n, h, H, C))
    transposed_CC = tl.load(dscore + at_transposed(n, h, H, C))
    for level in tl.static_range(LEVELS):
      # Otherwise levels are interleaved, and registers spill.
      tl.debug_barrier()
      from_start_CB = from_run_start(g, tile_at, 2**level, C, BK)
      to_end_CB = to_run_end(g, tile_at, H * K, 2**level, C, BK)
      k_CB = tl.load(k + tile_at).to(tl.float32)
      if dtype == tl.float32:
        dscore_CC = tl.load(dscore + at_square(n, h, H, C))
      pairs_CC = tl.where(neighbours(2**level, C, False), dscore_CC, 0.0)
      dq_CB += from_start_CB * tl.dot(
          pairs_CC.to(dtype), (k_CB * to_end_CB).to(dtype),
          input_precision=precision)
      tl.debug_barrier()
      q_CB = tl.load(q + tile_at).to(tl.float32)
      if dtype == tl.float32:
        transposed_CC = tl.load(dscore + at_transposed(n, h, H, C))
      pairs_CC = tl.where(neighbours(2**level, C, True), transposed_CC, 0.0)
      dk_CB += to_end_CB * tl.dot(
          pairs_CC.to(dtype), (q_CB * from_start_CB).to(dtype),
          input_precision=precision)
    tl.debug_barrier()
    q_CB = tl.load(q + tile_at).to(tl.float32)
    k_CB = tl.load(k + tile_at).to(tl.float32)
    diagonal_C = tl.load(dscore + at_diagonal(n, h, H, C)).to(tl.float32)
    dg_CB = tl.cumsum(dq_CB * q_CB - dk_CB * k_CB, 0, reverse=True)
    dg_CB += dchunk_B[None, :]
    dk_CB += diagonal_C[:, None] * q_CB
    if solves:
      dg_CB += tl.load(dg_inverse + tile_at)
      dk_CB += tl.load(dk_inverse + tile_at)
    tl.store(dg + tile_at, dg_CB)
    tl.store(dq + tile_at, (dq_CB + diagonal_C[:, None] * k_CB).to(dtype))
    tl.store(dk + tile_at, dk_CB.to(dtype))
  else:
    tl.store(dq + tile_at, tl.zeros((C, BK), dtype))
    tl.store(dk + tile_at, tl.zeros((C, BK), dtype))
    tl.store(dg + tile_at, tl.zeros((C, BK), tl.float32))


@triton.jit
@no_type_check
def channel_dk_inverse(
    k, g, beta, before, db, dkeys, group_N, dk, dg, dbeta, N: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    precision: tl.constexpr,
):
  """Compute the delta rule's part of the cotangents of K, log decay and beta.

  The first two are float32 and not written in unused chunks; the last has one
  part for each block of key channels.
  """
  n, h, partial = tl.program_id(0), tl.program_id(1), tl.program_id(2)
  dtype = k.dtype.element_ty
  rows = at_rows(n, h, H, C)
  tile_at = at_tile(rows, K, partial * BK, BK)
  partial_at = rows + partial.to(tl.int64) * (N * C * H)
  if tl.load(group_N + n) >= 0:
    dlater_CB = tl.zeros((C, BK), tl.float32)
    dearlier_CB = tl.zeros((C, BK), tl.float32)
    for first_v in range(0, V, BV):
      s_BB = tl.load(
          before + at_state(n, h, H, K, V, partial * BK, BK, first_v, BV))
      dlater_CB = tl.dot(
          tl.load(db + at_tile(rows, V, first_v, BV)), tl.trans(s_BB),
          dlater_CB, input_precision=precision)
    k_CB = tl.load(k + tile_at).to(tl.float32)
    dlater_CB *= from_run_start(g, tile_at, C, C, BK)
    tl.store(dbeta + partial_at, -tl.sum(dlater_CB * k_CB, 1))
    dlater_CB *= -tl.load(beta + rows)[:, None]
    dkeys_CC = tl.load(dkeys + at_square(n, h, H, C))
    transposed_CC = tl.load(dkeys + at_transposed(n, h, H, C))
    for level in tl.static_range(LEVELS):
      from_start_CB = from_run_start(g, tile_at, 2**level, C, BK)
      to_end_CB = to_run_end(g, tile_at, H * K, 2**level, C, BK)
      pairs_CC = tl.where(neighbours(2**level, C, False), dkeys_CC, 0.0)
      dlater_CB += from_start_CB * tl.dot(
          pairs_CC.to(dtype), (k_CB * to_end_CB).to(dtype),
          input_precision=precision)
      pairs_CC = tl.where(neighbours(2**level, C, True), transposed_CC, 0.0)
      dearlier_CB += to_end_CB * tl.dot(
          pairs_CC.to(dtype), (k_CB * from_start_CB).to(dtype),
          input_precision=precision)
    dg_CB = tl.cumsum((dlater_CB - dearlier_CB) * k_CB, 0, reverse=True)
    tl.store(dg + tile_at, dg_CB)
    tl.store(dk + tile_at, dlater_CB + dearlier_CB)
  else:
    tl.store(dbeta + partial_at, tl.zeros((C,), tl.float32))
