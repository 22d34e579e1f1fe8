"""Linear algebra inside one chunk of one head, on values in registers.

`inverses` takes a list with one matrix per chunk and head and advances all of
them by one step before the next step: independent work hides the latency of the
matrix units.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

LANES = 128
BLOCK = 16  # rows of the blocks that are inverted by substitution
LOWEST = -128.0  # its exponential and those of all below it are 0 in float32
STEP = 1 / 16  # sums of multiples of it are exact
SMALL_BETA = 2.0**-20  # as good as 0

NN = (((1,), (0,)), ((), ()))  # a b
NT = (((1,), (1,)), ((), ()))  # a b^T
TN = (((0,), (0,)), ((), ()))  # a^T b


def dot(a, b, dims, dtype):
  """A product with operands rounded to `dtype`, summed in float32."""
  exact = dtype == jnp.float32
  return jax.lax.dot_general(
      a.astype(dtype), b.astype(dtype), dims,
      precision=jax.lax.Precision.HIGHEST if exact else None,
      preferred_element_type=jnp.float32)


def dot_split(a, b, dims, dtype):
  """`dot` in split precision: a, and b if float32, as sums of two `dtype`."""
  if dtype == jnp.float32:
    return dot(a, b, dims, dtype)
  high, low = _split(a, dtype)
  b, *low_b = [b] if b.dtype == dtype else _split(b, dtype)
  # Side by side, so that b is pushed into the matrix units once.
  out = dot(
      jnp.concatenate([high, low], 1 - dims[0][0][0]), b, dims, dtype)
  out = out[:len(out) // 2] + out[len(out) // 2:]
  return sum((dot(high, x, dims, dtype) for x in low_b), out)


def _split(x, dtype):
  """x rounded to `dtype`, and the rest."""
  high = x.astype(dtype)
  return high, (x - high.astype(jnp.float32)).astype(dtype)


def iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def to_column(row):
  """[1, C] to [C, 1]."""
  C = row.shape[1]
  same = iota((C, C), 0) == iota((C, C), 1)
  return jnp.where(same, row, 0.0).sum(1, keepdims=True)


def to_row(column):
  """[C, 1] to [1, C]."""
  C = column.shape[0]
  same = iota((C, C), 0) == iota((C, C), 1)
  return jnp.where(same, column, 0.0).sum(0, keepdims=True)


class RowDecay(NamedTuple):
  """Decays inside a chunk, one scalar per row."""

  between: jax.Array  # [C, C], from row j to row i; 0 for j > i
  from_start: jax.Array  # [C, 1], from before the chunk to the row
  to_end: jax.Array  # [C, 1], from the row to the chunk's end
  chunk_decay: jax.Array  # [1, 1], of the whole chunk


def row_decay(g) -> RowDecay:
  """Return the decays of a chunk from its rows' log decay, [1, C].

  Differences of sums lose the small terms of the sum. So log decays are split
  into a multiple of STEP, whose sums and differences are exact, and a small
  rest.
  """
  C = g.shape[1]
  g = jnp.maximum(g, LOWEST)
  coarse = jnp.round(g * (1 / STEP)) * STEP
  lower = iota((C, C), 0) >= iota((C, C), 1)
  total = lambda x: jnp.where(lower, x, 0.0).sum(1, keepdims=True)
  big, small = total(coarse), total(g - coarse)
  diff = (big - to_row(big)) + (small - to_row(small))
  between = jnp.where(lower, jnp.exp(jnp.where(lower, diff, 0.0)), 0.0)
  big_end, small_end = big[C - 1 :], small[C - 1 :]
  return RowDecay(
      between, jnp.exp(big + small),
      jnp.exp((big_end - big) + (small_end - small)),
      jnp.exp(big_end + small_end))


def masked(x, decay, strict=False):
  """Lower triangle of [C, C], times the decay between its rows."""
  i, j = iota(x.shape, 0), iota(x.shape, 1)
  keep = i > j if strict else i >= j
  return jnp.where(keep, x if decay is None else x * decay.between, 0.0)


def scaled(x, decay):
  """x [C, X] times a decay per row, [C, LANES], or per channel, [C, X]."""
  width = x.shape[1]
  if decay.shape[1] != width:
    decay = jnp.concatenate([decay] * -(-width // LANES), 1)[:, :width]
  return x * decay


def beta_cotangent(beta, dy, y, dbeta):
  """Cotangent of beta, [C, 1], from dy after the solve and Y.

  Y is beta times the error that an update corrects, so dy Y / beta is the
  cotangent. The sums that make up `dbeta` recompute the error and cancel badly
  for close keys, so they are used only where beta is too small to divide by.
  """
  large = beta > SMALL_BETA
  product = (dy * y).sum(1, keepdims=True)
  return jnp.where(large, product / jnp.where(large, beta, 1.0), dbeta)


def inverses(a, dtype):
  """(I + A)^-1 for each strictly lower A [C, C], exact for near-equal keys.

  A generator that returns the inverses, so that other work may go on between
  its steps. Forward substitution inside blocks of BLOCK rows, all blocks of 128
  rows side by side in the lanes; then neighbours merge, by full-size products:
  [[P, 0], [A, Q]]^-1 = [[P^-1, 0], [-Q^-1 A P^-1, Q^-1]]. Doubling powers of A
  would be shorter, but cancels badly for equal keys, and so do merges that
  round what they multiply.
  """
  C = a[0].shape[0]
  if C < LANES:  # two chunks per matrix
    pairs = [a[n : n + 2] for n in range(0, len(a), 2)]
    out = yield from _invert_blocks(
        [_block_diagonal(pair) for pair in pairs], C, dtype)
    return [
        t[n * C : (n + 1) * C, n * C : (n + 1) * C]
        for t, pair in zip(out, pairs) for n in range(len(pair))
    ]
  corners = [
      x[n : n + LANES, n : n + LANES] for x in a for n in range(0, C, LANES)]
  out = yield from _invert_blocks(corners, LANES, dtype)
  if C == LANES:
    return out
  first, second = out[0::2], out[1::2]
  below = [
      dot_split(x[LANES:, :LANES], p, NN, dtype) for x, p in zip(a, first)]
  yield
  below = [-dot_split(q, x, NN, dtype) for q, x in zip(second, below)]
  return [
      jnp.concatenate([
          jnp.concatenate([p, jnp.zeros_like(p)], 1),
          jnp.concatenate([x, q], 1)], 0)
      for p, x, q in zip(first, below, second)
  ]


def num_inverse_steps(C):
  """Number of yields of `inverses` for matrices of C rows."""
  size, merges = BLOCK, 0
  while size < min(C, LANES):
    size, merges = 2 * size, merges + 1
  return (BLOCK - 1) // 4 + 2 * merges + (C > LANES)


def _block_diagonal(blocks):
  """[LANES, LANES] with one or two blocks on its diagonal."""
  h = LANES // 2
  zero = jnp.zeros((h, h), jnp.float32)
  first, second = (*blocks, zero)[:2]
  return jnp.concatenate([
      jnp.concatenate([first, zero], 1), jnp.concatenate([zero, second], 1)], 0)


def _invert_blocks(a, size, dtype):
  """Inverses of [LANES, LANES] with diagonal blocks of `size` rows."""
  B = BLOCK
  lane, row = iota((B, LANES), 1), iota((B, LANES), 0)
  in_block = [lane // B == b for b in range(LANES // B)]
  packed = [
      sum(jnp.where(mask, x[b * B : (b + 1) * B], 0.0)
          for b, mask in enumerate(in_block)) for x in a]
  t = [jnp.where(lane % B == row, 1.0, 0.0)] * len(a)
  for m in range(B - 1):
    at = (lane // B) * B + m
    t = [y - jnp.take_along_axis(x, at, 1) * y[m : m + 1]
         for x, y in zip(packed, t)]
    if m % 4 == 3:
      yield
  i, j = iota((LANES, LANES), 0), iota((LANES, LANES), 1)
  t = [jnp.where(i // B == j // B, jnp.concatenate([y] * (LANES // B), 0), 0.0)
       for y in t]
  half = LANES // 2
  i, j = iota((half, LANES), 0), iota((half, LANES), 1)
  h = B
  while h < size:
    corner = j // h == 2 * (i // h)
    x = [dot_split(jnp.where(corner, odd_runs(y, h), 0.0), z, NN, dtype)
         for y, z in zip(a, t)]
    yield
    x = [dot_split(odd_runs(y, h), scatter_odd_runs(z, h), NN, dtype)
         for y, z in zip(t, x)]
    t = [y - scatter_odd_runs(z, h) for y, z in zip(t, x)]
    yield
    h *= 2
  return t


def odd_runs(x, h):
  """Return every second run of h rows."""
  return jnp.concatenate([x[n : n + h] for n in range(h, len(x), 2 * h)], 0)


def scatter_odd_runs(x, h):
  """Invert `odd_runs`, with zeros in the even runs."""
  zero = jnp.zeros((h, x.shape[1]), x.dtype)
  runs = [x[n : n + h] for n in range(0, len(x), h)]
  return jnp.concatenate([y for run in runs for y in (zero, run)], 0)
