"""The benchmarks at toy size: their tables are whole and their rows add up."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import tiny_run

from mom_jax import config
from mom_jax.models import flops
from mom_jax.pallas.chunk_memory import api as memory_api
from mom_jax.pallas.grouped_matmul import api as matmul_api

ROOT = pathlib.Path(__file__).parents[2]
MACHINE = {'device', 'cores', 'jax', 'jaxlib', 'Python', 'dtype', 'repetitions'}
# Speed is not what is tested: compile quickly.
QUICK = '--xla_backend_optimization_level=0 '
QUICK += '--xla_llvm_disable_expensive_passes=true'


def _run(script, *flags, code=0):
  """What a script prints, on stderr if it is to fail."""
  done = subprocess.run(
      [sys.executable, ROOT / 'scripts' / script, *flags], text=True,
      capture_output=True, timeout=300, env=os.environ | {
          'PYTHONPATH': str(ROOT), 'XLA_FLAGS': QUICK})
  assert done.returncode == code, done.stderr
  return done.stderr if code else done.stdout


def _measure(script, folder, *flags):
  """(printed text, JSON) of a run; the text shows every row of the JSON."""
  path = folder / 'numbers.json'
  text = _run(script, '--steps=1', f'--output={path}', *flags)
  numbers = json.loads(path.read_text())
  assert set(numbers) == {'machine', 'tables'}
  assert set(numbers['machine']) >= MACHINE
  lines = text.splitlines()
  for title, rows in numbers['tables'].items():
    start = lines.index(title) + 2
    assert lines[start] == '| ' + ' | '.join(rows[0]) + ' |'
    table = lines[start + 2:start + 2 + len(rows)]
    for line, row in zip(table, rows, strict=True):
      cells = line.strip('| ').split(' | ')
      assert line.count('|') == len(row) + 1
      assert cells[0] == str(next(iter(row.values())))
  return text, numbers


def _recipe(folder, *overrides):
  cfg = tiny_run.make_config(folder, 'model.num_layers=1', *overrides)
  path = folder / 'config.json'
  path.write_text(config.to_json(cfg))
  return cfg, f'--config={path}'


def _check_parts(rows, cfg):
  """The parts of a step make up the step."""
  ms = {row['part']: row['ms'] for row in rows}
  assert list(ms) == [
      'data', 'forward', 'backward', 'optimizer', 'step', 'training']
  assert min(ms['data'], ms['forward'], ms['step'], ms['training']) > 0
  parts = ms['forward'] + ms['backward'] + ms['optimizer']
  assert parts == pytest.approx(ms['step'])
  step = next(row for row in rows if row['part'] == 'step')
  assert step['MFLOP a token'] * 1e6 == flops.train_flops_per_token(cfg)
  tokens = step['tokens/s'] * ms['step'] / 1e3
  assert 0.5 * cfg.data.batch_size * cfg.data.seq_len < tokens
  assert tokens <= 1.001 * cfg.data.batch_size * cfg.data.seq_len


def test_training_of_an_attention_recipe(tmp_path):
  """It is its own rival, so each length has one row."""
  cfg, recipe = _recipe(tmp_path, 'model.pattern=attention/mlp')
  _, numbers = _measure('bench_training.py', tmp_path, recipe, '--lengths=16')
  parts, growth = numbers['tables'].values()
  _check_parts(parts, cfg)
  (row,) = growth
  assert (row['tokens a row'], row['rows']) == (16, 16)
  assert row['time / first'] == row['time / recipe'] == 1


@pytest.mark.slow
def test_training_beside_attention(tmp_path):
  """Tokens a step stay the recipe's until one micro-batch row is left."""
  cfg, recipe = _recipe(tmp_path, 'train.grad_accum_steps=2')
  _, numbers = _measure(
      'bench_training.py', tmp_path, recipe, '--lengths=512,16')
  parts, growth = numbers['tables'].values()
  _check_parts(parts, cfg)
  assert [(r['tokens a row'], r['rows'], r['pattern']) for r in growth] == [
      (16, 16, 'mom/moma'), (16, 16, 'attention/moma'),
      (512, 2, 'mom/moma'), (512, 2, 'attention/moma')]
  for mom, attention in zip(growth[::2], growth[1::2]):
    assert mom['time / recipe'] == 1
    assert attention['time / recipe'] == pytest.approx(
        attention['s a step'] / mom['s a step'])
    assert min(mom['temporary MiB'], attention['temporary MiB']) > 0
  a_token = [r['s a step'] / r['tokens a row'] / r['rows'] for r in growth]
  assert [r['time / first'] for r in growth] == pytest.approx(
      [1, 1, a_token[2] / a_token[0], a_token[3] / a_token[1]])


