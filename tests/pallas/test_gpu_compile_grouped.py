"""Grouped products and decoding compile for NVIDIA GPUs, within budget."""

import functools

import gpu_budget
import gpu_gate
import gpu_topology
import jax
import jax.numpy as jnp
import pytest

from mom_jax import pallas
from mom_jax.pallas.chunk_memory import cases as memory_cases
from mom_jax.pallas.chunk_memory import gpu_decode
from mom_jax.pallas.grouped_matmul import cases, gpu

pytestmark = pytest.mark.gpu_compile

R, D, F, G = 4096, 1024, 2816, 8
_array = jax.ShapeDtypeStruct


def _grouped(op, t, dtype, transposed=False):
  """(the one launch of an op, shapes of its operands)."""
  x, dy = _array((R, D), dtype), _array((R, F), dtype)
  w, sizes = _array((G, D, F), dtype), _array((G,), jnp.int32)
  run, args = {
      'times': (functools.partial(gpu.times, t=t), (x, w, sizes)),
      'times_t': (
          functools.partial(gpu.times, t=t, transposed=True), (dy, w, sizes)),
      'swiglu': (
          functools.partial(gpu.times_gated, t=t, keep=True),
          (x, _array((G, D, 2 * F), dtype), sizes)),
      'outer': (functools.partial(gpu.outer, t=t), (x, dy, sizes)),
  }[op]
  (launch,) = gpu_gate.launches(run, *args)
  return launch


def _check(launch, arrays, variant, capability):
  measured = gpu_gate.measure(launch, arrays, capability)
  variant = f'{variant} sm_{capability}'
  gpu_budget.check(launch.kernel.__name__, variant, measured)
  return measured


ENTRIES = [
    (op, dtype, number) for (table, dtype), tiles in gpu.TILES.items()
    for op in (('times', 'times_t') if table == 'times' else (table,))
    for number in range(len(tiles))]


@pytest.mark.parametrize('op, dtype, number', ENTRIES)
def test_every_tile_compiles_for_hopper(op, dtype, number):
  """Its products by wgmma, with as much shared memory as the table says."""
  table = op.removesuffix('_t')
  t = gpu.TILES[table, dtype][number]
  launch, arrays = _grouped(op, t, dtype)
  variant = f'{op} {dtype} {t.rows}x{t.width}x{t.inner}'
  measured = _check(launch, arrays, variant, 90)
  assert measured['wgmma']
  operands = {'times': 2, 'swiglu': 3, 'outer': 0}[table]
  size = jnp.dtype(dtype).itemsize
  assert measured['shared'] <= t.shared(size, operands) + 1024


@pytest.mark.parametrize('capability', [80, 89, 100, 120])
@pytest.mark.parametrize('op', ['times', 'swiglu', 'outer'])
def test_chosen_tiles_compile_for_other_gpus(op, capability, monkeypatch):
  monkeypatch.setattr(
      gpu.common, 'gpu_target',
      lambda: gpu.common.GpuTarget(capability, False))
  t = gpu.tile(op, 'bfloat16', R / G, F)
  launch, arrays = _grouped(op, t, 'bfloat16')
  _check(launch, arrays, f'{op} bfloat16', capability)


def _decode(K, dtype, **kind):
  case = memory_cases.Case(
      **kind, chunk=1, lengths=(1,) * 4, heads=2, key=K, value=128, unused=0)
  (q, k, v, g, beta), more = case.operands(dtype=dtype)
  run = functools.partial(
      gpu_decode.decode, scale=0.3, read_before=case.read_before)
  (launch,) = gpu_gate.launches(
      run, q, k, v, g, beta, more['erase_RHK'], more['value_decay_RHV'],
      more['initial_state_GHKV'], more['group_N'])
  return launch


@pytest.mark.parametrize('K', gpu_decode.SIZES)
def test_decode_compiles_for_hopper(K):
  launch, arrays = _decode(
      K, jnp.bfloat16, **memory_cases.KINDS['delta_head'])
  _check(launch, arrays, f'delta_head bfloat16 K={K}', 90)


@pytest.mark.parametrize('kind, capability', [
    ('erase_channel', 80), ('before_value_decay', 100), ('delta_channel', 120)])
def test_decode_compiles_for_other_gpus(kind, capability):
  launch, arrays = _decode(256, jnp.float32, **memory_cases.KINDS[kind])
  _check(launch, arrays, f'{kind} float32 K=256', capability)


def _with_gradients(run, *args, sizes):
  loss = lambda *args: (run(*args, sizes).astype(jnp.float32) ** 2).sum()
  return jax.value_and_grad(loss, (0, 1))(*args)


@pytest.mark.parametrize('op', ['grouped_matmul', 'grouped_swiglu'])
def test_whole_program_for_an_h100(op):
  """Chosen without being named; nothing dense is made of the groups."""
  case = cases.Case((300, 0, 200, 12), 600, 128, 256)
  x, w, sizes = case.operands(dtype=jnp.bfloat16)
  run = lambda x, w, sizes: _with_gradients(
      getattr(pallas, op), x, w, sizes=sizes)
  compiled = gpu_topology.compile_for_h100(run, x, w, sizes)
  assert compiled.as_text().count('triton_kernel_call_ffi') >= 3
  room = compiled.memory_analysis().temp_size_in_bytes
  assert room < 12 * case.rows * case.hidden


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
