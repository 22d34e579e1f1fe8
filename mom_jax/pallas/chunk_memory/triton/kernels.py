"""Triton kernels of chunk_memory, forward; gpu.py says what they compute.

Pointers come first, named as arrays are: rows [R, H, X], numbers a row [R, H],
what a chunk has [N, H, ...]. Then sizes; `decays` and `solves` say whether
there is a log decay by head and whether the delta rule writes, and if not, the
pointers that belong to it are not read. `channels` says that q and k come
decayed by key channel, from the chunk's start and to its end
(kernels_channel.py), beside the decay of the whole chunk and the scores;
where it also `solves`, k as the delta rule reads, from the start, is `k_read`,
and the scores of keys with keys are `keys`. Else neither is read.
Products are of operands in the rows' dtype, sums are float32. No product is
transposed to be an operand again, which releases of Triton were seen to
miscompile for Hopper: its transpose is computed instead.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def place(n, h, H: tl.constexpr, C: tl.constexpr):
  """Where the numbers of a chunk's rows lie, [C]."""
  return (n.to(tl.int64) * C + tl.arange(0, C)) * H + h


@triton.jit
@no_type_check
def tile(place_C, X: tl.constexpr, first, B: tl.constexpr):
  """Where channels first ... first + B of those rows lie, [C, B]."""
  return place_C[:, None] * X + first + tl.arange(0, B)[None, :]


@triton.jit
@no_type_check
def square(n, h, H: tl.constexpr, C: tl.constexpr):
  """Where a chunk's [C, C] matrix lies."""
  i = tl.arange(0, C)
  return (n.to(tl.int64) * H + h) * C * C + i[:, None] * C + i[None, :]


@triton.jit
@no_type_check
def turned(n, h, H: tl.constexpr, C: tl.constexpr):
  """The same, of its transpose."""
  i = tl.arange(0, C)
  return (n.to(tl.int64) * H + h) * C * C + i[None, :] * C + i[:, None]


@triton.jit
@no_type_check
def diagonal(n, h, H: tl.constexpr, C: tl.constexpr):
  """Where its diagonal lies."""
  return (n.to(tl.int64) * H + h) * C * C + tl.arange(0, C) * (C + 1)


@triton.jit
@no_type_check
def matrix(
    n, h, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, k,
    BK: tl.constexpr, v, BV: tl.constexpr,
):
  """Where a block of a state [K, V] of chunk or group n lies."""
  row = (n.to(tl.int64) * H + h) * K + k + tl.arange(0, BK)
  return row[:, None] * V + v + tl.arange(0, BV)[None, :]


@triton.jit
@no_type_check
def ends(n, h, H: tl.constexpr, K: tl.constexpr, k, BK: tl.constexpr):
  """Where numbers by key channel of chunk n lie."""
  return (n.to(tl.int64) * H + h) * K + k + tl.arange(0, BK)


@triton.jit
@no_type_check
def between(g_C, C: tl.constexpr):
  """Decay from row j to row i, 0 for j > i: a sum over the rows in between.

  Never a difference of sums, which would cancel under strong decays.
  """
  i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
  sums = tl.cumsum(tl.where(i > j, g_C[:, None], 0.0), 0)
  return tl.where(i >= j, tl.exp(sums), 0.0)


@triton.jit
@no_type_check
def between_turned(g_C, C: tl.constexpr):
  """The transpose: decay from row i to row j."""
  i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
  sums = tl.cumsum(tl.where(j > i, g_C[None, :], 0.0), 1)
  return tl.where(j >= i, tl.exp(sums), 0.0)


@triton.jit
@no_type_check
def to_end(g, place_C, H: tl.constexpr, C: tl.constexpr):
  """Decay from each row to the chunk's end."""
  later = tl.arange(0, C) < C - 1
  g_C = tl.load(g + place_C + H, mask=later, other=0.0)
  return tl.exp(tl.cumsum(g_C, 0, reverse=True))


@triton.jit
@no_type_check
def inverse(a_CC, C: tl.constexpr, B: tl.constexpr, precision: tl.constexpr):
  """(I + A)^-1 for strictly lower A.

  Forward substitution in all diagonal blocks of B rows at once. Then, if B = 16
  and C = 64, with X their inverse and N = X L for the rest L of A, it is
  (I - N)(I + N^2) X, for N^4 = 0. Powers of A itself would cancel for keys that
  are nearly equal.
  """
  i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
  block = i // B == j // B
  near_CC = tl.where(block, a_CC, 0.0)
  x_CC = tl.where(i == j, 1.0, 0.0)
  for r in range(1, B):
    here = i % B == r
    row_C = tl.sum(tl.where(here, near_CC, 0.0), 0)
    new_C = tl.sum(row_C[:, None] * x_CC, 0)
    x_CC = tl.where(here & block, x_CC - new_C[None, :], x_CC)
  if B < C:
    n_CC = tl.dot(x_CC, a_CC - near_CC, input_precision=precision)
    square_CC = tl.dot(n_CC, n_CC, input_precision=precision)
    x_CC = tl.dot(square_CC, x_CC, x_CC, input_precision=precision)
    x_CC = tl.dot(-n_CC, x_CC, x_CC, input_precision=precision)
  return x_CC


