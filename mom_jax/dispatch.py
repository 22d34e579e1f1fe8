"""Bring the rows of each group together, and back.

A router says which group (a memory or an expert) takes which token. `group`
turns that into a layout in which the rows of a group are contiguous and in time
order; `take` moves token arrays into it and `ungroup` is the weighted sum back.
All shapes are static, nothing is dropped, whatever the imbalance.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from mom_jax import pallas


class Layout(NamedTuple):
  """Where every routed row lies; P slots, N tokens, R rows, G groups.

  Attributes:
    row_P: row in each slot; R marks a padding slot.
    slot_R: slot of each row; P marks a row that no group takes.
    row_R: token of each row.
    start_G: first slot of each group.
    count_G: rows of each group, padding not counted.
    group_P: group of each slot, padding slots of its last chunk included; -1
      past the last group.
    choices: rows per token where rows are token-major, else None.
  """

  row_P: Int[Array, 'P']
  slot_R: Int[Array, 'R']
  row_R: Int[Array, 'R']
  start_G: Int[Array, 'G']
  count_G: Int[Array, 'G']
  group_P: Int[Array, 'P']
  choices: int | None


def num_slots(rows: int, num_groups: int, align: int) -> int:
  """Static number of slots that any split of `rows` fits into."""
  return (rows + min(num_groups, rows) * (align - 1)) // align * align


def group(
    row_R: Int[Array, 'R'],
    group_R: Int[Array, 'R'],
    *,
    num_tokens: int,
    num_groups: int,
    align: int = 1,
    choices: int | None = None,
    room: int | None = None,
) -> Layout:
  """Lays rows out by group, stably, each group from a multiple of `align`.

  Args:
    row_R: token of each row.
    group_R: group in [0, num_groups) of each row, or -1 for none.
    num_tokens: tokens N.
    num_groups: groups G.
    align: rows a group's start is aligned to, 1 or a chunk length.
    choices: A where row_R = repeat(arange(N), A), else None. With it, moving
      rows needs gathers only, in the backward pass too.
    room: slots of every group, for groups that have at most so many rows, so
      that slots are an array [G, room]; None gives a group what it needs.
  """
  R, G = row_R.shape[0], num_groups
  P = num_slots(R, G, align) if room is None else G * room
  key_R = jnp.where(group_R < 0, G, group_R)
  order_R = jnp.argsort(key_R, stable=True)
  bound_G = jnp.searchsorted(
      key_R[order_R], jnp.arange(G + 1), side='left', method='sort'
  ).astype(jnp.int32)
  count_G = jnp.diff(bound_G)
  padded_G = -(-count_G // align) * align
  if room is not None:
    padded_G = jnp.full_like(count_G, room)
  end_G = jnp.cumsum(padded_G)
  start_G = end_G - padded_G
  # Row order_R[i] is number i - bound of its group.
  sorted_key_R = key_R[order_R]
  offset_G = jnp.append(start_G - bound_G[:-1], 0)
  sorted_slot_R = jnp.arange(R) + offset_G[sorted_key_R]
  sorted_slot_R = jnp.where(sorted_key_R < G, sorted_slot_R, P)
  sorted_slot_R = sorted_slot_R.astype(jnp.int32)
  slot_R = jnp.zeros(R, jnp.int32).at[order_R].set(
      sorted_slot_R, unique_indices=True
  )
  row_P = jnp.full(P, R, jnp.int32).at[sorted_slot_R].set(
      order_R.astype(jnp.int32), mode='drop'
  )
  slot_P = jnp.arange(P)
  group_P = jnp.searchsorted(end_G, slot_P, side='right', method='sort')
  group_P = jnp.where(slot_P < end_G[-1], group_P, -1).astype(jnp.int32)
  return Layout(row_P, slot_R, row_R, start_G, count_G, group_P, choices)


def take(
    x_N: Shaped[Array, 'N ...'], layout: Layout
) -> Shaped[Array, 'P ...']:
  """Rows of `x_N` in their slots, zeros in padding slots."""
  source_P = _gather(layout.row_R, layout.row_P, x_N.shape[0])
  if not jnp.issubdtype(x_N.dtype, jnp.inexact):
    return _gather(x_N, source_P)
  return _take(x_N, source_P, layout.slot_R, layout.row_R, layout.choices)


def ungroup(
    y_P: Float[Array, 'P ...'],
    layout: Layout,
    weight_R: Float[Array, 'R'],
    num_tokens: int,
) -> Float[Array, 'N ...']:
  """Sum over a token's rows of weight * y, in y's dtype."""
  y_R = _permute(y_P, layout.slot_R, layout.row_P)
  weight_R = weight_R.reshape(weight_R.shape + (1,) * (y_P.ndim - 1))
  return _sum_rows(
      y_R * weight_R.astype(y_P.dtype), layout.row_R, layout.choices, num_tokens
  )


def matmul(
    x_RD: Float[Array, 'R D'],
    w_GDF: Float[Array, 'G D F'],
    group_R: Int[Array, 'R'],
) -> Float[Array, 'R F']:
  """y_r = x_r w[group_r], rows in any order; 0 where the group is -1."""
  R, G = len(x_RD), len(w_GDF)
  layout = group(
      jnp.arange(R), group_R, num_tokens=R, num_groups=G, choices=1)
  y_PF = pallas.grouped_matmul(take(x_RD, layout), w_GDF, layout.count_G)
  return ungroup(y_PF, layout, jnp.ones(R), R)


def _gather(x, index, fill=0):
  """Rows of x; an index past the end reads `fill`."""
  return x.at[index].get(mode='fill', fill_value=fill)


def _sum_rows(y_R, row_R, choices, num_tokens):
  if choices is None:
    return jax.ops.segment_sum(y_R, row_R, num_tokens)
  return y_R.reshape(num_tokens, choices, *y_R.shape[1:]).sum(1)


# Transposes of gathers are scatters, slow on every device and on some not
# reproducible. Here both ways of moving are known, so both passes gather.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _take(x_N, source_P, slot_R, row_R, choices):
  del slot_R, row_R, choices
  return _gather(x_N, source_P)


def _take_fwd(x_N, source_P, slot_R, row_R, choices):
  return _gather(x_N, source_P), (slot_R, row_R, jnp.zeros((x_N.shape[0], 0)))


def _take_bwd(choices, saved, dx_P):
  slot_R, row_R, like_N = saved
  dx_R = _gather(dx_P, slot_R)
  return _sum_rows(dx_R, row_R, choices, like_N.shape[0]), None, None, None


_take.defvjp(_take_fwd, _take_bwd)


@jax.custom_vjp
def _permute(x, index, inverse):
  """Gathers rows; `inverse` gathers them back."""
  del inverse
  return _gather(x, index)


_permute.defvjp(
    lambda x, index, inverse: (_gather(x, index), inverse),
    lambda inverse, dy: (_gather(dy, inverse), None, None),
)
