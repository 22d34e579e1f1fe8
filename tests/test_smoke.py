"""The quick subset: one short run of every kind of model, end to end."""

import json

import jax
import numpy as np
import pytest
import tiny_run

from mom_jax import evaluate, generate, train
from mom_jax.parallel import sharding
from mom_jax.tasks import run
from mom_jax.training import metrics

RECIPES = {
    'both': (),
    'hybrid, expert choice': (
        'model.pattern=mom/moma attention/moma', 'model.mixer.rule=delta',
        'model.moma.router=expert_choice', 'model.dtype=bfloat16',
        'model.remat=full', 'optimizer.schedule=wsd', 'optimizer.ema=0.9'),
}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
  monkeypatch.setattr(sharding, 'make_mesh', lambda **sizes: mesh)


@pytest.mark.parametrize('name', RECIPES)
def test_train_evaluate_generate(name, tmp_path, capsys):
  cfg = tiny_run.make_config(tmp_path, *RECIPES[name])
  workdir = tmp_path / 'run'
  final = train.fit(cfg, workdir)
  losses = [r['loss_text'] if 'loss_text' in r else r['loss_text_noncausal']
            for r in metrics.read_jsonl(workdir) if 'grad_norm' in r]
  assert len(losses) == final['step'] == cfg.train.steps
  assert losses[-1] < losses[0] - 0.1

  results = evaluate.evaluate(
      run.load(workdir), 'all' if name == 'both' else 'loss')
  assert json.loads((workdir / 'evaluation.json').read_text()) == results
  assert np.isfinite(results['loss']['causal']['all']['loss'])
  if name == 'both':
    for task in ('curve', 'samples'):
      assert (workdir / results[task]['picture']).stat().st_size > 5000
    assert (workdir / results['routing']['causal']['picture']).is_file()

  capsys.readouterr()
  settings = generate.config.Sampling(max_new_tokens=12)
  generate.run(workdir, generate.compose(['a red<draw>', 'a'], []), settings)
  assert 'a red' in capsys.readouterr().out
  assert list((workdir / 'generated').glob('*.png'))
