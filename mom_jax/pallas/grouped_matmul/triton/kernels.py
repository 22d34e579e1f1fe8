"""Triton kernels of grouped products; backend.py says what they compute.

x is cut into tiles of rows of one group each: `group_P` is their group (-1:
rows past the last group, which become zeros), `first_P` their first row,
`last_P` the end of their group. A tile that ends before it begins is unused. If
`gathered`, row r is row index_R[r] of x, otherwise r. No accumulator is
transposed: an operand whose transpose is needed is loaded transposed.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _tile_of(P: tl.constexpr, columns: tl.constexpr, band: tl.constexpr):
  """Return (tile of rows, tile of columns) of the program.

  `band` tiles of rows run side by side, so that programs that run together
  share rows and matrices in the cache.
  """
  program = tl.program_id(0)
  begin = program // (band * columns) * band
  height = tl.minimum(P - begin, band)
  within = program % (band * columns)
  return begin + within % height, within // height


@triton.jit
@no_type_check
def grouped_matmul(
    x, index_R, w, group_P, first_P, last_P, y, D: tl.constexpr,
    F: tl.constexpr, P: tl.constexpr, transposed: tl.constexpr,
    gathered: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
    inner: tl.constexpr, band: tl.constexpr, precision: tl.constexpr,
):
  """y = x_r w_g, or x_r w_g^T where w is [G, F, D]."""
  tile, column = _tile_of(P, tl.cdiv(F, width), band)
  group = tl.load(group_P + tile)
  first, last = tl.load(first_P + tile), tl.load(last_P + tile)
  row = first + tl.arange(0, rows)
  col = column * width + tl.arange(0, width)
  k = tl.arange(0, inner)
  source = tl.maximum(tl.minimum(row, last - 1), 0)
  if gathered:
    source = tl.load(index_R + source)
  x_at = x + source.to(tl.int64)[:, None] * D + k[None, :]
  w_at = w + tl.maximum(group, 0).to(tl.int64) * D * F
  if transposed:
    w_at = w_at + col[None, :] * D + k[:, None]
    step = inner
  else:
    w_at = w_at + k[:, None] * F + col[None, :]
    step = inner * F
  total = tl.zeros((rows, width), tl.float32)
  steps = tl.where((group >= 0) & (last > first), tl.cdiv(D, inner), 0)
  for i in range(0, steps):
    left = D - i * inner
    if D % inner == 0:
      x_rk = tl.load(x_at)
    else:
      x_rk = tl.load(x_at, mask=k[None, :] < left, other=0)
    if F % width == 0:
      if D % inner == 0:
        w_ko = tl.load(w_at)
      else:
        w_ko = tl.load(w_at, mask=k[:, None] < left, other=0)
    elif D % inner == 0:
      w_ko = tl.load(w_at, mask=col[None, :] < F, other=0)
    else:
      w_ko = tl.load(
          w_at, mask=(k[:, None] < left) & (col[None, :] < F), other=0)
    total = tl.dot(x_rk, w_ko, total, input_precision=precision)
    x_at += inner
    w_at += step
  tl.store(
      y + row.to(tl.int64)[:, None] * F + col[None, :],
      total.to(y.dtype.element_ty),
      mask=(row[:, None] < last) & (col[None, :] < F))


@triton.jit
@no_type_check
def grouped_swiglu(
    x, w, group_P, first_P, last_P, h, D: tl.constexpr, F: tl.constexpr,
    P: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
    inner: tl.constexpr, band: tl.constexpr, precision: tl.constexpr,
):
  """h = silu(x_r a_g) * (x_r b_g) with w = [a, b]."""
  gate, up, offsets, mask = _gate_up(
      x, w, group_P, first_P, last_P, D, F, P, rows, width, inner, band,
      precision)
  h_tile = gate * tl.sigmoid(gate) * up
  tl.store(h + offsets, h_tile.to(h.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def grouped_swiglu_keep(
    x, w, group_P, first_P, last_P, h, gate_out, up_out, D: tl.constexpr,
    F: tl.constexpr, P: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
    inner: tl.constexpr, band: tl.constexpr, precision: tl.constexpr,
):
  """`grouped_swiglu`, and both products for the backward pass."""
  gate, up, offsets, mask = _gate_up(
      x, w, group_P, first_P, last_P, D, F, P, rows, width, inner, band,
      precision)
  dtype = h.dtype.element_ty
  tl.store(gate_out + offsets, gate.to(dtype), mask=mask)
  tl.store(up_out + offsets, up.to(dtype), mask=mask)
  h_tile = gate * tl.sigmoid(gate) * up
  tl.store(h + offsets, h_tile.to(dtype), mask=mask)


@triton.jit
@no_type_check
def _gate_up(
    x, w, group_P, first_P, last_P, D: tl.constexpr, F: tl.constexpr,
    P: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
    inner: tl.constexpr, band: tl.constexpr, precision: tl.constexpr,
):
  """Return both products of a tile, their offsets and the mask to store."""
  tile, column = _tile_of(P, tl.cdiv(F, width), band)
  group = tl.load(group_P + tile)
  first, last = tl.load(first_P + tile), tl.load(last_P + tile)
  row = first + tl.arange(0, rows)
  col = column * width + tl.arange(0, width)
  k = tl.arange(0, inner)
  source = tl.maximum(tl.minimum(row, last - 1), 0).to(tl.int64)
  x_at = x + source[:, None] * D + k[None, :]
  w_at = w + tl.maximum(group, 0).to(tl.int64) * (2 * D * F)
  w_at = w_at + k[:, None] * (2 * F) + col[None, :]
  gate = tl.zeros((rows, width), tl.float32)
  up = tl.zeros((rows, width), tl.float32)
  steps = tl.where((group >= 0) & (last > first), tl.cdiv(D, inner), 0)
  for i in range(0, steps):
    left = D - i * inner
    if D % inner == 0:
      x_rk = tl.load(x_at)
    else:
      x_rk = tl.load(x_at, mask=k[None, :] < left, other=0)
    if (F % width == 0) & (D % inner == 0):
      a_ko = tl.load(w_at)
      b_ko = tl.load(w_at + F)
    else:
      mask_w = (k[:, None] < left) & (col[None, :] < F)
      a_ko = tl.load(w_at, mask=mask_w, other=0)
      b_ko = tl.load(w_at + F, mask=mask_w, other=0)
    gate = tl.dot(x_rk, a_ko, gate, input_precision=precision)
    up = tl.dot(x_rk, b_ko, up, input_precision=precision)
    x_at += inner
    w_at += inner * 2 * F
  offsets = row.to(tl.int64)[:, None] * F + col[None, :]
  return gate, up, offsets, (row[:, None] < last) & (col[None, :] < F)


@triton.jit
@no_type_check
def grouped_matmul_dw(
    x, index_R, dy, first_G, last_G, dw, D: tl.constexpr, F: tl.constexpr,
    gathered: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
    inner: tl.constexpr, precision: tl.constexpr,
):
  """dw_g = the sum of x_r^T dy_r over a group's rows, one tile per program."""
  columns: tl.constexpr = (F + width - 1) // width
  group = tl.program_id(1)
  first, last = tl.load(first_G + group), tl.load(last_G + group)
  d = tl.program_id(0) // columns * inner + tl.arange(0, inner)
  f = tl.program_id(0) % columns * width + tl.arange(0, width)
  row = tl.arange(0, rows)
  x_at = x + first.to(tl.int64) * D + row[None, :] * D + d[:, None]
  dy_at = dy + first.to(tl.int64) * F + row[:, None] * F + f[None, :]
  total = tl.zeros((inner, width), tl.float32)
  for begin in range(first, last, rows):
    mask = row < last - begin
    if gathered:
      index = tl.load(index_R + begin + row, mask=mask, other=0).to(tl.int64)
      x_at = x + index[None, :] * D + d[:, None]
    x_dr = tl.load(x_at, mask=mask[None, :] & (d[:, None] < D), other=0)
    dy_rf = tl.load(dy_at, mask=mask[:, None] & (f[None, :] < F), other=0)
    total = tl.dot(x_dr, dy_rf, total, input_precision=precision)
    if not gathered:
      x_at += rows * D
    dy_at += rows * F
  offsets = group.to(tl.int64) * D * F + d[:, None] * F + f[None, :]
  tl.store(
      dw + offsets, total.to(dw.dtype.element_ty),
      mask=(d[:, None] < D) & (f[None, :] < F))
