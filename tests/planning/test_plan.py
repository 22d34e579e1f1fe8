"""Plans: memory, speed, what to change; the command."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
import tiny_run

from mom_jax import chips, config, plan
from mom_jax.models import flops
from mom_jax.parallel import sharding
from mom_jax.planning import compiled, report, suggestions
from mom_jax.training import step

ROOT = pathlib.Path(__file__).parents[2]
V5E = chips.topology('v5e-8')


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  return tiny_run.make_config(
      tmp_path_factory.mktemp('plan'), 'model.pattern=attention/mlp',
      'model.num_layers=2', 'mesh.fsdp=8', 'mesh.data=1')


@pytest.fixture(scope='module')
def planned(small):
  return plan.make_plan(small, chips.topology('h100-8'), tokens=1e9)


def test_gpus_are_planned_by_arithmetic(small, planned):
  """The model's own FLOPs, at least; parameters and moments to the byte."""
  batch = small.data.batch_size * small.data.seq_len
  assert planned['model_flops'] == pytest.approx(
      flops.train_flops_per_token(small) * batch / 8)
  # Causal attention is computed with all its masked half.
  assert 1 <= planned['flops'] / planned['model_flops'] < 2
  assert planned['fits'] and planned['suggestion'] is None
  memory = planned['memory']
  assert 4 * planned['parameters'] / 8 <= memory['parameters'] < (
      4 * planned['parameters'])
  assert memory['optimizer'] >= 2 * memory['parameters']
  assert {r['kind'] for r in planned['traffic']} == {
      'all-gather', 'reduce-scatter', 'all-reduce'}
  assert planned['dcn_bytes'] == 0 < planned['ici_bytes']
  assert planned['days'] == pytest.approx(
      1e9 / planned['tokens_per_s'] / 86400)
  json.dumps(planned)
  text = report.text(planned)
  for part in ('8 h100', 'nothing compiled', 'Memory of a chip', 'fits',
               'all-gather', 'limited by', 'tokens/s', 'days for 1 B tokens'):
    assert part in text


def test_memory_is_read_of_allocations_before_there_is_code(small):
  """Of HBM alone; what kernels use for themselves is no allocation."""
  mesh = sharding.make_mesh(fsdp=8, data=1)
  _, abstract = step.init(small, mesh)
  text = '\n'.join(f'allocation {k}: size {line}' for k, line in enumerate((
      '7, page 0, thread-local:', '5, color 1, page 0, preallocated-temp:',
      '1000000, page 0, parameter 3, shape |f32[8]| at ShapeIndex {}:',
      '2000000, page 0, parameter 4, shape |f32[8]| at ShapeIndex {}:',
      '40, page 0, output shape is |(f32[8])|:',
      '300, page 0, preallocated-temp:')))
  got = compiled.scheduled_memory(text + '\n value: <1> size 9\n', abstract)
  assert sum(got.values()) == 3000340
  assert got['activations and temporaries'] == 300
  assert got | compiled.state_bytes(abstract) == got


def test_the_setting_to_change_is_named(small):
  suggest = lambda cfg, state, rest, devices=1: suggestions.suggest(
      cfg, {'data': devices}, {'parameters': float(state)},
      float(state + rest), 10.0)
  assert suggest(small, 5, 5) is None
  assert 'config.mesh.fsdp' in suggest(small, 9.5, 5)
  assert 'config.train.grad_accum_steps=4.' in suggest(small, 5, 15)
  dots = config.override(small, ['model.remat=dots'])
  assert 'config.model.remat=full' in suggest(dots, 5, 15, devices=8)
  full = config.override(small, ['model.remat=full'])
  assert 'config.data.seq_len' in suggest(full, 5, 15, devices=8)


