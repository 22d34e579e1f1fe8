"""A checkpoint of any mesh restores on any other."""

import contextlib
import itertools

import grain
import jax
import numpy as np
import pytest
import tiny_run

from mom_jax import config
from mom_jax.parallel import sharding
from mom_jax.training import checkpoint, step

# (sizes of data and fsdp); fewer devices than there are, too.
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8), (2, 1), (1, 1)]


def _mesh(sizes):
  devices = jax.devices()[:sizes[0] * sizes[1]]
  return sharding.make_mesh(data=sizes[0], fsdp=sizes[1], devices=devices)


def _data():
  return iter(grain.MapDataset.range(100).to_iter_dataset())


@pytest.fixture(scope='module')
def states(tmp_path_factory):
  """The shapes and shardings of a model's state on each mesh."""
  cfg = tiny_run.make_config(
      tmp_path_factory.mktemp('elastic'), 'model.pattern=mom/moma',
      'model.num_layers=1', 'optimizer.ema=0.9')
  return {sizes: step.init(cfg, _mesh(sizes))[1]._asdict()
          for sizes in MESHES}


@pytest.fixture(scope='module')
def values(states):
  """Numbers that differ everywhere, one array a leaf."""
  counter = itertools.count()
  return jax.tree.map(
      lambda x: (np.arange(x.size).reshape(x.shape) + 1000 * next(counter)
                 ).astype(x.dtype), states[1, 1])


@pytest.mark.parametrize('saved', [
    mesh if mesh == (4, 2) else pytest.param(mesh, marks=pytest.mark.slow_law)
    for mesh in MESHES])
def test_a_state_comes_back_on_every_mesh(states, values, tmp_path, saved):
  with contextlib.closing(checkpoint.Checkpoints(
      tmp_path, config.Checkpoint())) as checkpoints:
    here = jax.tree.map(
        lambda x, a: jax.device_put(x, a.sharding), values, states[saved])
    checkpoints.save(3, here, _data(), {})
    checkpoints.wait()
    for sizes in MESHES:
      restored = checkpoints.restore(states[sizes], _data())
      jax.tree.map(np.testing.assert_array_equal, restored.trees, values)
      for got, wanted in zip(jax.tree.leaves(restored.trees),
                             jax.tree.leaves(states[sizes])):
        assert got.sharding == wanted.sharding
