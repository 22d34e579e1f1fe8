"""The whole train step compiles for TPUs and GPUs, with our kernels in it."""

import pathlib
import re

import gpu_topology
import jax
import pytest
import tpu_topology

from mom_jax import config
from mom_jax.planning import compiled

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
# Layers are the body of a loop: one costs the compiler as much as 24.
RECIPES = {
    'quickstart': ['data.batch_size=2'],
    'mom_380m': ['model.num_layers=2', 'data.batch_size=2', 'data.seq_len=512'],
}
SMALL = [
    'model.num_layers=1', 'data.batch_size=1', 'data.seq_len=256',
    'model.vocab_size=1024', 'model.width=256', 'model.mixer.num_heads=1',
    'model.mlp.hidden=256']
KERNELS = {
    'quickstart': ('grouped_matmul', 'grouped_matmul_dx', 'grouped_matmul_dw',
                   'grouped_swiglu'),
    'mom_380m': ('short_conv_forward', 'short_conv_backward',
                 'chunk_memory_forward', 'chunk_memory_backward',
                 'grouped_matmul', 'grouped_matmul_dx', 'grouped_matmul_dw'),
}


slow = pytest.mark.slow


@pytest.mark.tpu_compile
@pytest.mark.parametrize('name, overrides, generation', [
    pytest.param('mom_380m', SMALL, 'v6e', id='mom_380m-small-v6e'),
    *(pytest.param(name, overrides, to, marks=slow, id=f'{name}-{to}')
      for name, overrides in RECIPES.items() for to in ('v5p', 'v6e')),
])
def test_train_step_compiles(name, overrides, generation):
  """Loss, gradients, update; the new state takes the place of the old one."""
  found = tpu_topology.devices(generation)[:1]
  lowered, _ = _compile(name, overrides, found)
  text = lowered.as_text()
  for kernel in KERNELS[name]:
    assert f'kernel_name = "{kernel}"' in text, kernel


@pytest.mark.gpu_compile
def test_train_step_compiles_for_an_h100():
  """Of memories and experts; routers and norms are XLA's, nothing else."""
  found = gpu_topology.mesh({'x': 1}).devices.ravel()
  _, made = _compile('mom_380m', [
      *SMALL, 'model.mixer.key_dim=64', 'model.mixer.value_dim=64',
      'model.pattern=mom/moma', 'model.moma.hidden=256', 'model.remat=none',
      'model.moma.router=token_choice', 'model.moma.experts=(4,)'],
      found)
  calls = re.findall(
      r'triton_kernel_call.*op_name="[^"]*/(\w+)/ffi_call"', made.as_text())
  assert set(calls) == {
      'grouped_matmul', 'grouped_matmul_dw', 'grouped_swiglu_keep',
      'chunk_inverse', 'chunk_states', 'chunk_outputs', 'chunk_dy_local',
      'chunk_dstates', 'chunk_dpairs', 'chunk_dqk'}


def _compile(name, overrides, devices):
  """(lowered, compiled) step, which must work in place."""
  cfg = config.load(CONFIGS / f'{name}.py', overrides)
  lowered, abstract, mesh = compiled.lower_step(cfg, list(devices))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    made = lowered.compile()
  assert made.memory_analysis().alias_size_in_bytes > sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract.params))
  return lowered, made
