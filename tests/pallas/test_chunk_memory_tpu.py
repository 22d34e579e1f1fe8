"""The TPU kernels of chunk_memory, interpreted, and compiled without a TPU."""

import dataclasses
import functools

from chunk_memory_program import NAMED, Case, program, run
import contract
import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_topology

from mom_jax import pallas
from mom_jax.pallas import common
from mom_jax.pallas.chunk_memory import api, cases, tpu

# Few chunks and heads: compiling what is interpreted takes nearly all the time.
CASES = {
    # Groups that begin and end inside a block, an empty one, unused chunks
    # before and after; two heads a step, K != V.
    'delta_head': Case(heads=2, value=128, lengths=(70, 0, 1)),
    'delta_none': Case(decay='none', lengths=(70,), unused=0),
    'additive_head': Case(delta=False, lengths=(70,), segments=True),
    'additive_none': Case(delta=False, decay='none', lengths=(1, 64)),
    'segments': Case(lengths=(64, 20), segments=True, unused=1),
    'near_equal_keys': Case(
        lengths=(128,), near_equal_keys=True, beta=1.0,
        decay_range=(-1e-3, 0.0)),
    'decay_0_to_20': Case(lengths=(100,), decay_range=(-20.0, 0.0)),
    'four_heads': Case(heads=4, lengths=(70, 1)),
    # Decay by channel: weak decays show what strong ones hide.
    'delta_key': Case(
        heads=2, value=128, lengths=(70, 0, 1), decay='channel'),
    'delta_key_0_to_20': Case(
        lengths=(100,), decay='channel', decay_range=(-20.0, 0.0),
        near_equal_keys=True, beta=1.0),
    'additive_key': Case(
        lengths=(70,), decay='channel', delta=False, segments=True, value=128),
    'removal_key': Case(
        lengths=(70,), decay='channel', delta=False, removal=True),
    'removal_head_exclusive': Case(
        lengths=(70, 1), delta=False, removal=True, exclusive=True),
    'value_exclusive': Case(
        lengths=(70, 0, 1), decay='none', delta=False, value_decay=True,
        exclusive=True, segments=True),
    'value_0_to_20': Case(
        lengths=(70,), decay='none', delta=False, value_decay=True, value=128,
        decay_range=(-20.0, 0.0)),
    'delta_exclusive': Case(
        lengths=(70, 1), decay='none', exclusive=True, unused=0),
    'chunk128_key': Case(
        chunk=128, lengths=(130,), decay='channel', decay_range=(-2.0, 0.0)),
    'chunk128': Case(chunk=128, lengths=(130,), near_equal_keys=True),
    'chunk256': Case(chunk=256, lengths=(256,), unused=0),
}
SLOW = ('additive_none', 'chunk128', 'chunk128_key', 'chunk256',
        'removal_head_exclusive', 'four_heads', 'value_0_to_20',
        'delta_exclusive')
SLOW_LAWS = ('delta_key_0_to_20', 'decay_0_to_20', 'near_equal_keys')


@pytest.mark.parametrize(
    'name, dtype',
    [(name, 'float32') for name in CASES if name not in SLOW + SLOW_LAWS]
    + [pytest.param(name, 'float32', marks=pytest.mark.slow_law)
       for name in SLOW_LAWS]
    + [('delta_head', 'bfloat16')]
    + [pytest.param(name, 'float32', marks=pytest.mark.slow) for name in SLOW]
    + [('near_equal_keys', 'bfloat16')]
    + [pytest.param(name, 'bfloat16', marks=pytest.mark.slow)
       for name in ('delta_key', 'delta_key_0_to_20', 'chunk128', 'chunk256')])
def test_kernels_are_the_reference(name, dtype):
  """Interpreted, with what is not written yet held to be NaN."""
  case, dtype = CASES[name], jnp.dtype(dtype)
  with common.interpret():
    out, grads = run(case, dtype, 'tpu')
  want, want_grads = run(case, dtype, 'reference')
  assert out['o'].dtype == dtype and out['state'].dtype == jnp.float32
  for key, x in want.items():
    contract.outputs_agree(out[key], x, dtype.name, key)
  assert grads.keys() == want_grads.keys()
  for key, x in want_grads.items():
    contract.gradients_agree(grads[key], x, dtype.name, key)


@pytest.mark.parametrize(
    'kind, unused', [(kind, 2) for kind in cases.KINDS] + [('delta_head', 0)])
def test_decoding_is_the_reference(kind, unused):
  """Chunks of one row: groups with several and with none, unused ones."""
  case = Case(
      heads=2, value=128, chunk=1, lengths=(1, 0, 3, 1), unused=unused,
      **cases.KINDS[kind])
  args, kw = case.operands()
  with common.interpret(detect_races=True):
    got = jax.block_until_ready(jax.jit(functools.partial(
        pallas.chunk_memory, **kw, backend='tpu'))(*args))
    assert not interpret_pallas_call.races.races_found
  want = pallas.chunk_memory(*args, **kw, backend='reference')
  for name, x, y in zip(('o', 'state'), got, want):
    contract.outputs_agree(x, y, 'float32', name)


def test_gradients_of_decoding_are_there():
  """By xla: a step that trains decodes nothing, but it must not be wrong."""
  case = Case(chunk=1, lengths=(1, 2))
  with common.interpret():
    out, grads = run(case, jnp.float32, 'tpu')
  want, want_grads = run(case, jnp.float32, 'xla')
  jax.tree.map(np.testing.assert_array_equal, (out, grads), (want, want_grads))


