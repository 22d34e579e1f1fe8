"""Training stops and resumes anywhere, on any mesh, and fails in one line."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import grain
import jax
import numpy as np
import pytest
import tiny_run

from mom_jax import compilation, config, train
from mom_jax.data import pipeline
from mom_jax.models import outputs
from mom_jax.parallel import sharding
from mom_jax.training import (
  checkpoint,
  lease,
  loop,
  metrics,
  step,
)

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('data')


make_mesh = sharding.make_mesh


def _one_device():
  return make_mesh(1, 1, devices=jax.devices()[:1])


@pytest.fixture(scope='module', autouse=True)
def one_device():
  """One device, and one compilation for all runs of one config."""
  patch = pytest.MonkeyPatch()
  mesh = _one_device()
  patch.setattr(sharding, 'make_mesh', lambda **sizes: mesh)
  known = {}

  def once(name, function):
    def call(cfg, *rest):
      # What the functions depend on, and the mesh.
      train = dataclasses.replace(
          config.Train(), steps=cfg.train.steps, seed=cfg.train.seed,
          grad_accum_steps=cfg.train.grad_accum_steps)
      key = (name, cfg.model, cfg.loss, cfg.optimizer, cfg.mesh, train,
             jax.sharding.get_abstract_mesh())
      if key not in known:
        known[key] = function(cfg, *rest)
      return known[key]
    return call

  for name in ('init', 'make_step', 'make_evaluation'):
    patch.setattr(step, name, once(name, getattr(step, name)))
  yield
  patch.undo()


def _lines(workdir):
  """metrics.jsonl as text, without what depends on the clock."""
  return [
      json.dumps({k: v for k, v in r.items() if k not in metrics.TIMING_KEYS})
      for r in metrics.read_jsonl(workdir)
  ]


@pytest.fixture(scope='module')
def whole(folder, one_device):
  """An uninterrupted run: (config, workdir, final metrics)."""
  cfg = tiny_run.make_config(folder)
  workdir = folder / 'whole'
  return cfg, workdir, train.fit(cfg, workdir)


class Killed(Exception):
  pass


def _same(whole, workdir):
  cfg, reference, final = whole
  assert _lines(workdir) == _lines(reference)
  saved = [
      checkpoint.load_params(d) for d in (reference, workdir)]
  assert saved[0][2] == saved[1][2] == cfg.train.steps
  jax.tree.map(np.testing.assert_array_equal, saved[0][1], saved[1][1])


# The run itself.


def test_a_run_leaves_what_it_says(whole):
  cfg, workdir, final = whole
  assert config.load(workdir / 'config.json') == cfg
  records = metrics.read_jsonl(workdir)
  assert [r['step'] for r in records if 'loss' in r] == [1, 2, 3, 4, 5, 6]
  assert [r['step'] for r in records if 'val_loss' in r] == [4, 6]
  assert sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir()
                ) == [4, 6]
  for key in ('loss', 'loss_text', 'loss_image', 'val_loss', 'val_loss_text',
              'val_loss_image', 'balance_loss', 'grad_norm', 'param_norm',
              'learning_rate', 'entropy/mixer', 'entropy/channel',
              'load_min/mixer', 'load_max/channel', 'tokens_with_1_expert',
              'tokens_per_s', 'step_time_p90', 'load/layer_01/mixer'):
    assert key in final, key
  assert 'mfu' not in final  # nobody knows the peak of this CPU
  first, last = records[0], records[-1]
  assert last['val_loss'] < first['loss'] - 0.2
  assert abs(first['loss'] - np.log(cfg.model.vocab_size)) < 0.2


def test_a_run_says_what_it_waits_for_and_how_long_it_takes(
    whole, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(loop, 'TIMED_STEPS', 2)
  train.fit(whole[0], tmp_path / 'run')
  said = capsys.readouterr().out
  for text in ('initialising the parameters: done after ',
               'compiling the training step: done after ',
               'compiling the evaluation: done after ',
               's per step: the other 3 steps take about 0:00:0'):
    assert said.count(text) == 1, said


def test_router_state_moves(whole):
  """Biases of token choice are the model's, not the optimizer's."""
  _, params, _ = checkpoint.load_params(whole[1])
  bias = params['units']['block_0']['channel']['balance_bias']
  assert np.abs(bias).max() > 0.005
  np.testing.assert_allclose(bias.reshape(-1, 2).sum(1), 0, atol=1e-6)


def test_a_finished_run_does_nothing_twice(whole, capsys, monkeypatch):
  cfg, workdir, final = whole
  lines = (workdir / 'metrics.jsonl').read_text()
  with monkeypatch.context() as m:
    m.setattr(compilation, 'Background', lambda *_: pytest.fail('compiles'))
    again = train.fit(cfg, workdir)
  assert (workdir / 'metrics.jsonl').read_text() == lines
  assert again == {k: v for k, v in final.items()
                   if k not in metrics.TIMING_KEYS}
  assert 'done before: 6 steps; a larger' in capsys.readouterr().out


def test_other_documents_are_refused_unless_allowed(whole, tmp_path, capsys):
  cfg, workdir, _ = whole
  shutil.copytree(workdir, tmp_path / 'run')
  path = tmp_path / 'run' / 'data.json'
  kept = json.loads(path.read_text())
  kept[0]['fingerprint'] = '0' * 16
  path.write_text(json.dumps(kept))
  with pytest.raises(config.UserError, match='gives other documents than'):
    train.fit(cfg, tmp_path / 'run')
  said = capsys.readouterr().out
  assert f'{kept[0]["source"]}: {kept[0]["documents"]:,} documents' in said
  train.fit(config.override(cfg, ['data.allow_changed=true']), tmp_path / 'run')
  assert 'documents have changed: ' in capsys.readouterr().out
  assert json.loads(path.read_text())[0]['fingerprint'] != '0' * 16


# Resume = uninterrupted.


def test_documents_that_moved_are_the_same(whole, folder, tmp_path, capsys):
  """And other ones are refused before the run's config is touched."""
  cfg, workdir, _ = whole
  shutil.copytree(workdir, tmp_path / 'run')
  shutil.copytree(folder, tmp_path / 'moved', ignore=shutil.ignore_patterns(
      'cache', 'whole'))
  path = tmp_path / 'moved' / 'documents.jsonl'
  moved = config.override(cfg, [f'data.sources=jsonl:{path}'])
  train.fit(moved, tmp_path / 'run')
  assert 'done before' in capsys.readouterr().out
  assert checkpoint.read_config(tmp_path / 'run') == moved
  assert checkpoint.load_params(tmp_path / 'run').config == moved
  path.write_text(path.read_text().replace('red', 'pale red'))
  with pytest.raises(config.UserError, match='gives other (documents|tokens)'):
    train.fit(cfg=config.override(moved, ['train.steps=9']),
              workdir=tmp_path / 'run')
  assert checkpoint.read_config(tmp_path / 'run') == moved


