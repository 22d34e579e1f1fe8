"""Recipes, shrunk, train on every mesh as on one device.

Twenty steps of the whole training step on each axis alone and on combinations:
losses, and after the first step the gradient, by the optimizer's state.
"""

import functools
import pathlib

import jax
import numpy as np
import pytest

from mom_jax import config
from mom_jax.data import batch
from mom_jax.parallel import sharding
from mom_jax.training import step

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
STEPS, B, T, W = 20, 8, 32, 48

COMMON = (
    'model.width=32', f'model.vocab_size={W}', 'model.dtype=float32',
    'model.mixer.num_heads=2', 'model.mixer.key_dim=8',
    'model.mixer.value_dim=8', 'model.mixer.chunk=4', 'model.mlp.hidden=32',
    'model.moma.hidden=16', 'model.attention.num_heads=2',
    'model.attention.num_kv_heads=2', 'model.attention.head_dim=8',
    # Compiles fast; `tests/models` runs other backends on meshes.
    'model.mixer.backend=reference', 'optimizer.warmup_steps=2',
)
MODELS = {
    'quickstart': ('quickstart.py', (
        'model.num_layers=2', 'model.image_side=2')),
    'mom_380m': ('mom_380m.py', ('model.num_layers=2',)),
    # Tokens compete within a sequence: within a device they are others on
    # every mesh.
    'moma': ('moma_90m.py', (
        'model.num_layers=2', 'model.moma.experts=2,2',
        'model.moma.pool=sequence')),
}
MESHES = [
    dict(dcn_data=2), dict(data=2), dict(fsdp=2), dict(expert=2),
    dict(tensor=2), dict(context=2),
    dict(data=2, fsdp=2, tensor=2),
    dict(fsdp=2, expert=4),
    dict(expert=2, tensor=2, context=2),
    dict(dcn_data=2, fsdp=2, context=2),
    dict(dcn_data=2, data=2, expert=2),
    dict(dcn_data=2, dcn_expert=2, expert=2),
]


def _batches():
  rng = np.random.default_rng(0)
  for _ in range(STEPS):
    segment = np.sort(rng.integers(1, 4, (B, T)), 1).astype(np.int32)
    segment[0, -5:] = 0
    yield batch.Batch(
        rng.integers(0, W, (B, T)).astype(np.int32),
        rng.integers(0, 2, (B, T)).astype(np.int32), segment,
        np.ones((B, T), np.float32))


@functools.cache
def _run(model, sizes):
  """(losses of all steps, optimizer state after the first)."""
  file, overrides = MODELS[model]
  sizes = {'data': 1} | dict(sizes)
  cfg = config.load(CONFIGS / file, [
      *COMMON, *overrides, *(f'mesh.{k}={v}' for k, v in sizes.items())])
  mesh = sharding.make_mesh(
      **cfg.mesh.sizes,
      devices=jax.devices()[:int(np.prod([*sizes.values()]))])
  losses, first = [], None
  with jax.set_mesh(mesh):
    make, abstract = step.init(cfg, mesh)
    state, run = make(), step.make_step(cfg, abstract)
    for rows in _batches():
      if len(cfg.model.modalities) == 1:
        rows = rows._replace(modality=np.zeros_like(rows.modality))
      state, metrics = run(state, sharding.shard_batch(rows, mesh))
      losses.append(float(metrics.total_loss))
      if first is None:
        first = jax.device_get(state.optimizer)
  return np.array(losses), first


@pytest.mark.slow
@pytest.mark.parametrize('sizes', MESHES, ids=lambda m: '-'.join(
    f'{k}{v}' for k, v in m.items()))
@pytest.mark.parametrize('model', MODELS)
def test_a_mesh_trains_as_one_device(model, sizes):
  losses, first = _run(model, tuple(sizes.items()))
  want, want_first = _run(model, ())
  assert want[-1] != want[0]
  np.testing.assert_allclose(losses, want, rtol=1e-4)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
          a, b, atol=1e-5 * max(1e-2, np.abs(b).max(initial=0))),
      first, want_first)
