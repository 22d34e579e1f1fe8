"""The whole train step compiles for TPUs, with our kernels in it."""

import pathlib

import jax
import pytest
import tpu_topology

from mom_jax import config
from mom_jax.planning import compiled

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
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
  cfg = config.load(CONFIGS / f'{name}.py', overrides)
  lowered, abstract, mesh = compiled.lower_step(cfg, list(found))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    donated = lowered.compile().memory_analysis().alias_size_in_bytes
  text = lowered.as_text()
  for kernel in KERNELS[name]:
    assert f'kernel_name = "{kernel}"' in text, kernel
  assert donated > sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract.params))
