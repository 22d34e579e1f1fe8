"""The Triton kernel of decoding, interpreted, against the reference."""

import dataclasses
import functools

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_interpreter

from mom_jax.pallas.chunk_memory import cases, reference
from mom_jax.pallas.chunk_memory.triton import decode

CASES = {name: dataclasses.replace(case, key=64, value=128) for name, case in
         cases.CASES.items() if case.chunk == 1}


@pytest.fixture(autouse=True)
def interpreter():
  with triton_interpreter.installed():
    yield


def _operands(case, dtype, seed=0):
  """Operands of a backend, and its settings."""
  (q, k, v, log_decay, beta), more = case.operands(seed, jnp.dtype(dtype))
  return (
      q, k, v, log_decay, beta, more['removal_key_RHK'],
      more['value_decay_RHV'], more['initial_state_GHKV'], more['group_N'],
  ), dict(scale=0.3, exclusive=case.exclusive)


def _agree(got, operands, settings, dtype):
  want = reference.chunk_memory_ref(*operands, **settings, chunk=1)
  assert [a.dtype for a in got] == [dtype, jnp.float32]
  contract.outputs_agree(got[0], want[0], dtype, 'o')
  contract.outputs_agree(got[1], want[1], 'float32', 'state')


@pytest.mark.parametrize('name, dtype', [
    *((name, 'float32') for name in CASES),
    ('delta_channel_chunk1', 'bfloat16'), ('value_decay_chunk1', 'bfloat16')])
def test_kernel_is_the_reference(name, dtype):
  operands, settings = _operands(CASES[name], dtype)
  run = jax.jit(functools.partial(decode.decode, **settings))
  _agree(run(*operands), operands, settings, dtype)


@pytest.mark.parametrize('K, V', [(64, 64), (128, 256), (256, 128)])
def test_every_size(K, V):
  """Of a head; states of groups without rows stay bit-equal."""
  case = cases.Case(
      **cases.KINDS['delta_head'], chunk=1, lengths=(1, 0, 2), heads=1, key=K,
      value=V, unused=1)
  operands, settings = _operands(case, 'bfloat16')
  run = jax.jit(functools.partial(decode.decode, **settings))
  got = run(*operands)
  np.testing.assert_array_equal(got[1][1], operands[7][1])
  _agree(got, operands, settings, 'bfloat16')


def test_vmap_is_one_launch(monkeypatch):
  launches, interpret = [], triton_interpreter.run

  def recorded(kernel, *args, **more):
    launches.append(kernel)
    return interpret(kernel, *args, **more)

  monkeypatch.setattr(triton_interpreter, 'run', recorded)
  each = [_operands(CASES['delta_head_chunk1'], 'float32', seed)
          for seed in range(3)]
  settings = each[0][1]
  stacked = jax.tree.map(lambda *a: jnp.stack(a), *(one for one, _ in each))
  run = functools.partial(decode.decode, **settings)
  got = jax.block_until_ready(jax.jit(jax.vmap(run))(*stacked))
  assert len(launches) == 1
  for i, (operands, _) in enumerate(each):
    _agree([a[i] for a in got], operands, settings, 'float32')
