"""FLOPs at matched loss: known factors, and what cannot be compared."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest
import tiny_run

from mom_jax import config, evaluate, figures
from mom_jax.tasks import compute_matched, eta
from mom_jax.training import metrics

ROOT = pathlib.Path(__file__).parents[2]
FLOPS = np.geomspace(1.0, 1e3, 40)
POWER = lambda c: 1.5 + 3.0 * np.asarray(c, float) ** -0.3


def _curves(factor, spread=(0.0,)):
  """Runs of a power law whose FLOPs are worth `factor` of the dense one's."""
  return [compute_matched.curve(FLOPS, POWER(FLOPS * factor * np.exp(s)))
          for s in spread]


@pytest.mark.parametrize('factor', [0.4, 1.0, 1.2, 3.7])
def test_eta_of_power_laws(factor):
  """The same law, reached with 1/factor of the FLOPs: the factor, at any loss.
  """
  dense, arm = _curves(1.0), _curves(factor)
  low, high = compute_matched.common_range([*dense, *arm])
  found = compute_matched.savings(dense, arm, np.linspace(low, high, 9))
  np.testing.assert_allclose(found.eta_N, factor, rtol=2e-3)
  assert np.isnan(found.low_N).all() and np.isnan(found.high_N).all()


def test_reach_is_what_all_runs_have():
  dense, arm = _curves(1.0), _curves(4.0)
  assert compute_matched.common_range([*dense, *arm]) == (
      pytest.approx(POWER(1e3)), pytest.approx(POWER(4.0)))
  assert compute_matched.common_range([*dense, *_curves(1e6)]) is None


def test_seeds_of_known_spread_give_welchs_interval():
  """log C of the seeds lies at known distances, so the interval is known.

  Three seeds at -d, 0, d have variance d^2; both means have d^2 / 3.
  """
  d = 0.1
  dense, arm = _curves(1.0, (-d, 0, d)), _curves(2.0, (-d, 0, d))
  found = compute_matched.savings(dense, arm, np.array([2.5, 2.0]))
  half = 2.7764 * d * np.sqrt(2 / 3)  # t of 4 degrees of freedom, 97.5 %
  np.testing.assert_allclose(np.log(found.eta_N), np.log(2), atol=3e-3)
  np.testing.assert_allclose(
      np.log(found.high_N / found.eta_N), half, rtol=2e-2)
  np.testing.assert_allclose(
      np.log(found.eta_N / found.low_N), half, rtol=2e-2)


def test_seeds_without_spread_are_certain():
  dense, arm = _curves(1.0, (0, 0)), _curves(2.0, (0, 0))
  found = compute_matched.savings(dense, arm, np.array([2.0]))
  np.testing.assert_allclose(found.low_N, found.eta_N)
  np.testing.assert_allclose(found.high_N, found.eta_N)


def test_noise_is_averaged_not_taken_at_its_best():
  """A single lucky validation does not count as reaching a loss."""
  rng = np.random.default_rng(0)
  flops = np.geomspace(1.0, 1e3, 400)
  noisy = lambda factor: compute_matched.curve(
      flops, POWER(flops * factor) + 0.02 * rng.normal(size=400))
  found = compute_matched.savings(
      [noisy(1.0) for _ in range(3)], [noisy(2.0) for _ in range(3)],
      np.array([2.6, 2.2, 1.95]))
  np.testing.assert_allclose(found.eta_N, 2, rtol=0.1)
  assert (np.diff(noisy(1.0).loss_N) < 0).all()


def test_a_loss_that_does_not_fall_has_no_curve():
  curve = lambda *points: compute_matched.curve(*np.array(points, float).T)
  assert curve((1, 2), (2, 2), (3, 3)) is None
  assert curve((1, 2), (2, np.nan)) is None
  assert curve((0, 9), (1, 3), (2, 2)).loss_N.tolist() == [3, 2]


# The task, on logs that are written as a run writes them.

STEPS = range(10, 401, 10)


