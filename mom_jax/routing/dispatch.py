"""Sort the rows of an assignment by group, and sum them back by token.

An assignment says which groups (memories or experts) take which tokens. `group`
sorts its rows: each group's rows become contiguous and keep their order in
time. A group that is not a multiple of `align` long is completed by padded
positions. Tokens a to d, of which memory 0 takes a, b and d, memory 1 takes b,
with align = 2:

  position P   0    1    2    3    4    5    6    7
  token        a    b    d    -    b    -    -    -     - is padding
  group_P      0    0    0    0    1    1   -1   -1     -1: past the last group
  start_G      0                   4                    first position
  count_G      3                   1                    rows without padding

`gather` moves token arrays into the layout, `gather_matmul` multiplies them by
their group's matrix on the way, and `ungroup` is the weighted sum back. All
shapes are static and nothing is dropped, however uneven the load.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mom_jax import pallas
from mom_jax.routing import assignment

MAX_COMPARED_GROUPS = 512


@assignment.static_fields('rows_per_token')
class Layout(NamedTuple):
  """Positions of all rows: P positions, N tokens, R rows, G groups.

  Attributes:
    row_P: row at each position; R marks a padded position.
    position_R: position of each row; P marks a row that no group takes.
    token_R: token of each row.
    start_G: first position of each group.
    count_G: rows of each group, padding left out.
    group_P: group of each position, padded ones that complete the group
      included; -1 past the last group.
    metadata: integers of the tokens that came along, as by `gather`.
    rows_per_token: A where rows are token-major, else None.
  """

  row_P: Int[Array, ' P']
  position_R: Int[Array, ' R']
  token_R: Int[Array, ' R']
  start_G: Int[Array, ' G']
  count_G: Int[Array, ' G']
  group_P: Int[Array, ' P']
  metadata: tuple[Int[Array, ' P'], ...]
  rows_per_token: int | None


def num_positions(rows: int, num_groups: int, align: int) -> int:
  """Static number of positions that any split of `rows` into groups needs."""
  return (rows + min(num_groups, rows) * (align - 1)) // align * align


def group(
    token_R: Int[Array, ' R'],
    group_R: Int[Array, ' R'],
    *,
    num_tokens: int,
    num_groups: int,
    align: int = 1,
    rows_per_token: int | None = None,
    capacity: int | None = None,
    metadata: Sequence[Int[Array, ' N']] = (),
) -> Layout:
  """Sort rows by group, stably.

  Args:
    token_R: token of each row.
    group_R: group in [0, num_groups) of each row, or -1 for none.
    num_tokens: tokens N.
    num_groups: groups G.
    align: each group starts at a multiple of it: 1 or a chunk length.
    rows_per_token: A where token_R = repeat(arange(N), A), else None. With A,
      moving rows needs gathers only, in the backward pass too.
    capacity: positions of every group, for groups that have at most so many
      rows; positions are then an array [G, capacity]. None gives a group what
      it needs.
    metadata: integers of the tokens to bring along.
  """
  R, G, A = token_R.shape[0], num_groups, rows_per_token
  P = num_positions(R, G, align) if capacity is None else G * capacity
  key_R = jnp.where(group_R < 0, G, group_R)
  count_G = (key_R[:, None] == jnp.arange(G)[None]).sum(0, dtype=jnp.int32)
  padded_G = -(-count_G // align) * align
  if capacity is not None:
    padded_G = jnp.full_like(count_G, capacity)
  end_G = jnp.cumsum(padded_G)
  # Rows and enough padding, sorted by group, are in the order of positions.
  padding = min(G, R) * (align - 1) if capacity is None else G * capacity
  fill_X = _below(jnp.cumsum(padded_G - count_G), jnp.arange(padding))
  # On TPUs lookups of scalars are slow, elsewhere wider sorts are.
  sort_metadata = pallas.platform() == 'tpu'

  def by_row(x_N):
    x_R = x_N[token_R] if A is None else jnp.repeat(x_N, A)
    return jnp.pad(x_R, (0, padding))

  key_Y, order_Y, *metadata_Y = jax.lax.sort(
      (jnp.concatenate([key_R, fill_X]),
       jnp.arange(R + padding, dtype=jnp.int32),
       *(by_row(x_N) for x_N in metadata if sort_metadata)), num_keys=1)
  used_P = key_Y[:P] < G
  keep = lambda x_Y, unused: jnp.where(used_P, x_Y[:P], unused)
  position_R = jnp.where(key_R < G, pallas.inverse_permutation(order_Y)[:R], P)
  layout = Layout(
      keep(jnp.minimum(order_Y, R), R), position_R, token_R, end_G - padded_G,
      count_G, keep(key_Y, -1), (), A)
  metadata_P = [keep(x_Y, 0) for x_Y in metadata_Y] if sort_metadata else [
      _rows_at(x_N, _source(layout, num_tokens)) for x_N in metadata]
  return layout._replace(metadata=tuple(metadata_P))


def _below(end_G, at_X):
  """Count the ends that each entry is not below."""
  # Lookups of scalars are slow on TPUs.
  method = 'compare_all' if len(end_G) <= MAX_COMPARED_GROUPS else 'sort'
  return jnp.searchsorted(
      end_G, at_X, side='right', method=method).astype(jnp.int32)


def gather(
    x_N: Float[Array, 'N ...'], layout: Layout, zeros: bool = True
) -> Float[Array, 'P ...']:
  """Gather tokens' rows into their positions.

  Args:
    zeros: padded positions hold zeros; else the row of some token, for callers
      that set it to zero later, so that its gradient is zero.
  """
  N = x_N.shape[0]
  source_P = _source(layout, N)
  if not zeros:
    source_P = jnp.minimum(source_P, N - 1)
  return _gather(
      x_N, source_P, layout.position_R, layout.token_R, layout.rows_per_token,
      zeros)


def gather_matmul(
    x_ND: Float[Array, 'N D'],
    w_GDF: Float[Array, 'G D F'],
    sizes_G: Int[Array, ' G'],
    layout: Layout,
) -> Float[Array, 'P F']:
  """Multiply gathered rows by their group's matrix.

  Equals grouped_matmul(gather(x_ND, layout), ...), but the gathered rows need
  not be stored. Padded positions hold no meaningful value.

  Args:
    sizes_G: positions of each matrix.
  """
  A = layout.rows_per_token
  return pallas.grouped_matmul(
      x_ND, w_GDF, sizes_G, row_index=_source(layout, len(x_ND)),
      inverse_index=None if A is None else _choice_major(layout.position_R, A))


def _source(layout, N):
  """Token at each position, N in padding."""
  A = layout.rows_per_token
  if A is None:
    token_R = jnp.asarray(layout.token_R)
    return token_R.at[layout.row_P].get(mode='fill', fill_value=N)
  return jnp.where(layout.row_P < A * N, layout.row_P // A, N)


def ungroup(
    y_P: Float[Array, 'P ...'],
    layout: Layout,
    weight_R: Float[Array, ' R'],
    num_tokens: int,
) -> Float[Array, 'N ...']:
  """Sum weight * y over the rows of each token, in y's dtype."""
  A, position_R, row_P = layout.rows_per_token, layout.position_R, layout.row_P
  if A is not None:  # the first choices of all tokens come first
    R = len(position_R)
    position_R, weight_R = (
        _choice_major(x, A).reshape(-1) for x in (position_R, weight_R))
    row_P = jnp.where(row_P < R, row_P % A * num_tokens + row_P // A, R)
  y_R = _permute(y_P, position_R, row_P)
  weight_R = weight_R.reshape(weight_R.shape + (1,) * (y_P.ndim - 1))
  y_R *= weight_R.astype(y_P.dtype)
  if A is None:
    return jax.ops.segment_sum(y_R, layout.token_R, num_tokens)
  return y_R.reshape(A, num_tokens, *y_R.shape[1:]).sum(0)


def matmul(
    x_RD: Float[Array, 'R D'],
    w_GDF: Float[Array, 'G D F'],
    group_R: Int[Array, ' R'],
) -> Float[Array, 'R F']:
  """Multiply rows in any order: y_r = x_r w[group_r], 0 where that is -1."""
  R, G = len(x_RD), len(w_GDF)
  layout = group(
      jnp.arange(R), group_R, num_tokens=R, num_groups=G, rows_per_token=1)
  y_PF = gather_matmul(x_RD, w_GDF, layout.count_G, layout)
  return ungroup(y_PF, layout, jnp.ones(R), R)


def _rows_at(x, index, zeros=True):
  """Rows of x at indices; those past the end give `zeros`, if there are any."""
  x = jnp.asarray(x)  # a NumPy array has no `at`
  if not zeros:
    return x.at[index].get(mode='promise_in_bounds')
  return x.at[index].get(mode='fill', fill_value=0)


def _choice_major(x_R, rows_per_token):
  """Turn token-major rows into an array [rows_per_token, N]."""
  return x_R.reshape(-1, rows_per_token).T


# Transposes of gathers are scatters, slow on every device and on some not
# reproducible. Here both ways of moving are known, so both passes gather.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _gather(x_N, source_P, position_R, token_R, rows_per_token, zeros):
  del position_R, token_R, rows_per_token
  return _rows_at(x_N, source_P, zeros)


def _gather_fwd(x_N, source_P, position_R, token_R, rows_per_token, zeros):
  saved = position_R, token_R, jnp.zeros((x_N.shape[0], 0))
  return _rows_at(x_N, source_P, zeros), saved


def _gather_bwd(rows_per_token, zeros, saved, dx_P):
  del zeros
  position_R, token_R, like_N = saved
  N = like_N.shape[0]
  if rows_per_token is None:
    dx_N = jax.ops.segment_sum(_rows_at(dx_P, position_R), token_R, N)
  else:
    dx_N = _rows_at(dx_P, _choice_major(position_R, rows_per_token)).sum(0)
  return dx_N, None, None, None


_gather.defvjp(_gather_fwd, _gather_bwd)


@jax.custom_vjp
def _permute(x, index, inverse):
  """Gather rows; `inverse` gathers them back."""
  del inverse
  return _rows_at(x, index)


_permute.defvjp(
    lambda x, index, inverse: (_rows_at(x, index), inverse),
    lambda inverse, dy: (_rows_at(dy, inverse), None, None),
)
