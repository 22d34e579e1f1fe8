r"""The tables and the picture of docs/results/memory.md, from its runs.

  python scripts/recall_report.py --runs=DIR --out=docs/results/memory

DIR holds the runs of scripts/recall_evidence.sh. Writes results.json, one entry
a run, and a picture for each task and number of steps, and prints Markdown. Of
runs that DIR does not hold, results.json keeps what it has; remove it where the
recipes have changed. With --best=TASK-ARM it prints the learning rate at which
this arm had the lowest validation loss with --seed.
"""

from __future__ import annotations

import json
import pathlib
import re
import statistics

from absl import flags
import report

from mom_jax import cli, config, figures
from mom_jax.training import metrics

RUNS = flags.DEFINE_string('runs', None, 'folder of the runs')
OUT = flags.DEFINE_string('out', None, 'folder for results and pictures')
BEST = flags.DEFINE_string('best', None, 'TASK-ARM whose best rate is printed')
SEED = flags.DEFINE_integer('seed', 0, 'seed that the grid was run with')
NAME = re.compile(r'(?P<task>[a-z_]+)-(?P<arm>[^-]+(?:e-\d)?)-'
                  r'(?P<rate>[\d.]+(?:e-?\d+)?)-(?P<seed>\d+)$')
BASE = 'plain'
ORDER = ('plain', 'expanded', 'keys', 'shared', 'mom', 'single_kv', 'attention',
         'hybrid')


def results(runs: pathlib.Path) -> list[dict]:
  """Every finished run: its name's parts, validation loss and evaluation."""
  found = []
  for path, cfg in report.finished(runs.glob('*-*')):
    parts = NAME.match(path.name)
    if parts is None:
      raise config.UserError(
          f'{path} is no run of this evidence; its name must be'
          ' TASK-ARM-RATE-SEED.')
    last = [r for r in metrics.read_jsonl(path) if 'val_loss' in r][-1]
    evaluated = path / 'evaluation.json'
    found.append(parts.groupdict() | {
        'steps': cfg.train.steps, 'val_loss': last['val_loss'],
        'evaluation': json.loads(evaluated.read_text(encoding='utf-8'))
        if evaluated.is_file() else {},
    })
  return found


def with_kept(found: list[dict], path: pathlib.Path) -> list[dict]:
  """Prepend the results of an earlier report that are not among `found`."""
  key = lambda r: [r[k] for k in ('task', 'arm', 'rate', 'seed', 'steps')]
  keys = [key(r) for r in found]
  kept = json.loads(path.read_text('utf-8')) if path.is_file() else []
  return [r for r in kept if key(r) not in keys] + found


def best(found: list[dict], task: str, arm: str, seed: int) -> str:
  """The rate with the lowest validation loss of a seed."""
  here = [r for r in found
          if (r['task'], r['arm'], int(r['seed'])) == (task, arm, seed)]
  if not here:
    raise config.UserError(
        f'--best={task}-{arm}: no run of it with --seed={seed} is finished.')
  return min(here, key=lambda r: r['val_loss'])['rate']


def order(arm: str) -> tuple:
  place = ORDER.index(arm) if arm in ORDER else len(ORDER)
  number = re.search(r'\d+$', arm)
  return place, re.sub(r'\d+$', '', arm), int(number[0]) if number else 0


def at_best(found: list[dict], task: str) -> dict[str, list[dict]]:
  """{arm: its runs at its best rate, a seed each}."""
  arms = sorted({r['arm'] for r in found if r['task'] == task}, key=order)
  chosen = {}
  for arm in arms:
    if any(r['arm'] == arm and int(r['seed']) == SEED.value
           for r in found if r['task'] == task):
      rate = best(found, task, arm, SEED.value)
      chosen[arm] = [r for r in found if (r['task'], r['arm'], r['rate'])
                     == (task, arm, rate)]
  return chosen


def accuracies(task: str, runs: list[dict]) -> dict[tuple, list[float]]:
  """{(load, its name): share of right answers of each run, in %}."""
  found: dict[tuple, list[float]] = {}
  for run in runs:
    result = run['evaluation'].get(task, {})
    for name, value in result.get('loads', {}).items():
      load = value[result['over']], name
      found.setdefault(load, []).append(100 * value['accuracy'])
  return found


def _loads(found: dict[str, dict[tuple, list[float]]]) -> list[tuple]:
  return sorted({load for one in found.values() for load in one})


