"""grouped_matmul's TPU kernels, interpreted on a CPU, against the reference."""

import functools
import inspect
import re

import contract
import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_topology

from mom_jax import pallas
from mom_jax.pallas import common
from mom_jax.pallas.grouped_matmul import cases
from mom_jax.pallas.grouped_matmul.tpu import backend, gather, tiles

# Cuts every axis, with a narrower last tile of columns; tiles that several
# groups share and that no group reaches.
CUT = cases.Case((0, 70, 0, 1, 64, 33, 0), 200, 256, 384)
# The same where no axis is whole tiles.
ODD = cases.Case(CUT.sizes, 200, 250, 389)
OTHER_SIZES = {
    'all_empty': (0,) * 7, 'one_takes_all': (0, 0, 0, 0, 0, 0, 200),
    'borders_on_tiles': (64, 0, 64, 32, 0, 0, 40), 'single_rows': (1,) * 7,
}


def _tile_sizes(inner, out, split=False):
  return tiles.TileSizes(
      rows=64, block=32, inner=inner, out=out, chunk=128, split=split)


@functools.partial(jax.jit, static_argnames='split')
def _cut(x, w, sizes, dy, split=False):
  _, D, F = w.shape
  return (
      backend.matmul(x, w, sizes, _tile_sizes(D, 256, split)),
      backend.matmul(
          dy, w, sizes, _tile_sizes(F, 128, split), transposed=True),
      backend.weight_gradient(x, dy, sizes, _tile_sizes(128, 256, split)))


@functools.partial(jax.jit, static_argnames='name')
def _both(x, w, sizes, dy, name):
  y, pull = jax.vjp(lambda x, w: pallas.grouped_matmul(
      x, w, sizes, backend=name), x, w)
  return y, *pull(dy)


def _operands(case, dtype='float32'):
  x, w, sizes = case.operands(dtype=dtype)
  dy = jnp.cos(jnp.arange(case.rows * case.hidden, dtype=jnp.float32))
  return x, w, sizes, dy.reshape(case.rows, case.hidden).astype(dtype)


def _agree(got, operands):
  want, dtype = _both(*operands, 'reference'), operands[0].dtype.name
  contract.outputs_agree(got[0], want[0], dtype, 'y')
  contract.gradients_agree(got[1], want[1], dtype, 'dx')
  contract.gradients_agree(got[2], want[2], dtype, 'dw')


@pytest.mark.parametrize('name, dtype', [
    ('uneven_with_rest', 'bfloat16'), ('odd_sizes', 'float32')])
def test_backend_is_the_reference(name, dtype):
  operands = _operands(cases.CASES[name], dtype)
  with common.interpret():
    got = _both(*operands, 'tpu')
  assert [a.dtype for a in got] == [dtype] * 3
  _agree(got, operands)


def test_every_axis_cut():
  """At any load; rows past the last group are zero and never multiplied."""
  x, w, sizes, dy = _operands(CUT)
  for sizes in ({'cut': CUT.sizes} | OTHER_SIZES).values():
    end, sizes = sum(sizes), jnp.array(sizes, jnp.int32)
    with common.interpret():
      y, dx, dw = _cut(
          x.at[end:].set(jnp.nan), w, sizes, dy.at[end:].set(jnp.inf))
    assert not np.any(y[end:]) and not np.any(dx[end:])
    assert not np.any(dw[np.flatnonzero(sizes == 0)])
    _agree((y, dx, dw), (x, w, sizes, dy))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_what_lies_behind_the_end_of_w_stays_out(dtype):
  """It is fetched with w's last part, and may be anything."""
  operands = _operands(ODD, dtype)
  with common.interpret(out_of_bounds_reads='uninitialized'):
    got = _cut(*operands)
  _agree(got, operands)


@pytest.mark.parametrize('case', [CUT, ODD])
def test_two_cores_without_races(case):
  """Each with half of the columns; copies happen only when awaited."""
  operands = _operands(case)
  with common.interpret(
      detect_races=True, num_cores_or_threads=2, random_seed=0,
      out_of_bounds_reads='uninitialized' if case is ODD else 'raise'):
    got = _cut(*operands, split=True)
    assert not interpret_pallas_call.races.races_found
  _agree(got, operands)


def _row_index(order):
  """An index of rows in groups of 130, 0, 470, 1, 120 out of 1,400 rows."""
  rng, sizes = np.random.default_rng(0), (130, 0, 470, 1, 120)
  index = {
      # Blocks that are windows, and one that is two halves of them.
      'contiguous': np.concatenate([
          np.arange(128, 258), np.arange(472) + 254, np.arange(119)]),
      'each_second': np.concatenate([
          np.sort(rng.choice(2 * n, n, replace=False)) for n in sizes]),
      'far_apart': np.concatenate([
          np.sort(rng.choice(1400, n, replace=False)) for n in sizes]),
      'any': rng.integers(0, 1400, sum(sizes)),
  }[order].astype(np.int32)
  index = np.append(index, np.full(79, 1400, np.int32))
  index[sum(sizes):] = index[200:212] = index[640:650] = 1400
  return jnp.asarray(sizes, jnp.int32), index


