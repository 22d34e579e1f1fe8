"""Triton kernels of chunk_memory with the state in HBM.

For states that do not fit the registers; conventions of kernels.py. A program
keeps its part of the state in global memory, where the last one goes, and loads
BK key channels of it at a time. A barrier separates what its threads store
there from what others of them load; loads are never pipelined, since they would
overtake the stores.
"""

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
  to_chunk_end,
)


@triton.jit
@no_type_check
def _update(
    stored_CB, v, g, beta, inverse, y, n, h, first_v, H: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, decays: tl.constexpr,
    solves: tl.constexpr, precision: tl.constexpr,
):
  """Return Y decayed to the end of chunk n, and the chunk's decay; store Y.

  `stored_CB` is K S.
  """
  dtype = v.dtype.element_ty
  rows = at_rows(n, h, H, C)
  y_CB = tl.load(v + at_tile(rows, V, first_v, BV)).to(tl.float32)
  decay = 1.0
  if decays:
    g_C = tl.load(g + rows)
  if solves:
    if decays:
      stored_CB *= tl.exp(tl.cumsum(g_C, 0))[:, None]
    y_CB = (y_CB - stored_CB) * tl.load(beta + rows)[:, None]
    t_CC = tl.load(inverse + at_square(n, h, H, C))
    y_CB = tl.dot(t_CC, y_CB.to(dtype), input_precision=precision)
    tl.store(y + at_tile(rows, V, first_v, BV), y_CB.to(dtype))
  if decays:
    y_CB *= to_chunk_end(g, rows, H, C)[:, None]
    decay = tl.exp(tl.sum(g_C, 0))
  return y_CB, decay


@triton.jit
@no_type_check
def chunk_states_hbm(
    k, k_start, v, g, chunk_decay, beta, inverse, first_G, count_G, initial,
    before, y, final, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, decays: tl.constexpr,
    channels: tl.constexpr, solves: tl.constexpr, precision: tl.constexpr,
):
  """`chunk_states`."""
  first_v, h, group = tl.program_id(0) * BV, tl.program_id(1), tl.program_id(2)
  dtype = k.dtype.element_ty
  for first_k in tl.range(0, K, BK, num_stages=1):
    state_at = at_state(group, h, H, K, V, first_k, BK, first_v, BV)
    tl.store(final + state_at, tl.load(initial + state_at))
  start = tl.load(first_G + group)
  for step in tl.range(0, tl.load(count_G + group), num_stages=1):
    n = start + step
    rows = at_rows(n, h, H, C)
    stored_CB = tl.zeros((C, BV), tl.float32)
    tl.debug_barrier()
    for first_k in tl.range(0, K, BK, num_stages=1):
      s_BB = tl.load(
          final + at_state(group, h, H, K, V, first_k, BK, first_v, BV))
      before_at = at_state(n, h, H, K, V, first_k, BK, first_v, BV)
      tl.store(before + before_at, s_BB.to(dtype))
      if solves:
        if channels:
          k_CB = tl.load(k_start + at_tile(rows, K, first_k, BK))
        else:
          k_CB = tl.load(k + at_tile(rows, K, first_k, BK))
        stored_CB = tl.dot(
            k_CB, s_BB.to(dtype), stored_CB, input_precision=precision)
    y_CB, decay = _update(
        stored_CB, v, g, beta, inverse, y, n, h, first_v, H, V, C, BV, decays,
        solves, precision)
    tl.debug_barrier()
    for first_k in tl.range(0, K, BK, num_stages=1):
      state_at = at_state(group, h, H, K, V, first_k, BK, first_v, BV)
      s_BB = tl.load(final + state_at)
      if decays:
        s_BB *= decay
      if channels:
        s_BB *= tl.load(
            chunk_decay + at_channels(n, h, H, K, first_k, BK))[:, None]
      k_CB = tl.load(k + at_tile(rows, K, first_k, BK))
      s_BB = tl.dot(
          tl.trans(k_CB), y_CB.to(dtype), s_BB, input_precision=precision)
      tl.store(final + state_at, s_BB)


