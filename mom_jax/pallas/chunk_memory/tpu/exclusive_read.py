"""Exclusive outputs, as outputs of the row before.

The state before row t decays or updates it is the state after row t - 1. So
queries shift up by a row inside their group and outputs shift down again; a
group's first row reads its initial state.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def shift_up(x_RHX, group_N):
  """Give each row the next one of its group; 0 where there is none."""
  return _shift(x_RHX, group_N, 1)


def outputs(shifted_RHV, q_RHK, state_GHKV, group_N, scale):
  """Return the outputs, from those that shifted queries gave."""
  first_G, q_GHK = _first_rows(q_RHK, group_N, len(state_GHKV))
  o_GHV = scale * _einsum('ghk,ghkv->ghv', q_GHK, state_GHKV)
  return _set_rows(_shift(shifted_RHV, group_N, -1), first_G, o_GHV)


def cotangents(
    dshifted_RHK, dstate_GHKV, do_RHV, q_RHK, state_GHKV, group_N, scale):
  """Return the cotangents of queries and initial states.

  Args:
    dshifted_RHK: of the shifted queries.
    dstate_GHKV: of initial states, without the outputs of first rows.
  """
  first_G, q_GHK = _first_rows(q_RHK, group_N, len(state_GHKV))
  _, do_GHV = _first_rows(do_RHV, group_N, len(state_GHKV))
  dq_GHK = scale * _einsum('ghv,ghkv->ghk', do_GHV, state_GHKV)
  dstate_GHKV += scale * _einsum('ghk,ghv->ghkv', q_GHK, do_GHV)
  return _set_rows(_shift(dshifted_RHK, group_N, -1), first_G, dq_GHK), (
      dstate_GHKV)


def _einsum(spec, a, b):
  return jnp.einsum(
      spec, a.astype(jnp.float32), b.astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST)


def _shift(x_RHX, group_N, by):
  """Give row r row r + by of its group; 0 where there is none."""
  group_R = jnp.repeat(group_N, len(x_RHX) // len(group_N))
  there_R = jnp.roll(group_R, -by)
  row_R = jnp.arange(len(x_RHX)) + by
  inside_R = (row_R >= 0) & (row_R < len(x_RHX))
  same_R = inside_R & (group_R >= 0) & (group_R == there_R)
  return jnp.where(same_R[:, None, None], jnp.roll(x_RHX, -by, 0), 0)


def _first_rows(x_RHX, group_N, num_groups):
  """Return the index of each group's first row, R for none, and the rows."""
  R = len(x_RHX)
  here_GN = group_N[None] == jnp.arange(num_groups)[:, None]
  first_G = jnp.where(
      here_GN.any(1), jnp.argmax(here_GN, 1) * (R // len(group_N)), R)
  return first_G, x_RHX.at[first_G].get(mode='fill', fill_value=0)


def _set_rows(x_RHX, row_G, rows_GHX):
  return x_RHX.at[row_G].set(rows_GHX.astype(x_RHX.dtype), mode='drop')