@pytest.mark.parametrize('order, dtype, buffered', [
    ('contiguous', 'bfloat16', 12), ('each_second', 'bfloat16', 12),
    ('far_apart', 'float32', 5), ('any', 'bfloat16', 5)])
def test_gathered_inside_is_gathered_before(
    order, dtype, buffered, monkeypatch):
  """To the bit, in any order, whatever memory held before, without races."""
  monkeypatch.setattr(gather, 'BUFFERED', (buffered, 2**22))
  sizes, index = _row_index(order)
  x, w, _ = cases.Case((1,) * 5, 1400, 256, 384).operands(dtype=dtype)
  real = index < len(x)
  x_RD = np.where(real[:, None], x[np.minimum(index, len(x) - 1)], 0)
  dy = jnp.cos(jnp.arange(len(index) * 384.0)).reshape(len(index), 384)
  dy = jnp.where(real[:, None], dy, 0).astype(dtype)
  tile_sizes = lambda inner: tiles.TileSizes(
      rows=256, block=128, inner=inner, out=256, chunk=128, split=False)

  def run(x, index):
    return (
        backend.matmul(x, w, sizes, tile_sizes(256), row_index=index),
        backend.weight_gradient(
            x, dy, sizes, tile_sizes(128), row_index=index))

  with common.interpret(detect_races=True):
    got = jax.jit(run)(x, index)
    assert not interpret_pallas_call.races.races_found
    want = jax.jit(run)(jnp.asarray(x_RD, dtype), None)
  np.testing.assert_array_equal(got[0][real], want[0][real])
  assert np.isfinite(np.asarray(got[0], np.float32)).all()
  np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize('order, kind', [
    ('contiguous', gather.CONTIGUOUS), ('each_second', gather.NEAR),
    ('any', gather.FAR)])
def test_a_work_item_copies_the_windows_of_its_own_rows_only(
    order, kind, monkeypatch):
  """Of each block the windows from its first row's to its last one's."""
  monkeypatch.setattr(gather, 'BUFFERED', (8, 2**22))
  sizes, index = _row_index(order)
  with common.interpret():
    _, items = backend.work_items(sizes, len(index), 256, rest=True)
    windows, _ = gather.plan(
        jnp.zeros((1400, 128)), jnp.asarray(index), items, 256, 128)
  group_R = np.repeat(np.arange(6), [*sizes, len(index) - sum(sizes)])
  assert kind in windows.kind_I
  for i, (group, tile) in enumerate(zip(items.group_I, items.tile_I)):
    needed = []
    for b in range(2):
      at = slice((tile * 2 + b) * 128, (tile * 2 + b + 1) * 128)
      own = (group_R[at] == group) & (index[at] < 1400)
      found = index[at][own] // 128
      needed += [(found.min(), found.max() + 1)] if len(found) else []
      low, high = (
          int(a[i * 2 + b]) for a in (windows.low_IB, windows.high_IB))
      assert (low, high) == (needed[-1] if len(found) else (0, 0))
    assert (windows.kind_I[i] == gather.EMPTY) == (not needed)
    if needed:
      lows, highs = zip(*needed)
      assert (windows.low_I[i], windows.high_I[i]) == (min(lows), max(highs))


