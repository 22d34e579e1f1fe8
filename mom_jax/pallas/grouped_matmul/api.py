"""grouped_matmul: signature, checks and gradient; the backends do the work."""

import functools

import jax
from jaxtyping import Array, Float, Int

from mom_jax.pallas import common
from mom_jax.pallas.grouped_matmul import gpu, reference, tpu, xla

# Best first.
BACKENDS = {b.name: b for b in (
    tpu.BACKEND, gpu.BACKEND, xla.BACKEND, reference.BACKEND)}


def grouped_matmul(
    x: Float[Array, 'R D'],
    w: Float[Array, 'G D F'],
    group_sizes: Int[Array, 'G'],
    *,
    backend: str = 'auto',
) -> Float[Array, 'R F']:
  """Multiplies each contiguous group of rows by its own matrix.

    y_r = x_r w_g   for rows r of group g;  y_r = 0 past the last group

  Args:
    x: rows, those of group 0 first, then those of group 1, and so on.
    w: one matrix per group, of x's dtype.
    group_sizes: rows of each group; zeros are legal, the sum is at most R.
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
  operands = common.vary_alike(x, w, group_sizes)
  chosen = common.select('grouped_matmul', BACKENDS, backend, *operands)
  return _run(chosen, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(backend, *operands):
  return backend.fwd(*operands)


def _fwd(backend, *operands):
  return backend.fwd(*operands), operands


def _bwd(backend, operands, dy):
  return (*backend.bwd(*operands, dy), None)  # no gradient for group_sizes


_run.defvjp(_fwd, _bwd)