@pytest.mark.parametrize('dtype, tolerance', [
    ('float32', 1e-5),
    pytest.param('bfloat16', 2e-2, marks=pytest.mark.slow)])
def test_kernels_and_rivals_agree_with_the_reference(
    dtype, tolerance, tmp_path):
  cases = (
      'chunk_memory/no_state,chunk_memory/removal_channel,grouped_matmul/few_rows')
  _, numbers = _measure(
      'bench_kernels.py', tmp_path, f'--cases={cases}', f'--dtype={dtype}')
  assert numbers['machine']['dtype'] == dtype
  memory = numbers['tables']['chunk_memory']
  matmul = numbers['tables']['grouped_matmul']
  names = lambda rows: {row['backend'].partition(':')[0] for row in rows}
  assert names(memory) == {*memory_api.BACKENDS, 'scan over time *'}
  assert names(matmul) == {
      *matmul_api.BACKENDS, 'ragged_dot *', 'one-hot einsum *'}
  assert {row['case'] for row in memory + matmul} == set(cases.split(','))
  absent = [row for row in memory + matmul if row['forward ms'] is None]
  assert {row['case'] for row in absent if 'scan' in row['backend']} == {
      'chunk_memory/removal_channel'}
  assert all(
      'scan' in row['backend'] or 'needs a TPU' in row['backend']
      or 'needs a GPU' in row['backend'] for row in absent)
  memory = [row for row in memory if row not in absent]
  matmul = [row for row in matmul if row not in absent]
  for row in memory + matmul:
    assert min(row['forward ms'], row['forward+backward ms']) > 0, row
    assert max(row['error'], row['gradient error']) < tolerance, row
    if dtype == 'bfloat16':
      assert min(row['error'], row['gradient error']) > 0, row


def test_a_rival_that_cannot_run_is_named_with_its_reason(tmp_path):
  text, numbers = _measure(
      'bench_kernels.py', tmp_path, '--cases=*/additive_none_segments')
  *_, last = numbers['tables']['chunk_memory']
  assert last['backend'] == 'scan over time *: absent, keeps no documents apart'
  assert last['forward ms'] is None and last['backend'] in text


def test_kernel_cases_are_listed():
  names = _run('bench_kernels.py', '--list').split()
  assert {'chunk_memory/gated_delta', 'grouped_matmul/moma_in',
          'grouped_matmul/all_empty'} <= set(names)


@pytest.mark.parametrize('script, flags, words', [
    ('bench_kernels.py', ('--cases=matmul',), '--cases=matmul matches no'),
    ('bench_kernels.py', ('--steps=0',), '--steps=0 must be above 0'),
    ('bench_kernels.py', ('--config.model.width=8',), 'no recipe is used'),
    ('bench_rules.py', ('--rules=gated',), "unknown ['gated']"),
    ('bench_rules.py', ('--width=100',), '--width=100 must be a multiple'),
    ('bench_training.py', ('--config=none.py',), 'no such file'),
    ('bench_training.py', ('--config=x.py', '--lengths=8,a'), '--lengths=8,a'),
    ('bench_training.py', ('--config=x.py', '--output=/nowhere/x'),
     '/nowhere is no folder'),
])
def test_mistakes_are_one_line(script, flags, words):
  error = _run(script, *flags, code=2)
  assert words in error and error.count('\n') == 1


def test_rules_beside_a_loop_and_attention(tmp_path):
  _, numbers = _measure(
      'bench_rules.py', tmp_path, '--rules=delta', '--lengths=64',
      '--memory_lengths=64,128', '--width=32', '--heads=2')
  delta, attention = numbers['tables']['Speed']
  assert (delta['rule'], attention['rule']) == ('delta', 'attention')
  assert attention['times attention'] == 1
  assert attention['times token by token'] is None
  assert delta['times token by token'] > 0
  for row in numbers['tables']['Temporary memory']:
    assert 0 < row['MiB at 64'] < row['MiB at 128']


def _finished_run(folder, name, val_loss, accuracy):
  """What a run of the evidence on recall leaves."""
  path = folder / name
  path.mkdir(parents=True)
  cfg = config.override(config.Config(), ['train.steps=7'])
  (path / 'config.json').write_text(config.to_json(cfg))
  (path / 'metrics.jsonl').write_text(
      json.dumps({'step': 7, 'val_loss': val_loss}) + '\n')
  loads = {f'mqar:pairs={n}': {'pairs': n, 'accuracy': a}
           for n, a in zip((4, 16), accuracy)}
  (path / 'evaluation.json').write_text(json.dumps(
      {'mqar': {'step': 7, 'over': 'pairs', 'loads': loads}}))