@pytest.mark.parametrize('steps', [
    1, 3, pytest.param(4, marks=pytest.mark.slow_law), 5])
def test_killed_after_any_step_goes_on_to_the_bit(
    whole, tmp_path, monkeypatch, steps):
  """Before the first save, between saves, right at one, one later."""
  cfg, advance = whole[0], loop.Run.advance

  def dies(run):
    if run.step_index == steps:
      raise Killed
    advance(run)

  with monkeypatch.context() as m:
    m.setattr(loop.Run, 'advance', dies)
    with pytest.raises(Killed):
      train.fit(cfg, tmp_path)
  train.fit(cfg, tmp_path)
  _same(whole, tmp_path)


def test_killed_before_a_save_is_whole_goes_on_from_the_one_before(
    whole, tmp_path, monkeypatch):
  """The metrics are further than the checkpoint; they are cut back."""
  cfg = whole[0]

  def dies(run):
    run.finish()
    if run.step_index == 4:
      raise Killed
    return save(run)

  save = loop.Run.save
  with monkeypatch.context() as m:
    m.setattr(loop.Run, 'save', dies)
    with pytest.raises(Killed):
      train.fit(cfg, tmp_path)
  assert len(_lines(tmp_path)) == 5
  train.fit(cfg, tmp_path)
  _same(whole, tmp_path)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_a_second_run_goes_on(
    whole, tmp_path, monkeypatch, capsys, number):
  cfg, advance = whole[0], loop.Run.advance

  def signalled(run):
    if run.step_index == 2:
      os.kill(os.getpid(), number)
    advance(run)

  with monkeypatch.context() as m:
    m.setattr(loop.Run, 'advance', signalled)
    train.fit(cfg, tmp_path)
  assert (f'stopped by {number.name} at step 3 of 6; the same command resumes'
          ' it.' in capsys.readouterr().out)
  assert (tmp_path / 'checkpoints' / '3').is_dir()
  train.fit(cfg, tmp_path)
  _same(whole, tmp_path)


