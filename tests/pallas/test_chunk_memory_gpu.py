"""The Triton kernels of chunk_memory: compiled without a GPU, run on one.

Their results are tested in the interpreter, by interpret/.
"""

from chunk_memory_program import Case, program, run, whole_and_shards
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
from mom_jax.pallas.chunk_memory import api, cases
from mom_jax.pallas.chunk_memory.triton import backend

# A GPU of each capability.
GPUS = {
    capability: f'NVIDIA {name}'
    for name, capability in common.CAPABILITIES.items()}
KINDS = (
    'delta_head', 'delta_none', 'additive_head', 'additive_none',
    'additive_channel', 'delta_channel')
# Kinds whose kernels do all that those of the others do.
COMPILED = ('delta_head', 'additive_channel', 'delta_channel')
FLOAT32 = ('delta_head', 'additive_channel')  # of these, always for sm_80
# (kind, dtype, size) of all that the kernels compute.
ENTRIES = [
    (kind, dtype, size) for kind in KINDS for dtype in backend.SUBSTITUTION
    for size in backend.SIZES]

on_gpu = pytest.mark.skipif(
    jax.default_backend() != 'gpu', reason='there is no NVIDIA GPU')


def _case(kind, size, **more):
  """Groups of several chunks, of none, of one row; an unused chunk."""
  return Case(
      key=size, value=size, heads=2, lengths=(130, 0, 1), unused=1,
      **cases.KINDS[kind], **more)


def _launches(case, dtype, capability):
  fn, args = program(case, jnp.dtype(dtype), 'gpu')
  return gpu_gate.launches(fn, *args, kind=GPUS[capability])


def _check(kind, dtype, size, capability):
  """Every kernel is within budget, its products use Hopper's instruction."""
  seen = _launches(_case(kind, size), dtype, capability)
  each = {launch.kernel.__name__: (launch, arrays) for launch, arrays in seen}
  for name, (launch, arrays) in each.items():
    measured = gpu_gate.measure(launch, arrays, capability)
    assert measured['wgmma'] == (measured['multiplies'] and capability == 90)
    gpu_budget.check(name, f'{kind} {dtype} {size} sm_{capability}', measured)


@pytest.mark.gpu_compile
@pytest.mark.parametrize('kind, dtype, size', [
    pytest.param(kind, dtype, size, marks=(
        () if dtype == 'bfloat16' and (kind, size) in (
            ('delta_head', 256), ('delta_channel', 64))
        else pytest.mark.slow))
    for kind, dtype, size in ENTRIES
    if kind in COMPILED])
def test_every_entry_compiles_for_hopper(kind, dtype, size):
  _check(kind, dtype, size, 90)


@pytest.mark.gpu_compile
@pytest.mark.parametrize('kind, dtype, size, capability', [
    ('additive_none', 'bfloat16', 64, 90),
    *((kind, 'float32', 64, 80) for kind in FLOAT32),
    *(pytest.param(kind, dtype, size, capability, marks=(
        () if (kind, dtype, size, capability) in (
            ('delta_head', 'bfloat16', 256, 80),
            ('delta_head', 'bfloat16', 64, 100)) else pytest.mark.slow))
      for capability in backend.CAPABILITIES if capability != 90
      for kind, dtype, size in ENTRIES
      if kind in COMPILED and (
          kind not in FLOAT32
          or (dtype, size, capability) != ('float32', 64, 80)))])
def test_other_forms_and_gpus_compile(kind, dtype, size, capability):
  reason = backend.triton_too_old(capability)
  if reason is not None:
    pytest.skip(reason)
  _check(kind, dtype, size, capability)


@pytest.mark.gpu_compile
def test_whole_program_for_an_h100():
  """Forward and gradient, chosen without being named."""
  case = _case('delta_head', 64, segments=True)
  fn, args = program(case, jnp.dtype('bfloat16'), 'auto')
  compiled = gpu_topology.compile_for_h100(fn, *args)
  gpu_topology.assert_kernels_multiply(compiled)


@pytest.mark.gpu_compile
def test_jax_triton_takes_the_same_kernels(monkeypatch):
  """As where there is a GPU; also under vmap and over shards of heads."""
  monkeypatch.setattr(common, 'gpu_target', lambda: common.GpuTarget(90, True))
  args, kw = _case('additive_head', 64).operands(dtype=jnp.bfloat16)
  P = jax.sharding.PartitionSpec

  def op(q, k, v, g, state, group_N):
    return pallas.chunk_memory(
        q, k, v, g, None, initial_state_GHKV=state, group_N=group_N)

  heads = (P(None, 'x'),) * 5
  sharded = jax.shard_map(
      jax.vmap(op, in_axes=(0, None, None, None, None, None)),
      in_specs=(P(None, None, 'x'), *heads[1:], P()),
      out_specs=(P(None, None, 'x'),) * 2)
  q, k, v, g, _ = args
  gpu_topology.assert_kernels_multiply(gpu_topology.compile_for_h100(
      sharded, jnp.stack([q, q]), k, v, g, kw['initial_state_GHKV'],
      kw['group_N']))


