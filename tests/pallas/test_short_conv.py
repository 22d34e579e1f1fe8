"""short_conv: every backend against the row-by-row reference."""

import functools
import inspect

import contract
import gpu_topology
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_topology

from mom_jax import pallas
from mom_jax.pallas import common
from mom_jax.pallas.short_conv import cases

EVERY = cases.CASES | cases.ODD


@functools.partial(jax.jit, static_argnames=('parts', 'backend'))
def _both(xs, conv, bias, reach, dys, parts, backend):
  run = lambda *floats: pallas.short_conv(
      *floats, reach, parts, backend=backend)
  ys, pull = jax.vjp(run, xs, conv, bias)
  return ys, pull(dys)


def _operands(case, dtype):
  args = case.operands(dtype=jnp.dtype(dtype))
  widths = [p.width for ps in case.parts for p in ps]
  dys = tuple(
      jnp.cos(jnp.arange(case.rows * w, dtype=jnp.float32)).reshape(-1, w)
      .astype(dtype) for w in widths)
  return *args, dys


def _agree(got, case, operands):
  want = _both(*operands, case.parts, 'reference')
  dtype = operands[0][0].dtype.name
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for which, (a, b) in enumerate(zip(*map(jax.tree.leaves, (got, want)))):
    assert a.dtype == b.dtype
    check = (contract.outputs_agree if which < len(operands[-1])
             else contract.gradients_agree)
    check(a, b, dtype, which)


@pytest.mark.parametrize('name, dtype', [
    *((name, 'float32') for name in EVERY), ('mom', 'bfloat16'),
    ('bias', 'bfloat16')])
def test_xla_is_the_reference(name, dtype):
  operands = _operands(EVERY[name], dtype)
  _agree(_both(*operands, EVERY[name].parts, 'xla'), EVERY[name], operands)


@pytest.mark.parametrize('name, dtype', [
    *((name, 'float32') for name in cases.CASES), ('mom', 'bfloat16')])
def test_tpu_kernels_are_the_reference(name, dtype):
  """Interpreted, with races looked for."""
  case = cases.CASES[name]
  operands = _operands(case, dtype)
  with common.interpret(detect_races=True):
    got = _both(*operands, case.parts, 'tpu')
  _agree(got, case, operands)


@pytest.mark.parametrize('backend', ['xla', 'tpu'])
def test_a_row_depends_on_what_it_reaches_alone(backend):
  """Of its own document, and the taps before it; to the bit."""
  case = cases.CASES['mom']
  (q, kvg), conv, bias, reach = case.operands()
  run = jax.jit(lambda q: pallas.short_conv(
      (q, kvg), conv, bias, reach, case.parts, backend=backend)[0])
  at = 140  # in the last document, beyond the first block
  with common.interpret():
    one, other = run(q), run(q.at[at].add(1))
  changed = np.flatnonzero((np.asarray(one) != np.asarray(other)).any(1))
  assert changed.tolist() == [at, at + 1, at + 2, at + 3]
  assert not np.asarray(one)[np.asarray(reach) < 0].any()


def test_what_is_not_convolved_is_handed_on():
  parts = ((pallas.Part(3, conv=False), pallas.Part(2, conv=False)),)
  x = jnp.arange(20.0).reshape(4, 5)
  a, b = pallas.short_conv((x,), None, None, jnp.zeros(4, jnp.int32), parts)
  np.testing.assert_array_equal(jnp.concatenate([a, b], 1), x)


def test_errors_say_what_is_wrong():
  """As a user sees them, without the shape checks of the test run."""
  unchecked = inspect.unwrap(pallas.short_conv)
  case = cases.ODD['narrow']
  xs, conv, bias, reach = case.operands()
  with pytest.raises(ValueError, match=r'the arrays \[30\]; each array needs'):
    unchecked((xs[0][:, 1:],), conv, bias, reach, case.parts)
  with pytest.raises(ValueError, match='conv_WF is .* must be 31'):
    unchecked(xs, conv[:, 1:], bias, reach, case.parts)
  with pytest.raises(ValueError, match='multiple of l2_dim'):
    unchecked(xs, conv, bias, reach, ((pallas.Part(31, l2_dim=2),),))
  with common.interpret(), pytest.raises(
      NotImplementedError, match='24 columns from 0 are convolved'):
    unchecked(xs, conv, bias, reach, case.parts, backend='tpu')
  with pytest.raises(NotImplementedError, match='it needs a TPU'):
    unchecked(xs, conv, bias, reach, case.parts, backend='tpu')


@pytest.mark.tpu_compile
@pytest.mark.parametrize('generation', tpu_topology.TOPOLOGIES)
def test_compiles(generation):
  """Both passes, chosen without being named."""
  case = cases.Case((256,), cases.heads(256, 256), bias=True)
  text = tpu_topology.compile_for(
      generation, lambda *args: _both(*args, case.parts, 'auto'),
      *_operands(case, 'bfloat16')).as_text()
  for kernel in ('short_conv_forward', 'short_conv_backward'):
    assert kernel in text


@pytest.mark.gpu_compile
def test_compiles_for_an_h100():
  """Both passes, in XLA."""
  case = cases.Case((256,), cases.heads(256, 256), bias=True)
  compiled = gpu_topology.compile_for_h100(
      lambda *args: _both(*args, case.parts, 'auto'),
      *_operands(case, 'bfloat16'))
  assert 'triton_kernel_call' not in compiled.as_text()
