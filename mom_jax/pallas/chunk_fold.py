"""A fold over the chunks of grouped rows, for states of any shape.

Updates that are no linear recurrence do not fit `chunk_memory`; here a function
takes the state through one chunk. Groups advance side by side as in
`chunk_memory`. The backward pass keeps the state before every chunk and
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

PARALLEL_GROUPS = 16  # groups that advance side by side

Step = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]


@common.takes_numpy
def chunk_fold(
    step: Step,
    params: Any,
    xs_N: Any,
    initial_state_G: jax.Array,
    *,
    group_N: Int[Array, ' N'],
) -> tuple[Any, jax.Array]:
  """Fold `step` over each group's chunks, in order.

  Args:
    step: (params, state, x) -> (state, y) for one chunk. It closes over no
      arrays and is the same object whenever it computes the same.
    params: a tree of float arrays that all chunks share.
    xs_N: a tree of float arrays, chunks on the first axis.
    initial_state_G: state before each group's first chunk, float32.
    group_N: group of each chunk. A group's chunks are consecutive; -1 marks an
      unused chunk, whose result is zero.
  Returns:
    (y of every chunk, each group's last state).

  Differentiable once, in reverse, in params, xs and states.

  Example, sums of the chunks of two groups:

    >>> import jax.numpy as jnp
    >>> from mom_jax import pallas
    >>> def step(scale, state, x):
    ...   state = state + scale * x
    ...   return state, state
    >>> y, last = pallas.chunk_fold(
    ...     step, jnp.float32(2), jnp.ones((3, 1)), jnp.zeros((2, 1)),
    ...     group_N=jnp.array([0, 0, 1]))
    >>> y[:, 0].tolist(), last[:, 0].tolist()
    ([2.0, 4.0, 2.0], [4.0, 2.0])
  """
  leaves, treedef = jax.tree.flatten((params, xs_N))
  *leaves, initial_state_G, group_N = common.vary_alike(
      *leaves, initial_state_G, group_N)
  params, xs_N = jax.tree.unflatten(treedef, leaves)
  return _fold(step, params, xs_N, initial_state_G, group_N)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fold(step, params, xs_N, state_G, group_N):
  return _fwd(step, params, xs_N, state_G, group_N)[0]


def _queues(group_N, state_G):
  return schedule.parallel_groups(
      group_N, min(PARALLEL_GROUPS, len(group_N), len(state_G)))


def _get(tree, index_Q):
  return jax.tree.map(lambda x: x[index_Q], tree)


def _set(tree, index_Q, values):
  return jax.tree.map(
      lambda x, y: x.at[index_Q].set(y, mode='drop'), tree, values)


def _where(mask_Q, a, b):
  return jnp.where(mask_Q.reshape(-1, *[1] * (a.ndim - 1)), a, b)


def _fwd(step, params, xs_N, state_G, group_N):
  N, G, queues = len(group_N), len(state_G), _queues(group_N, state_G)
  step_all = jax.vmap(functools.partial(step, params))
  zeros = lambda shape, dtype: common.zeros(shape, dtype, like=state_G)
  y_shape = jax.eval_shape(step_all, state_G[:1], jax.tree.map(
      lambda x: x[:1], xs_N))[1]
  y_N = jax.tree.map(lambda y: zeros((N, *y.shape[1:]), y.dtype), y_shape)

  def body(j, carry):
    s_Q, before_N, y_N, final_G = carry
    at = schedule.queue_step(queues, group_N, j)
    s_Q = _where(at.first_Q, state_G[at.group_Q], s_Q)
    before_N = before_N.at[at.write_Q].set(s_Q, mode='drop')
    s_Q, y_Q = step_all(s_Q, _get(xs_N, at.chunk_Q))
    done_Q = jnp.where(at.valid_Q & at.last_Q, at.group_Q, G)
    return s_Q, before_N, _set(y_N, at.write_Q, y_Q), final_G.at[done_Q].set(
        s_Q, mode='drop')

  inner = state_G.shape[1:]
  carry = (
      zeros((len(queues.start_Q), *inner), jnp.float32),
      zeros((N, *inner), jnp.float32), y_N, state_G)
  _, before_N, y_N, final_G = jax.lax.fori_loop(0, queues.steps, body, carry)
  return (y_N, final_G), (params, xs_N, state_G, group_N, before_N)


def _bwd(step, kept, cotangents):
  params, xs_N, state_G, group_N, before_N = kept
  dy_N, dfinal_G = cotangents
  G, queues = len(state_G), _queues(group_N, state_G)

  def step_all(params, s_Q, x_Q):
    return jax.vmap(functools.partial(step, params))(s_Q, x_Q)

  def body(j, carry):
    ds_Q, dparams, dxs_N, dstate_G = carry
    at = schedule.queue_step(queues, group_N, queues.steps - 1 - j)
    ds_Q = _where(at.last_Q, dfinal_G[at.group_Q], ds_Q)
    dy_Q = jax.tree.map(
        lambda y: _where(
            at.valid_Q, y[at.chunk_Q], jnp.zeros_like(y[at.chunk_Q])), dy_N)
    _, pull = jax.vjp(
        step_all, params, before_N[at.chunk_Q], _get(xs_N, at.chunk_Q))
    dp, ds_new_Q, dx_Q = pull(
        (_where(at.valid_Q, ds_Q, jnp.zeros_like(ds_Q)), dy_Q))
    dparams = jax.tree.map(jnp.add, dparams, dp)
    ds_Q = _where(at.valid_Q, ds_new_Q, ds_Q)
    done_Q = jnp.where(at.valid_Q & at.first_Q, at.group_Q, G)
    return ds_Q, dparams, _set(dxs_N, at.write_Q, dx_Q), dstate_G.at[
        done_Q].set(ds_Q, mode='drop')

  zeros = lambda x: common.zeros(x.shape, x.dtype, like=state_G)
  carry = (
      common.zeros(
          (len(queues.start_Q), *state_G.shape[1:]), jnp.float32,
          like=state_G),
      jax.tree.map(zeros, params), jax.tree.map(zeros, xs_N), dfinal_G)
  _, dparams, dxs_N, dstate_G = jax.lax.fori_loop(0, queues.steps, body, carry)
  return dparams, dxs_N, dstate_G, None


_fold.defvjp(_fwd, _bwd)
