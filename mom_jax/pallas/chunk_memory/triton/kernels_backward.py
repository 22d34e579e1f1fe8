"""Triton kernels of chunk_memory, backward; conventions of kernels.py."""

from typing import no_type_check

import triton
import triton.language as tl

from mom_jax.pallas.chunk_memory.triton.kernels import (
    between,
    between_turned,
    ends,
    matrix,
    place,
    square,
    tile,
    to_end,
    turned,
)


@triton.jit
@no_type_check
def local(
    q, k, g, scores, do, group_N, dlocal, H: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    scale: tl.constexpr, decays: tl.constexpr, channels: tl.constexpr,
    precision: tl.constexpr,
):
  """P^T dO: the part of dY that comes from reads in the same chunk."""
  n, h = tl.program_id(0), tl.program_id(1)
  kind = q.dtype.element_ty
  if tl.load(group_N + n) >= 0:
    at = place(n, h, H, C)
    # Turned: [written, reading].
    if channels:
      p_CC = tl.load(scores + turned(n, h, H, C)).to(tl.float32)
    else:
      p_CC = tl.zeros((C, C), tl.float32)
      for first in range(0, K, BK):
        q_CB = tl.load(q + tile(at, K, first, BK))
        k_CB = tl.load(k + tile(at, K, first, BK))
        p_CC = tl.dot(k_CB, tl.trans(q_CB), p_CC, input_precision=precision)
      if decays:
        p_CC *= between_turned(tl.load(g + at), C)
      else:
        i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        p_CC = tl.where(j >= i, p_CC, 0.0)
    p_CC = (p_CC * scale).to(kind)
    for column in range(0, V, BV):
      do_CB = tl.load(do + tile(at, V, column, BV))
      d_CB = tl.dot(p_CC, do_CB, input_precision=precision)
      tl.store(dlocal + tile(at, V, column, BV), d_CB.to(kind))


@triton.jit
@no_type_check
def states_back(
    q, k, k_read, g, end, beta, solved, do, dlocal, first_G, count_G, dfinal,
    after, db, dinitial, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, scale: tl.constexpr,
    decays: tl.constexpr, channels: tl.constexpr, solves: tl.constexpr,
    precision: tl.constexpr,
):
  """Cotangents of the state after each chunk, of B, of the initial state.

  Without the delta rule B is what the rows write, V.
  """
  column, h, group = tl.program_id(0) * BV, tl.program_id(1), tl.program_id(2)
  kind = k.dtype.element_ty
  home = matrix(group, h, H, K, V, 0, K, column, BV)
  z_KB = tl.load(dfinal + home)
  start, count = tl.load(first_G + group), tl.load(count_G + group)
  for step in range(0, count):
    n = start + count - 1 - step
    at = place(n, h, H, C)
    tl.store(after + matrix(n, h, H, K, V, 0, K, column, BV), z_KB.to(kind))
    k_CK = tl.load(k + tile(at, K, 0, K))
    dy_CB = tl.dot(k_CK, z_KB.to(kind), input_precision=precision)
    if decays:
      dy_CB *= to_end(g, at, H, C)[:, None]
    dy_CB += tl.load(dlocal + tile(at, V, column, BV)).to(tl.float32)
    do_CB = tl.load(do + tile(at, V, column, BV)).to(tl.float32) * scale
    if decays:
      g_C = tl.load(g + at)
      to_row_C = tl.exp(tl.cumsum(g_C, 0))
      do_CB *= to_row_C[:, None]
      z_KB *= tl.exp(tl.sum(g_C, 0))
    if channels:
      z_KB *= tl.load(end + ends(n, h, H, K, 0, K))[:, None]
    q_CK = tl.load(q + tile(at, K, 0, K))
    z_KB = tl.dot(
        tl.trans(q_CK), do_CB.to(kind), z_KB, input_precision=precision)
    if solves:
      t_CC = tl.load(solved + turned(n, h, H, C))
      dy_CB = tl.dot(t_CC, dy_CB.to(kind), input_precision=precision)
      taken_CB = dy_CB * -tl.load(beta + at)[:, None]
      if decays:
        taken_CB *= to_row_C[:, None]
      if channels:
        k_CK = tl.load(k_read + tile(at, K, 0, K))
      z_KB = tl.dot(
          tl.trans(k_CK), taken_CB.to(kind), z_KB, input_precision=precision)
    tl.store(db + tile(at, V, column, BV), dy_CB.to(kind))
  tl.store(dinitial + home, z_KB)


