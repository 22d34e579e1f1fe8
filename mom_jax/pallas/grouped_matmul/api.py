"""grouped_matmul: signature, checks and gradient; the backends do the work."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mom_jax.pallas import common
from mom_jax.pallas.grouped_matmul import reference, xla
from mom_jax.pallas.grouped_matmul.tpu import backend as tpu
from mom_jax.pallas.grouped_matmul.triton import backend as gpu

# Best first.
BACKENDS = {b.name: b for b in (
    tpu.BACKEND, gpu.BACKEND, xla.BACKEND, reference.BACKEND)}


def grouped_matmul(
    x: Float[Array, 'N D'],
    w: Float[Array, 'G D F'],
    group_sizes: Int[Array, 'G'],
    rows: Int[Array, 'R'] | None = None,
    places: Int[Array, 'A N'] | None = None,
    *,
    backend: str = 'auto',
) -> Float[Array, 'R F']:
  """Multiplies each contiguous group of rows by its own matrix.

    y_r = x_r w_g   for rows r of group g;  y_r = 0 past the last group

  With `rows` it is x[rows] that is multiplied. A copy of that is made at most
  while the product is, and not kept for the backward pass.

  Args:
    x: rows, those of group 0 first, then those of group 1, and so on; in any
      order with `rows`.
    w: one matrix per group, of x's dtype.
    group_sizes: rows of each group; zeros are legal, the sum is at most R.
    rows: number in x of each row; None is 0, 1, ..., R - 1. One that is not in
      [0, N) marks padding: y holds nothing of use there, if finite where x is,
      and is to get no gradient.
    places: the inverse of `rows`, if known: where the rows made of each of x
      are, R where there are fewer than A. The gradient of x is a sum over
      gathered rows then, and else over scattered ones.
    backend: a key of BACKENDS, or 'auto' for the best that can run here.

  Returns:
    y in x's dtype, accumulated in float32.

  Raises:
    ValueError: shapes or dtypes do not fit together.
    NotImplementedError: the named backend cannot run this.

  Differentiable once, in reverse, in x and w.
  """
  if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1]:
    raise ValueError(
        f'x must be [R, D] and w [G, D, F]; got {x.shape} and {w.shape}.'
    )
  if group_sizes.shape != w.shape[:1]:
    raise ValueError(
        f'group_sizes must be {w.shape[:1]}, a number for each matrix of w;'
        f' got {group_sizes.shape}.'
    )
  if x.dtype != w.dtype:
    raise ValueError(
        f'x is {x.dtype} and w is {w.dtype}; cast w to the dtype of x.'
    )
  if rows is not None and rows.ndim != 1:
    raise ValueError(
        f'rows must be [R], a number for each row; got {rows.shape}.')
  if places is not None and (
      rows is None or places.ndim != 2 or places.shape[1] != x.shape[0]):
    raise ValueError(
        f'places must be [A, {x.shape[0]}], and come with rows, whose inverse'
        f' they are; got {places.shape}.'
    )
  x, w, group_sizes, rows, places = common.vary_alike(
      x, w, group_sizes, rows, places)
  chosen = common.select(
      'grouped_matmul', BACKENDS, backend, x, w, group_sizes, rows)
  return _run(chosen, x, w, group_sizes, rows, places)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(backend, x, w, group_sizes, rows, places):
  del places
  return backend.fwd(x, w, group_sizes, rows)


def _fwd(backend, *operands):
  return _run(backend, *operands), operands


def _bwd(backend, operands, dy):
  x, w, group_sizes, rows, places = operands
  dx, dw = backend.bwd(x, w, group_sizes, rows, dy)
  if places is not None:
    dx = dx.at[places].get(mode='fill', fill_value=0).sum(0)
  elif rows is not None:
    dx = jnp.zeros_like(x).at[rows].add(dx, mode='drop')
  return dx, dw, None, None, None  # no gradients for numbers


_run.defvjp(_fwd, _bwd)