@triton.jit
@no_type_check
def _dupdate(
    dy_CB, g, beta, inverse, do, dy_local, n, h, first_v, H: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, scale: tl.constexpr,
    decays: tl.constexpr, solves: tl.constexpr, precision: tl.constexpr,
):
  """Return dB, the rows that Q and K carry into dS, and the chunk's decay.

  `dy_CB` is K dS.
  """
  dtype = do.dtype.element_ty
  rows = at_rows(n, h, H, C)
  tile_at = at_tile(rows, V, first_v, BV)
  if decays:
    dy_CB *= to_chunk_end(g, rows, H, C)[:, None]
  dy_CB += tl.load(dy_local + tile_at).to(tl.float32)
  do_CB = tl.load(do + tile_at).to(tl.float32) * scale
  decay = 1.0
  if decays:
    g_C = tl.load(g + rows)
    to_row_C = tl.exp(tl.cumsum(g_C, 0))
    do_CB *= to_row_C[:, None]
    decay = tl.exp(tl.sum(g_C, 0))
  dstored_CB = dy_CB
  if solves:
    t_CC = tl.load(inverse + at_transposed(n, h, H, C))
    dy_CB = tl.dot(t_CC, dy_CB.to(dtype), input_precision=precision)
    dstored_CB = dy_CB * -tl.load(beta + rows)[:, None]
    if decays:
      dstored_CB *= to_row_C[:, None]
  return dy_CB, do_CB, dstored_CB, decay


@triton.jit
@no_type_check
def chunk_dstates_hbm(
    q, k, k_start, g, chunk_decay, beta, inverse, do, dy_local, first_G,
    count_G, dfinal, dafter, db, dinitial, H: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    scale: tl.constexpr, decays: tl.constexpr, channels: tl.constexpr,
    solves: tl.constexpr, precision: tl.constexpr,
):
  """`chunk_dstates`."""
  first_v, h, group = tl.program_id(0) * BV, tl.program_id(1), tl.program_id(2)
  dtype = k.dtype.element_ty
  for first_k in tl.range(0, K, BK, num_stages=1):
    state_at = at_state(group, h, H, K, V, first_k, BK, first_v, BV)
    tl.store(dinitial + state_at, tl.load(dfinal + state_at))
  start, count = tl.load(first_G + group), tl.load(count_G + group)
  for step in tl.range(0, count, num_stages=1):
    n = start + count - 1 - step
    rows = at_rows(n, h, H, C)
    dy_CB = tl.zeros((C, BV), tl.float32)
    tl.debug_barrier()
    for first_k in tl.range(0, K, BK, num_stages=1):
      state_at = at_state(group, h, H, K, V, first_k, BK, first_v, BV)
      ds_BB = tl.load(dinitial + state_at)
      dafter_at = at_state(n, h, H, K, V, first_k, BK, first_v, BV)
      tl.store(dafter + dafter_at, ds_BB.to(dtype))
      k_CB = tl.load(k + at_tile(rows, K, first_k, BK))
      dy_CB = tl.dot(k_CB, ds_BB.to(dtype), dy_CB, input_precision=precision)
    dy_CB, do_CB, dstored_CB, decay = _dupdate(
        dy_CB, g, beta, inverse, do, dy_local, n, h, first_v, H, V, C, BV,
        scale, decays, solves, precision)
    tl.store(db + at_tile(rows, V, first_v, BV), dy_CB.to(dtype))
    tl.debug_barrier()
    for first_k in tl.range(0, K, BK, num_stages=1):
      state_at = at_state(group, h, H, K, V, first_k, BK, first_v, BV)
      ds_BB = tl.load(dinitial + state_at)
      if decays:
        ds_BB *= decay
      if channels:
        ds_BB *= tl.load(
            chunk_decay + at_channels(n, h, H, K, first_k, BK))[:, None]
      q_CB = tl.load(q + at_tile(rows, K, first_k, BK))
      ds_BB = tl.dot(
          tl.trans(q_CB), do_CB.to(dtype), ds_BB, input_precision=precision)
      if solves:
        if channels:
          k_CB = tl.load(k_start + at_tile(rows, K, first_k, BK))
        else:
          k_CB = tl.load(k + at_tile(rows, K, first_k, BK))
        ds_BB = tl.dot(
            tl.trans(k_CB), dstored_CB.to(dtype), ds_BB,
            input_precision=precision)
      tl.store(dinitial + state_at, ds_BB)
