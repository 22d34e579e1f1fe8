r"""The curves and tables of docs/results/moma.md, from the runs of an evidence.

  python scripts/moma_report.py --runs=DIR --out=docs/results/moma

DIR holds the runs of scripts/moma_evidence.sh, and what `evaluate` left there:
eta.json of --task=eta, evaluation.json of single runs. Writes curves.csv,
eta.json, evaluation.json and the pictures, and prints Markdown.
"""

from __future__ import annotations

import csv
import json
import pathlib

from absl import flags
import report
from scipy import stats

from mom_jax import cli, config
from mom_jax.training import checkpoint, metrics

RUNS = flags.DEFINE_string('runs', None, 'folder of the runs')
OUT = flags.DEFINE_string('out', None, 'folder for logs and pictures')
ARMS = flags.DEFINE_list(
    'arms', ['dense', 'moe_1t1i', 'moe_8x', 'moe_4t4i', 'threshold',
             'token_choice', 'upcycled', 'mot'], 'arms, in the order of rows')
NAMES = ('all', 'text', 'image')


def workdirs(runs: pathlib.Path) -> list[tuple[str, int, pathlib.Path]]:
  """(arm, seed, workdir) of every run that has an end."""
  return [
      (arm, cfg.train.seed, path) for arm in ARMS.value
      for path, cfg in report.finished(runs.glob(f'{arm}-*'))
  ]


def curves(runs: pathlib.Path, out: pathlib.Path) -> None:
  """Every validation of every run, as CSV."""
  keys = [f'val_loss{m}{s}' for s in ('', '_noncausal')
          for m in ('', '_text', '_image')]
  with open(out / 'curves.csv', 'w', encoding='utf-8', newline='') as file:
    table = csv.writer(file, lineterminator='\n')
    table.writerow(['arm', 'seed', 'step', 'flops', *keys])
    for arm, seed, path in workdirs(runs):
      cfg = checkpoint.read_config(path)
      for record in metrics.read_jsonl(path):
        if 'val_loss' in record:
          spent = metrics.total_train_flops(path, cfg, record['step'])
          table.writerow([
              arm, seed, record['step'], f'{spent:.6g}',
              *(f'{record[k]:.5f}' if k in record else '' for k in keys)])


def _kinds(result, *others):
  """Return kinds of losses; those that are not causal only if an arm has them.
  """
  return [k for k in ('causal', 'noncausal', *others) if k in result]


def factor(value) -> str:
  """2.1 (1.9 to 2.3)."""
  if 'eta' not in value:
    return '1'
  text = f'{value["eta"]:.2f}'
  if value['low'] is not None:
    text += f' ({value["low"]:.2f} to {value["high"]:.2f})'
  return text


def etas(result) -> str:
  """Factors and last losses of every arm, by kind."""
  parts = []
  for kind in _kinds(result, 'training'):
    by_name = result[kind]
    parts += [f'{kind}:\n', report.table(
        ['arm', *(f'eta, {n}' for n in NAMES), *(f'last, {n}' for n in NAMES)],
        [[arm, *(factor(by_name[n][arm]) for n in NAMES),
          *(report.spread(by_name[n][arm]['final_losses']) for n in NAMES)]
         for arm in result['arms']])]
  return '\n'.join(parts)


def paired(result) -> str:
  """Last losses less those of `dense` with the same seed, by kind.

  The same seed has the same batches in every arm. The interval is Student's of
  95 % for the mean over seeds, none for a single one.
  """
  parts = []
  for kind in _kinds(result):
    rows = []
    for arm, about in result['arms'].items():
      if arm == result['dense']:
        continue
      cells = []
      for name in NAMES:
        last = {a: dict(zip(result['arms'][a]['seeds'],
                            result[kind][name][a]['final_losses']))
                for a in (arm, result['dense'])}
        gap_S = [last[arm][seed] - last[result['dense']][seed]
                 for seed in about['seeds'] if seed in last[result['dense']]]
        cells.append(interval(gap_S))
      rows.append([arm, *cells])
    parts += [f'{kind}, less dense of the same seed:\n',
              report.table(['arm', *NAMES], rows)]
  return '\n'.join(parts)


def interval(values) -> str:
  """-0.020 (-0.030 to -0.010), or what there is of it."""
  if not values:
    return 'no seed in common'
  mean = sum(values) / len(values)
  if len(values) == 1:
    return f'{mean:+.3f}'
  half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
  return f'{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})'


def tasks(results) -> str:
  """Format the results of single checkpoints."""
  parts = []
  for run, by_task in results.items():
    parts.append(f'{run}:\n')
    for mode, value in by_task.get('flips', {}).items():
      if mode in ('step', 'auxiliary'):
        continue
      for part, shares in value['mean'].items():
        parts.append(f'- flips, {mode}, {part}: ' + ', '.join(
            f'{k} {100 * v:.1f} %' for k, v in shares.items()))
    for key, value in by_task.get('flips', {}).get('auxiliary', {}).items():
      parts.append(f'- {key}: {value:.3f}')
    for mode, value in by_task.get('routing', {}).items():
      if mode == 'step':
        continue
      for layer, layers in value['layers'].items():
        parts += [f'- taken, {mode}, layer {layer}: ' + ', '.join(
            f'{k} ' + '/'.join(f'{100 * x:.0f}' for x in v)
            for k, v in layers.get('experts_per_token', {}).items())]
    for mode, value in by_task.get('loss', {}).items():
      if mode == 'gap':
        parts.append('- gap: ' + ', '.join(
            f'{k} {v:+.3f}' for k, v in value.items()))
      elif mode not in ('step', 'positions', 'picture'):
        parts.append(f'- loss, {mode}: ' + ', '.join(
            f'{k} {v["loss"]:.3f}' for k, v in value.items()))
    for mode, value in by_task.get('errors', {}).items():
      if mode in ('step', 'picture'):
        continue
      for part, curve in value.items():
        for name, loss in curve['loss'].items():
          parts.append(f'- errors, {mode}, {part}, {name}: ' + ', '.join(
              f'{100 * r:g} % {x - loss[0]:+.4f}'
              for r, x in zip(curve['error_probs'], loss)))
    parts.append('')
  return '\n'.join(parts)


def main(overrides: list[str]) -> None:
  if not RUNS.value or not OUT.value or overrides:
    raise config.UserError('give --runs=DIR and --out=DIR, and nothing else.')
  runs, out = pathlib.Path(RUNS.value), pathlib.Path(OUT.value)
  if not (runs / 'eta.json').is_file():
    raise config.UserError(
        f'--runs={runs} has no eta.json; first run: python -m mom_jax.evaluate'
        f' --task=eta --runs={runs}/dense-0,{runs}/moe_4t4i-0,...')
  out.mkdir(parents=True, exist_ok=True)
  curves(runs, out)
  result = json.loads((runs / 'eta.json').read_text(encoding='utf-8'))
  for about in result['arms'].values():
    about['runs'] = [pathlib.Path(w).name for w in about['runs']]
  report.write_json(out / 'eta.json', result)
  for kind in _kinds(result):
    report.picture(runs / f'eta_{kind}.png', out / f'eta_{kind}.png')
  results = {}
  for path in sorted(runs.glob('*/evaluation.json')):
    results[path.parent.name] = json.loads(path.read_text(encoding='utf-8'))
    if 'errors' in results[path.parent.name]:
      report.picture(path.with_name('errors.png'),
              out / f'errors_{path.parent.name}.png')
  report.write_json(out / 'evaluation.json', results)
  print(etas(result))
  print(paired(result))
  print(tasks(results))


if __name__ == '__main__':
  cli.run(main)
