"""Decay per channel inside one chunk of one head, on values in registers.

With Gamma_ij = exp(g_{j+1} + ... + g_i) in each of X channels (0 for j > i),
this module computes three products:

  scores              p_ij = sum_x a_ix b_jx Gamma_ijx
  outputs             o_ix = sum_j p_ij Gamma_ijx b_jx
  transposed_outputs  b_jx = sum_i p_ij Gamma_ijx a_ix

Where i and j lie in two neighbouring runs of h rows, Gamma is the decay from
the start of the second run to i times that from j to the end of the first: one
matrix product for each h = 1, 2, 4, ..., and one for i = j. All decays are
products of factors of at most 1, so the result is exact for any decay: nothing
is clamped, no quotient of decays is taken.
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
    odd_runs,
    scatter_odd_runs,
)

BLOCK = 8  # rows of a register


class Level(NamedTuple):
  """Decays within runs of h rows, [C, X]."""

  h: int
  from_start: jax.Array  # from before the run to the row
  to_end: jax.Array  # from the row to the run's end


class ChannelDecay(NamedTuple):
  """Decays inside a chunk, one per row and channel."""

  levels: tuple[Level, ...]  # runs of 1, 2, 4, ... rows
  from_start: jax.Array  # [C, X], from before the chunk to the row
  to_end: jax.Array  # [C, X], from the row to the chunk's end
  chunk_decay: jax.Array  # [1, X], of the whole chunk


def channel_decay(g) -> ChannelDecay:
  """Return the decays of a chunk from its rows' log decays, [C, X]."""
  row, C = jnp.exp(g), len(g)
  levels = [Level(1, row, jnp.ones_like(row))]
  for h in (2, 4, 8):
    levels.append(_register_level(row, h))
  _, start, end = levels.pop()
  h = BLOCK
  while h < C:
    levels.append(Level(h, start, end))
    runs = range(0, C, h)
    # Runs pair up: the second follows the end of the first.
    start, end = (
        jnp.concatenate([
            start[n : n + h] * start[n - 1 : n] if n // h % 2
            else start[n : n + h] for n in runs], 0),
        jnp.concatenate([
            end[n : n + h] if n // h % 2
            else end[n : n + h] * start[n + 2 * h - 1 : n + 2 * h]
            for n in runs], 0))
    h *= 2
  return ChannelDecay(tuple(levels), start, end, start[C - 1 :])


def _register_level(row, h):
  """Return the level of runs that lie inside registers."""
  index = iota(row.shape, 0) % h
  start = rest = row
  n = 1
  while n < h:
    start = jnp.where(index >= n, start * _shift_down(start, n), start)
    rest = jnp.where(index + n < h, rest * _shift_up(rest, n), rest)
    n *= 2
  return Level(h, start, jnp.where(index < h - 1, _shift_up(rest, 1), 1.0))


def scores(decay, rows, b, dot):
  """Return p, [C, C], for each a of `rows`; 0 for j > i."""
  C, n = len(b), len(rows)
  same = dot(jnp.concatenate(rows, 0), b, NT)
  out = [jnp.where(_diagonal(C), x, 0.0) for x in _split(same, n)]
  for level in decay.levels:
    a = jnp.concatenate(_decayed(level, rows), 0)
    below = dot(a, b * level.to_end, NT)
    out = [p + _scatter_odd(_mask_couplings(x, level.h, C), level.h)
           for p, x in zip(out, _split(below, n))]
  return out


def outputs(decay, matrices, b, dot):
  """Return o, [C, X], for each p of `matrices`."""
  C, n = len(b), len(matrices)
  same = [jnp.where(_diagonal(C), p, 0.0) for p in matrices]
  out = _split(dot(jnp.concatenate(same, 0), b, NN), n)
  for level in decay.levels:
    output = dot(_couplings(level, matrices), b * level.to_end, NN)
    start = _odd(level.from_start, level.h)
    out = [o + _scatter_odd(start * x, level.h)
           for o, x in zip(out, _split(output, n))]
  return out


def transposed_outputs(decay, matrices, rows, dot):
  """Return the sum of b over all p and a of `matrices` and `rows`, [C, X]."""
  same = [jnp.where(_diagonal(len(p)), p, 0.0) for p in matrices]
  out = dot(jnp.concatenate(same, 0), jnp.concatenate(rows, 0), TN)
  for level in decay.levels:
    a = jnp.concatenate(_decayed(level, rows), 0)
    out += level.to_end * dot(_couplings(level, matrices), a, TN)
  return out


def _decayed(level, rows):
  """Rows of the odd runs, decayed from the start of their run."""
  start = _odd(level.from_start, level.h)
  return [_odd(a, level.h) * start for a in rows]


def _couplings(level, matrices):
  """Entries with i in an odd run and j in the run before it."""
  return jnp.concatenate([
      _mask_couplings(_odd(p, level.h), level.h, p.shape[1])
      for p in matrices], 0)


def _mask_couplings(x, h, C):
  """The same, of [C, C] or of the odd runs of its rows."""
  i, j = iota(x.shape, 0), iota(x.shape, 1)
  if len(x) < C:
    return jnp.where(j // h == 2 * (i // h), x, 0.0)
  return jnp.where((i // h % 2 == 1) & (j // h == i // h - 1), x, 0.0)


def _odd(x, h):
  """Return the odd runs of h rows, if runs fill registers; else all rows."""
  return odd_runs(x, h) if h >= BLOCK else x


def _scatter_odd(x, h):
  """Invert `_odd`."""
  return scatter_odd_runs(x, h) if h >= BLOCK else x


def _diagonal(C):
  return iota((C, C), 0) == iota((C, C), 1)


def log_decay_cotangent(dsum, dchunk):
  """Cotangent of the log decays, [C, X], from those of their sums.

  Args:
    dsum: of the sums up to each row, [C, X].
    dchunk: of the sum over the chunk, [1, X].
  """
  C, index = len(dsum), iota(dsum.shape, 0) % BLOCK
  h = 1
  while h < BLOCK:
    dsum += jnp.where(index + h < BLOCK, _shift_up(dsum, h), 0.0)
    h *= 2
  while h < C:
    dsum = jnp.concatenate([
        dsum[n : n + h] if n // h % 2
        else dsum[n : n + h] + dsum[n + h : n + h + 1]
        for n in range(0, C, h)], 0)
    h *= 2
  return dsum + dchunk


def _shift_down(x, n):
  """Shift rows down by n within the chunk; the last ones wrap to its top."""
  return pltpu.roll(x, n, 0)


def _shift_up(x, n):
  return pltpu.roll(x, len(x) - n, 0)


def _split(x, n):
  size = len(x) // n
  return [x[m * size : (m + 1) * size] for m in range(n)]
