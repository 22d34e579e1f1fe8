"""The Triton kernels of chunk_memory, interpreted, against the reference."""

from chunk_memory_program import Case, run
import contract
import jax.numpy as jnp
import pytest
import triton_interpreter

CASES = {
    # Groups of several chunks, of none, of one row; unused chunks before and
    # after; more than one block of key and value channels.
    'delta_head': Case(heads=2, key=128, value=128, lengths=(70, 0, 1)),
    'delta_none': Case(decay='none', lengths=(70,), value=128, unused=0),
    'additive_head': Case(
        delta=False, lengths=(70, 1), segments=True, key=128),
    'additive_none': Case(delta=False, decay='none', lengths=(1, 0, 65)),
    'segments': Case(heads=2, lengths=(64, 20), segments=True, unused=1),
    'no_state': Case(lengths=(65,), state=False, segments=True),
    'near_equal_keys': Case(
        lengths=(128,), near_equal_keys=True, beta=1.0,
        decay_range=(-1e-3, 0.0)),
    'near_equal_keys_no_decay': Case(
        lengths=(128,), near_equal_keys=True, beta=1.0, decay='none'),
    'decay_0': Case(lengths=(128, 40), decay_range=(0.0, 0.0)),
    'decay_20': Case(lengths=(128, 40), decay_range=(-20.0, -20.0)),
    'decay_0_to_20': Case(lengths=(100,), decay_range=(-20.0, 0.0)),
    'additive_0_to_20': Case(
        lengths=(100,), delta=False, decay_range=(-20.0, 0.0)),
    'chunk128': Case(chunk=128, lengths=(130, 1)),
    'additive_channel': Case(
        heads=2, delta=False, decay='channel', lengths=(70, 0, 1), key=128,
        value=128),
    'additive_channel_segments': Case(
        delta=False, decay='channel', lengths=(70, 20), segments=True),
    'additive_channel_0_to_20': Case(
        delta=False, decay='channel', lengths=(100,),
        decay_range=(-20.0, 0.0)),
    'largest': Case(key=256, value=256, lengths=(65,), unused=0),
}


@pytest.fixture(autouse=True)
def interpreter():
  with triton_interpreter.installed():
    yield


def _agree(name, dtype, tolerance):
  """float16 is held to bounds of its own: they lie between the others."""
  out, grads = run(CASES[name], jnp.dtype(dtype), 'gpu')
  want, want_grads = run(CASES[name], jnp.dtype(dtype), 'reference')
  assert out['o'].dtype == dtype and out['state'].dtype == jnp.float32
  assert grads.keys() == want_grads.keys()
  for key, x in want.items():
    contract.outputs_agree(out[key], x, tolerance, key)
  for key, x in want_grads.items():
    contract.gradients_agree(grads[key], x, tolerance, key)


@pytest.mark.parametrize('name', CASES)
def test_kernels_are_the_reference(name):
  _agree(name, 'float32', 'float32')
