"""Triton kernels of chunk_memory for states that do not fit the registers.

Conventions of kernels.py. A program keeps its part of the state in memory,
where the last one goes, and takes BK key channels of it at a time. A barrier
parts what its threads write there from what others of them read; loads are
never pipelined, since they would overtake the stores.
"""

from typing import no_type_check

import triton
import triton.language as tl

from mom_jax.pallas.chunk_memory.triton.kernels import (
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
def _writes(
    old_CB, v, g, beta, solved, y, n, h, column, H: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, decays: tl.constexpr,
    solves: tl.constexpr, precision: tl.constexpr,
):
  """What chunk n writes, decayed to its end, and the decay of all of it.

  K S is `old_CB`. Stores Y.
  """
  kind = v.dtype.element_ty
  at = place(n, h, H, C)
  y_CB = tl.load(v + tile(at, V, column, BV)).to(tl.float32)
  decay = 1.0
  if decays:
    g_C = tl.load(g + at)
  if solves:
    if decays:
      old_CB *= tl.exp(tl.cumsum(g_C, 0))[:, None]
    y_CB = (y_CB - old_CB) * tl.load(beta + at)[:, None]
    t_CC = tl.load(solved + square(n, h, H, C))
    y_CB = tl.dot(t_CC, y_CB.to(kind), input_precision=precision)
    tl.store(y + tile(at, V, column, BV), y_CB.to(kind))
  if decays:
    y_CB *= to_end(g, at, H, C)[:, None]
    decay = tl.exp(tl.sum(g_C, 0))
  return y_CB, decay


@triton.jit
@no_type_check
def states_by_blocks(
    k, k_read, v, g, end, beta, solved, first_G, count_G, initial, before, y,
    final, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, decays: tl.constexpr,
    channels: tl.constexpr, solves: tl.constexpr, precision: tl.constexpr,
):
  """`states`."""
  column, h, group = tl.program_id(0) * BV, tl.program_id(1), tl.program_id(2)
  kind = k.dtype.element_ty
  for first in tl.range(0, K, BK, num_stages=1):
    home = matrix(group, h, H, K, V, first, BK, column, BV)
    tl.store(final + home, tl.load(initial + home))
  start = tl.load(first_G + group)
  for step in tl.range(0, tl.load(count_G + group), num_stages=1):
    n = start + step
    at = place(n, h, H, C)
    old_CB = tl.zeros((C, BV), tl.float32)
    tl.debug_barrier()
    for first in tl.range(0, K, BK, num_stages=1):
      s_BB = tl.load(final + matrix(group, h, H, K, V, first, BK, column, BV))
      here = matrix(n, h, H, K, V, first, BK, column, BV)
      tl.store(before + here, s_BB.to(kind))
      if solves:
        if channels:
          k_CB = tl.load(k_read + tile(at, K, first, BK))
        else:
          k_CB = tl.load(k + tile(at, K, first, BK))
        old_CB = tl.dot(k_CB, s_BB.to(kind), old_CB, input_precision=precision)
    y_CB, decay = _writes(
        old_CB, v, g, beta, solved, y, n, h, column, H, V, C, BV, decays,
        solves, precision)
    tl.debug_barrier()
    for first in tl.range(0, K, BK, num_stages=1):
      home = matrix(group, h, H, K, V, first, BK, column, BV)
      s_BB = tl.load(final + home)
      if decays:
        s_BB *= decay
      if channels:
        s_BB *= tl.load(end + ends(n, h, H, K, first, BK))[:, None]
      k_CB = tl.load(k + tile(at, K, first, BK))
      s_BB = tl.dot(
          tl.trans(k_CB), y_CB.to(kind), s_BB, input_precision=precision)
      tl.store(final + home, s_BB)


@triton.jit
@no_type_check
def _asks(
    dy_CB, g, beta, solved, do, dlocal, n, h, column, H: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, scale: tl.constexpr,
    decays: tl.constexpr, solves: tl.constexpr, precision: tl.constexpr,
):
  """dB, what goes into dS under Q and, if it solves, K, and the chunk's decay.

  K dS is `dy_CB`.
  """
  kind = do.dtype.element_ty
  at = place(n, h, H, C)
  where = tile(at, V, column, BV)
  if decays:
    dy_CB *= to_end(g, at, H, C)[:, None]
  dy_CB += tl.load(dlocal + where).to(tl.float32)
  do_CB = tl.load(do + where).to(tl.float32) * scale
  decay = 1.0
  if decays:
    g_C = tl.load(g + at)
    to_row_C = tl.exp(tl.cumsum(g_C, 0))
    do_CB *= to_row_C[:, None]
    decay = tl.exp(tl.sum(g_C, 0))
  taken_CB = dy_CB
  if solves:
    t_CC = tl.load(solved + turned(n, h, H, C))
    dy_CB = tl.dot(t_CC, dy_CB.to(kind), input_precision=precision)
    taken_CB = dy_CB * -tl.load(beta + at)[:, None]
    if decays:
      taken_CB *= to_row_C[:, None]
  return dy_CB, do_CB, taken_CB, decay


@triton.jit
@no_type_check
def states_back_by_blocks(
    q, k, k_read, g, end, beta, solved, do, dlocal, first_G, count_G, dfinal,
    after, db, dinitial, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, scale: tl.constexpr,
    decays: tl.constexpr, channels: tl.constexpr, solves: tl.constexpr,
    precision: tl.constexpr,
):
  """`states_back`."""
  column, h, group = tl.program_id(0) * BV, tl.program_id(1), tl.program_id(2)
  kind = k.dtype.element_ty
  for first in tl.range(0, K, BK, num_stages=1):
    home = matrix(group, h, H, K, V, first, BK, column, BV)
    tl.store(dinitial + home, tl.load(dfinal + home))
  start, count = tl.load(first_G + group), tl.load(count_G + group)
  for step in tl.range(0, count, num_stages=1):
    n = start + count - 1 - step
    at = place(n, h, H, C)
    dy_CB = tl.zeros((C, BV), tl.float32)
    tl.debug_barrier()
    for first in tl.range(0, K, BK, num_stages=1):
      home = matrix(group, h, H, K, V, first, BK, column, BV)
      z_BB = tl.load(dinitial + home)
      here = matrix(n, h, H, K, V, first, BK, column, BV)
      tl.store(after + here, z_BB.to(kind))
      k_CB = tl.load(k + tile(at, K, first, BK))
      dy_CB = tl.dot(k_CB, z_BB.to(kind), dy_CB, input_precision=precision)
    dy_CB, do_CB, taken_CB, decay = _asks(
        dy_CB, g, beta, solved, do, dlocal, n, h, column, H, V, C, BV, scale,
        decays, solves, precision)
    tl.store(db + tile(at, V, column, BV), dy_CB.to(kind))
    tl.debug_barrier()
    for first in tl.range(0, K, BK, num_stages=1):
      home = matrix(group, h, H, K, V, first, BK, column, BV)
      z_BB = tl.load(dinitial + home)
      if decays:
        z_BB *= decay
      if channels:
        z_BB *= tl.load(end + ends(n, h, H, K, first, BK))[:, None]
      q_CB = tl.load(q + tile(at, K, first, BK))
      z_BB = tl.dot(
          tl.trans(q_CB), do_CB.to(kind), z_BB, input_precision=precision)
      if solves:
        if channels:
          k_CB = tl.load(k_read + tile(at, K, first, BK))
        else:
          k_CB = tl.load(k + tile(at, K, first, BK))
        z_BB = tl.dot(
            tl.trans(k_CB), taken_CB.to(kind), z_BB, input_precision=precision)
      tl.store(dinitial + home, z_BB)