def synthetic(task: str, chosen: dict[str, list[dict]]) -> str:
  """Shares of right answers, mean of seeds and the farthest one, in %."""
  found = {arm: accuracies(task, runs) for arm, runs in chosen.items()}
  loads = _loads(found)
  rows = []
  for arm, runs in chosen.items():
    rows.append([
        arm, runs[0]['rate'], str(sum(task in r['evaluation'] for r in runs)),
        *(report.spread(found[arm][load], 1) if load in found[arm] else ''
          for load in loads),
        report.spread([r['val_loss'] for r in runs])])
  return report.table(
      ['arm', 'rate', 'seeds', *(name for _, name in loads),
       'validation loss'], rows)


def gaps(task: str, chosen: dict[str, list[dict]]) -> str:
  """Accuracy less that of `plain`, and that in its standard errors, or ''.

  In points, of means over seeds; the standard error is that of the difference
  of two means, from the spread of the seeds of both arms.
  """
  found = {arm: accuracies(task, runs) for arm, runs in chosen.items()}
  loads = _loads(found)
  rows = []
  for arm in chosen:
    cells = [_gap(*(found.get(name, {}).get(load, []) for name in (arm, BASE)))
             for load in loads]
    if arm != BASE and any(cells):
      rows.append([arm, *cells])
  if not rows:
    return ''
  return f'{task}, less {BASE}, points:\n\n' + report.table(
      ['arm', *(name for _, name in loads)], rows)


def _gap(mine: list[float], base: list[float]) -> str:
  if not mine or not base:
    return ''
  gap = statistics.mean(mine) - statistics.mean(base)
  if min(len(mine), len(base)) == 1:
    return f'{gap:+.1f} (one seed)'
  error = sum(statistics.variance(x) / len(x) for x in (mine, base)) ** 0.5
  return f'{gap:+.1f} ({gap / error:+.1f} s.e.)' if error else f'{gap:+.1f}'


def perplexities(runs: list[dict]) -> dict[int, list[float]]:
  """{length of what is read: of each run}."""
  found: dict[int, list[float]] = {}
  for run in runs:
    lengths = run['evaluation'].get('length', {}).get('lengths', {})
    for length, value in lengths.items():
      found.setdefault(int(length), []).append(value['perplexity'])
  return found


def text(chosen: dict[str, list[dict]]) -> str:
  """Loss, perplexity at lengths, and the cache of the longest context."""
  found = {arm: perplexities(runs) for arm, runs in chosen.items()}
  lengths = sorted({n for one in found.values() for n in one})
  rows = []
  for arm, runs in chosen.items():
    contexts = [r['evaluation'].get('throughput', {}).get('contexts', {})
                for r in runs]
    caches = {list(c.values())[-1]['cache'] for c in contexts if c}
    rows.append([
        arm, runs[0]['rate'], str(len(runs)),
        report.spread([r['val_loss'] for r in runs]),
        *(report.spread(found[arm][n], 2) if n in found[arm] else ''
          for n in lengths),
        ', '.join(f'{c:,}' for c in sorted(caches))])
  return report.table(
      ['arm', 'rate', 'seeds', 'validation loss',
       *(f'perplexity at {n:,}' for n in lengths),
       'cache after the longest, bytes'], rows)


def draw(path: pathlib.Path, task: str, chosen: dict[str, list[dict]]) -> None:
  """Means over seeds by load, or by length of text, a line an arm."""
  by_arm = {}
  for arm, runs in chosen.items():
    if task == 'text':
      points = [(x, statistics.mean(y)) for x, y in
                sorted(perplexities(runs).items())]
      names = 'tokens read', 'perplexity'
    else:
      points = [(x, statistics.mean(y) / 100)
                for (x, _), y in sorted(accuracies(task, runs).items())]
      names = runs[0]['evaluation'].get(task, {}).get('over'), (
          'share of answers right')
    if points and arm in ORDER:
      by_arm[arm] = points
      labels = names
  if by_arm:
    figures.lines(path, {task: by_arm}, *labels)
    report.picture(path, path)


def main(overrides: list[str]) -> None:
  if not RUNS.value or bool(OUT.value) == bool(BEST.value) or overrides:
    raise config.UserError(
        'give --runs=DIR and one of --out=DIR and --best=TASK-ARM.')
  found = results(pathlib.Path(RUNS.value))
  if BEST.value:
    print(best(found, *BEST.value.split('-', 1), SEED.value))
    return
  out = pathlib.Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  found = with_kept(found, out / 'results.json')
  report.write_json(out / 'results.json', found)
  for task, steps in sorted({(r['task'], r['steps']) for r in found}):
    chosen = at_best([r for r in found if r['steps'] == steps], task)
    print(f'{task}, {steps:,} steps:\n')
    print(text(chosen) if task == 'text' else synthetic(task, chosen))
    if task != 'text':
      print(gaps(task, chosen))
    draw(out / f'{task}_{steps}.png', task, chosen)


if __name__ == '__main__':
  cli.run(main)
