"""Decay by channel inside one chunk of one head, on values in registers.

With e_i = exp(g_i) and Gamma_ij = e_{j+1} ... e_i in each of X channels (0 for
j > i), three things are needed; two of them are products with Gamma, one is
what multiplies by the transpose:

  pairs   p_ij = sum_x a_ix b_jx Gamma_ijx
  reads   o_ix = sum_j p_ij Gamma_ijx b_jx
  back    b_jx = sum_i p_ij Gamma_ijx a_ix

Where i and j lie in two neighbouring runs of h rows, Gamma is the decay from
the beginning of the second run to i times that from j to the end of the first:
a product of matrices for each h = 1, 2, 4, ..., and one for i = j. All decays
are products of numbers that are at most 1, so it is exact for any decay:
nothing is clamped, no quotient of decays is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mom_jax.pallas.chunk_memory.tpu.chunk_algebra import (
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

  levels: tuple[Level, ...]  # runs of 1, 2, 4, ... rows
  from_start: jax.Array  # [C, X], from before the chunk to the row
  to_end: jax.Array  # [C, X], from the row to the chunk's end
  whole: jax.Array  # [1, X]


def decays(g):
  """Decays of a chunk from the log decays of its rows, [C, X]."""
  own, C = jnp.exp(g), len(g)
  levels = [Level(1, own, jnp.ones_like(own))]
  for h in (2, 4, 8):
    levels.append(_within(own, h))
  _, to, after = levels.pop()
  h = BLOCK
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
  return Decay(tuple(levels), to, after, to[C - 1 :])


def _within(own, h):
  """The level of runs that lie in registers."""
  place = iota(own.shape, 0) % h
  to = rest = own
  n = 1
  while n < h:
    to = jnp.where(place >= n, to * _down(to, n), to)
    rest = jnp.where(place + n < h, rest * _up(rest, n), rest)
    n *= 2
  return Level(h, to, jnp.where(place < h - 1, _up(rest, 1), 1.0))


def pairs(decay, rows, b, dot):
  """For each a of `rows`: [C, C] of a_i and b_j, 0 for j > i."""
  C, n = len(b), len(rows)
  same = dot(jnp.concatenate(rows, 0), b, NT)
  out = [jnp.where(_same(C), x, 0.0) for x in _parts(same, n)]
  for level in decay.levels:
    a = jnp.concatenate(_left(level, rows), 0)
    below = dot(a, b * level.after, NT)
    out = [p + _whole(_corner(x, level.h, C), level.h)
           for p, x in zip(out, _parts(below, n))]
  return out


def reads(decay, matrices, b, dot):
  """For each p of `matrices`: what rows read of b, [C, X]."""
  C, n = len(b), len(matrices)
  same = [jnp.where(_same(C), p, 0.0) for p in matrices]
  out = _parts(dot(jnp.concatenate(same, 0), b, NN), n)
  for level in decay.levels:
    read = dot(_corners(level, matrices), b * level.after, NN)
    to = _second(level.to, level.h)
    out = [o + _whole(to * x, level.h) for o, x in zip(out, _parts(read, n))]
  return out


def back(decay, matrices, rows, dot):
  """Sum over p and a of `matrices` and `rows`, [C, X]."""
  same = [jnp.where(_same(len(p)), p, 0.0) for p in matrices]
  out = dot(jnp.concatenate(same, 0), jnp.concatenate(rows, 0), TN)
  for level in decay.levels:
    a = jnp.concatenate(_left(level, rows), 0)
    out += level.after * dot(_corners(level, matrices), a, TN)
  return out


def _left(level, rows):
  """Of every second run: a_i decayed from the run's beginning."""
  to = _second(level.to, level.h)
  return [_second(a, level.h) * to for a in rows]


def _corners(level, matrices):
  """Where i is in a second run and j in the one before it."""
  return jnp.concatenate([
      _corner(_second(p, level.h), level.h, p.shape[1]) for p in matrices], 0)


def _corner(x, h, C):
  """The same of [C, C], or of every second run of its rows."""
  i, j = iota(x.shape, 0), iota(x.shape, 1)
  if len(x) < C:
    return jnp.where(j // h == 2 * (i // h), x, 0.0)
  return jnp.where((i // h % 2 == 1) & (j // h == i // h - 1), x, 0.0)


def _second(x, h):
  """Every second run of h rows, if runs are whole registers; else all rows."""
  return second(x, h) if h >= BLOCK else x


def _whole(x, h):
  """All rows, from what `_second` answers."""
  return spread(x, h) if h >= BLOCK else x


def _same(C):
  return iota((C, C), 0) == iota((C, C), 1)


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


def _parts(x, n):
  size = len(x) // n
  return [x[m * size : (m + 1) * size] for m in range(n)]
