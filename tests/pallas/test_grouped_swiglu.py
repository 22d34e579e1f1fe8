"""grouped_swiglu: every backend against the row-by-row reference."""

import dataclasses
import functools
import inspect

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_topology

from mom_jax import pallas
from mom_jax.pallas import common
from mom_jax.pallas.grouped_matmul import cases as matmul_cases
from mom_jax.pallas.grouped_matmul.tpu import backend as matmul
from mom_jax.pallas.grouped_matmul.tpu import tiles
from mom_jax.pallas.grouped_swiglu import api, cases

# That run on a CPU; the others are interpreted.
RUN = [name for name, backend in api.BACKENDS.items()
       if backend.supported(*cases.CASES['even'].operands()) is None]
BACKENDS = [name for name in RUN if name != 'reference']
# Cuts columns, the last tile narrower; empty groups, and some in one tile.
CUT = matmul_cases.Case((0, 70, 0, 1, 64, 33, 0), 200, 128, 768)


# The same where the second matrix starts within a register, as in moma_1b4.
ODD = dataclasses.replace(CUT, hidden=2 * (2 * 128 + 85))


@functools.partial(jax.jit, static_argnames='backend')
def _both(x, gate_up, sizes, dh, backend):
  h, pull = jax.vjp(lambda x, w: pallas.grouped_swiglu(
      x, w, sizes, backend=backend), x, gate_up)
  return h, *pull(dh)


def _operands(case, dtype):
  x, w, sizes = case.operands(dtype=dtype)
  dh = jnp.cos(jnp.arange(case.rows * case.hidden // 2, dtype=jnp.float32))
  return x, w, sizes, dh.reshape(case.rows, -1).astype(dtype)


def _interpret(case, **params):
  """Interprets; memory past the end of w is undefined, if it is read at all."""
  behind = 'uninitialized' if case is ODD else 'raise'
  return common.interpret(out_of_bounds_reads=behind, **params)


def _agree(got, operands):
  want, dtype = _both(*operands, 'reference'), operands[0].dtype.name
  assert [a.dtype for a in got] == [operands[0].dtype] * 3
  contract.outputs_agree(got[0], want[0], dtype, 'h')
  contract.gradients_agree(got[1], want[1], dtype, 'dx')
  contract.gradients_agree(got[2], want[2], dtype, 'dw')


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('name, dtype', [
    *((name, 'float32') for name in cases.CASES),
    ('uneven_with_rest', 'bfloat16'),
])
def test_backend_is_the_reference(name, backend, dtype):
  operands = _operands(cases.CASES[name], jnp.dtype(dtype))
  _agree(_both(*operands, backend), operands)


@pytest.mark.parametrize('case', [CUT, ODD])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_tpu_kernels_are_the_reference(dtype, case):
  """Interpreted; rows past the last group are never multiplied."""
  x, w, sizes, dh = operands = _operands(case, jnp.dtype(dtype))
  end = sum(case.sizes)
  with _interpret(case):
    got = _both(x.at[end:].set(jnp.nan), w, sizes, dh, 'tpu')
  assert not np.any(got[0][end:]) and not np.any(got[1][end:])
  _agree(got, operands)


@pytest.mark.parametrize('case', [CUT, ODD])
def test_tpu_kernel_cuts_columns_without_races(case):
  """In tiles that the last one does not fill; both products are kept."""
  x, w, sizes, _ = _operands(case, jnp.float32)
  tile_sizes = tiles.TileSizes(
      rows=64, block=32, inner=128, out=256, chunk=128, split=False)
  with _interpret(case, detect_races=True):
    h, gate, up = jax.jit(functools.partial(
        matmul.matmul_swiglu, t=tile_sizes, keep=True))(x, w, sizes)
  both = pallas.grouped_matmul(x, w, sizes, backend='reference')
  contract.outputs_agree(jnp.concatenate([gate, up], 1), both)
  contract.outputs_agree(
      h, pallas.grouped_swiglu(x, w, sizes, backend='reference'))


def test_errors_say_what_is_wrong():
  """As a user sees them, without the shape checks of the test run."""
  unchecked = inspect.unwrap(pallas.grouped_swiglu)
  x, w, sizes = cases.CASES['even'].operands()
  with pytest.raises(ValueError, match='gate and up side by side'):
    unchecked(x, w[..., 1:], sizes)
  with pytest.raises(ValueError, match='group_sizes must be'):
    unchecked(x, w, sizes[:-1])
  with pytest.raises(ValueError, match='cast gate_up'):
    unchecked(x, w.astype(jnp.bfloat16), sizes)
  with common.interpret(), pytest.raises(
      NotImplementedError, match='F=48 must be 128 or more'):
    unchecked(x, w, sizes, backend='tpu')


@pytest.mark.tpu_compile
@pytest.mark.parametrize('generation, case', [
    *((name, cases.BENCHMARKS['moma_in']) for name in tpu_topology.TOPOLOGIES),
    *((name, ODD) for name in ('v5p', 'v6e'))])
def test_compiles(generation, case):
  """h, dx and dw, chosen without being named."""

  def run(x, w, sizes):
    loss = lambda x, w: (pallas.grouped_swiglu(x, w, sizes).astype(
        jnp.float32) ** 2).sum()
    return jax.value_and_grad(loss, (0, 1))(x, w)

  compiled = tpu_topology.compile_for(
      generation, run, *case.operands(dtype=jnp.bfloat16))
  text = compiled.as_text()
  for kernel in ('grouped_swiglu', 'grouped_matmul_dx', 'grouped_matmul_dw'):
    assert f'({kernel})' in text
