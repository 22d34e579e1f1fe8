"""Triton kernels of grouped products, interpreted, against the reference."""

import dataclasses
import functools

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_interpreter

from mom_jax import pallas
from mom_jax.pallas.grouped_matmul import cases
from mom_jax.pallas.grouped_matmul.triton import backend
from mom_jax.pallas.grouped_swiglu import cases as swiglu_cases

OPS = {'matmul': pallas.grouped_matmul, 'swiglu': pallas.grouped_swiglu}
CASES = {'matmul': cases.CASES, 'swiglu': swiglu_cases.CASES}
# Cuts every axis of every tile, the last part narrower; groups that share the
# last rows of a tile, and some without any.
CUT = cases.Case((0, 70, 0, 1, 140, 33, 0), 260, 136, 296)


@pytest.fixture(autouse=True)
def interpreter():
  with triton_interpreter.installed():
    yield


@functools.partial(jax.jit, static_argnums=(0, 1))
def _both(op, name, x, w, sizes, dy):
  y, pull = jax.vjp(
      lambda x, w: OPS[op](x, w, sizes, backend=name), x, w)
  return y, *pull(dy)


def _operands(op, case, dtype='float32'):
  x, w, sizes = case.operands(dtype=jnp.dtype(dtype))
  shape = case.rows, case.hidden // (2 if op == 'swiglu' else 1)
  dy = jnp.cos(jnp.arange(shape[0] * shape[1], dtype=jnp.float32))
  return x, w, sizes, dy.reshape(shape).astype(dtype)


def _agree(op, got, operands):
  dtype = operands[0].dtype.name
  want = _both(op, 'reference', *operands)
  assert [a.dtype for a in got] == [operands[0].dtype] * 3
  contract.outputs_agree(got[0], want[0], dtype, 'y')
  contract.gradients_agree(got[1], want[1], dtype, 'dx')
  contract.gradients_agree(got[2], want[2], dtype, 'dw')


@pytest.mark.parametrize('op, name, dtype', [
    *(('matmul', name, 'float32') for name in (
        'all_empty', 'few_rows', 'many_groups', 'odd_sizes',
        'one_group_takes_all', 'uneven_with_rest')),
    *(('swiglu', name, 'float32') for name in ('all_empty', 'odd_sizes')),
    *((op, 'uneven_with_rest', 'bfloat16') for op in OPS)])
def test_backend_is_the_reference(op, name, dtype):
  operands = _operands(op, CASES[op][name], dtype)
  _agree(op, _both(op, 'gpu', *operands), operands)


def _force(monkeypatch, dtype, number):
  """Every op takes entry `number` of its configs."""
  monkeypatch.setattr(
      backend, 'best_config',
      lambda op, *_: backend.CONFIGS[op, dtype][number])


@pytest.mark.parametrize('number', [0, 1])
@pytest.mark.parametrize('op', OPS)
def test_every_config_cuts_every_axis(op, number, monkeypatch):
  """And rows past the last group are zero and never multiplied."""
  _force(monkeypatch, 'bfloat16', number)
  x, w, sizes, dy = operands = _operands(op, CUT, 'bfloat16')
  end = sum(CUT.sizes)
  got = _both(
      op, 'gpu', x.at[end:].set(jnp.nan), w, sizes, dy.at[end:].set(jnp.inf))
  assert not np.any(got[0][end:]) and not np.any(got[1][end:])
  assert not np.any(got[2][np.flatnonzero(sizes == 0)])
  _agree(op, got, operands)


def _indexed(dtype):
  """(y, dx and dw of x and a row index), operands and which rows are real."""
  case, N = cases.Case((0, 70, 0, 1, 64), 140, 72, 136), 90
  x, w, sizes, dy = _operands('matmul', case, dtype)
  row_index, inverse_index = case.indices(N)
  dy = jnp.where((row_index < N)[:, None], dy, 0)

  def run(x, row_index, inverse_index=None):
    y, pull = jax.vjp(lambda x, w: pallas.grouped_matmul(
        x, w, sizes, row_index=row_index, inverse_index=inverse_index,
        backend='gpu'), x, w)
    return y, *pull(dy)

  return jax.jit(run), x[:N], row_index, inverse_index, row_index < N


@pytest.mark.parametrize('number, dtype', [
    (0, 'bfloat16'), (1, 'bfloat16'), (0, 'float32')])
def test_indexed_rows_are_rows_of_a_copy(number, dtype, monkeypatch):
  """To the bit but for sums over a token's rows."""
  _force(monkeypatch, dtype, number)
  run, x, row_index, inverse_index, real = _indexed(dtype)
  want = run(x.at[row_index].get(mode='clip'), None)
  got = run(x, row_index, inverse_index)
  np.testing.assert_array_equal(got[0][real], want[0][real])
  np.testing.assert_array_equal(got[2], want[2])
  dx = jnp.zeros(x.shape).at[row_index].add(
      want[1].astype('float32'), mode='drop')
  contract.gradients_agree(got[1], dx, dtype, 'dx')


