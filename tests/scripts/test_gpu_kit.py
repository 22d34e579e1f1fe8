"""scripts/gpu_kit.sh without a GPU: its plan, its table, who is absent."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def _load(name, monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / 'scripts'))
  return importlib.import_module(name)


def _kit(*words, code=0, **environment):
  done = subprocess.run(
      ['bash', ROOT / 'scripts/gpu_kit.sh', *words], text=True,
      capture_output=True, timeout=300, env=os.environ | {
          'PYTHON': sys.executable, 'JAX_PLATFORMS': 'cpu'} | environment)
  assert done.returncode == code, done.stdout + done.stderr
  return done.stdout + done.stderr


def test_dry_run_names_every_stage_and_case(tmp_path, monkeypatch):
  cases = _load('gpu_cases', monkeypatch)
  text = _kit('--dry-run', f'--out={tmp_path}/none')
  for part in ('kernels', 'models'):
    stages = cases.stages(part, f'{tmp_path}/none')
    assert sum(stage.seconds for stage in stages) < 600
    for stage in stages:
      needed = 'needed' if stage.needed else 'optional'
      assert f'{stage.name}\t{stage.seconds}\t{needed}\t' in text
      script = stage.command.split()[1]
      assert script == '-m' or (ROOT / script).is_file()
  for case in cases.CASES:
    assert f'{case.name}: {", ".join(case.passes)}' in text
  for recipe in cases.RECIPES:
    assert (ROOT / f'configs/{recipe}.py').is_file()
    assert f'decode {recipe}, after 524288 tokens' in text
    assert f'training {recipe}, rows of 65536 tokens' in text
  assert not (tmp_path / 'none').exists()


def test_without_a_gpu_it_stops_at_the_first_needed_stage(tmp_path):
  text = _kit(f'--out={tmp_path}', code=1)
  assert 'there is no NVIDIA GPU' in text
  assert '== smoke: exit status 1' in text and '== ours' not in text
  assert 'stage smoke: exit status 1' in (tmp_path / 'table.md').read_text()


def test_unknown_arguments_are_refused():
  assert 'unknown argument --fast' in _kit('--fast', code=2)


def test_absent_rivals_are_named(tmp_path, monkeypatch):
  if importlib.util.find_spec('torch') is not None:
    pytest.skip('torch is installed')
  cases = _load('gpu_cases', monkeypatch)
  rivals = _load('bench_torch', monkeypatch)
  for stage in ('kernels', 'models'):
    monkeypatch.setattr(sys, 'argv', [
        '', f'--out={tmp_path}', f'--stage={stage}'])
    rivals.main()
  rows = _load('gpu_table', monkeypatch).read(tmp_path)
  assert all('No module named' in row['absent'] for row in rows)
  asked = {(case.name, pass_, who) for case in cases.CASES
           for op, who, _ in rivals.OPS if op == case.op
           for pass_ in case.passes}
  assert asked < {(row['case'], row['pass'], row['who']) for row in rows}
  assert {'conv', 'gla'} < {op for op, *_ in rivals.OPS}


def test_table(tmp_path, monkeypatch):
  """Ours beside the best of the others; the easier one is never the best."""
  cases, tables = (_load(name, monkeypatch) for name in (
      'gpu_cases', 'gpu_table'))
  case = cases.CASES[5]
  assert case.op == 'grouped_matmul'
  row = {'case': case.name, 'pass': 'forward'}
  flop, moved = case.cost('forward')
  rows = [
      {'ceiling': 'matmul', 'flops': 8e14},
      {'ceiling': 'copy', 'bandwidth': 3e12},
      row | {'who': 'mom_jax', 'ms': 0.25, 'error': 1e-3},
      row | {'who': 'slow', 'ms': 2.0},
      row | {'who': 'torch', 'ms': 0.5},
      row | {'who': 'batched einsum, equal groups', 'ms': 0.1},
      row | {'who': 'tokamax', 'absent': 'ImportError: no tokamax'},
      {'case': 'training x T=8', 'pass': 'step', 'who': 'mom_jax', 'ms': 4.0,
       'tokens/s': 2000.0, 'bytes': 2**31, 'of peak': 0.5},
      {'stage': 'tests', 'ended': 'its 140 seconds were over'}]
  cases.results(tmp_path).write_text(
      ''.join(json.dumps(row) + '\n' for row in rows))
  monkeypatch.setattr(sys, 'argv', ['', str(tmp_path)])
  tables.main()
  saved = json.loads((tmp_path / 'results.json').read_text())
  first, second = saved['table']
  floor = 1e3 * max(flop / 8e14, moved / 3e12)
  assert (first['rival'], first['rival / ours']) == ('torch', '2')
  assert float(first['floor ms']) == pytest.approx(floor, rel=1e-2)
  assert float(first['% of floor']) == pytest.approx(400 * floor, rel=1e-2)
  assert (second['tokens/s'], second['GiB'], second['MFU %']) == (
      '2000', '2', '50')
  assert second['rival'] == second['floor ms'] == ''
  text = (tmp_path / 'table.md').read_text()
  assert '- tokamax: ' in text and 'no tokamax' in text
  assert '- stage tests: its 140 seconds were over' in text
  assert saved['rows'] == rows
