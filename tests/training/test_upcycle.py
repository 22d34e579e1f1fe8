"""Upcycling keeps what a model computes and gives it experts."""

import dataclasses
import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from mom_jax import config, models, train
from mom_jax.data import pipeline, tokenizers
from mom_jax.parallel import sharding
from mom_jax.training import (
  checkpoint,
  metrics,
  step,
  upcycle,
)

SEED = ('model.pattern=attention/moma', 'model.moma.experts=1,1',
        'model.moma.router=expert_choice', 'model.channel_norm=post',
        'model.num_layers=1', 'train.steps=2', 'train.eval_every=0',
        'checkpoint.every=9')
EXPERTS = ('model.moma.experts=3,2', 'model.moma.noise=True', 'train.steps=4')


@pytest.fixture(scope='module', autouse=True)
def one_device():
  patch = pytest.MonkeyPatch()
  mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
  patch.setattr(sharding, 'make_mesh', lambda **sizes: mesh)
  yield
  patch.undo()


@pytest.fixture(scope='module')
def seed(tmp_path_factory, one_device):
  """A finished run with one expert a modality: (config, workdir)."""
  folder = tmp_path_factory.mktemp('upcycle')
  cfg = tiny_run.make_config(folder, *SEED)
  train.fit(cfg, folder / 'seed')
  return cfg, folder / 'seed'


def _tiny(*overrides):
  return config.override(config.Config(), [
      'model.width=16', 'model.num_layers=2', 'model.vocab_size=40',
      'model.remat=none', 'model.attention.num_heads=2',
      'model.attention.num_kv_heads=1', 'model.attention.head_dim=8',
      'model.mlp.hidden=24', 'model.moma.hidden=24',
      'model.channel_norm=post', 'model.moma.router=expert_choice',
      'model.norm_eps=1e-12', *overrides])


def _params(cfg, key):
  return jax.tree.map(lambda p: p * 8, nn.meta.unbox(
      models.init_params(cfg, jax.random.key(key))))


@pytest.mark.parametrize('pattern, experts', [
    pytest.param('attention/moma', (3, 2), marks=pytest.mark.slow),
    ('attention/mlp', (3, 2)),
    pytest.param('attention/mlp', (4,), marks=pytest.mark.slow)])
def test_tokens_that_experts_take_get_what_the_seed_gave(pattern, experts):
  """Law: y is a multiple of the FFN's and the norm behind removes the factor.

  With a capacity that lets all experts take all tokens the whole model is the
  seed (but for the norm's epsilon). With the usual one, tokens without an
  expert get 0 for their FFN.
  """
  old = _tiny(f'model.pattern={pattern}', 'model.moma.experts=1,1')
  new = _tiny('model.pattern=attention/moma',
              f'model.moma.experts={",".join(map(str, experts))}',
              'model.moma.capacity=9')
  seed = _params(old, 0)
  params = upcycle.grown(seed, _params(new, 1), new.model)
  assert jax.tree.structure(params) == jax.tree.structure(_params(new, 1))
  tokens = jax.random.randint(jax.random.key(2), (3, 12), 0, 40)
  modality = (tokens >= 20).astype(jnp.int32)
  run = lambda cfg, p: models.LM(cfg).apply({'params': p}, tokens, modality)
  want = run(old, seed).logits
  got = run(new, params)
  taken = got.aux[0].channel.stats.selected_BTE
  own = experts if len(experts) > 1 else experts * 2
  np.testing.assert_array_equal(
      taken.sum(-1), jnp.where(modality == 0, *own)[None].repeat(2, 0))
  np.testing.assert_allclose(got.logits, want, atol=1e-3, rtol=1e-3)
  usual = dataclasses.replace(new, model=dataclasses.replace(
      new.model, moma=dataclasses.replace(new.model.moma, capacity=1.0)))
  assert np.abs(run(usual, params).logits - want).max() > 0.1


