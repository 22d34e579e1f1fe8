"""Triton kernels of chunk_memory, forward; backend.py says what they compute.

Pointers come first, named like arrays: rows [R, H, X], scalars per row [R, H],
per chunk [N, H, ...]. Then sizes and flags. `decays`: there is a log decay per
head. `solves`: the delta rule. `channels`: decay per key channel, where q comes
decayed from the chunk's start and k to its end (kernels_channel.py), with
`chunk_decay` and `scores`; together with `solves` also `k_start`, k decayed
from the chunk's start, and `keys`, the scores of keys with keys. Pointers that
belong to a flag that is off are not read.

Products are of operands in the rows' dtype, sums are float32. No product is
transposed to be an operand again, which releases of Triton were seen to
miscompile for Hopper: its transpose is computed instead.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def at_rows(n, h, H: tl.constexpr, C: tl.constexpr):
  """Offsets of scalars per row of a chunk, [C]."""
  return (n.to(tl.int64) * C + tl.arange(0, C)) * H + h


@triton.jit
@no_type_check
def at_tile(row_C, X: tl.constexpr, first, B: tl.constexpr):
  """Offsets of channels first ... first + B of a chunk's rows, [C, B]."""
  return row_C[:, None] * X + first + tl.arange(0, B)[None, :]


@triton.jit
@no_type_check
def at_square(n, h, H: tl.constexpr, C: tl.constexpr):
  """Offsets of a chunk's [C, C] matrix."""
  i = tl.arange(0, C)
  return (n.to(tl.int64) * H + h) * C * C + i[:, None] * C + i[None, :]


@triton.jit
@no_type_check
def at_transposed(n, h, H: tl.constexpr, C: tl.constexpr):
  """Offsets of its transpose."""
  i = tl.arange(0, C)
  return (n.to(tl.int64) * H + h) * C * C + i[None, :] * C + i[:, None]


@triton.jit
@no_type_check
def at_diagonal(n, h, H: tl.constexpr, C: tl.constexpr):
  """Offsets of its diagonal."""
  return (n.to(tl.int64) * H + h) * C * C + tl.arange(0, C) * (C + 1)


@triton.jit
@no_type_check
def at_state(
    n, h, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, k,
    BK: tl.constexpr, v, BV: tl.constexpr,
):
  """Offsets of a block of a state [K, V] of chunk or group n."""
  row = (n.to(tl.int64) * H + h) * K + k + tl.arange(0, BK)
  return row[:, None] * V + v + tl.arange(0, BV)[None, :]


@triton.jit
@no_type_check
def at_channels(n, h, H: tl.constexpr, K: tl.constexpr, k, BK: tl.constexpr):
  """Offsets of scalars per key channel of chunk n."""
  return (n.to(tl.int64) * H + h) * K + k + tl.arange(0, BK)


@triton.jit
@no_type_check
def pair_decay(g_C, C: tl.constexpr):
  """Decay from row j to row i, 0 for j > i: a sum over the rows in between.

  Never a difference of sums, which would cancel under strong decays.
  """
  i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
  sums = tl.cumsum(tl.where(i > j, g_C[:, None], 0.0), 0)
  return tl.where(i >= j, tl.exp(sums), 0.0)


@triton.jit
@no_type_check
def pair_decay_transposed(g_C, C: tl.constexpr):
  """The transpose: decay from row i to row j."""
  i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
  sums = tl.cumsum(tl.where(j > i, g_C[None, :], 0.0), 1)
  return tl.where(j >= i, tl.exp(sums), 0.0)


@triton.jit
@no_type_check
def to_chunk_end(g, row_C, H: tl.constexpr, C: tl.constexpr):
  """Decay from each row to the chunk's end."""
  later = tl.arange(0, C) < C - 1
  g_C = tl.load(g + row_C + H, mask=later, other=0.0)
  return tl.exp(tl.cumsum(g_C, 0, reverse=True))


@triton.jit
@no_type_check
def invert(a_CC, C: tl.constexpr, B: tl.constexpr, precision: tl.constexpr):
  """(I + A)^-1 for strictly lower A.

  Forward substitution in all diagonal blocks of B rows at once. Then, if B = 16
  and C = 64, with X their inverse and N = X L for the rest L of A, it is
  (I - N)(I + N^2) X, because N^4 = 0. Powers of A itself would cancel for keys
  that are nearly equal.
  """
  i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
  in_block = i // B == j // B
  near_CC = tl.where(in_block, a_CC, 0.0)
  x_CC = tl.where(i == j, 1.0, 0.0)
  for r in range(1, B):
    in_row = i % B == r
    row_C = tl.sum(tl.where(in_row, near_CC, 0.0), 0)
    new_C = tl.sum(row_C[:, None] * x_CC, 0)
    x_CC = tl.where(in_row & in_block, x_CC - new_C[None, :], x_CC)
  if B < C:
    n_CC = tl.dot(x_CC, a_CC - near_CC, input_precision=precision)
    square_CC = tl.dot(n_CC, n_CC, input_precision=precision)
    x_CC = tl.dot(square_CC, x_CC, x_CC, input_precision=precision)
    x_CC = tl.dot(-n_CC, x_CC, x_CC, input_precision=precision)
  return x_CC