def test_the_backend_gathers_inside_where_that_is_faster(monkeypatch):
  """With the same result as where XLA gathers, to the bit."""
  case = cases.Case((130, 0, 126), 256, 128, 64)
  x, w, sizes = case.operands()
  row_index, inverse_index = case.indices(200)
  real_R1 = jnp.where(row_index < 200, 1.0, 0.0)[:, None]
  product = functools.partial(
      pallas.grouped_matmul, group_sizes=sizes, row_index=row_index,
      inverse_index=inverse_index, backend='tpu')

  def gradients(x, w):
    return jax.vjp(product, x, w)[1](real_R1 * jnp.ones((256, 64)))

  results = []
  with common.interpret():
    for inside in (False, True):
      monkeypatch.setattr(gather, 'is_faster', lambda *_, inside=inside: inside)
      program = str(jax.make_jaxpr(lambda x, w: product(x, w))(x[:200], w))
      copies_rows = 'f32[256,128] = gather[' in program
      assert copies_rows != inside
      results.append(jax.jit(lambda *args: gradients(*args))(x[:200], w))
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_work_follows_the_load():
  """As many work items as groups have tiles, whatever the number of groups."""
  for sizes, used in (
      ((64, 64, 0, 0), 2), ((65, 0, 63, 0), 3), ((0, 0, 0, 0), 0),
      ((256, 0, 0, 0), 4), ((1, 1, 1, 1), 4)):
    count, items = backend.work_items(jnp.array(sizes), 256, 64, rest=True)
    rest = -(-256 // 64) - sum(sizes) // 64
    assert (count, items.totals[0]) == (used + rest, used)
    count, _ = backend.work_items(jnp.array(sizes), 256, 64, rest=False)
    assert count == used + sizes.count(0)


def test_needs_a_tpu():
  unchecked = inspect.unwrap(pallas.grouped_matmul)
  operands = cases.CASES['even'].operands()
  with pytest.raises(NotImplementedError, match='this is a cpu'):
    unchecked(*operands, backend='tpu')
  half = [a.astype(jnp.float16) for a in operands[:2]]
  with common.interpret(), pytest.raises(
      NotImplementedError, match='x is float16'):
    unchecked(*half, operands[2], backend='tpu')


@pytest.mark.tpu_compile
@pytest.mark.parametrize('name, dtype, generation', [
    *((*one, generation) for generation in tpu_topology.TOPOLOGIES for one in (
        ('mom_project', 'bfloat16'), ('moma_out', 'float32'),
        ('odd_sizes', 'bfloat16'))),
    ('cut', 'bfloat16', 'v5p'), ('cut', 'bfloat16', 'v6e')])
def test_compiles(name, dtype, generation):
  """y, dx and dw, chosen without being named."""
  case = (cases.CASES | cases.BENCHMARKS | {'cut': ODD})[name]

  def run(x, w, sizes):
    loss = lambda x, w: (pallas.grouped_matmul(x, w, sizes).astype(
        jnp.float32) ** 2).sum()
    return jax.value_and_grad(loss, (0, 1))(x, w)

  compiled = tpu_topology.compile_for(
      generation, run, *case.operands(dtype=dtype))
  text = compiled.as_text()
  for kernel in ('grouped_matmul', 'grouped_matmul_dx', 'grouped_matmul_dw'):
    assert f'({kernel})' in text


@pytest.mark.tpu_compile
@pytest.mark.parametrize('inside, dtype, generation', [
    *((None, 'bfloat16', generation) for generation in tpu_topology.TOPOLOGIES),
    (True, 'float32', 'v6e'), (True, 'bfloat16', 'v5p'),
    (True, 'bfloat16', 'tpu7x')])
def test_indexed_rows_compile(inside, dtype, generation, monkeypatch):
  """Gathered inside on TPUs without SparseCores, or where that is asked for."""
  if inside:
    monkeypatch.setattr(gather, 'is_faster', lambda *_: True)
  case = cases.Case((700, 0, 60, 512), 1300, 256, 384)
  indices = case.indices(900)

  def run(x, w, sizes, row_index, inverse_index):
    loss = lambda x, w: (jnp.where(row_index[:, None] < len(x), (
        pallas.grouped_matmul(
            x, w, sizes, row_index=row_index, inverse_index=inverse_index)
    ).astype(jnp.float32), 0) ** 2).sum()
    return jax.value_and_grad(loss, (0, 1))(x, w)

  x, w, sizes = case.operands(dtype=dtype)
  text = tpu_topology.compile_for(
      generation, run, x[:900], w, sizes, *indices).as_text()
  kernels = {
      re.search(r'\((grouped_matmul\w*)\)', line)[1]: line
      for line in text.splitlines()
      if 'custom-call(' in line and 'grouped_matmul' in line}
  index = 's32[3,4,128]'  # by tile, block and row
  gathering = {name for name, line in kernels.items() if index in line}
  inside = inside or generation == 'v5e'
  assert gathering == (
      {'grouped_matmul', 'grouped_matmul_dw'} if inside else set())


@pytest.mark.tpu_compile
@pytest.mark.parametrize('memories', [1, 4, 64])
def test_a_block_of_rows_never_reads_most_of_x(memories):
  """Where groups take few of many rows, XLA gathers them beforehand.

  Of 1024 tokens each memory takes some, and a shared one all, in order.
  """
  tokens = 1024
  taken = tokens * 2 // memories if memories > 1 else tokens
  R = memories * taken + tokens
  row_index = np.concatenate([
      *(np.sort(np.random.default_rng(m).choice(tokens, taken, replace=False))
        for m in range(memories)), np.arange(tokens)]).astype(np.int32)
  blocks = row_index.reshape(-1, min(gather.WINDOW, taken))
  spans = blocks.max(1) // gather.WINDOW - blocks.min(1) // gather.WINDOW + 1
  inside = []

  def look(x):
    index = jnp.zeros(R, jnp.int32)
    inside.append(gather.is_faster(x, index, memories + 1))
    return x

  tpu_topology.compile_for('v5e', look, jnp.zeros((tokens, 128)))
  assert inside == [np.median(spans) <= gather.WINDOWS_PER_PRODUCT[128]]
