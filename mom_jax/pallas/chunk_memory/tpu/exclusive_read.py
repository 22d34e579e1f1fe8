"""Reads before the write, as reads of the row before.

What row t finds before it decays or writes is what a query of row t - 1 finds
after that row. So queries move up by a row inside their group and what they
find moves down again; a group's first row looks in its initial state.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def up(x_RHX, group_N):
  """Each row takes the next one of its group; 0 where there is none."""
  return _moved(x_RHX, group_N, 1)


def reads(early_RHV, q_RHK, state_GHKV, group_N, scale):
  """What rows read, from what the rows before them found for them."""
  at_G, q_GHK = _first(q_RHK, group_N, len(state_GHKV))
  first_GHV = scale * _look('ghk,ghkv->ghv', q_GHK, state_GHKV)
  return _put(_moved(early_RHV, group_N, -1), at_G, first_GHV)


def reads_back(dearly_RHK, dstate_GHKV, do_RHV, q_RHK, state_GHKV, group_N,
               scale):
  """Cotangents of queries and initial states.

  Args:
    dearly_RHK: of queries that had moved up.
    dstate_GHKV: of initial states, but for what first rows read.
  """
  at_G, q_GHK = _first(q_RHK, group_N, len(state_GHKV))
  _, do_GHV = _first(do_RHV, group_N, len(state_GHKV))
  dq_GHK = scale * _look('ghv,ghkv->ghk', do_GHV, state_GHKV)
  dstate_GHKV += scale * _look('ghk,ghv->ghkv', q_GHK, do_GHV)
  return _put(_moved(dearly_RHK, group_N, -1), at_G, dq_GHK), dstate_GHKV


def _look(spec, a, b):
  return jnp.einsum(
      spec, a.astype(jnp.float32), b.astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST)


def _moved(x_RHX, group_N, by):
  """Row r takes row r + by of its group; 0 where there is none."""
  group_R = jnp.repeat(group_N, len(x_RHX) // len(group_N))
  there_R = jnp.roll(group_R, -by)
  row_R = jnp.arange(len(x_RHX)) + by
  inside_R = (row_R >= 0) & (row_R < len(x_RHX))
  same_R = inside_R & (group_R >= 0) & (group_R == there_R)
  return jnp.where(same_R[:, None, None], jnp.roll(x_RHX, -by, 0), 0)


def _first(x_RHX, group_N, num_groups):
  """Places of the groups' first rows, R where there is none; those rows."""
  R = len(x_RHX)
  here_GN = group_N[None] == jnp.arange(num_groups)[:, None]
  at_G = jnp.where(
      here_GN.any(1), jnp.argmax(here_GN, 1) * (R // len(group_N)), R)
  return at_G, x_RHX.at[at_G].get(mode='fill', fill_value=0)


def _put(x_RHX, at_G, rows_GHX):
  return x_RHX.at[at_G].set(rows_GHX.astype(x_RHX.dtype), mode='drop')