@triton.jit
@no_type_check
def solve(
    k, g, keys, beta, group_N, solved, H: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, B: tl.constexpr, decays: tl.constexpr,
    channels: tl.constexpr, precision: tl.constexpr,
):
  """T = (I + A)^-1 of every used chunk."""
  n, h = tl.program_id(0), tl.program_id(1)
  if tl.load(group_N + n) >= 0:
    at = place(n, h, H, C)
    if channels:
      a_CC = tl.load(keys + square(n, h, H, C))
    else:
      a_CC = tl.zeros((C, C), tl.float32)
      for first in range(0, K, BK):
        k_CB = tl.load(k + tile(at, K, first, BK))
        a_CC = tl.dot(k_CB, tl.trans(k_CB), a_CC, input_precision=precision)
    a_CC *= tl.load(beta + at)[:, None]
    if decays:
      a_CC *= between(tl.load(g + at), C)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    a_CC = tl.where(i > j, a_CC, 0.0)
    t_CC = inverse(a_CC, C, B, precision)
    tl.store(solved + square(n, h, H, C), t_CC.to(solved.dtype.element_ty))


@triton.jit
@no_type_check
def states(
    k, k_read, v, g, end, beta, solved, first_G, count_G, initial, before, y,
    final, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BV: tl.constexpr, decays: tl.constexpr, channels: tl.constexpr,
    solves: tl.constexpr, precision: tl.constexpr,
):
  """State before each chunk of a group, what its rows write, the last state."""
  column, h, group = tl.program_id(0) * BV, tl.program_id(1), tl.program_id(2)
  kind = k.dtype.element_ty
  home = matrix(group, h, H, K, V, 0, K, column, BV)
  s_KB = tl.load(initial + home)
  start = tl.load(first_G + group)
  for step in range(0, tl.load(count_G + group)):
    n = start + step
    at = place(n, h, H, C)
    tl.store(
        before + matrix(n, h, H, K, V, 0, K, column, BV), s_KB.to(kind))
    k_CK = tl.load(k + tile(at, K, 0, K))
    y_CB = tl.load(v + tile(at, V, column, BV)).to(tl.float32)
    if decays:
      g_C = tl.load(g + at)
    if solves:
      if channels:
        read_CK = tl.load(k_read + tile(at, K, 0, K))
        old_CB = tl.dot(read_CK, s_KB.to(kind), input_precision=precision)
      else:
        old_CB = tl.dot(k_CK, s_KB.to(kind), input_precision=precision)
      if decays:
        old_CB *= tl.exp(tl.cumsum(g_C, 0))[:, None]
      y_CB = (y_CB - old_CB) * tl.load(beta + at)[:, None]
      t_CC = tl.load(solved + square(n, h, H, C))
      y_CB = tl.dot(t_CC, y_CB.to(kind), input_precision=precision)
      tl.store(y + tile(at, V, column, BV), y_CB.to(kind))
    if decays:
      y_CB *= to_end(g, at, H, C)[:, None]
      s_KB *= tl.exp(tl.sum(g_C, 0))
    if channels:
      s_KB *= tl.load(end + ends(n, h, H, K, 0, K))[:, None]
    s_KB = tl.dot(
        tl.trans(k_CK), y_CB.to(kind), s_KB, input_precision=precision)
  tl.store(final + home, s_KB)


@triton.jit
@no_type_check
def reads(
    q, k, g, scores, y, before, group_N, o, H: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    scale: tl.constexpr, decays: tl.constexpr, channels: tl.constexpr,
    precision: tl.constexpr,
):
  """What the rows read; zero in unused chunks."""
  n, h, column = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
  kind = o.dtype.element_ty
  at = place(n, h, H, C)
  if tl.load(group_N + n) >= 0:
    o_CB = tl.zeros((C, BV), tl.float32)
    p_CC = tl.zeros((C, C), tl.float32)
    for first in range(0, K, BK):
      q_CB = tl.load(q + tile(at, K, first, BK))
      s_KB = tl.load(before + matrix(n, h, H, K, V, first, BK, column, BV))
      o_CB = tl.dot(q_CB, s_KB, o_CB, input_precision=precision)
      if not channels:
        k_CB = tl.load(k + tile(at, K, first, BK))
        p_CC = tl.dot(q_CB, tl.trans(k_CB), p_CC, input_precision=precision)
    if channels:
      p_CC = tl.load(scores + square(n, h, H, C))
    elif decays:
      g_C = tl.load(g + at)
      o_CB *= tl.exp(tl.cumsum(g_C, 0))[:, None]
      p_CC *= between(g_C, C)
    else:
      i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
      p_CC = tl.where(i >= j, p_CC, 0.0)
    y_CB = tl.load(y + tile(at, V, column, BV))
    o_CB = tl.dot(p_CC.to(kind), y_CB, o_CB, input_precision=precision)
    tl.store(o + tile(at, V, column, BV), (o_CB * scale).to(kind))
  else:
    tl.store(o + tile(at, V, column, BV), tl.zeros((C, BV), kind))