def _write(folder, name, factor, *overrides, seed=0, spread=0.0, key='',
           note=None):
  """A workdir whose losses, of a dense run's FLOPs, come `factor` cheaper."""
  workdir = folder / name
  workdir.mkdir()
  cfg = tiny_run.make_config(folder, f'train.seed={seed}', *overrides)
  (workdir / 'config.json').write_text(config.to_json(cfg))
  if note:
    (workdir / metrics.UPCYCLED).write_text(json.dumps(note))
  unit = metrics.train_flops(tiny_run.make_config(folder, *DENSE), 1)
  lines = []
  for step in STEPS:
    flops = metrics.total_train_flops(workdir, cfg, step) / unit
    text = float(POWER(flops * factor * np.exp(spread)))
    image = float(POWER(flops * factor**2 * np.exp(spread)))
    record = {'step': step}
    for prefix in ('', 'val_'):
      for suffix in {'', key}:
        worse = 0.01 * (suffix != key)
        record |= {f'{prefix}loss{suffix}': (text + image) / 2 + worse,
                   f'{prefix}loss_text{suffix}': text + worse,
                   f'{prefix}loss_image{suffix}': image + worse}
    lines.append(json.dumps(record) + '\n')
  (workdir / 'metrics.jsonl').write_text(''.join(lines))
  return str(workdir)


DENSE = ('model.pattern=attention/mlp', 'model.moma.experts=1,1')
EXPERTS = ('model.pattern=attention/moma', 'model.moma.experts=2,2',
           'model.moma.router=expert_choice')


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
  """Two seeds of a dense arm, two of one that is twice as good in text."""
  folder = tmp_path_factory.mktemp('eta')
  return folder, [
      _write(folder, f'{name}-{seed}', factor, *model, seed=seed,
             spread=(-0.05, 0.05)[seed], key=key)
      for name, factor, model, key in (
          ('dense', 1.0, DENSE, ''), ('moe', 2.0, EXPERTS, '_noncausal'))
      for seed in (0, 1)]


@pytest.fixture
def undrawn(monkeypatch):
  monkeypatch.setattr(figures, 'savings', lambda *args: None)


def test_factors_from_logs_by_modality_and_mode(workdirs, capsys):
  """Text saves a factor of 2, images its square; FLOPs are each run's own."""
  folder, runs = workdirs
  evaluate.compare(runs, '', None)
  result = json.loads((folder / 'eta.json').read_text())
  assert result['dense'] == 'dense'
  assert [(k, v['seeds']) for k, v in result['arms'].items()] == [
      ('dense', [0, 1]), ('moe', [0, 1])]
  about = result['arms']['moe']
  assert about['flops'][0] == about['flops_per_token'] * 400 * 8 * 32
  for name, want in (('text', 2.0), ('image', 4.0)):
    value = result['noncausal'][name]['moe']
    assert value['eta'] == pytest.approx(want, rel=0.01)
    assert value['low'] < want < value['high']
    assert value['loss'] == value['loss_range'][0] == value['curve']['loss'][0]
    np.testing.assert_allclose(value['curve']['eta'], want, rtol=0.01)
    # The causal loss is 0.01 higher, so that it is reached later.
    assert 1 < result['causal'][name]['moe']['eta'] < want * 0.99
    assert result['training'][name]['moe']['eta'] <= value['eta'] * 1.001
  assert 2 < result['noncausal']['all']['moe']['eta'] < 4
  for kind in eta.KINDS:
    picture = folder / result[kind]['picture']
    assert Image.open(picture).size[0] > 300
  printed = capsys.readouterr().out
  assert 'noncausal, moe: all ' in printed and 'eta.json' in printed


def test_the_report_pairs_seeds(tmp_path):
  """Arms of one seed share its luck, so their difference is free of it."""
  runs = []
  for name, factor, model in (('dense', 1.0, DENSE), ('moe_8x', 2.0, EXPERTS)):
    for seed, spread in enumerate((-0.2, 0.0, 0.2)):
      runs.append(_write(
          tmp_path, f'{name}-{seed}', factor, *model, 'train.steps=400',
          seed=seed, spread=spread))
  evaluate.compare(runs, '', None)
  out = tmp_path / 'out'
  done = subprocess.run(
      [sys.executable, ROOT / 'scripts' / 'moma_report.py',
       f'--runs={tmp_path}', f'--out={out}'],
      text=True, capture_output=True, timeout=120,
      env=os.environ | {'PYTHONPATH': str(ROOT)})
  assert done.returncode == 0, done.stderr
  lines = (out / 'curves.csv').read_text().splitlines()
  assert len(lines) == 1 + 6 * len(STEPS)
  last = [json.loads((pathlib.Path(r) / 'metrics.jsonl').read_text()
                     .splitlines()[-1])['val_loss_text'] for r in runs]
  gap_S = np.array(last[3:]) - last[:3]
  half = 4.3027 * gap_S.std(ddof=1) / np.sqrt(3)  # t of 2 degrees of freedom
  mean = gap_S.mean()
  want = f'{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})'
  row = done.stdout.partition('less dense of the same seed')[2].partition(
      '| moe_8x | ')[2].splitlines()[0]
  assert row.split(' | ')[1] == want
  result = json.loads((out / 'eta.json').read_text())
  assert result['arms']['moe_8x']['runs'] == [
      f'moe_8x-{seed}' for seed in range(3)]