@triton.jit
@no_type_check
def chunk_inverse(
    k, g, keys, beta, group_N, inverse, H: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, B: tl.constexpr, decays: tl.constexpr,
    channels: tl.constexpr, precision: tl.constexpr,
):
  """Compute T = (I + A)^-1 of every used chunk."""
  n, h = tl.program_id(0), tl.program_id(1)
  if tl.load(group_N + n) >= 0:
    rows = at_rows(n, h, H, C)
    if channels:
      a_CC = tl.load(keys + at_square(n, h, H, C))
    else:
      a_CC = tl.zeros((C, C), tl.float32)
      for first_k in range(0, K, BK):
        k_CB = tl.load(k + at_tile(rows, K, first_k, BK))
        a_CC = tl.dot(k_CB, tl.trans(k_CB), a_CC, input_precision=precision)
    a_CC *= tl.load(beta + rows)[:, None]
    if decays:
      a_CC *= pair_decay(tl.load(g + rows), C)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    a_CC = tl.where(i > j, a_CC, 0.0)
    t_CC = invert(a_CC, C, B, precision)
    tl.store(inverse + at_square(n, h, H, C), t_CC.to(inverse.dtype.element_ty))


@triton.jit
@no_type_check
def chunk_states(
    k, k_start, v, g, chunk_decay, beta, inverse, first_G, count_G, initial,
    before, y, final, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, decays: tl.constexpr,
    channels: tl.constexpr, solves: tl.constexpr, precision: tl.constexpr,
):
  """Compute the state before each chunk of a group, Y, the last state."""
  first_v, h, group = tl.program_id(0) * BV, tl.program_id(1), tl.program_id(2)
  dtype = k.dtype.element_ty
  state_at = at_state(group, h, H, K, V, 0, K, first_v, BV)
  s_KB = tl.load(initial + state_at)
  start = tl.load(first_G + group)
  for step in range(0, tl.load(count_G + group)):
    n = start + step
    rows = at_rows(n, h, H, C)
    tl.store(
        before + at_state(n, h, H, K, V, 0, K, first_v, BV), s_KB.to(dtype))
    k_CK = tl.load(k + at_tile(rows, K, 0, K))
    y_CB = tl.load(v + at_tile(rows, V, first_v, BV)).to(tl.float32)
    if decays:
      g_C = tl.load(g + rows)
    if solves:
      if channels:
        k_start_CK = tl.load(k_start + at_tile(rows, K, 0, K))
        stored_CB = tl.dot(
            k_start_CK, s_KB.to(dtype), input_precision=precision)
      else:
        stored_CB = tl.dot(k_CK, s_KB.to(dtype), input_precision=precision)
      if decays:
        stored_CB *= tl.exp(tl.cumsum(g_C, 0))[:, None]
      y_CB = (y_CB - stored_CB) * tl.load(beta + rows)[:, None]
      t_CC = tl.load(inverse + at_square(n, h, H, C))
      y_CB = tl.dot(t_CC, y_CB.to(dtype), input_precision=precision)
      tl.store(y + at_tile(rows, V, first_v, BV), y_CB.to(dtype))
    if decays:
      y_CB *= to_chunk_end(g, rows, H, C)[:, None]
      s_KB *= tl.exp(tl.sum(g_C, 0))
    if channels:
      s_KB *= tl.load(chunk_decay + at_channels(n, h, H, K, 0, K))[:, None]
    s_KB = tl.dot(
        tl.trans(k_CK), y_CB.to(dtype), s_KB, input_precision=precision)
  tl.store(final + state_at, s_KB)


@triton.jit
@no_type_check
def chunk_outputs(
    q, k, g, scores, y, before, group_N, o, H: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    scale: tl.constexpr, decays: tl.constexpr, channels: tl.constexpr,
    precision: tl.constexpr,
):
  """Compute O; zero in unused chunks."""
  n, h, first_v = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
  dtype = o.dtype.element_ty
  rows = at_rows(n, h, H, C)
  if tl.load(group_N + n) >= 0:
    o_CB = tl.zeros((C, BV), tl.float32)
    p_CC = tl.zeros((C, C), tl.float32)
    for first_k in range(0, K, BK):
      q_CB = tl.load(q + at_tile(rows, K, first_k, BK))
      s_KB = tl.load(before + at_state(n, h, H, K, V, first_k, BK, first_v, BV))
      o_CB = tl.dot(q_CB, s_KB, o_CB, input_precision=precision)
      if not channels:
        k_CB = tl.load(k + at_tile(rows, K, first_k, BK))
        p_CC = tl.dot(q_CB, tl.trans(k_CB), p_CC, input_precision=precision)
    if channels:
      p_CC = tl.load(scores + at_square(n, h, H, C))
    elif decays:
      g_C = tl.load(g + rows)
      o_CB *= tl.exp(tl.cumsum(g_C, 0))[:, None]
      p_CC *= pair_decay(g_C, C)
    else:
      i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
      p_CC = tl.where(i >= j, p_CC, 0.0)
    y_CB = tl.load(y + at_tile(rows, V, first_v, BV))
    o_CB = tl.dot(p_CC.to(dtype), y_CB, o_CB, input_precision=precision)
    tl.store(o + at_tile(rows, V, first_v, BV), (o_CB * scale).to(dtype))
  else:
    tl.store(o + at_tile(rows, V, first_v, BV), tl.zeros((C, BV), dtype))