def test_unused_rows_may_hold_anything():
  """Even NaN: outputs and gradients there are zero, elsewhere unchanged."""
  case = CASES['delta_head']
  run, (floats, group_N, *rest) = program(case, jnp.float32, 'tpu')
  unused_R = np.repeat(np.asarray(group_N) < 0, case.chunk)
  assert unused_R.any()
  spoil = lambda x: jnp.where(
      unused_R.reshape(-1, *[1] * (x.ndim - 1)), jnp.nan, x)
  dirty = {n: x if n == NAMED[0] else spoil(x) for n, x in floats.items()}
  with common.interpret():
    run = jax.jit(run)
    want, got = run(floats, group_N, *rest), run(dirty, group_N, *rest)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert not np.any(np.asarray(got[1]['o'])[unused_R])
  assert not np.any(np.asarray(got[0]['k'])[unused_R])


def _everywhere(*shapes, quick=()):
  """Each for each TPU; slow but where `quick` names the TPU."""
  return [
      pytest.param(*shape, to, marks=[] if to in quick else pytest.mark.slow)
      for shape in shapes for to in tpu_topology.TOPOLOGIES]


@pytest.mark.tpu_compile
@pytest.mark.parametrize('name, heads, key, value, chunk, dtype, generation', [
    *_everywhere(
        ('delta_head', 2, 64, 128, 64, 'bfloat16'),
        ('delta_head', 1, 256, 256, 128, 'bfloat16'),
        quick=tpu_topology.TOPOLOGIES),
    *_everywhere(('delta_key', 2, 64, 128, 64, 'bfloat16'), quick=('v6e',)),
    *_everywhere(
        ('delta_none', 1, 128, 64, 256, 'float32'),
        ('additive_head', 3, 64, 64, 64, 'bfloat16'),
        ('delta_key', 1, 256, 256, 64, 'bfloat16'),
        ('removal_key', 1, 256, 256, 64, 'bfloat16'),
        ('value_0_to_20', 2, 128, 64, 64, 'float32')),
])
def test_compiles_and_is_chosen(
    name, heads, key, value, chunk, dtype, generation):
  """Forward and backward, without a TPU."""
  case = dataclasses.replace(
      CASES[name], heads=heads, key=key, value=value, chunk=chunk,
      lengths=(2 * chunk, chunk), unused=0)
  run, args = program(case, jnp.dtype(dtype), 'auto')
  text = tpu_topology.compile_for(generation, run, *args).as_text()
  assert 'chunk_memory_forward' in text
  assert 'chunk_memory_backward' in text


@pytest.mark.tpu_compile
@pytest.mark.parametrize('kind, heads, key, value, generation', [
    *_everywhere(('delta_head', 4, 256, 256), quick=('v6e',)),
    *_everywhere(('exclusive_value_decay', 3, 128, 64))])
def test_decoding_compiles(kind, heads, key, value, generation):
  case = Case(heads=heads, key=key, value=value, chunk=1, lengths=(1, 1, 0),
              **cases.KINDS[kind])
  args, kw = case.operands(dtype=jnp.bfloat16)
  run = functools.partial(pallas.chunk_memory, chunk=1, num_groups=3,
                          exclusive=kw.pop('exclusive'))
  arrays = {n: x for n, x in kw.items() if hasattr(x, 'shape')}
  compiled = tpu_topology.compile_for(
      generation, lambda args, kw: run(*args, **kw), args, arrays)
  assert 'chunk_memory_decode' in compiled.as_text()


@pytest.mark.parametrize('change, reason', [
    (dict(chunk=32), 'chunk=32 must be one of'),
    (dict(key=32), 'K=32 must be one of'),
    (dict(heads=5), '5 heads of 64 cannot be split'),
])
def test_what_is_not_covered_goes_to_xla(change, reason):
  """By name it is an error that says why."""
  run, args = program(
      Case(lengths=(5,), **change), jnp.float32, 'tpu')
  with common.interpret(), pytest.raises(NotImplementedError, match=reason):
    jax.eval_shape(run, *args)


@pytest.mark.parametrize('chunk', [1, 64])
@pytest.mark.parametrize('kind', cases.KINDS)
def test_every_variant_is_covered(kind, chunk):
  """So each rule of one pass has a kernel where its shapes allow one."""
  case = Case(chunk=chunk, lengths=(5,), segments=True, **cases.KINDS[kind])
  run, args = program(case, jnp.bfloat16, 'tpu')
  with common.interpret():
    grads, out = jax.eval_shape(run, *args)
  assert grads.keys() == args[0].keys() and out.keys() == {'o', 'state'}


def test_without_a_tpu_it_is_not_chosen():
  args, kw = Case(lengths=(5,)).operands()
  settings = dict(scale=1.0, chunk=64, exclusive=False)
  operands = (*args, None, None, kw['initial_state_GHKV'], kw['group_N'])
  reason = tpu.BACKEND.supported(*operands, **settings)
  assert 'it needs a TPU' in reason
  select = functools.partial(
      common.select, 'chunk_memory', api.BACKENDS, 'auto', *operands)
  assert select(**settings).name == 'xla'
  with common.interpret():
    assert select(**settings).name == 'tpu'
