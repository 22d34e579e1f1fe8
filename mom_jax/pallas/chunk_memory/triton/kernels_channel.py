"""Triton kernels of chunk_memory where key channels decay.

Conventions of kernels.py; g is [R, H, K]. The decay from row j to row i is
split where two neighbouring runs of h rows meet that part them, h = 1, 2, ...,
C / 2: q_i takes the decay from the start of its run, k_j that to the end of its
run. Both are sums of log decays over rows in between, so nothing overflows or
cancels, and each h is one product.
"""

from typing import no_type_check

import triton
import triton.language as tl

from mom_jax.pallas.chunk_memory.triton.kernels import (
    diagonal,
    ends,
    matrix,
    place,
    square,
    tile,
    turned,
)


@triton.jit
@no_type_check
def from_start(
    g, where_CB, h: tl.constexpr, C: tl.constexpr, B: tl.constexpr,
):
  """Decay from the start of each run of h rows to each of its rows."""
  g_CB = tl.load(g + where_CB)
  runs = tl.cumsum(tl.reshape(g_CB, (C // h, h, B)), 1)
  return tl.exp(tl.reshape(runs, (C, B)))


@triton.jit
@no_type_check
def to_end(
    g, where_CB, row: tl.constexpr, h: tl.constexpr, C: tl.constexpr,
    B: tl.constexpr,
):
  """Decay from each row of a run of h to its end; rows lie `row` apart."""
  more = (tl.arange(0, C) % h < h - 1)[:, None]
  g_CB = tl.load(g + where_CB + row, mask=more, other=0.0)
  runs = tl.cumsum(tl.reshape(g_CB, (C // h, h, B)), 1, reverse=True)
  return tl.exp(tl.reshape(runs, (C, B)))


@triton.jit
@no_type_check
def parted(h: tl.constexpr, C: tl.constexpr, turn: tl.constexpr):
  """Which pairs (row, earlier row) lie in neighbouring runs of h, paired."""
  i, j = tl.arange(0, C)[:, None] // h, tl.arange(0, C)[None, :] // h
  if turn:
    i, j = j, i
  return (i % 2 == 1) & (i == j + 1)


@triton.jit
@no_type_check
def channel_scores(
    q, k, g, group_N, scores, q_decayed, k_decayed, end, H: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr,
    precision: tl.constexpr,
):
  """Q K^T with the decay in between, and what `channels` asks for."""
  n, h = tl.program_id(0), tl.program_id(1)
  kind = q.dtype.element_ty
  i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
  if tl.load(group_N + n) >= 0:
    at = place(n, h, H, C)
    p_CC = tl.zeros((C, C), tl.float32)
    for first in range(0, K, BK):
      here = tile(at, K, first, BK)
      q_CB = tl.load(q + here).to(tl.float32)
      k_CB = tl.load(k + here).to(tl.float32)
      p_CC += tl.where(i == j, tl.sum(q_CB * k_CB, 1)[:, None], 0.0)
      for level in tl.static_range(LEVELS):
        late_CB = (q_CB * from_start(g, here, 2**level, C, BK)).to(kind)
        early_CB = (k_CB * to_end(g, here, H * K, 2**level, C, BK)).to(kind)
        pairs_CC = tl.dot(
            late_CB, tl.trans(early_CB), input_precision=precision)
        p_CC += tl.where(parted(2**level, C, False), pairs_CC, 0.0)
      q_CB *= from_start(g, here, C, C, BK)
      k_CB *= to_end(g, here, H * K, C, C, BK)
      tl.store(q_decayed + here, q_CB.to(kind))
      tl.store(k_decayed + here, k_CB.to(kind))
      sum_B = tl.sum(tl.load(g + here), 0)
      tl.store(end + ends(n, h, H, K, first, BK), tl.exp(sum_B))
    tl.store(scores + square(n, h, H, C), p_CC.to(kind))


@triton.jit
@no_type_check
def channel_keys(
    k, g, group_N, keys, k_read, H: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr,
    precision: tl.constexpr,
):
  """K K^T under the diagonal with the decay in between, and K from the start.
  """
  n, h = tl.program_id(0), tl.program_id(1)
  kind = k.dtype.element_ty
  if tl.load(group_N + n) >= 0:
    at = place(n, h, H, C)
    a_CC = tl.zeros((C, C), tl.float32)
    for first in range(0, K, BK):
      here = tile(at, K, first, BK)
      k_CB = tl.load(k + here).to(tl.float32)
      for level in tl.static_range(LEVELS):
        late_CB = (k_CB * from_start(g, here, 2**level, C, BK)).to(kind)
        early_CB = (k_CB * to_end(g, here, H * K, 2**level, C, BK)).to(kind)
        pairs_CC = tl.dot(
            late_CB, tl.trans(early_CB), input_precision=precision)
        a_CC += tl.where(parted(2**level, C, False), pairs_CC, 0.0)
      k_CB *= from_start(g, here, C, C, BK)
      tl.store(k_read + here, k_CB.to(kind))
    tl.store(keys + square(n, h, H, C), a_CC)


@triton.jit
@no_type_check
def channel_back(
    q, k, g, before, after, y, do, dscore, more_dk, more_dg, group_N, dq, dk,
    dg, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    scale: tl.constexpr, solves: tl.constexpr, precision: tl.constexpr,
):
  """dQ, dK and the cotangent of the log decay; zero in unused chunks.

  If it solves, with what the delta rule adds, `more`.
  """
  n, h, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
  kind = q.dtype.element_ty
  at = place(n, h, H, C)
  here = tile(at, K, part * BK, BK)
  if tl.load(group_N + n) >= 0:
    dq_CB = tl.zeros((C, BK), tl.float32)
    dk_CB = tl.zeros((C, BK), tl.float32)
    end_B = tl.zeros((BK,), tl.float32)
    for column in range(0, V, BV):
      rows = tile(at, V, column, BV)
      block = matrix(n, h, H, K, V, part * BK, BK, column, BV)
      s_BB, z_BB = tl.load(before + block), tl.load(after + block)
      dq_CB = tl.dot(
          tl.load(do + rows), tl.trans(s_BB), dq_CB, input_precision=precision)
      dk_CB = tl.dot(
          tl.load(y + rows), tl.trans(z_BB), dk_CB, input_precision=precision)
      end_B += tl.sum(s_BB.to(tl.float32) * z_BB.to(tl.float32), 1)
    dq_CB *= from_start(g, here, C, C, BK) * scale
    dk_CB *= to_end(g, here, H * K, C, C, BK)
    sum_B = tl.sum(tl.load(g + here), 0)
    k_CB = tl.load(k + here).to(tl.float32)
    end_B = end_B * tl.exp(sum_B) + tl.sum(dk_CB * k_CB, 0)
    score_CC = tl.load(dscore + square(n, h, H, C))
    turned_CC = tl.load(dscore + turned(n, h, H, C))
    for level in tl.static_range(LEVELS):
      # Else levels are mixed and all is kept in registers, which spill.
      tl.debug_barrier()
      late_CB = from_start(g, here, 2**level, C, BK)
      early_CB = to_end(g, here, H * K, 2**level, C, BK)
      k_CB = tl.load(k + here).to(tl.float32)
      if kind == tl.float32:
        score_CC = tl.load(dscore + square(n, h, H, C))
      pairs_CC = tl.where(parted(2**level, C, False), score_CC, 0.0)
      dq_CB += late_CB * tl.dot(
          pairs_CC.to(kind), (k_CB * early_CB).to(kind),
          input_precision=precision)
      tl.debug_barrier()
      q_CB = tl.load(q + here).to(tl.float32)
      if kind == tl.float32:
        turned_CC = tl.load(dscore + turned(n, h, H, C))
      pairs_CC = tl.where(parted(2**level, C, True), turned_CC, 0.0)
      dk_CB += early_CB * tl.dot(
          pairs_CC.to(kind), (q_CB * late_CB).to(kind),
          input_precision=precision)
    tl.debug_barrier()
    q_CB = tl.load(q + here).to(tl.float32)
    k_CB = tl.load(k + here).to(tl.float32)
    own_C = tl.load(dscore + diagonal(n, h, H, C)).to(tl.float32)
    moved_CB = tl.cumsum(dq_CB * q_CB - dk_CB * k_CB, 0, reverse=True)
    moved_CB += end_B[None, :]
    dk_CB += own_C[:, None] * q_CB
    if solves:
      moved_CB += tl.load(more_dg + here)
      dk_CB += tl.load(more_dk + here)
    tl.store(dg + here, moved_CB)
    tl.store(dq + here, (dq_CB + own_C[:, None] * k_CB).to(kind))
    tl.store(dk + here, dk_CB.to(kind))
  else:
    tl.store(dq + here, tl.zeros((C, BK), kind))
    tl.store(dk + here, tl.zeros((C, BK), kind))
    tl.store(dg + here, tl.zeros((C, BK), tl.float32))


@triton.jit
@no_type_check
def channel_solve_back(
    k, g, beta, before, db, dsolve, group_N, dk, dg, dbeta, N: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    precision: tl.constexpr,
):
  """What the delta rule's reads add to the cotangents of K, log decay and beta.

  The first two are float32 and not written in unused chunks; the last is a part
  for each block of key channels.
  """
  n, h, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
  kind = k.dtype.element_ty
  at = place(n, h, H, C)
  here = tile(at, K, part * BK, BK)
  mine = at + part.to(tl.int64) * (N * C * H)
  if tl.load(group_N + n) >= 0:
    late_CB = tl.zeros((C, BK), tl.float32)
    early_CB = tl.zeros((C, BK), tl.float32)
    for column in range(0, V, BV):
      s_BB = tl.load(
          before + matrix(n, h, H, K, V, part * BK, BK, column, BV))
      late_CB = tl.dot(
          tl.load(db + tile(at, V, column, BV)), tl.trans(s_BB), late_CB,
          input_precision=precision)
    k_CB = tl.load(k + here).to(tl.float32)
    late_CB *= from_start(g, here, C, C, BK)
    tl.store(dbeta + mine, -tl.sum(late_CB * k_CB, 1))
    late_CB *= -tl.load(beta + at)[:, None]
    solve_CC = tl.load(dsolve + square(n, h, H, C))
    turned_CC = tl.load(dsolve + turned(n, h, H, C))
    for level in tl.static_range(LEVELS):
      start_CB = from_start(g, here, 2**level, C, BK)
      end_CB = to_end(g, here, H * K, 2**level, C, BK)
      pairs_CC = tl.where(parted(2**level, C, False), solve_CC, 0.0)
      late_CB += start_CB * tl.dot(
          pairs_CC.to(kind), (k_CB * end_CB).to(kind),
          input_precision=precision)
      pairs_CC = tl.where(parted(2**level, C, True), turned_CC, 0.0)
      early_CB += end_CB * tl.dot(
          pairs_CC.to(kind), (k_CB * start_CB).to(kind),
          input_precision=precision)
    moved_CB = tl.cumsum((late_CB - early_CB) * k_CB, 0, reverse=True)
    tl.store(dg + here, moved_CB)
    tl.store(dk + here, late_CB + early_CB)
  else:
    tl.store(dbeta + mine, tl.zeros((C,), tl.float32))
