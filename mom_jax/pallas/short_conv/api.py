"""short_conv: signature, checks and gradient; the backends do the work."""

from __future__ import annotations

from collections.abc import Sequence
import functools

import jax
from jaxtyping import Array, Float, Int

from mom_jax.pallas import common
from mom_jax.pallas.short_conv import reference, tpu, xla
from mom_jax.pallas.short_conv.parts import Parts, convolved, places

# Best first.
BACKENDS = {b.name: b for b in (tpu.BACKEND, xla.BACKEND, reference.BACKEND)}


def short_conv(
    xs: Sequence[Float[Array, 'R _']],
    conv_WF: Float[Array, 'W F'] | None,
    bias_F: Float[Array, 'F'] | None,
    reach_R: Int[Array, 'R'],
    parts: Parts,
    *,
    backend: str = 'auto',
) -> tuple[Float[Array, 'R _'], ...]:
  """Causal depthwise convolution along grouped rows, and what follows it.

    c_r = bias + sum_{j <= min(reach_r, W - 1)} conv[W - 1 - j] * x_{r - j}
    y = unit(silu(c)),  unit(a) = a / sqrt(sum a^2 + UNIT_EPS) of each head

  with SiLU and unit length where a part says so. It splits columns on the way,
  so that projections side by side need no copies.

  Args:
    xs: arrays of rows, all of one dtype.
    conv_WF: taps, the last is that of the row itself; F runs over the columns
      of all parts that are convolved, in order. None leaves rows alone.
    bias_F: joins before SiLU.
    reach_R: rows before each that it sees: of its group, of its document. -1 is
      a row of padding, which becomes zeros where it is convolved.
    parts: of each array, its columns in order.
    backend: a key of BACKENDS, or 'auto' for the best that can run here.

  Returns:
    One array a part, in its array's dtype; sums are float32.

  Raises:
    ValueError: shapes or dtypes do not fit together.
    NotImplementedError: the named backend cannot run this.

  Differentiable once, in reverse, in xs, conv_WF and bias_F; keeps nothing but
  the operands.

  Source: the convolution of arXiv 2312.00752, unit keys of arXiv 2406.06484.
  """
  xs = tuple(xs)
  if [x.shape[1] for x in xs] != [sum(p.width for p in ps) for ps in parts]:
    raise ValueError(
        f'parts are {[[p.width for p in ps] for ps in parts]} columns wide, the'
        f' arrays {[x.shape[1] for x in xs]}; each array needs its parts.')
  F = convolved(parts)
  for name, w in (('conv_WF', conv_WF), ('bias_F', bias_F)):
    if w is not None and w.shape[-1] != F:
      raise ValueError(
          f'{name} is {w.shape}; its last axis must be {F}, the columns of all'
          ' parts that are convolved.')
  if bad := [p for ps in parts for p in ps if p.unit and p.width % p.unit]:
    raise ValueError(f'{bad[0]}: width must be a multiple of unit.')
  if not F:
    return tuple(xs[p.array][:, p.columns] for p in places(parts))
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
