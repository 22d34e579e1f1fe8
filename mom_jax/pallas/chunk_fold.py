"""A function folded over the chunks of grouped rows, for states of any shape.

For updates that are no linear recurrence and so have no place in
`chunk_memory`: the function takes a state through one chunk. Groups advance
side by side as there; the backward pass keeps the state before every chunk and
recomputes the rest.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mom_jax.pallas import common
from mom_jax.pallas.chunk_memory import schedule

LANES = 16  # groups that advance side by side

Step = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]


def chunk_fold(
    step: Step,
    params: Any,
    xs_N: Any,
    initial_state_G: jax.Array,
    *,
    group_N: Int[Array, ' N'],
) -> tuple[Any, jax.Array]:
  """Folds `step` over each group's chunks, in order.

  Args:
    step: (params, state, x) -> (state, y) for one chunk; a function that closes
      over no arrays, the same object whenever it computes the same.
    params: a tree of float arrays that all chunks share.
    xs_N: a tree of float arrays, chunks first.
    initial_state_G: state before each group's first chunk, float32.
    group_N: group of each chunk. A group's chunks are consecutive; -1 marks an
      unused chunk, whose result is zero.
  Returns:
    (y of every chunk, each group's last state).

  Differentiable once, in reverse, in params, xs and states.
  """
  leaves, treedef = jax.tree.flatten((params, xs_N))
  *leaves, initial_state_G, group_N = common.vary_alike(
      *leaves, initial_state_G, group_N)
  params, xs_N = jax.tree.unflatten(treedef, leaves)
  return _fold(step, params, xs_N, initial_state_G, group_N)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fold(step, params, xs_N, state_G, group_N):
  return _fwd(step, params, xs_N, state_G, group_N)[0]


def _lanes(group_N, state_G):
  return schedule.lanes(group_N, min(LANES, len(group_N), len(state_G)))


def _at(tree, index_L):
  return jax.tree.map(lambda x: x[index_L], tree)


def _put(tree, index_L, values):
  return jax.tree.map(
      lambda x, y: x.at[index_L].set(y, mode='drop'), tree, values)


def _where(mask_L, a, b):
  return jnp.where(mask_L.reshape(-1, *[1] * (a.ndim - 1)), a, b)


def _visit(lane, group_N, j):
  """Which chunk and group each lane takes in step j, and where it may write."""
  N = len(group_N)
  place_L = lane.start_L + j
  valid_L = place_L < lane.end_L
  chunk_L = lane.order_N[jnp.minimum(place_L, N - 1)]
  return chunk_L, jnp.where(valid_L, chunk_L, N), jnp.maximum(
      group_N[chunk_L], 0), valid_L


def _fwd(step, params, xs_N, state_G, group_N):
  N, G, lane = len(group_N), len(state_G), _lanes(group_N, state_G)
  many = jax.vmap(functools.partial(step, params))
  zeros = lambda shape, dtype: common.zeros(shape, dtype, like=state_G)
  y_shape = jax.eval_shape(many, state_G[:1], jax.tree.map(
      lambda x: x[:1], xs_N))[1]
  y_N = jax.tree.map(lambda y: zeros((N, *y.shape[1:]), y.dtype), y_shape)

  def body(j, carry):
    s_L, before_N, y_N, final_G = carry
    chunk_L, write_L, group_L, valid_L = _visit(lane, group_N, j)
    s_L = _where(lane.first_N[chunk_L], state_G[group_L], s_L)
    before_N = before_N.at[write_L].set(s_L, mode='drop')
    s_L, y_L = many(s_L, _at(xs_N, chunk_L))
    done_L = jnp.where(valid_L & lane.last_N[chunk_L], group_L, G)
    return s_L, before_N, _put(y_N, write_L, y_L), final_G.at[done_L].set(
        s_L, mode='drop')

  inner = state_G.shape[1:]
  carry = (
      zeros((len(lane.start_L), *inner), jnp.float32),
      zeros((N, *inner), jnp.float32), y_N, state_G)
  _, before_N, y_N, final_G = jax.lax.fori_loop(0, lane.steps, body, carry)
  return (y_N, final_G), (params, xs_N, state_G, group_N, before_N)


def _bwd(step, kept, cotangents):
  params, xs_N, state_G, group_N, before_N = kept
  dy_N, dfinal_G = cotangents
  G, lane = len(state_G), _lanes(group_N, state_G)
  many = lambda params, s_L, x_L: jax.vmap(
      functools.partial(step, params))(s_L, x_L)

  def body(j, carry):
    ds_L, dparams, dxs_N, dstate_G = carry
    chunk_L, write_L, group_L, valid_L = _visit(
        lane, group_N, lane.steps - 1 - j)
    ds_L = _where(lane.last_N[chunk_L], dfinal_G[group_L], ds_L)
    dy_L = jax.tree.map(
        lambda y: _where(valid_L, y[chunk_L], jnp.zeros_like(y[chunk_L])),
        dy_N)
    _, pull = jax.vjp(many, params, before_N[chunk_L], _at(xs_N, chunk_L))
    dp, ds_new_L, dx_L = pull(
        (_where(valid_L, ds_L, jnp.zeros_like(ds_L)), dy_L))
    dparams = jax.tree.map(jnp.add, dparams, dp)
    ds_L = _where(valid_L, ds_new_L, ds_L)
    done_L = jnp.where(valid_L & lane.first_N[chunk_L], group_L, G)
    return ds_L, dparams, _put(dxs_N, write_L, dx_L), dstate_G.at[done_L].set(
        ds_L, mode='drop')

  zeros = lambda x: common.zeros(x.shape, x.dtype, like=state_G)
  carry = (
      common.zeros(
          (len(lane.start_L), *state_G.shape[1:]), jnp.float32, like=state_G),
      jax.tree.map(zeros, params), jax.tree.map(zeros, xs_N), dfinal_G)
  _, dparams, dxs_N, dstate_G = jax.lax.fori_loop(0, lane.steps, body, carry)
  return dparams, dxs_N, dstate_G, None


_fold.defvjp(_fwd, _bwd)