@triton.jit
@no_type_check
def _scores(
    a, b, at, X: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    precision: tl.constexpr,
):
  """a_i . b_j of a chunk's rows."""
  sum_CC = tl.zeros((C, C), tl.float32)
  for first in range(0, X, B):
    a_CB = tl.load(a + tile(at, X, first, B))
    b_CB = tl.load(b + tile(at, X, first, B))
    sum_CC = tl.dot(a_CB, tl.trans(b_CB), sum_CC, input_precision=precision)
  return sum_CC


@triton.jit
@no_type_check
def pairs_back(
    q, k, v, g, keys, beta, y, do, db, group_N, dscore, dsolve, dv, dgamma,
    dbeta, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, scale: tl.constexpr,
    decays: tl.constexpr, channels: tl.constexpr, solves: tl.constexpr,
    precision: tl.constexpr,
):
  """What comes from pairs of rows of a chunk; zero in unused ones.

  Cotangents of q_i . k_j (lower) and k_i . k_j (strictly lower), of V, and the
  pairs' parts of those of the summed log decay and of beta.
  """
  n, h = tl.program_id(0), tl.program_id(1)
  kind = q.dtype.element_ty
  at = place(n, h, H, C)
  i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
  zero_C = tl.zeros((C,), tl.float32)
  if tl.load(group_N + n) >= 0:
    if decays:
      decay_CC = between(tl.load(g + at), C)
    else:
      decay_CC = tl.where(i >= j, 1.0, 0.0)
    d_CC = _scores(do, y, at, V, BV, C, precision) * decay_CC * scale
    tl.store(dscore + square(n, h, H, C), d_CC.to(kind))
    if decays:
      d_CC *= _scores(q, k, at, K, BK, C, precision)
      dgamma_C = tl.sum(d_CC, 1) - tl.sum(d_CC, 0)
    if solves:
      b_C = tl.load(beta + at)
      d_CC = _scores(db, y, at, V, BV, C, precision) * -decay_CC
      d_CC = tl.where(i > j, d_CC, 0.0)
      tl.store(
          dsolve + square(n, h, H, C), (d_CC * b_C[:, None]).to(kind))
      if channels:
        d_CC *= tl.load(keys + square(n, h, H, C))
      else:
        d_CC *= _scores(k, k, at, K, BK, C, precision)
      db_C = tl.sum(d_CC, 1)
      if decays:
        dgamma_C += db_C * b_C - tl.sum(d_CC * b_C[:, None], 0)
      for column in range(0, V, BV):
        where = tile(at, V, column, BV)
        db_CB = tl.load(db + where).to(tl.float32)
        db_C += tl.sum(db_CB * tl.load(v + where).to(tl.float32), 1)
        tl.store(dv + where, (db_CB * b_C[:, None]).to(kind))
      tl.store(dbeta + at, db_C)
    else:
      for column in range(0, V, BV):
        where = tile(at, V, column, BV)
        tl.store(dv + where, tl.load(db + where))
    if decays:
      tl.store(dgamma + at, dgamma_C)
  else:
    for column in range(0, V, BV):
      tl.store(dv + tile(at, V, column, BV), tl.zeros((C, BV), kind))
    if decays:
      tl.store(dgamma + at, zero_C)
    if solves:
      tl.store(dbeta + at, zero_C)