@pytest.mark.parametrize('shared', [True, False])
def test_indexed_rows_in_a_batch(shared):
  """Each as alone, of its own tokens or of the same."""
  run, x, index, _, real = _indexed('bfloat16')
  index = jnp.stack([index, jnp.where(real, (index + 1) % len(x), len(x))])
  xs = x if shared else jnp.stack([x, -x])
  both = jax.jit(jax.vmap(run, (None if shared else 0, 0)))(xs, index)
  for i, index_R in enumerate(index):
    one = run(x if shared else xs[i], index_R)
    np.testing.assert_array_equal(both[0][i][real], one[0][real])
    np.testing.assert_array_equal(both[2][i], one[2])


def test_swiglu_is_the_same_without_gradients():
  operands = _operands('swiglu', swiglu_cases.CASES['few_rows'])
  run = jax.jit(functools.partial(pallas.grouped_swiglu, backend='gpu'))
  np.testing.assert_array_equal(
      run(*operands[:3]), _both('swiglu', 'gpu', *operands)[0])


def test_tiles_cover_all_rows_once():
  """Whatever the load; as many as there is room for in the grid at most."""
  rng = np.random.default_rng(0)
  for R, rows, G, B in ((300, 64, 5, 1), (64, 64, 1, 3), (7, 16, 4, 2)):
    run = jax.jit(functools.partial(backend.row_tiles, R=R, rows=rows))
    for _ in range(20):
      cut = np.sort(rng.integers(0, R + 1, (B, G)), 1)
      sizes = np.diff(cut, axis=1, prepend=0)
      seen = jax.tree.map(np.asarray, run(jnp.asarray(sizes)))
      got = np.full(B * R, -2)
      for group, first, last in zip(*seen):
        at = slice(first, min(last, first + rows))
        assert (got[at] == -2).all()
        got[at] = group
      want = [[*np.repeat(b * G + np.arange(G), sizes[b]),
               *[-1] * (R - sizes[b].sum())] for b in range(B)]
      np.testing.assert_array_equal(got, np.ravel(want))


def test_a_row_does_not_depend_on_other_rows_or_its_offset():
  """Bit-equal at other offsets, among other rows."""
  rng = np.random.default_rng(1)
  rows = rng.normal(size=(40, 32)).astype(np.float32)
  w = jnp.asarray(rng.normal(size=(2, 32, 24)), jnp.float32)

  def read(before, first_group):
    x = rng.normal(size=(200, 32)).astype(np.float32)
    x[before : before + 40] = rows
    sizes = jnp.asarray([first_group, 190 - first_group])
    y = pallas.grouped_matmul(jnp.asarray(x), w, sizes, backend='gpu')
    return np.asarray(y)[before : before + 40]

  want = read(0, 0)
  for before, first in ((77, 77), (150, 100)):
    np.testing.assert_array_equal(read(before, first), want)


@pytest.mark.parametrize('op, axes', [
    ('swiglu', (0, 0, 0)), ('matmul', (0, None, 0)),
    ('matmul', (None, 0, None))])
def test_a_batch_takes_as_many_launches_as_one(op, axes, monkeypatch):
  """Forward and backward, also of a vmap in a vmap."""
  launches, run = [], triton_interpreter.run

  def recorded(kernel, *args, **more):
    launches.append(kernel)
    return run(kernel, *args, **more)

  monkeypatch.setattr(triton_interpreter, 'run', recorded)
  case = dataclasses.replace(CASES[op]['few_rows'], sizes=(3, 0, 2, 1))
  x, w, sizes, dy = _operands(op, case)
  roll = lambda a, axis: a if axis is None else jnp.stack(
      [jnp.roll(a, i, 0) for i in range(4)]).reshape(2, 2, *a.shape)
  operands = [roll(a, axis) for a, axis in zip((x, w, sizes, dy), (*axes, 0))]
  one = functools.partial(_both, op, 'gpu')
  got = jax.vmap(jax.vmap(one, (*axes, 0)), (*axes, 0))(*operands)
  jax.block_until_ready(got)
  of_batch = sorted(kernel.__name__ for kernel in launches)
  launches.clear()
  jax.block_until_ready(_both(op, 'gpu', x, w, sizes, dy))
  assert of_batch == sorted(kernel.__name__ for kernel in launches)
  for i in range(2):
    for j in range(2):
      one = [a if axis is None else a[i, j]
             for a, axis in zip(operands, (*axes, 0))]
      _agree(op, [a[i, j] for a in got], one)
