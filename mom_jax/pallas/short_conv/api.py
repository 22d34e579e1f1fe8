"""Signature, checks and gradient of short_conv; backends do the work."""

from __future__ import annotations

from collections.abc import Sequence
import functools

import jax
from jaxtyping import Array, Float, Int

from mom_jax.pallas import common
from mom_jax.pallas.short_conv import reference, tpu, xla
from mom_jax.pallas.short_conv.parts import Parts, columns, num_convolved

# Best first.
BACKENDS = {b.name: b for b in (tpu.BACKEND, xla.BACKEND, reference.BACKEND)}


@common.takes_numpy
def short_conv(
    xs: Sequence[Float[Array, 'R _']],
    conv_WF: Float[Array, 'W F'] | None,
    bias_F: Float[Array, ' F'] | None,
    reach_R: Int[Array, ' R'],
    parts: Parts,
    *,
    backend: str = 'auto',
) -> tuple[Float[Array, 'R _'], ...]:
  """Convolve grouped rows causally per channel, then SiLU and l2 norm.

    c_r = bias + sum_{j <= min(reach_r, W - 1)} conv[W - 1 - j] * x_{r - j}
    y = l2(silu(c)),  l2(a) = a / sqrt(sum a^2 + L2_EPS) of each head

  with SiLU and l2 norm for the parts that ask for them. Arrays are split into
  parts on the way, so that projections side by side need no copies.

  Args:
    xs: arrays of rows, all of one dtype.
    conv_WF: taps, the last for the row itself; F runs over the columns of all
      convolved parts, in order. None skips the convolution.
    bias_F: added before SiLU.
    reach_R: number of earlier rows that each row sees, those of its group and
      document. -1 marks padding, which becomes zeros where it is convolved.
    parts: for each array, its parts in order.
    backend: a key of BACKENDS, or 'auto' for the best that can run here.

  Returns:
    One array per part, in its array's dtype; sums are float32.

  Raises:
    ValueError: shapes or dtypes do not fit together.
    NotImplementedError: the named backend cannot run this.

  Differentiable once, in reverse, in xs, conv_WF and bias_F; keeps only the
  operands.

  Example, keys of two heads and a gate side by side in one array:

    >>> import jax.numpy as jnp
    >>> from mom_jax import pallas
    >>> parts = ((pallas.Part(8, silu=True, l2_dim=4),
    ...           pallas.Part(1, conv=False)),)
    >>> k, gate = pallas.short_conv(
    ...     [jnp.ones((5, 9))], jnp.ones((4, 8)), None, jnp.arange(5), parts)
    >>> k.shape, gate.shape
    ((5, 8), (5, 1))

  Source: the convolution of arXiv 2312.00752, normalised keys of arXiv
  2406.06484.
  """
  xs = tuple(xs)
  if [x.shape[1] for x in xs] != [sum(p.width for p in ps) for ps in parts]:
    raise ValueError(
        f'parts are {[[p.width for p in ps] for ps in parts]} columns wide, the'
        f' arrays {[x.shape[1] for x in xs]}; each array needs its parts.')
  F = num_convolved(parts)
  for name, w in (('conv_WF', conv_WF), ('bias_F', bias_F)):
    if w is not None and w.shape[-1] != F:
      raise ValueError(
          f'{name} is {w.shape}; its last axis must be {F}, the columns of all'
          ' convolved parts.')
  if bad := [p for ps in parts for p in ps
             if p.l2_dim and p.width % p.l2_dim]:
    raise ValueError(f'{bad[0]}: width must be a multiple of l2_dim.')
  if not F:
    return tuple(xs[c.array][:, c.span] for c in columns(parts))
  operands = common.vary_alike(*xs, conv_WF, bias_F, reach_R)
  xs, rest = operands[:len(xs)], operands[len(xs):]
  chosen = common.select(
      'short_conv', BACKENDS, backend, xs, *rest, parts=parts)
  return _run(chosen, parts, xs, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(backend, parts, *operands):
  return backend.fwd(*operands, parts=parts)


def _fwd(backend, parts, *operands):
  return backend.fwd(*operands, parts=parts), operands


def _bwd(backend, parts, operands, dys):
  return (*backend.bwd(*operands, dys, parts=parts), None)  # none for reach_R


_run.defvjp(_fwd, _bwd)