def test_a_sweep_tries_every_split_and_ranks(small, planned):
  cfgs = plan.meshes(small, ['fsdp', 'data'], 8)
  assert [(c.mesh.fsdp, c.mesh.data) for c in cfgs] == [
      (1, 8), (2, 4), (4, 2), (8, 1)]
  slow = planned | {'step_s': 2 * planned['step_s'], 'mesh': {'data': 8}}
  large = planned | {'fits': False, 'mesh': {'data': 2}}
  lines = report.ranking([large, slow, planned]).split('\n')
  assert 'fsdp=8' in lines[1] and 'data=8' in lines[2] and 'data=2' in lines[3]
  with pytest.raises(config.UserError, match='--sweep=wide is no axis'):
    plan.meshes(small, ['wide'], 8)
  with pytest.raises(config.UserError, match='does not divide the 12'):
    plan.meshes(small, ['data'], 12)


def test_a_mesh_that_does_not_fit_is_one_line(small):
  wrong = config.override(small, ['mesh.fsdp=3'])
  with pytest.raises(config.UserError, match='do not fit the 8 devices'):
    plan.make_plan(wrong, chips.topology('h100-8'))


def test_without_libtpu_the_extra_is_named(small, monkeypatch):
  monkeypatch.setattr(compiled.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(config.UserError, match=r'mom_jax\[tpu-compile\]'):
    plan.make_plan(small, V5E)


def _command(path, *flags):
  return subprocess.run(
      [sys.executable, '-m', 'mom_jax.plan', f'--config={path}', *flags],
      text=True, capture_output=True, timeout=500,
      env=os.environ | {'PYTHONPATH': str(ROOT)})


@pytest.mark.tpu_compile
@pytest.mark.slow
def test_a_step_is_compiled_for_tpus_that_are_not_there(small, tmp_path):
  import tpu_topology
  tpu_topology.mesh('v5e')  # skips without libtpu
  wide = config.override(small, ['model.width=128', 'mesh.fsdp=-1'])
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(dataclasses.asdict(wide)))
  done = _command(path, '--topology=v5e-4', f'--json={tmp_path / "plan.json"}')
  assert done.returncode == 0, done.stderr
  got = json.loads((tmp_path / 'plan.json').read_text())
  assert got['mesh']['fsdp'] == 4 and 'v5e:2x2' in got['basis']
  assert got['flops'] >= got['model_flops'] > 0
  assert {'all-gather'} <= {r['kind'] for r in got['traffic']}
  inside = [r for r in got['collectives']
            if r['iterations'] == wide.model.repeats]
  assert inside, 'collectives of the layers run once per layer'
  assert math.isclose(sum(got['memory'].values()), got['memory_used'])
  assert 'DOES NOT FIT' not in done.stdout
  done = _command(path, '--topology=v5e-4', '--quick',
                  f'--json={tmp_path / "quick.json"}')
  assert done.returncode == 0, done.stderr
  quick = json.loads((tmp_path / 'quick.json').read_text())
  assert got['memory'] == quick['memory'] | {
      'program': got['memory']['program']}
  for key in ('flops', 'hbm_bytes', 'traffic'):
    assert quick[key] == got[key], key
  assert quick['busy_s'] <= got['busy_s']


def test_plans_become_the_tables_of_the_documentation(planned, tmp_path):
  """A row a plan; of weak scaling, what is not hidden against a chip's own."""
  for chips_, exposed in ((1, 0.0), (4, 0.125)):
    one = planned | {
        'chips': chips_, 'exposed_s': exposed, 'bounds': dict(
            compute=0.5, HBM=0.25, ICI=0.125)}
    (tmp_path / f'weak-{chips_}.json').write_text(json.dumps(one))
  (tmp_path / 'large.json').write_text(json.dumps(one))
  done = subprocess.run(
      [sys.executable, ROOT / 'scripts/scaling_report.py', tmp_path], text=True,
      capture_output=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
  assert done.returncode == 0, done.stderr
  recipes, weak = done.stdout.split('\n\n')
  assert recipes.count('\n') == 2 and '| 500 | 250 | 125 |' in recipes
  lines = weak.strip().split('\n')
  assert '| 125.0 | 0.0 |' in lines[2] and '| 100.0% |' in lines[2]
  assert '| 125.0 | 125.0 |' in lines[3] and '| 80.0% |' in lines[3]