def test_a_signal_during_validation_repeats_the_validation(
    whole, tmp_path, monkeypatch):
  """The signal comes between two batches."""
  cfg, batches = whole[0], pipeline.validation_batches

  class Signalled(list):

    def __iter__(self):
      for batch in super().__iter__():
        yield batch
        os.kill(os.getpid(), signal.SIGTERM)

  two = dataclasses.replace(
      cfg, train=dataclasses.replace(cfg.train, eval_batches=2))
  with monkeypatch.context() as m:
    m.setattr(pipeline, 'validation_batches',
              lambda *a, **k: Signalled(2 * batches(*a, **k)))
    train.fit(two, tmp_path)
  assert 'val_loss' not in ''.join(_lines(tmp_path))
  assert checkpoint.load_params(tmp_path)[2] == 4
  train.fit(cfg, tmp_path)
  _same(whole, tmp_path)


def test_a_corrupt_newest_checkpoint_costs_only_time(whole, tmp_path, capsys):
  cfg, reference, _ = whole
  shutil.copytree(reference, tmp_path / 'run')
  for file in (tmp_path / 'run/checkpoints/6/params').rglob('*'):
    if file.is_file():
      os.truncate(file, file.stat().st_size // 2)
  train.fit(cfg, tmp_path / 'run')
  captured = capsys.readouterr()
  assert 'warning: the checkpoint of step 6' in captured.err
  assert 'resuming from step 4' in captured.out
  _same(whole, tmp_path / 'run')


def test_a_run_can_be_made_longer(folder, tmp_path):
  """It keeps its lines and adds to them."""
  cfg = tiny_run.make_config(
      folder, 'model.pattern=attention/mlp', 'train.steps=2',
      'train.eval_every=0')
  train.fit(cfg, tmp_path)
  before = _lines(tmp_path)
  final = train.fit(config.override(cfg, ['train.steps=3']), tmp_path)
  assert final['step'] == 3
  assert _lines(tmp_path)[:len(before)] == before
  assert config.load(tmp_path / 'config.json').train.steps == 3


def test_a_workdir_of_another_config_is_left_alone(whole):
  cfg, workdir, _ = whole
  before = sorted(workdir.rglob('*'))
  with pytest.raises(config.UserError, match=(
      'holds a run of another config; it differs in config.model.width: 32 ->'
      ' 16.')):
    train.fit(config.override(cfg, ['model.width=16']), workdir)
  assert sorted(workdir.rglob('*')) == before


def test_a_workdir_in_which_another_run_trains_is_left_alone(whole):
  cfg, workdir, _ = whole
  with lease.hold(workdir, print):
    before = sorted(workdir.rglob('*'))
    with pytest.raises(config.UserError, match='is in use: process'):
      train.fit(cfg, workdir)
    assert sorted(workdir.rglob('*')) == before
  assert not (workdir / lease.FILE).exists()


def test_a_run_that_another_has_followed_saves_nothing_more(
    folder, tmp_path, monkeypatch
):
  cfg = tiny_run.make_config(folder, 'train.steps=6', 'checkpoint.every=1')
  save, path = checkpoint.Checkpoints.save, tmp_path / lease.FILE

  def follow(self, number, *args):
    save(self, number, *args)
    if number == 2:
      path.write_text(path.read_text().replace('"token": "', '"token": "x'))

  monkeypatch.setattr(checkpoint.Checkpoints, 'save', follow)
  with pytest.raises(config.UserError, match='has taken it over'):
    train.fit(cfg, tmp_path)
  steps = [int(p.name) for p in (tmp_path / 'checkpoints').iterdir()]
  assert max(steps) == 2 and path.exists()


# Micro-batches and meshes.


def _gradient(cfg, mesh, batch):
  with jax.set_mesh(mesh):
    make, _ = step.init(cfg, mesh)
    run = jax.jit(lambda p, b: step.gradient(cfg, p, b, jax.random.key(1)))
    got = run(make().params, sharding.shard_batch(batch, mesh))
  return jax.device_get(got)


def _close(one, other):
  """Loss, sums and gradient agree; the same tokens were routed alike."""
  np.testing.assert_allclose(one.total_loss, other.total_loss, rtol=1e-6)
  compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
  jax.tree.map(compare, one.output.sums, other.output.sums)
  layers = [list(outputs.layers(x.output.routing)) for x in (one, other)]
  assert layers[0]
  for (*at, count), (*want_at, want) in zip(*layers, strict=True):
    assert at == want_at
    np.testing.assert_array_equal(count.load_E, want.load_E)
    np.testing.assert_array_equal(count.taken_3, want.taken_3)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
               one.grads, other.grads)


