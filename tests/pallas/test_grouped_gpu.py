"""The Triton kernels of grouped products and of decoding.

Compiled without a GPU, within budget, and run on one. Their results are tested
in the interpreter, by interpret/.
"""

import functools

import contract
import gpu_budget
import gpu_gate
import gpu_topology
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import pallas
from mom_jax.pallas import common, triton_call
from mom_jax.pallas.chunk_memory import cases as memory_cases
from mom_jax.pallas.chunk_memory import reference, triton
from mom_jax.pallas.chunk_memory.triton import decode
from mom_jax.pallas.grouped_matmul import cases
from mom_jax.pallas.grouped_matmul.triton import backend

compiles = pytest.mark.gpu_compile
on_gpu = pytest.mark.skipif(
    jax.default_backend() != 'gpu', reason='there is no NVIDIA GPU')

R, D, F, G = 4096, 1024, 2816, 8
_array = jax.ShapeDtypeStruct


def _grouped(op, config, dtype):
  """(the one launch of an op, shapes of its operands)."""
  x, dy = _array((R, D), dtype), _array((R, F), dtype)
  w, sizes = _array((G, D, F), dtype), _array((G,), jnp.int32)
  row_index = _array((R,), jnp.int32)
  run, args = {
      'matmul': (
          functools.partial(backend.matmul, config=config), (x, w, sizes)),
      'matmul_transposed': (
          functools.partial(backend.matmul, config=config, transposed=True),
          (dy, w, sizes)),
      'swiglu': (
          functools.partial(backend.matmul_swiglu, config=config, keep=True),
          (x, _array((G, D, 2 * F), dtype), sizes)),
      'dw': (
          functools.partial(backend.weight_gradient, config=config),
          (x, dy, sizes)),
      'matmul_indexed': (
          lambda x, w, sizes, row_index: backend.matmul(
              x, w, sizes, config, row_index=row_index),
          (x, w, sizes, row_index)),
      'dw_indexed': (
          lambda x, dy, sizes, row_index: backend.weight_gradient(
              x, dy, sizes, config, row_index=row_index),
          (x, dy, sizes, row_index)),
  }[op]
  (launch,) = gpu_gate.launches(run, *args)
  return launch


def _check(launch, arrays, variant, capability):
  measured = gpu_gate.measure(launch, arrays, capability)
  variant = f'{variant} sm_{capability}'
  gpu_budget.check(launch.kernel.__name__, variant, measured)
  return measured


ENTRIES = [
    (op, dtype, number) for (table, dtype), configs in backend.CONFIGS.items()
    for op in {'matmul': ('matmul', 'matmul_transposed', 'matmul_indexed'),
               'dw': ('dw', 'dw_indexed')}.get(table, (table,))
    for number in range(len(configs))]


@compiles
@pytest.mark.parametrize('op, dtype, number', ENTRIES)
def test_every_config_compiles_for_hopper(op, dtype, number):
  """Its products by wgmma, with as much shared memory as it says."""
  table = op.split('_')[0]
  config = backend.CONFIGS[table, dtype][number]
  launch, arrays = _grouped(op, config, dtype)
  variant = f'{op} {dtype} {config.rows}x{config.width}x{config.inner}'
  measured = _check(launch, arrays, variant, 90)
  assert measured['wgmma']
  itemsize = jnp.dtype(dtype).itemsize
  assert measured['shared'] <= config.shared_memory(table, itemsize) + 1024


@compiles
@pytest.mark.parametrize('capability', [80, 89, 100, 120])
@pytest.mark.parametrize(
    'op', ['matmul', 'matmul_indexed', 'swiglu', 'dw', 'dw_indexed'])
def test_chosen_configs_compile_for_other_gpus(op, capability, monkeypatch):
  monkeypatch.setattr(
      common, 'gpu_target', lambda: common.GpuTarget(capability, False))
  config = backend.best_config(op.split('_')[0], 'bfloat16', R / G, F)
  launch, arrays = _grouped(op, config, 'bfloat16')
  _check(launch, arrays, f'{op} bfloat16', capability)


def _decode(K, dtype, **kind):
  case = memory_cases.Case(
      **kind, chunk=1, lengths=(1,) * 4, heads=2, key=K, value=128, unused=0)
  (q, k, v, g, beta), more = case.operands(dtype=dtype)
  run = functools.partial(
      decode.decode, scale=0.3, exclusive=case.exclusive)
  (launch,) = gpu_gate.launches(
      run, q, k, v, g, beta, more['removal_key_RHK'], more['value_decay_RHV'],
      more['initial_state_GHKV'], more['group_N'])
  return launch


@compiles
@pytest.mark.parametrize('K', decode.SIZES)
def test_decode_compiles_for_hopper(K):
  launch, arrays = _decode(
      K, jnp.bfloat16, **memory_cases.KINDS['delta_head'])
  _check(launch, arrays, f'delta_head bfloat16 K={K}', 90)