def test_any_arm_may_be_the_one_to_compare_with(workdirs, undrawn):
  folder, runs = workdirs
  result = eta.eta(runs, 'moe', folder)
  assert result['noncausal']['text']['dense']['eta'] == pytest.approx(
      0.5, rel=0.01)
  with pytest.raises(config.UserError, match='--dense=mom is no arm of'):
    eta.eta(runs, 'mom', folder)


def test_an_upcycled_run_pays_for_its_seed(workdirs, undrawn, tmp_path):
  """Its curve starts where its seed's FLOPs end; another arm than one without.
  """
  note = {'seed_step': 30, 'seed_flops': 1e9, 'schedule': 'restart',
          'optimizer': 'reset'}
  folder, _ = workdirs
  dense = _write(tmp_path, 'dense-0', 1.0, *DENSE)
  grown = _write(tmp_path, 'grown-0', 2.0, *EXPERTS, note=note)
  fresh = _write(tmp_path, 'fresh-0', 2.0, *EXPERTS)
  cfg = tiny_run.make_config(folder, *EXPERTS)
  mine = metrics.train_flops(cfg, 7)
  assert metrics.total_train_flops(grown, cfg, 7) == 1e9 + mine
  result = eta.eta([dense, grown, fresh], '', tmp_path)
  assert list(result['arms']) == ['dense', 'grown', 'fresh']
  assert result['causal']['text']['grown']['eta'] == pytest.approx(2, rel=0.01)
  assert result['causal']['text']['grown']['low'] is None
  on = note | {'schedule': 'continue'}
  (tmp_path / 'grown-0' / metrics.UPCYCLED).write_text(json.dumps(on))
  assert metrics.total_train_flops(grown, cfg, 37) == 1e9 + mine


@pytest.mark.parametrize('name, arm', [
    ('moe_8x-2', 'moe_8x'), ('moma_seed3', 'moma'), ('run.12', 'run'),
    ('moe_4t4i', 'moe_4t4i'), ('mix2-0', 'mix2')])
def test_an_arm_is_named_without_the_seed(name, arm, tmp_path):
  assert eta.arm_name([eta.Log(tmp_path / name, None, [])]) == arm


def test_folders_named_by_seed_alone_take_the_name_above(tmp_path):
  logs = [eta.Log(tmp_path / 'dense' / f'seed{i}', None, []) for i in (0, 1)]
  assert eta.arm_name(logs) == 'dense'


def test_runs_that_cannot_be_compared(workdirs, tmp_path):
  folder, runs = workdirs
  refused = lambda runs, match: pytest.raises(
      config.UserError, eta.eta, runs, '', tmp_path).match(match)
  refused(runs[:2], 'two arms or more, a dense one first; it has 2 of dense')
  refused([runs[0], str(tmp_path)], 'holds no run')
  other = _write(tmp_path, 'other', 1.0, *EXPERTS)
  refused([runs[0], other], 'different data: config.data.sources')
  dense = _write(tmp_path, 'dense', 1.0, *DENSE)
  (tmp_path / 'other' / 'metrics.jsonl').write_text('{"step": 1, "loss": 3}\n')
  refused([dense, other], 'no validation loss')
  for losses, match in (((2.0, 3.0), 'does not fall'),
                        ((99.0, 98.0), 'share no causal loss of all')):
    (tmp_path / 'other' / 'metrics.jsonl').write_text(''.join(
        json.dumps({'step': i + 1, 'val_loss': x}) + '\n'
        for i, x in enumerate(losses)))
    refused([dense, other], match)
  stage = _write(tmp_path, 'stage', 1.0, *EXPERTS, 'train.stage=aux_router',
                 'train.init_from=first')
  refused([dense, stage], 'parameters of first')


def test_the_command_says_in_one_line_what_is_wrong():
  done = subprocess.run(
      [sys.executable, '-m', 'mom_jax.evaluate', '--task=eta'],
      capture_output=True, text=True, timeout=120)
  assert done.returncode == 2
  assert done.stderr == (
      'error: --task=eta needs --runs=DIR1,DIR2,..., folders of runs, the dense'
      ' one first.\n')