@pytest.fixture(scope='module')
def batch(folder):
  iterator = pipeline.train_iterator(tiny_run.make_config(folder))
  got = next(iterator)
  iterator.close()
  return got


def test_micro_batches_give_the_gradient_of_the_batch(folder, batch):
  """Sums, counts and gradient; balance is per micro-batch, so it is off."""
  cfg = tiny_run.make_config(
      folder, 'model.pattern=attention/moma', 'loss.balance=0',
      'loss.z_loss=1e-3', 'loss.modality_weights=1,0.5')
  mesh = _one_device()
  parts = config.override(cfg, ['train.grad_accum_steps=4'])
  _close(_gradient(parts, mesh, batch), _gradient(cfg, mesh, batch))


def test_micro_batches_count_by_their_tokens(folder, batch):
  """Rows of few tokens or none; router_z and balance by sample add up."""
  tokens_B = np.array([99, 2, 99, 0])
  here_BT = np.arange(batch.tokens.shape[1])[None] < tokens_B[:, None]
  batch = type(batch)(*(np.where(here_BT, x[:4], 0) for x in batch))
  cfg = tiny_run.make_config(
      folder, 'model.pattern=mom/none', 'model.num_layers=1',
      'loss.balance_over=sample', 'loss.balance=0.1', 'loss.router_z=0.5')
  mesh = _one_device()
  parts = config.override(cfg, ['train.grad_accum_steps=2'])
  _close(_gradient(parts, mesh, batch), _gradient(cfg, mesh, batch))


def test_blocks_without_a_channel_mixer_are_trained(folder, batch):
  cfg = tiny_run.make_config(
      folder, 'model.pattern=mom/none', 'model.num_layers=1')
  mesh = _one_device()
  with jax.set_mesh(mesh):
    make, abstract = step.init(cfg, mesh)
    state, values = step.make_step(cfg, abstract)(
        make(), sharding.shard_batch(batch, mesh))
  assert np.isfinite(values.total_loss)
  assert values.total_nonfinite == 0
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)),
                       state.params['units'], make().params['units'])
  assert all(jax.tree.leaves(moved['block_0']['mixer']))


