"""Decay by channel inside one chunk of one head, on values in registers.

With e_i = exp(g_i) and Gamma_ij = e_{j+1} ... e_i in each of X channels (0 for
j > i), three things are needed; two of them are products with Gamma, one is
what multiplies by the transpose:

  pairs   p_ij = sum_x a_ix b_jx Gamma_ijx
  reads   o_ix = sum_j p_ij Gamma_ijx b_jx
  back    b_jx = sum_i p_ij Gamma_ijx a_ix

Where i and j lie in two neighbouring runs of h rows, Gamma is the decay from
the beginning of the second run to i times that from j to the end of the first:
a product of matrices for each h. What is left are blocks of BLOCK rows on the
diagonal, done a diagonal at a time: b moves down a row and decays, by one
factor. All is products of numbers that are at most 1, so it is exact for any
decay: nothing is clamped, no quotient of decays is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mom_jax.pallas.chunk_memory.tpu_chunk import (
    NN,
    NT,
    TN,
    iota,
    second,
    spread,
)

BLOCK = 8  # rows of a register


class Level(NamedTuple):
  """Decays within runs of h rows, [C, X]."""

  h: int
  to: jax.Array  # from before the run to the row
  after: jax.Array  # from the row to the run's end


class Decay(NamedTuple):
  """Decays of a chunk with a rate for each channel of each row."""

  own: jax.Array  # e, [C, X]
  levels: tuple[Level, ...]  # runs of BLOCK rows, of twice as many, ...
  from_start: jax.Array  # [C, X], from before the chunk to the row
  to_end: jax.Array  # [C, X], from the row to the chunk's end
  whole: jax.Array  # [1, X]


def decays(g):
  """Decays of a chunk from the log decays of its rows, [C, X]."""
  own, C = jnp.exp(g), len(g)
  place = iota(g.shape, 0) % BLOCK
  to = rest = own
  h = 1
  while h < BLOCK:
    to = jnp.where(place >= h, to * _down(to, h), to)
    rest = jnp.where(place + h < BLOCK, rest * _up(rest, h), rest)
    h *= 2
  after = jnp.where(place < BLOCK - 1, _up(rest, 1), 1.0)
  levels = []
  while h < C:
    levels.append(Level(h, to, after))
    starts = range(0, C, h)
    # Runs pair up: the second follows the end of the first.
    to, after = (
        jnp.concatenate([
            to[n : n + h] * to[n - 1 : n] if n // h % 2 else to[n : n + h]
            for n in starts], 0),
        jnp.concatenate([
            after[n : n + h] if n // h % 2
            else after[n : n + h] * to[n + 2 * h - 1 : n + 2 * h]
            for n in starts], 0))
    h *= 2
  return Decay(own, tuple(levels), to, after, to[C - 1 :])


def pairs(decay, rows, b, dot):
  """For each a of `rows`: [C, C] of a_i and b_j, 0 for j > i."""
  C = len(b)
  out, moved = [jnp.zeros((C, C), jnp.float32)] * len(rows), b
  for d in range(BLOCK):
    moved = decay.own * _down(moved, 1) if d else moved
    here = _diagonal(C, d)
    out = [jnp.where(here, (a * moved).sum(1, keepdims=True), p)
           for a, p in zip(rows, out)]
  for level in decay.levels:
    to = second(level.to, level.h)
    a = jnp.concatenate([second(a, level.h) * to for a in rows], 0)
    below = dot(a, b * level.after, NT)
    out = [p + spread(_corner(x, level.h), level.h)
           for p, x in zip(out, _parts(below, len(rows)))]
  return out


def reads(decay, matrices, b, dot):
  """For each p of `matrices`: what rows read of b, [C, X]."""
  out, moved = [0.0] * len(matrices), b
  for d in range(BLOCK):
    moved = decay.own * _down(moved, 1) if d else moved
    out = [o + _on_diagonal(p, d) * moved for o, p in zip(out, matrices)]
  for level in decay.levels:
    p = jnp.concatenate(
        [_corner(second(p, level.h), level.h) for p in matrices], 0)
    read = dot(p, b * level.after, NN)
    to = second(level.to, level.h)
    out = [o + spread(to * x, level.h)
           for o, x in zip(out, _parts(read, len(matrices)))]
  return out


def back(decay, matrices, rows, dot):
  """Sum over p and a of `matrices` and `rows`, [C, X]."""
  out = jnp.zeros_like(decay.own)
  for d in reversed(range(BLOCK)):
    out = _up(decay.own * out, 1) if d + 1 < BLOCK else out
    for p, a in zip(matrices, rows):
      out += _on_diagonal(p, d) * a
  for level in decay.levels:
    to = second(level.to, level.h)
    p = jnp.concatenate(
        [_corner(second(p, level.h), level.h) for p in matrices], 0)
    a = jnp.concatenate([second(a, level.h) * to for a in rows], 0)
    out += level.after * dot(p, a, TN)
  return out


def rates(dsum, end):
  """Cotangent of the log decays, [C, X], from that of their sums up to a row.

  Args:
    dsum: [C, X].
    end: what is more of the sum over the whole chunk, [1, X].
  """
  C, place = len(dsum), iota(dsum.shape, 0) % BLOCK
  h = 1
  while h < BLOCK:
    dsum += jnp.where(place + h < BLOCK, _up(dsum, h), 0.0)
    h *= 2
  while h < C:
    dsum = jnp.concatenate([
        dsum[n : n + h] if n // h % 2
        else dsum[n : n + h] + dsum[n + h : n + h + 1]
        for n in range(0, C, h)], 0)
    h *= 2
  return dsum + end


def _down(x, n):
  """Every row moves down n places within the chunk, the last ones to its top.
  """
  return pltpu.roll(x, n, 0)


def _up(x, n):
  return pltpu.roll(x, len(x) - n, 0)


def _diagonal(C, d):
  """Where j = i - d in one block of BLOCK rows."""
  i, j = iota((C, C), 0), iota((C, C), 1)
  return (j == i - d) & (i % BLOCK >= d)


def _on_diagonal(p, d):
  """p_{i, i - d} within blocks, else 0, [C, 1]."""
  return jnp.where(_diagonal(len(p), d), p, 0.0).sum(1, keepdims=True)


def _corner(x, h):
  """Of every second run of h rows, the columns of the run before it."""
  i, j = iota(x.shape, 0), iota(x.shape, 1)
  return jnp.where(j // h == 2 * (i // h), x, 0.0)


def _parts(x, n):
  size = len(x) // n
  return [x[m * size : (m + 1) * size] for m in range(n)]
