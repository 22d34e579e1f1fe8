"""The whole training step compiles for TPUs."""

import pathlib

import jax
import numpy as np
import pytest
import tpu_topology

from mom_jax import config, sharding, step
from mom_jax.data import batch

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
HBM_GB = {'v5p': 95, 'v6e': 32}


@pytest.mark.tpu_compile
@pytest.mark.slow
@pytest.mark.parametrize('generation', HBM_GB)
@pytest.mark.parametrize('recipe, kernels, overrides', [
    ('quickstart', ('grouped_matmul', 'grouped_matmul_dx', 'grouped_matmul_dw'),
     ('model.num_layers=1', 'model.dtype=bfloat16')),
    ('mom_380m', ('grouped_matmul', 'grouped_matmul_dx', 'grouped_matmul_dw'),
     ('model.num_layers=2', 'data.batch_size=8')),
])
def test_step_compiles_and_fits(recipe, kernels, overrides, generation):
  """With the kernels that the backends choose on a TPU."""
  cfg = config.load(f'{CONFIGS / recipe}.py', overrides)
  mesh = tpu_topology.mesh(generation, tuple(sharding.AXES))
  _, abstract = step.init(cfg, mesh)
  run = step.make_step(cfg, abstract)
  lies = sharding.batch_sharding(mesh)
  shape = cfg.data.batch_size, cfg.data.seq_len
  integer, real = (
      jax.ShapeDtypeStruct(shape, t, sharding=lies)
      for t in (np.int32, np.float32))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = run.lower(
        abstract, batch.Batch(integer, integer, integer, real)).compile()
  text = compiled.as_text()
  assert 'tpu_custom_call' in text
  for kernel in kernels:
    assert f'({kernel})' in text, f'{kernel} is not in the program'
  memory = compiled.memory_analysis()
  used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  assert used < HBM_GB[generation] * 1e9
