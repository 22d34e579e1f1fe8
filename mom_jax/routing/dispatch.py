"""Bring the rows of each group together, and back.

A router says which group (a memory or an expert) takes which token. `group`
turns that into a layout in which the rows of a group are contiguous and in time
order; `take` moves token arrays into it and `ungroup` is the weighted sum back.
All shapes are static, nothing is dropped, whatever the imbalance.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mom_jax import pallas
from mom_jax.pallas import common

MOST_COMPARED = 512  # groups


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
    numbers: those that were brought along, as `take` would have them.
  """

  row_P: Int[Array, 'P']
  slot_R: Int[Array, 'R']
  row_R: Int[Array, 'R']
  start_G: Int[Array, 'G']
  count_G: Int[Array, 'G']
  group_P: Int[Array, 'P']
  choices: int | None
  numbers: tuple[Int[Array, 'P'], ...] = ()


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
    numbers: Sequence[Int[Array, 'N']] = (),
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
    numbers: whole numbers of the tokens to bring along.
  """
  R, G = row_R.shape[0], num_groups
  P = num_slots(R, G, align) if room is None else G * room
  key_R = jnp.where(group_R < 0, G, group_R)
  count_G = (key_R[:, None] == jnp.arange(G)[None]).sum(0, dtype=jnp.int32)
  padded_G = -(-count_G // align) * align
  if room is not None:
    padded_G = jnp.full_like(count_G, room)
  end_G = jnp.cumsum(padded_G)
  # Rows and enough padding, sorted by group: their order is that of the slots.
  most = min(G, R) * (align - 1) if room is None else G * room
  fill_X = _below(jnp.cumsum(padded_G - count_G), jnp.arange(most))
  # On TPUs lookups of single numbers are slow, elsewhere wider sorts are.
  along = common.platform() == 'tpu'
  bring = lambda x_N: jnp.pad(
      x_N[row_R] if choices is None else jnp.repeat(x_N, choices), (0, most))
  key_Y, order_Y, *numbers_Y = jax.lax.sort(
      (jnp.concatenate([key_R, fill_X]), jnp.arange(R + most, dtype=jnp.int32),
       *(bring(x_N) for x_N in numbers if along)), num_keys=1)
  used_P = key_Y[:P] < G
  keep = lambda x_Y, unused: jnp.where(used_P, x_Y[:P], unused)
  slot_R = jnp.where(key_R < G, common.inverse(order_Y)[:R], P)
  layout = Layout(
      keep(jnp.minimum(order_Y, R), R), slot_R, row_R, end_G - padded_G,
      count_G, keep(key_Y, -1), choices)
  numbers_P = [keep(x_Y, 0) for x_Y in numbers_Y] if along else [
      _gather(x_N, _source(layout, num_tokens)) for x_N in numbers]
  return layout._replace(numbers=tuple(numbers_P))


def _below(end_G, at_X):
  """How many of the ends each is not below."""
  # Lookups of single numbers are slow on TPUs.
  method = 'compare_all' if len(end_G) <= MOST_COMPARED else 'sort'
  return jnp.searchsorted(
      end_G, at_X, side='right', method=method).astype(jnp.int32)


def take(
    x_N: Float[Array, 'N ...'], layout: Layout, zeros: bool = True
) -> Float[Array, 'P ...']:
  """Rows of `x_N` in their slots.

  Args:
    zeros: padding slots hold zeros; else the row of some token, for callers who
      make zeros of it later, and send none back.
  """
  N = x_N.shape[0]
  source_P = _source(layout, N)
  if not zeros:
    source_P = jnp.minimum(source_P, N - 1)
  return _take(
      x_N, source_P, layout.slot_R, layout.row_R, layout.choices, zeros)


def times(
    x_ND: Float[Array, 'N D'],
    w_GDF: Float[Array, 'G D F'],
    sizes_G: Int[Array, 'G'],
    layout: Layout,
) -> Float[Array, 'P F']:
  """Slots' rows of `x_ND` times their group's matrix; padding is of no use.

  As a product of `take(x_ND, layout)`, which need not be made for it.

  Args:
    sizes_G: slots of each matrix.
  """
  A = layout.choices
  return pallas.grouped_matmul(
      x_ND, w_GDF, sizes_G, rows=_source(layout, len(x_ND)),
      places=None if A is None else _by_choice(layout.slot_R, A))


def _source(layout, N):
  """Token of each slot, N in padding."""
  A = layout.choices
  if A is None:
    return layout.row_R.at[layout.row_P].get(mode='fill', fill_value=N)
  return jnp.where(layout.row_P < A * N, layout.row_P // A, N)


def ungroup(
    y_P: Float[Array, 'P ...'],
    layout: Layout,
    weight_R: Float[Array, 'R'],
    num_tokens: int,
) -> Float[Array, 'N ...']:
  """Sum over a token's rows of weight * y, in y's dtype."""
  A, slot_R, row_P = layout.choices, layout.slot_R, layout.row_P
  if A is not None:  # first choices of all tokens first
    R = len(slot_R)
    slot_R, weight_R = (
        _by_choice(x, A).reshape(-1) for x in (slot_R, weight_R))
    row_P = jnp.where(row_P < R, row_P % A * num_tokens + row_P // A, R)
  y_R = _permute(y_P, slot_R, row_P)
  weight_R = weight_R.reshape(weight_R.shape + (1,) * (y_P.ndim - 1))
  y_R *= weight_R.astype(y_P.dtype)
  if A is None:
    return jax.ops.segment_sum(y_R, layout.row_R, num_tokens)
  return y_R.reshape(A, num_tokens, *y_R.shape[1:]).sum(0)


def matmul(
    x_RD: Float[Array, 'R D'],
    w_GDF: Float[Array, 'G D F'],
    group_R: Int[Array, 'R'],
) -> Float[Array, 'R F']:
  """y_r = x_r w[group_r], rows in any order; 0 where the group is -1."""
  R, G = len(x_RD), len(w_GDF)
  layout = group(
      jnp.arange(R), group_R, num_tokens=R, num_groups=G, choices=1)
  y_PF = times(x_RD, w_GDF, layout.count_G, layout)
  return ungroup(y_PF, layout, jnp.ones(R), R)


def _gather(x, index, zeros=True):
  """Rows of x; an index past the end reads zeros, if there may be any."""
  if not zeros:
    return x.at[index].get(mode='promise_in_bounds')
  return x.at[index].get(mode='fill', fill_value=0)


def _by_choice(x_R, choices):
  """[choices, N] of what is token-major."""
  return x_R.reshape(-1, choices).T


# Transposes of gathers are scatters, slow on every device and on some not
# reproducible. Here both ways of moving are known, so both passes gather.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _take(x_N, source_P, slot_R, row_R, choices, zeros):
  del slot_R, row_R, choices
  return _gather(x_N, source_P, zeros)


def _take_fwd(x_N, source_P, slot_R, row_R, choices, zeros):
  saved = slot_R, row_R, jnp.zeros((x_N.shape[0], 0))
  return _take(x_N, source_P, slot_R, row_R, choices, zeros), saved


def _take_bwd(choices, zeros, saved, dx_P):
  del zeros
  slot_R, row_R, like_N = saved
  N = like_N.shape[0]
  if choices is None:
    dx_N = jax.ops.segment_sum(_gather(dx_P, slot_R), row_R, N)
  else:
    dx_N = _gather(dx_P, _by_choice(slot_R, choices)).sum(0)
  return dx_N, None, None, None


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