@pytest.mark.parametrize('optimizer', upcycle.OPTIMIZERS)
@pytest.mark.parametrize('schedule', upcycle.SCHEDULES)
def test_a_workdir_that_training_goes_on_with(
    seed, tmp_path, schedule, optimizer):
  """Same place in the data; step and moments as asked for; copies of FFNs."""
  first, workdir = seed
  cfg = config.override(first, EXPERTS)
  upcycle.upcycle(workdir, cfg, tmp_path / 'new', schedule, optimizer)
  number = {'restart': 0, 'continue': 2}[schedule]
  _, params, at = checkpoint.load_params(tmp_path / 'new')
  assert at == number
  _, old, _ = checkpoint.load_params(workdir)
  channel, was = (p['units']['block_0']['channel'] for p in (params, old))
  for name in ('gate_up', 'down'):
    for e, m in enumerate((0, 0, 0, 1, 1)):
      np.testing.assert_array_equal(channel[name][:, e], was[name][:, m])
  np.testing.assert_array_equal(
      params['embed']['embedding'], old['embed']['embedding'])
  mesh = sharding.make_mesh()  # of one device, as `one_device` says
  data = pipeline.train_iterator(cfg, tokenizers.load(workdir))
  with jax.set_mesh(mesh):
    abstract = step.init(cfg, mesh)[1]
    names = {k: v for k, v in abstract._asdict().items() if v is not None}
    restored = checkpoint.load_trees(tmp_path / 'new', names, data)
    before = checkpoint.load_trees(workdir, {
        k: v for k, v in step.init(first, mesh)[1]._asdict().items()
        if v is not None}, data)
  batch = next(data)  # the third; two were the seed's
  whole = pipeline.train_iterator(cfg, tokenizers.load(workdir))
  third = [next(whole) for _ in range(3)][-1]
  np.testing.assert_array_equal(batch.tokens, third.tokens)
  assert int(restored.trees['counters'].step) == number
  moments = [x['units']['block_0']['channel'] for x in jax.tree.leaves(
      restored.trees['optimizer'], is_leaf=_has_units) if _has_units(x)]
  theirs = [x['units']['block_0']['channel'] for x in jax.tree.leaves(
      before.trees['optimizer'], is_leaf=_has_units) if _has_units(x)]
  for new_moment, moment in list(zip(moments, theirs))[:2]:
    got = np.asarray(new_moment['down'])
    if optimizer == 'reset':
      assert not got.any()
    else:
      assert got.any()
      for e, m in enumerate((0, 0, 0, 1, 1)):
        np.testing.assert_array_equal(got[:, e], moment['down'][:, m])
    assert not np.asarray(new_moment['router']['kernel']).any()
  note = json.loads((tmp_path / 'new' / metrics.UPCYCLED).read_text())
  assert note == {
      'seed': str(workdir), 'seed_step': 2, 'schedule': schedule,
      'optimizer': optimizer, 'seed_flops': metrics.train_flops(first, 2)}


def _has_units(x):
  return isinstance(x, dict) and 'units' in x


def test_training_goes_on_from_there(seed, tmp_path):
  """Through the command; the loss begins near the seed's, not anew."""
  first, workdir = seed
  cfg = config.override(first, EXPERTS)
  recipe = tmp_path / 'recipe.json'
  recipe.write_text(config.to_json(cfg))
  done = command(f'--upcycle={workdir}', f'--config={recipe}',
                 f'--workdir={tmp_path / "new"}')
  assert done.returncode == 0, done.stderr
  assert 'continue with python -m mom_jax.train' in done.stdout
  final = train.fit(cfg, tmp_path / 'new')
  assert final['step'] == 4 and np.isfinite(final['loss_noncausal'])
  params = checkpoint.load_params(tmp_path / 'new')[1]
  down = params['units']['block_0']['channel']['down'][0]
  assert np.abs(down[0] - down[1]).max() > 1e-5  # copies part


def command(*arguments):
  return subprocess.run(
      [sys.executable, '-m', 'mom_jax.convert', *arguments], text=True,
      capture_output=True, check=False)


@pytest.mark.parametrize('overrides, message', [
    (('model.width=16',), 'changes nothing else; .*width: 32 -> 16'),
    (('data.seq_len=16',), 'data.seq_len: 32 -> 16'),
    (('model.pattern=mom/moma',), "pattern: 'attention/moma' -> 'mom/moma'"),
    (('model.pattern=attention/mlp',), 'model.pattern'),
    (('model.moma.hidden=8',), 'hidden=8 must be the 32 of the seed'),
    (('model.moma.experts=4',), r'experts=\(4,\) must have as many groups'),
])
def test_what_a_seed_cannot_become(seed, tmp_path, overrides, message):
  first, workdir = seed
  cfg = config.override(first, [*EXPERTS, *overrides])
  with pytest.raises(config.UserError, match=message):
    upcycle.upcycle(workdir, cfg, tmp_path / 'new', 'restart', 'reset')
  assert not (tmp_path / 'new').exists()


def test_options_and_workdirs_that_cannot_be(seed, tmp_path):
  first, workdir = seed
  cfg = config.override(first, EXPERTS)
  with pytest.raises(config.UserError, match='schedule=anew must be one of'):
    upcycle.upcycle(workdir, cfg, tmp_path / 'new', 'anew', 'reset')
  with pytest.raises(config.UserError, match='already holds a run'):
    upcycle.upcycle(workdir, cfg, workdir, 'restart', 'reset')
  with pytest.raises(config.UserError, match='train.steps=2 is no more than'):
    upcycle.upcycle(
        workdir, config.override(cfg, ['train.steps=2']), tmp_path / 'new',
        'continue', 'reset')
  sparse = config.override(first, EXPERTS)
  with pytest.raises(config.UserError, match='only a dense model or one with'):
    upcycle.check(sparse, sparse, workdir)
  done = command(f'--workdir={workdir}')
  assert done.returncode == 2 and '--upcycle=SEED_WORKDIR' in done.stderr