@pytest.mark.gpu_compile
def test_shards_of_heads_and_groups_for_four_h100s(monkeypatch):
  """Forward and gradient: every device works alone, all products in kernels."""
  monkeypatch.setattr(common, 'gpu_target', lambda: common.GpuTarget(90, True))
  _, shards, args = whole_and_shards('bfloat16')
  compiled = gpu_topology.compile_for_h100(
      shards, *args, axes=dict(batch=2, heads=2))
  assert 'num_partitions=4' in compiled.as_text()
  gpu_topology.assert_kernels_multiply(compiled)
  gpu_topology.assert_no_communication(compiled)


def test_each_config_is_run_by_a_test_on_a_gpu(monkeypatch):
  seen, config = set(), backend.config

  def recorded(*key):
    seen.add(backend.config_key(*key))
    return config(*key)

  monkeypatch.setattr(backend, 'config', recorded)
  monkeypatch.setattr(backend, 'MIN_TRITON', {})  # nothing is compiled here
  for capability in (80, 90, 100):
    for kind, dtype, size in ENTRIES:
      _launches(_case(kind, size), dtype, capability)
  assert seen == backend.CONFIGS.keys()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize('kind, dtype, size', ENTRIES)
def test_on_a_gpu_kernels_are_the_reference(kind, dtype, size):
  """Twice the same bits, in memory that held NaN before."""
  case = _case(kind, size, segments=kind.endswith('head'))
  want, want_grads = run(case, jnp.dtype(dtype), 'reference')
  fn, args = program(case, jnp.dtype(dtype), 'gpu')
  fn, got = jax.jit(fn), []
  for _ in range(2):
    jax.block_until_ready(jnp.full(2**28, jnp.nan))  # freed at once
    got.append(jax.device_get(fn(*args)))
  jax.tree.map(np.testing.assert_array_equal, *got)
  grads, out = got[0]
  for key, x in want.items():
    contract.outputs_agree(out[key], x, dtype, key)
  for key, x in want_grads.items():
    contract.gradients_agree(grads[key], x, dtype, key)


@pytest.mark.parametrize('change, reason', [
    (dict(chunk=32), 'chunk=32 must be a multiple of 64'),
    (dict(key=32), 'K=32 must be one of'),
    (dict(value=32), 'V=32 must be one of'),
    (dict(removal=True, delta=False), 'removal_key_RHK'),
    (dict(exclusive=True), 'exclusive'),
])
def test_what_is_not_covered_goes_to_xla(change, reason, monkeypatch):
  """By name it is an error that says why."""
  monkeypatch.setattr(triton_call, 'missing', lambda: None)
  monkeypatch.setattr(
      common, 'gpu_target', lambda: common.GpuTarget(90, False))
  fn, args = program(Case(lengths=(5,), **change), jnp.float32, 'gpu')
  with pytest.raises(NotImplementedError, match=reason):
    jax.eval_shape(fn, *args)


def test_a_gpu_that_was_not_compiled_for_is_refused(monkeypatch):
  monkeypatch.setattr(triton_call, 'missing', lambda: None)
  monkeypatch.setattr(
      common, 'gpu_target', lambda: common.GpuTarget(75, False))
  fn, args = program(Case(lengths=(5,)), jnp.bfloat16, 'gpu')
  with pytest.raises(NotImplementedError, match='sm_75 has no configs; known:'):
    jax.eval_shape(fn, *args)


def test_a_triton_that_cannot_compile_for_a_gpu_is_refused(monkeypatch):
  monkeypatch.setattr(triton_call, 'missing', lambda: None)
  monkeypatch.setattr(
      common, 'gpu_target', lambda: common.GpuTarget(100, False))
  fn, args = program(Case(lengths=(5,)), jnp.bfloat16, 'gpu')
  monkeypatch.setattr(triton_call, 'triton_version', lambda: '3.6.0')
  with pytest.raises(NotImplementedError, match='3.6.0 cannot compile for'):
    jax.eval_shape(fn, *args)


@pytest.mark.parametrize('versions, reason', [
    ((None, None, None), 'it needs jax-triton'),
    (('0.10.2', '0.3.1', '3.1.0'), '3.1.0 were not tried together'),
    (triton_call.PROVEN[0], None),
])
def test_pairs_that_were_not_tried_are_refused(versions, reason, monkeypatch):
  monkeypatch.setattr(triton_call, 'versions', lambda: versions)
  monkeypatch.setattr(common, 'platform', lambda: 'gpu')
  found = triton_call.missing()
  assert reason in found if reason else found is None


def test_without_a_gpu_it_is_not_chosen():
  args, kw = Case(lengths=(5,)).operands()
  operands = (*args, None, None, kw['initial_state_GHKV'], kw['group_N'])
  settings = dict(scale=1.0, chunk=64, exclusive=False)
  assert 'it needs a GPU' in backend.BACKEND.supported(*operands, **settings)
  assert common.select(
      'chunk_memory', api.BACKENDS, 'auto', *operands, **settings
  ).name == 'xla'
