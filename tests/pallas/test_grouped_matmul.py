"""grouped_matmul: every backend against the row-by-row reference."""

import functools
import inspect

import contract
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from mom_jax import pallas
from mom_jax.pallas.grouped_matmul import api, cases

# That run on a CPU; test_grouped_matmul_tpu.py interprets the others.
RUN = [name for name, backend in api.BACKENDS.items()
       if backend.supported(*cases.CASES['even'].operands()) is None]
BACKENDS = [name for name in RUN if name != 'reference']


@functools.partial(jax.jit, static_argnames='backend')
def _value_and_grads(x, w, sizes, backend):
  """y and the gradients of a sum that weighs every entry differently."""

  def loss(x, w):
    y = pallas.grouped_matmul(x, w, sizes, backend=backend)
    weight = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
    return (y.astype(jnp.float32) * weight).sum(), y

  grads, y = jax.grad(loss, (0, 1), has_aux=True)(x, w)
  return y, *grads


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('name, dtype', [
    *((name, 'float32') for name in cases.CASES),
    ('uneven_with_rest', 'bfloat16'),
    ('one_group_takes_all', 'bfloat16'),
])
def test_backend_is_the_reference(name, backend, dtype):
  operands = cases.CASES[name].operands(dtype=jnp.dtype(dtype))
  got = _value_and_grads(*operands, backend)
  want = _value_and_grads(*operands, 'reference')
  assert got[0].dtype == operands[0].dtype
  contract.outputs_agree(got[0], want[0], dtype, 'y')
  contract.gradients_agree(got[1], want[1], dtype, 'dx')
  contract.gradients_agree(got[2], want[2], dtype, 'dw')


@pytest.mark.parametrize('known', [True, False])
@pytest.mark.parametrize('backend', RUN)
@pytest.mark.parametrize('name, tokens', [
    ('uneven_with_rest', 170), ('few_rows', 3), ('odd_sizes', 129)])
def test_indexed_rows_are_rows_of_a_copy(name, tokens, backend, known):
  """With gradients; padding has none, and none is lost."""
  case = cases.CASES[name]
  x, w, sizes = case.operands()
  x = jnp.resize(x, (tokens, case.width)) + jnp.arange(tokens)[:, None] / tokens
  row_index, inverse_index = case.indices(tokens)
  real = (row_index < tokens)[:, None]
  more = dict(inverse_index=inverse_index) if known else {}

  def indexed(x, w):
    y = pallas.grouped_matmul(
        x, w, sizes, row_index=row_index, backend=backend, **more)
    return jnp.where(real, y, 0)

  def copied(x, w):
    x_RD = x.at[row_index].get(mode='fill', fill_value=0)
    return pallas.grouped_matmul(x_RD, w, sizes, backend=backend)

  results = []
  for run in (indexed, copied):
    y, pull = jax.vjp(jax.jit(run), x, w)
    results.append((y, *pull(jnp.cos(jnp.arange(y.size)).reshape(y.shape))))
  got, want = results
  contract.outputs_agree(got[0], want[0], 'float32', 'y')
  contract.gradients_agree(got[1], want[1], 'float32', 'dx')
  contract.gradients_agree(got[2], want[2], 'float32', 'dw')


def test_indexed_rows_do_not_keep_a_copy():
  """For the backward pass x itself will do."""
  case = cases.CASES['even']
  x, w, sizes = case.operands()
  row_index, inverse_index = case.indices(100)
  _, pull = jax.vjp(lambda x, w: pallas.grouped_matmul(
      x, w, sizes, row_index=row_index, inverse_index=inverse_index),
                    x[:100], w)
  kept = [a.shape for a in jax.tree.leaves(pull)]
  assert x[:100].shape in kept and x.shape not in kept


def test_reference_is_one_matmul_per_group():
  """The definition, written once more with slices."""
  case = cases.CASES['uneven_with_rest']
  x, w, sizes = case.operands()
  want, start = np.zeros((case.rows, case.hidden)), 0
  for g, size in enumerate(case.sizes):
    rows = slice(start, start + size)
    want[rows] = np.asarray(x, np.float64)[rows] @ np.asarray(w, np.float64)[g]
    start += size
  got = pallas.grouped_matmul(x, w, sizes, backend='reference')
  contract.outputs_agree(got, want)


