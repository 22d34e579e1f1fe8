"""Signature, checks and gradient of grouped_swiglu; backends do the work."""

import functools

import jax
from jaxtyping import Array, Float, Int

from mom_jax.pallas import common
from mom_jax.pallas.grouped_swiglu import reference, tpu, triton, xla

# Best first.
BACKENDS = {b.name: b for b in (
    tpu.BACKEND, triton.BACKEND, xla.BACKEND, reference.BACKEND)}


@common.takes_numpy
def grouped_swiglu(
    x: Float[Array, 'R D'],
    gate_up: Float[Array, 'G D X'],
    group_sizes: Int[Array, ' G'],
    *,
    backend: str = 'auto',
) -> Float[Array, 'R F']:
  """Compute the first half of an expert's FFN for contiguous groups of rows.

    h_r = silu(x_r W_gate) * (x_r W_up)   with the matrices of r's group

  Args:
    x: rows, those of group 0 first, then those of group 1, and so on.
    gate_up: for each group W_gate and W_up side by side, X = 2 F, of x's dtype.
    group_sizes: rows of each group; zeros are legal, the sum is at most R. Rows
      past it give zeros.
    backend: a key of BACKENDS, or 'auto' for the best that can run here.

  Returns:
    h in x's dtype; sums and the gate are float32.

  Raises:
    ValueError: shapes or dtypes do not fit together.
    NotImplementedError: the named backend cannot run this.

  Differentiable once, in reverse, in x and gate_up; keeps both products, 2 R F
  elements of x's dtype.

  Example, two rows of one group, two hidden channels:

    >>> import jax.numpy as jnp
    >>> from mom_jax import pallas
    >>> h = pallas.grouped_swiglu(
    ...     jnp.ones((2, 3)), jnp.ones((1, 3, 4)), jnp.array([2]))
    >>> h.shape
    (2, 2)

  Source: arXiv 2002.05202, SwiGLU with silu.
  """
  if x.ndim != 2 or gate_up.ndim != 3 or x.shape[1] != gate_up.shape[1]:
    raise ValueError(
        'x must be [R, D] and gate_up [G, D, 2 F];'
        f' got {x.shape} and {gate_up.shape}.'
    )
  if gate_up.shape[2] % 2:
    raise ValueError(
        f'gate_up is {gate_up.shape}; its last axis holds gate and up side by'
        ' side and must be even.'
    )
  if group_sizes.shape != gate_up.shape[:1]:
    raise ValueError(
        f'group_sizes must be {gate_up.shape[:1]}, one size for each matrix of'
        f' gate_up; got {group_sizes.shape}.'
    )
  if x.dtype != gate_up.dtype:
    raise ValueError(
        f'x is {x.dtype} and gate_up is {gate_up.dtype}; cast gate_up to the'
        ' dtype of x.'
    )
  operands = common.vary_alike(x, gate_up, group_sizes)
  chosen = common.select('grouped_swiglu', BACKENDS, backend, *operands)
  return _run(chosen, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(backend, *operands):
  return backend.fwd(*operands, keep=False)[0]


def _fwd(backend, *operands):
  h, kept = backend.fwd(*operands, keep=True)
  return h, (operands, kept)


def _bwd(backend, residuals, dh):
  operands, kept = residuals
  return (*backend.bwd(*operands, kept, dh), None)  # none for group_sizes


_run.defvjp(_fwd, _bwd)