@pytest.mark.parametrize('pattern, sizes', [
    ('attention/moma', dict(data=2, fsdp=2, expert=2)),
    pytest.param('mom/moma', dict(data=4, fsdp=2), marks=pytest.mark.slow_law),
    pytest.param('mom/moma', dict(expert=2, tensor=2, context=2),
                 marks=pytest.mark.slow_law),
])
def test_eight_devices_give_the_gradient_of_one(folder, batch, pattern, sizes):
  cfg = tiny_run.make_config(
      folder, f'model.pattern={pattern}', 'mesh.data=1',
      *(f'mesh.{k}={v}' for k, v in sizes.items()))
  _close(_gradient(cfg, make_mesh(**cfg.mesh.sizes), batch),
         _gradient(cfg, _one_device(), batch))


@pytest.mark.slow_law
def test_a_run_goes_on_on_another_mesh(whole, tmp_path, monkeypatch):
  """From one device to eight."""
  cfg, reference, _ = whole
  shutil.copytree(reference, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run/checkpoints/6')
  monkeypatch.setattr(sharding, 'make_mesh', make_mesh)
  train.fit(config.override(cfg, ['mesh.data=2', 'mesh.fsdp=4']),
            tmp_path / 'run')
  for one, other in zip(metrics.read_jsonl(reference),
                        metrics.read_jsonl(tmp_path / 'run')):
    for key in one.keys() & {'loss', 'grad_norm', 'param_norm', 'val_loss'}:
      np.testing.assert_allclose(one[key], other[key], rtol=1e-4)


# Non-finite steps.


def test_nonfinite_steps_are_skipped_counted_and_end_the_run(
    whole, tmp_path, monkeypatch):
  cfg = config.override(whole[0], ['train.max_nonfinite_steps=2'])
  _spoil(monkeypatch, lambda number: number in (2, 4, 5))
  with pytest.raises(config.UserError) as e:
    train.fit(cfg, tmp_path)
  assert str(e.value).startswith('step 5: loss ')
  for part in ('for 2 steps in a row (train.max_nonfinite_steps)', 'is in ',
               'The last good checkpoint is step 4.'):
    assert part in str(e.value)
  records = metrics.read_jsonl(tmp_path)
  assert [r['nonfinite_steps'] for r in records if 'nonfinite_steps' in r] == [
      0, 1, 1, 2]
  assert records[1]['total_loss'] is None


def test_a_nonfinite_step_changes_nothing_but_the_count(
    whole, tmp_path, monkeypatch):
  """Parameters, moments and router state stay; the data goes on."""
  cfg = config.override(whole[0], ['train.steps=2', 'train.eval_every=0'])
  _spoil(monkeypatch, lambda number: True)
  train.fit(cfg, tmp_path)
  make, _ = step.init(cfg, _one_device())
  _, params, _ = checkpoint.load_params(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, make().params)


def _spoil(monkeypatch, when):
  """Makes the weights of the batches of some steps infinite."""
  real, number = pipeline.train_iterator, [0]

  class Spoiled(grain.DatasetIterator):
    def __init__(self, inner):
      super().__init__()
      self._inner = inner

    def __next__(self):
      number[0] += 1
      got = next(self._inner)
      factor = np.inf if when(number[0]) else 1
      return got._replace(weight=np.where(
          got.weight > 0, got.weight * factor, 0).astype(np.float32))

    def get_state(self):
      return self._inner.get_state()

    def set_state(self, state):
      self._inner.set_state(state)

    def close(self):
      self._inner.close()

  monkeypatch.setattr(
      pipeline, 'train_iterator', lambda *a, **k: Spoiled(real(*a, **k)))


def test_the_first_nonfinite_value_is_located():
  fine = np.array([True, True])
  finite = {'embed': np.True_, 'final_norm': np.True_,
            'block_0/mixer': np.array([False, True]), 'block_0/channel': fine,
            'block_1/mixer': np.array([False, False]), 'block_1/channel': fine}
  assert step.locate_nonfinite(finite, (), True, 2) == (
      'the gradient of layer 3 mixer')
  count = step.RoutingCounts(
      np.ones((2, 4)), np.array([0.5, np.nan]), np.ones((2, 3)))
  routers = (outputs.BlockAux(count), outputs.BlockAux(count))
  assert step.locate_nonfinite(finite, routers, False, 2) == (
      'the input of layer 2 mixer')
  assert step.locate_nonfinite({'embed': np.True_}, (), False, 1) == 'the loss'


# Options.


def test_both_losses_are_reported_for_a_router_that_sees_the_future(
    folder, tmp_path):
  cfg = tiny_run.make_config(
      folder, 'model.pattern=attention/moma', 'model.moma.router=expert_choice',
      'train.steps=2', 'train.eval_every=0')
  final = train.fit(cfg, tmp_path)
  assert {'val_loss', 'val_loss_text', 'val_loss_noncausal', 'loss_noncausal',
          'val_loss_image_noncausal'} <= set(final)
  assert 'loss' not in final
  assert final['val_loss'] != final['val_loss_noncausal']
  _, params, _ = checkpoint.load_params(tmp_path)
  threshold = params['units']['block_0']['channel']['threshold']
  assert (threshold != 0.5).any()


def test_averaged_parameters_are_kept_and_used(folder, tmp_path):
  cfg = tiny_run.make_config(
      folder, 'model.pattern=attention/mlp', 'train.steps=2',
      'train.eval_every=0', 'optimizer.ema=0.9')
  train.fit(cfg, tmp_path)
  _, averaged, _ = checkpoint.load_params(tmp_path)
  no_ema = config.override(cfg, ['optimizer.ema=0'])
  train.fit(no_ema, tmp_path / 'plain')
  _, newest, _ = checkpoint.load_params(tmp_path / 'plain')
  make, _ = step.init(cfg, _one_device())
  start = make().params['embed']['embedding']
  moved = np.abs(newest['embed']['embedding'] - start).max()
  lag = np.abs(newest['embed']['embedding']
               - averaged['embed']['embedding']).max()
  assert 0 < lag < moved


# Bad input: one line, exit code 2.


@pytest.mark.parametrize('override, message', [
    ('model.mixer.rule=gated-delta', "rule='gated-delta' must be one of"),
    ('model.moma.router=top', "moma.router='top' must be one of"),
    ('model.mixer.router=expert_choice', "model.mixer.router='expert_choice'"),
    ('mesh.strategy=zero', "config.mesh.strategy='zero' is unknown; known:"),
    ('data.sources=jsonl:/nowhere.jsonl', '/nowhere.jsonl'),
    ('model.vocab_size=100', 'vocab_size=100'),
])
def test_settings_that_cannot_be_are_one_line(
    folder, tmp_path, override, message):
  """And leave no config.json to stand in the way of the corrected run."""
  cfg = tiny_run.make_config(folder, override)
  with pytest.raises(config.UserError) as e:
    train.fit(cfg, tmp_path)
  assert message in str(e.value) and '\n' not in str(e.value)
  assert not list(tmp_path.iterdir())


def _command(folder, workdir, *arguments, cache):
  """The train command in a process of its own."""
  cfg = tiny_run.make_config(folder)
  recipe = folder / 'recipe.json'
  recipe.write_text(config.to_json(cfg))
  environment = os.environ | {
      'JAX_COMPILATION_CACHE_DIR': str(cache),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu',
  }
  return subprocess.Popen(
      [sys.executable, '-m', 'mom_jax.train', f'--config={recipe}',
       f'--workdir={workdir}', *arguments],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      env=environment, cwd=folder)


def test_a_trace_is_written_when_asked_for(folder, tmp_path):
  """In a process of its own.

  In one that has compiled and dropped as many programs as the tests do, jax's
  start_trace ended in a segmentation fault.
  """
  process = _command(
      folder, tmp_path / 'run', '--config.model.pattern=attention/mlp',
      '--config.train.steps=2', '--config.train.eval_every=0',
      '--config.train.profile=2,2', cache=tmp_path)
  out, err = process.communicate()
  assert process.returncode == 0, err
  assert 'trace of steps 2 to 2' in out + err
  assert list((tmp_path / 'run/profile').rglob('*.xplane.pb'))


def test_help_is_fast_and_lists_flags_and_settings(folder):
  started = time.perf_counter()
  got = subprocess.run(
      [sys.executable, '-c',
       'import sys; sys.argv=["train", "--help"]; import runpy;'
       'runpy.run_module("mom_jax.train", run_name="__main__", alter_sys=True)'
       ], capture_output=True, text=True, cwd=ROOT)
  assert got.returncode == 0 and time.perf_counter() - started < 8
  for part in ('--workdir', '--config:', '--config.model.width=128',
               'python -m mom_jax.train'):
    assert part in got.stdout


@pytest.mark.parametrize('argument, message', [
    ('--config.modle.width=3',
     'error: config.modle.width is no setting; the nearest is'),
    ('--config.model.width=wide',
     "error: config.model.width='wide' must be of type int."),
    ('--wordkir=x', 'error: Unknown command line flag'),
    ('--config=missing.py', 'error: --config=missing.py: no such file'),
])
def test_wrong_arguments_are_one_line_and_exit_code_2(
    folder, tmp_path, argument, message):
  process = _command(folder, tmp_path / 'run', argument, cache=tmp_path)
  out, err = process.communicate()
  assert process.returncode == 2 and out == ''
  assert err.startswith(message) and err.count('\n') == 1
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_process_killed_mid_save_goes_on_to_the_bit(folder, tmp_path):
  """SIGKILL as soon as a temporary checkpoint is seen, three times."""
  cache = tmp_path / 'compiled'
  command = lambda workdir: _command(
      folder, workdir, '--config.train.steps=12', cache=cache)
  process = command(tmp_path / 'whole')
  assert process.wait() == 0, process.stderr.read()
  workdir = tmp_path / 'killed'
  kills = 0
  for _ in range(3):
    process = command(workdir)
    saves = workdir / 'checkpoints'
    while process.poll() is None:
      if saves.is_dir() and any('tmp' in p.name for p in saves.iterdir()):
        process.kill()
        kills += 1
        break
    process.wait()
  assert kills == 3
  process = command(workdir)
  assert process.wait() == 0, process.stderr.read()
  assert _lines(workdir) == _lines(tmp_path / 'whole')


@pytest.mark.slow
def test_sigterm_to_the_command_exits_0(folder, tmp_path):
  cache = tmp_path / 'compiled'
  process = _command(folder, tmp_path / 'run', '--config.train.steps=100000',
                     cache=cache)
  while not (tmp_path / 'run/metrics.jsonl').is_file():
    assert process.poll() is None
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate()
  assert process.returncode == 0, err
  assert 'stopped by SIGTERM' in out.strip().split('\n')[-1]


def test_a_disk_that_fills_up_is_one_line_and_exit_code_2(
    whole, tmp_path, monkeypatch, capsys):
  """The last good checkpoint is named and stays."""
  cfg, flush = whole[0], metrics.Jsonl.flush

  def full(writer):
    with checkpoint.writing(str(tmp_path / 'metrics.jsonl')):
      if len(_lines(tmp_path)) > 3:
        raise OSError(28, 'No space left on device')
    flush(writer)

  with monkeypatch.context() as m:
    m.setattr(metrics.Jsonl, 'flush', full)
    with pytest.raises(config.UserError, match=(
        'cannot write .*metrics.jsonl: No space left on device; free some space'
        ' or choose another --workdir.')):
      train.fit(cfg, tmp_path)
  assert checkpoint.load_params(tmp_path)[2] == 2
  train.fit(cfg, tmp_path)
  _same(whole, tmp_path)
