"""Signature, checks and gradient of grouped_matmul; backends do the work."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mom_jax.pallas import common
from mom_jax.pallas.grouped_matmul import reference, tpu, triton, xla

# Best first.
BACKENDS = {b.name: b for b in (
    tpu.BACKEND, triton.BACKEND, xla.BACKEND, reference.BACKEND)}


@common.takes_numpy
def grouped_matmul(
    x: Float[Array, 'N D'],
    w: Float[Array, 'G D F'],
    group_sizes: Int[Array, ' G'],
    *,
    row_index: Int[Array, ' R'] | None = None,
    inverse_index: Int[Array, 'A N'] | None = None,
    backend: str = 'auto',
) -> Float[Array, 'R F']:
  """Multiply each contiguous group of rows by its own matrix.

    y_r = x_r w_g   for rows r of group g;  y_r = 0 past the last group

  With `row_index`, x[row_index] is multiplied. If a copy of that is made at
  all, it lives as long as the product and is not kept for the backward pass.

  Args:
    x: rows, those of group 0 first, then those of group 1, and so on; in any
      order with `row_index`.
    w: one matrix per group, of x's dtype.
    group_sizes: rows of each group; zeros are legal, the sum is at most R.
    row_index: index into x of each row; None is 0, 1, ..., R - 1. An index
      outside [0, N) marks padding: y is undefined there (finite if x is), and
      its cotangent must be zero.
    inverse_index: the inverse of `row_index`, if known: the rows r with
      row_index[r] = n, for each n, padded with R. The gradient of x is then a
      sum of gathered rows instead of a scatter.
    backend: a key of BACKENDS, or 'auto' for the best that can run here.

  Returns:
    y in x's dtype, accumulated in float32.

  Raises:
    ValueError: shapes or dtypes do not fit together.
    NotImplementedError: the named backend cannot run this.

  Differentiable once, in reverse, in x and w.

  Example, three rows for the first matrix and one for the second:

    >>> import jax.numpy as jnp
    >>> from mom_jax import pallas
    >>> x = jnp.arange(8.0).reshape(4, 2)
    >>> w = jnp.stack([jnp.eye(2), 10 * jnp.eye(2)])
    >>> pallas.grouped_matmul(x, w, jnp.array([3, 1])).tolist()
    [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [60.0, 70.0]]
  """
  if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1]:
    raise ValueError(
        f'x must be [R, D] and w [G, D, F]; got {x.shape} and {w.shape}.'
    )
  if group_sizes.shape != w.shape[:1]:
    raise ValueError(
        f'group_sizes must be {w.shape[:1]}, one size for each matrix of w;'
        f' got {group_sizes.shape}.'
    )
  if x.dtype != w.dtype:
    raise ValueError(
        f'x is {x.dtype} and w is {w.dtype}; cast w to the dtype of x.'
    )
  if row_index is not None and row_index.ndim != 1:
    raise ValueError(
        f'row_index must be [R], an index for each row; got {row_index.shape}.')
  if inverse_index is not None and (
      row_index is None or inverse_index.ndim != 2
      or inverse_index.shape[1] != x.shape[0]):
    raise ValueError(
        f'inverse_index must be [A, {x.shape[0]}], and come with row_index,'
        f' whose inverse it is; got {inverse_index.shape}.'
    )
  x, w, group_sizes, row_index, inverse_index = common.vary_alike(
      x, w, group_sizes, row_index, inverse_index)
  chosen = common.select(
      'grouped_matmul', BACKENDS, backend, x, w, group_sizes, row_index)
  return _run(chosen, x, w, group_sizes, row_index, inverse_index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(backend, x, w, group_sizes, row_index, inverse_index):
  del inverse_index
  return backend.fwd(x, w, group_sizes, row_index)


def _fwd(backend, *operands):
  return _run(backend, *operands), operands


def _bwd(backend, operands, dy):
  x, w, group_sizes, row_index, inverse_index = operands
  dx, dw = backend.bwd(x, w, group_sizes, row_index, dy)
  if inverse_index is not None:
    dx = dx.at[inverse_index].get(mode='fill', fill_value=0).sum(0)
  elif row_index is not None:
    dx = jnp.zeros_like(x).at[row_index].add(dx, mode='drop')
  return dx, dw, None, None, None  # no gradients for integers


_run.defvjp(_fwd, _bwd)