@triton.jit
@no_type_check
def rows_back(
    q, k, g, beta, before, after, y, do, db, dscore, dsolve, group_N, dq, dk,
    dgamma, dend, dbeta, N: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    scale: tl.constexpr, decays: tl.constexpr, solves: tl.constexpr,
    precision: tl.constexpr,
):
  """dQ and dK, and what a block of key channels adds to the other cotangents.

  Those, [K / BK, ...], are of the summed log decay, of that of the whole chunk,
  and of beta.
  """
  n, h, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
  kind = q.dtype.element_ty
  at = place(n, h, H, C)
  here = tile(at, K, part * BK, BK)
  mine = at + part.to(tl.int64) * (N * C * H)
  chunk = (part * N + n) * H + h
  if tl.load(group_N + n) >= 0:
    dq_CB = tl.zeros((C, BK), tl.float32)
    dk_CB = tl.zeros((C, BK), tl.float32)
    taken_CB = tl.zeros((C, BK), tl.float32)
    end = 0.0
    for column in range(0, V, BV):
      rows = tile(at, V, column, BV)
      block = matrix(n, h, H, K, V, part * BK, BK, column, BV)
      s_BB, z_BB = tl.load(before + block), tl.load(after + block)
      dq_CB = tl.dot(
          tl.load(do + rows), tl.trans(s_BB), dq_CB, input_precision=precision)
      dk_CB = tl.dot(
          tl.load(y + rows), tl.trans(z_BB), dk_CB, input_precision=precision)
      if solves:
        taken_CB = tl.dot(
            tl.load(db + rows), tl.trans(s_BB), taken_CB,
            input_precision=precision)
      if decays:
        end += tl.sum(s_BB.to(tl.float32) * z_BB.to(tl.float32))
    q_CB, k_CB = tl.load(q + here), tl.load(k + here)
    dq_CB *= scale
    if decays:
      g_C = tl.load(g + at)
      to_row_C = tl.exp(tl.cumsum(g_C, 0))
      dq_CB *= to_row_C[:, None]
      dk_CB *= to_end(g, at, H, C)[:, None]
      ends_C = tl.sum(dk_CB * k_CB.to(tl.float32), 1)
      dgamma_C = tl.sum(dq_CB * q_CB.to(tl.float32), 1) - ends_C
      tl.store(dend + chunk, tl.sum(ends_C, 0) + end * tl.exp(tl.sum(g_C, 0)))
    if solves:
      b_C = tl.load(beta + at)
      if decays:
        taken_CB *= to_row_C[:, None]
      dbeta_C = -tl.sum(taken_CB * k_CB.to(tl.float32), 1)
      tl.store(dbeta + mine, dbeta_C)
      dk_CB -= taken_CB * b_C[:, None]
      if decays:
        dgamma_C += dbeta_C * b_C
      both_CC = tl.load(dsolve + square(n, h, H, C)).to(tl.float32)
      both_CC += tl.load(dsolve + turned(n, h, H, C)).to(tl.float32)
      dk_CB = tl.dot(both_CC.to(kind), k_CB, dk_CB, input_precision=precision)
    if decays:
      tl.store(dgamma + mine, dgamma_C)
    score_CC = tl.load(dscore + square(n, h, H, C))
    dq_CB = tl.dot(score_CC, k_CB, dq_CB, input_precision=precision)
    turned_CC = tl.load(dscore + turned(n, h, H, C))
    dk_CB = tl.dot(turned_CC, q_CB, dk_CB, input_precision=precision)
    tl.store(dq + here, dq_CB.to(kind))
    tl.store(dk + here, dk_CB.to(kind))
  else:
    tl.store(dq + here, tl.zeros((C, BK), kind))
    tl.store(dk + here, tl.zeros((C, BK), kind))
    if decays:
      tl.store(dgamma + mine, tl.zeros((C,), tl.float32))
      tl.store(dend + chunk, 0.0)
    if solves:
      tl.store(dbeta + mine, tl.zeros((C,), tl.float32))