@compiles
@pytest.mark.parametrize('kind, capability', [
    ('removal_channel', 80), ('exclusive_value_decay', 100),
    ('delta_channel', 120)])
def test_decode_compiles_for_other_gpus(kind, capability):
  launch, arrays = _decode(256, jnp.float32, **memory_cases.KINDS[kind])
  _check(launch, arrays, f'{kind} float32 K=256', capability)


def _with_gradients(run, *args, sizes):
  loss = lambda *args: (run(*args, sizes).astype(jnp.float32) ** 2).sum()
  return jax.value_and_grad(loss, (0, 1))(*args)


@compiles
@pytest.mark.parametrize('op', ['grouped_matmul', 'grouped_swiglu'])
def test_whole_program_for_an_h100(op):
  """Chosen without being named; nothing dense is made of the groups."""
  case = cases.Case((300, 0, 200, 12), 600, 128, 256)
  x, w, sizes = case.operands(dtype=jnp.bfloat16)
  run = lambda x, w, sizes: _with_gradients(
      getattr(pallas, op), x, w, sizes=sizes)
  compiled = gpu_topology.compile_for_h100(run, x, w, sizes)
  gpu_topology.assert_kernels_multiply(compiled)
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < 12 * case.rows * case.hidden


@compiles
def test_jax_triton_takes_the_same_kernels(monkeypatch):
  """As where there is a GPU; under vmap, over shards, with gradients."""
  monkeypatch.setattr(
      common, 'gpu_target', lambda: common.GpuTarget(90, True))
  P = jax.sharding.PartitionSpec
  x, w, sizes = cases.Case((30, 0, 12), 48, 64, 64).operands(
      dtype=jnp.bfloat16)

  def run(x, w, sizes):
    sharded = jax.shard_map(
        lambda x, w, sizes: jax.vmap(
            pallas.grouped_swiglu, (0, None, 0))(x, w, sizes),
        in_specs=(P('x'), P(), P('x')), out_specs=P('x'))
    loss = lambda x, w: sharded(x, w, sizes).astype(jnp.float32).sum()
    return jax.grad(loss, (0, 1))(x, w)

  gpu_topology.assert_kernels_multiply(gpu_topology.compile_for_h100(
      run, jnp.stack([x] * 2), w, jnp.stack([sizes] * 2)))


@compiles
def test_decoding_for_an_h100_is_in_place():
  """A state that is given away is not copied."""
  case = memory_cases.Case(
      **memory_cases.KINDS['delta_head'], chunk=1, lengths=(1,) * 4, heads=2,
      key=64, value=128, unused=0)
  (q, k, v, g, beta), more = case.operands(dtype=jnp.bfloat16)
  state = more.pop('initial_state_GHKV')
  settings = dict(chunk=1, num_groups=4)

  def run(state, group_N, *rows):
    return pallas.chunk_memory(
        *rows, group_N=group_N, initial_state_GHKV=state, **settings)

  compiled = gpu_topology.compile_for_h100(
      run, state, more['group_N'], q, k, v, g, beta, donate_argnums=0)
  assert 'triton_kernel_call_ffi' in compiled.as_text()
  assert compiled.memory_analysis().temp_size_in_bytes < state.nbytes / 4


# The public operations that run each config.
DEVICE_CASES = [
    (op, dtype, number) for (table, dtype), configs in backend.CONFIGS.items()
    for op in (('grouped_swiglu',) if table == 'swiglu' else (
        'grouped_matmul', 'grouped_swiglu'))
    for number in range(len(configs))]
# Empty groups, groups of a part of a tile and of several; rows past the last.
LOAD = cases.Case((0, 700, 0, 1, 64, 129, 513, 0), 1500, 520, 1088)


def _force(monkeypatch, number):
  """Every op takes entry `number` of its configs, or the last one."""
  taken = set()

  def forced(table, dtype, *_):
    configs = backend.CONFIGS[table, jnp.dtype(dtype).name]
    at = min(number, len(configs) - 1)
    taken.add((table, jnp.dtype(dtype).name, at))
    return configs[at]

  monkeypatch.setattr(backend, 'best_config', forced)
  return taken


def _both(op, dtype, name):
  x, w, sizes = LOAD.operands(dtype=jnp.dtype(dtype))
  end = sum(LOAD.sizes)

  def run(x, w, sizes):
    y, pull = jax.vjp(lambda x, w: getattr(pallas, op)(
        x, w, sizes, backend=name), x, w)
    dy = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return y, *pull(dy.astype(y.dtype).at[end:].set(jnp.nan))

  return run, (x.at[end:].set(jnp.nan), w, sizes)


def test_each_config_is_run_by_a_test_on_a_gpu(monkeypatch):
  ran = set()
  for op, dtype, number in DEVICE_CASES:
    taken = _force(monkeypatch, number)
    run, args = _both(op, dtype, 'gpu')
    monkeypatch.setattr(triton_call, 'missing', lambda: None)
    gpu_gate.launches(run, *args)
    ran |= taken
  assert ran == {(*key, number) for key, configs in backend.CONFIGS.items()
                 for number in range(len(configs))}