def test_report_on_recall_says_how_far_an_arm_is_from_plain(tmp_path):
  """In standard errors of the difference of means, from both arms' seeds."""
  for name, *values in (
      ('mqar-plain-1e-3-0', 2.0, (0.50, 0.25)),
      ('mqar-plain-1e-3-1', 2.0, (0.52, 0.25)),
      ('mqar-mom-3e-3-0', 1.0, (0.60, 0.25)),
      ('mqar-mom-3e-3-1', 3.0, (0.64, 0.25)),
      ('mqar-keys-3e-3-0', 3.0, (0.31, 0.25))):
    _finished_run(tmp_path, name, *values)
  text = _run(
      'recall_report.py', f'--runs={tmp_path}', f'--out={tmp_path / "out"}')
  # Means 62 and 51; variances 8 and 2 of two seeds each.
  assert f'| mom | +11.0 ({11 / 5 ** 0.5:+.1f} s.e.) | +0.0 |' in text
  assert '| keys | -20.0 (one seed) | +0.0 (one seed) |' in text


def test_report_on_recall_has_text_by_length(tmp_path):
  """Perplexities of all seeds, and bytes of a sequence's cache at the end."""
  for seed, perplexity in enumerate((8.0, 9.0)):
    path = tmp_path / f'text-plain-1e-3-{seed}'
    _finished_run(tmp_path, path.name, 2.0 + seed, ())
    (path / 'evaluation.json').write_text(json.dumps({
        'length': {'lengths': {
            '128': {'perplexity': perplexity}, '1024': {'perplexity': 2.0}}},
        'throughput': {'contexts': {
            '128': {'cache': 5}, '1024': {'cache': 1234}}}}))
  out = tmp_path / 'out'
  text = _run('recall_report.py', f'--runs={tmp_path}', f'--out={out}')
  cells = ('plain', '1e-3', '2', '2.500 ± 0.500', '8.50 ± 0.50', '2.00 ± 0.00',
           '1,234')
  assert '| ' + ' | '.join(cells) + ' |' in text
  assert (out / 'text_7.png').is_file()


def test_report_on_recall_takes_the_best_rate_of_each_arm(tmp_path):
  """Chosen with the first seed; all seeds are in the table."""
  for name, *values in (
      ('mqar-mom-1e-3-0', 2.0, (0.5, 0.25)),
      ('mqar-mom-3e-3-0', 1.0, (1, 0.5)),
      ('mqar-mom-3e-3-1', 3.0, (0.75, 0.25)),
      ('mqar-aux1e-3-1e-2-0', 1.5, (0.5, 0.5))):
    _finished_run(tmp_path, name, *values)
  (tmp_path / 'mqar-plain-1e-3-0').mkdir()  # begun, not finished
  best = _run('recall_report.py', f'--runs={tmp_path}', '--best=mqar-mom')
  assert best == '3e-3\n'
  out = tmp_path / 'out'
  text = _run('recall_report.py', f'--runs={tmp_path}', f'--out={out}')
  cells = ('mom', '3e-3', '2', '87.5 ± 12.5', '37.5 ± 12.5', '2.000 ± 1.000')
  assert '| ' + ' | '.join(cells) + ' |' in text
  assert '| aux1e-3 | 1e-2 | 1 | 50.0 ± 0.0 |' in text and 'plain' not in text
  assert len(json.loads((out / 'results.json').read_text())) == 4
  assert (out / 'mqar_7.png').is_file()
  # Runs that are gone stay in the results; those that are there are read anew.
  shutil.rmtree(tmp_path / 'mqar-mom-3e-3-1')
  _finished_run(tmp_path / 'again', 'mqar-mom-3e-3-0', 1.0, (0.25, 0.25))
  text = _run(
      'recall_report.py', f'--runs={tmp_path / "again"}', f'--out={out}')
  cells = ('mom', '3e-3', '2', '50.0 ± 25.0', '25.0 ± 0.0', '2.000 ± 1.000')
  assert '| ' + ' | '.join(cells) + ' |' in text
  assert len(json.loads((out / 'results.json').read_text())) == 4
  error = _run('recall_report.py', f'--runs={tmp_path}', '--best=mqar-plain',
               code=2)
  assert '--best=mqar-plain: no run of it with --seed=0' in error