@pytest.mark.parametrize('backend', RUN)
def test_rows_past_the_groups_are_zero_and_get_no_gradient(backend):
  """Even where those rows hold what must never be multiplied."""
  x, w, sizes = cases.CASES['uneven_with_rest'].operands()
  end = int(sizes.sum())
  x = x.at[end:].set(jnp.nan)
  y, dx, dw = _value_and_grads(x, w, sizes, backend)
  assert not np.any(y[end:]) and not np.any(dx[end:])
  assert np.isfinite(y).all() and np.isfinite(dw).all()


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('hidden', [24, 276])
def test_a_row_does_not_depend_on_other_rows_or_its_offset(backend, hidden):
  """Its result is bit-equal among other rows, at other offsets and sizes."""
  rng = np.random.default_rng(1)
  rows = rng.normal(size=(40, 32)).astype(np.float32)
  w = jnp.asarray(rng.normal(size=(3, 32, hidden)), jnp.float32)
  run = jax.jit(functools.partial(pallas.grouped_matmul, backend=backend))

  def read(before, after, first_group):
    noise = lambda n: rng.normal(size=(n, 32)).astype(np.float32)
    x = np.concatenate([noise(before), rows, noise(after), noise(331 - before -
                                                                 after)])
    sizes = jnp.asarray([first_group, before - first_group + 40 + after, 0])
    return np.asarray(run(jnp.asarray(x), w, sizes))[before : before + 40]

  want = read(0, 0, 0)
  for before, after, first in ((0, 200, 0), (1, 3, 0), (77, 130, 77),
                               (130, 1, 100), (331, 0, 300)):
    np.testing.assert_array_equal(read(before, after, first), want)


def test_shard_map_sums_the_gradient_of_a_replicated_matrix():
  """Rows split over devices: as on one device, with and without type checks."""
  D = 4
  mesh = jax.make_mesh(
      (D,), ('data',), axis_types=(jax.sharding.AxisType.Auto,),
      devices=jax.devices()[:D],
  )
  case = cases.CASES['uneven_with_rest']
  x, w, sizes = (jnp.stack(a) for a in zip(*(
      case.operands(seed) for seed in range(D))))
  w = w[0]
  rows, all_ = PartitionSpec('data'), PartitionSpec()

  def local(x_1RD, w, sizes_1G):
    return pallas.grouped_matmul(x_1RD[0], w, sizes_1G[0])[None]

  sharded = jax.shard_map(
      local, mesh=mesh, in_specs=(rows, all_, rows), out_specs=rows
  )
  single = lambda x, w, sizes: jnp.stack(
      [pallas.grouped_matmul(x[i], w, sizes[i]) for i in range(D)])
  loss = lambda f: lambda x, w: jnp.sin(f(x, w, sizes)).sum()
  got = jax.jit(jax.value_and_grad(loss(sharded), (0, 1)))(x, w)
  want = jax.jit(jax.value_and_grad(loss(single), (0, 1)))(x, w)
  jax.tree.map(contract.gradients_agree, got, want)


def test_errors_say_what_is_wrong():
  """As a user sees them, without the shape checks of the test run."""
  unchecked = inspect.unwrap(pallas.grouped_matmul)
  x, w, sizes = cases.CASES['even'].operands()
  with pytest.raises(ValueError, match='group_sizes must be'):
    unchecked(x, w, sizes[:-1])
  with pytest.raises(ValueError, match='cast w'):
    unchecked(x, w.astype(jnp.bfloat16), sizes)
  with pytest.raises(ValueError, match='row_index must be'):
    unchecked(x, w, sizes, row_index=sizes[None])
  for index in (None, sizes):
    with pytest.raises(
        ValueError, match=f'inverse_index must be .A, {len(x)}'):
      unchecked(x, w, sizes, row_index=index, inverse_index=sizes[None])
  with pytest.raises(ValueError, match='known: auto, gpu, reference, tpu, xla'):
    unchecked(x, w, sizes, backend='cuda')