def _twice(fn, *args):
  """Results of fn, the same bits twice, in memory that held NaN before."""
  fn, got = jax.jit(fn), []
  for _ in range(2):
    jax.block_until_ready(jnp.full(2**28, jnp.nan))  # freed at once
    got.append(jax.device_get(fn(*args)))
  jax.tree.map(np.testing.assert_array_equal, *got)
  return got[0]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize('op, dtype, number', DEVICE_CASES)
def test_on_a_gpu_products_are_the_reference(op, dtype, number, monkeypatch):
  """And rows past the last group are zero and never multiplied."""
  _force(monkeypatch, number)
  run, args = _both(op, dtype, 'gpu')
  got, end = _twice(run, *args), sum(LOAD.sizes)
  run, args = _both(op, dtype, 'reference')
  want = jax.device_get(jax.jit(run)(*args))
  assert not np.any(got[0][end:]) and not np.any(got[1][end:])
  contract.outputs_agree(got[0], want[0], dtype, 'y')
  contract.gradients_agree(got[1], want[1], dtype, 'dx')
  contract.gradients_agree(got[2], want[2], dtype, 'dw')


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('number', [0, 1])
def test_on_a_gpu_indexed_rows_are_rows_of_a_copy(
    number, dtype, monkeypatch):
  """To the bit but for sums over a token's rows."""
  _force(monkeypatch, number)
  x, w, sizes = LOAD.operands(dtype=jnp.dtype(dtype))
  row_index, inverse_index = LOAD.indices(900)
  real = np.asarray(row_index < 900)

  def run(x, w, row_index=None, inverse_index=None):
    y, pull = jax.vjp(lambda x, w: pallas.grouped_matmul(
        x, w, sizes, row_index=row_index, inverse_index=inverse_index,
        backend='gpu'), x, w)
    dy = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return y, *pull(jnp.where(real[:, None], dy, 0).astype(y.dtype))

  got = _twice(run, x[:900], w, row_index, inverse_index)
  want = _twice(run, x[:900].at[row_index].get(mode='clip'), w)
  np.testing.assert_array_equal(got[0][real], want[0][real])
  np.testing.assert_array_equal(got[2], want[2])
  dx = np.zeros((900, x.shape[1]), np.float32)
  np.add.at(dx, row_index[real], want[1][real].astype(np.float32))
  contract.gradients_agree(got[1], dx, dtype, 'dx')


@pytest.mark.gpu
@on_gpu
def test_on_a_gpu_swiglu_is_the_same_without_gradients():
  x, w, sizes = LOAD.operands(dtype=jnp.bfloat16)
  run = lambda x, w: pallas.grouped_swiglu(x, w, sizes, backend='gpu')
  np.testing.assert_array_equal(
      _twice(run, x, w), _twice(lambda *args: jax.vjp(run, *args)[0], x, w))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('K', decode.SIZES)
@pytest.mark.parametrize('kind', memory_cases.KINDS)
def test_on_a_gpu_decoding_is_the_reference(kind, K, dtype):
  """States of groups without rows stay bit-equal."""
  case = memory_cases.Case(
      **memory_cases.KINDS[kind], chunk=1, lengths=(1, 0, 3, 1), heads=3,
      key=K, value=128)
  (q, k, v, g, beta), more = case.operands(dtype=jnp.dtype(dtype))
  operands = (
      q, k, v, g, beta, more['removal_key_RHK'], more['value_decay_RHV'],
      more['initial_state_GHKV'], more['group_N'])
  settings = dict(scale=0.3, exclusive=case.exclusive)
  o, state = _twice(
      functools.partial(decode.decode, **settings), *operands)
  want = reference.chunk_memory_ref(*operands, **settings, chunk=1)
  np.testing.assert_array_equal(state[1], operands[7][1])
  contract.outputs_agree(o, want[0], dtype, 'o')
  contract.outputs_agree(state, want[1], 'float32', 'state')


def test_what_is_not_covered_goes_to_xla(monkeypatch):
  """By name it is an error that says why."""
  monkeypatch.setattr(triton_call, 'missing', lambda: None)
  x, w, sizes = cases.CASES['even'].operands(dtype=jnp.float16)
  assert 'x is float16' in backend.supported(x, w, sizes)
  x, w = (a.astype(jnp.float32) for a in (x, w))
  assert 'nothing to multiply' in backend.supported(x[:0], w, sizes)
  monkeypatch.setattr(
      common, 'gpu_target', lambda: common.GpuTarget(75, True))
  assert 'sm_75 is not known' in backend.supported(x, w, sizes)
  case = memory_cases.Case(chunk=1, lengths=(1,), unused=0)
  (q, k, v, g, beta), more = case.operands()
  operands = (q, k, v, g, beta, None, None, None, more['group_N'])
  settings = dict(scale=1.0, chunk=1, exclusive=False)
  reason = triton.BACKEND.supported(*operands, **settings)
  assert 'K=16 must be one of' in reason
