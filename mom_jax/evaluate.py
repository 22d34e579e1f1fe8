"""Measures a trained model and draws what it does.

  python -m mom_jax.evaluate --workdir=runs/quickstart

Results go to the workdir: numbers to evaluation.json, pictures beside it.

  python -m mom_jax.evaluate --task=eta --runs=runs/dense-0,runs/moe-0,...

compares trainings by their logs: the FLOPs that others need for the dense one's
loss. Runs that differ in their seed alone are one arm; results go to --workdir,
by default the folder that holds the runs.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

from absl import flags

from mom_jax import cli, config
from mom_jax.data import synthetic
from mom_jax.tasks import (
  errors,
  eta,
  flips,
  length,
  loss,
  recall,
  routing,
  run,
  samples,
  suite,
  throughput,
)
from mom_jax.training import checkpoint

# A new task is a function in tasks/ and its line here; 'all' runs ALL in order.
TASKS: dict[str, Callable[[run.Run], run.Result]] = {
    'loss': loss.loss,
    'curve': loss.curve,
    'routing': routing.routing,
    'samples': samples.samples,
    'flips': flips.flips,
    'errors': errors.errors,
    'length': length.length,
    'throughput': throughput.throughput,
}
# Those with more after their names: 'mqar:pairs=8', 'fda:FILE'; and what checks
# this before anything runs.
WITH_MORE: dict[str, tuple[Callable[[run.Run, str], run.Result], Any]] = {
    **{name: (recall.recall, synthetic.parse) for name in synthetic.TASKS},
    **{name: (suite.contains, suite.check) for name in suite.SUITE},
}
ALL = ('loss', 'curve', 'routing', 'samples')  # the others take many passes


def names(task: str) -> list[str]:
  """The tasks of 'all' or of a list with commas.

  Raises:
    UserError: one is unknown.
  """
  chosen = list(ALL) if task == 'all' else task.split(',')
  for text in chosen:
    name = text.partition(':')[0]
    if name in WITH_MORE:
      WITH_MORE[name][1](text)
    elif text not in TASKS:
      raise config.UserError(
          f'--task={task}: unknown task {text!r}; known: all,'
          f' {", ".join([*TASKS, *WITH_MORE])}, and eta by itself.'
      )
  return chosen


def evaluate(trained: run.Run, task: str = 'all') -> run.Result:
  """Runs tasks and adds their results to workdir/evaluation.json.

  Returns:
    {task: result}, each with the step of the checkpoint.
  """
  results = {}
  for text in names(task):
    run.say(f'evaluating: {text}')
    if text in TASKS:
      found = TASKS[text](trained)
    else:
      found = WITH_MORE[text.partition(':')[0]][0](trained, text)
    results[text] = {'step': trained.step, **found}
  _keep(trained.workdir / 'evaluation.json', results)
  return results


def _keep(path: pathlib.Path, results: run.Result) -> None:
  """Adds results to a file of those of other tasks."""
  known = {}
  if path.is_file():
    try:
      known = json.loads(path.read_text(encoding='utf-8'))
    except json.JSONDecodeError:
      print(f'warning: {path} is damaged and is written anew', file=sys.stderr)
  with checkpoint.writing(str(path)):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix('.json.partial')
    partial.write_text(json.dumps(known | results, indent=2), encoding='utf-8')
    partial.replace(path)


def compare(workdirs: list[str], dense: str, target: str | None) -> None:
  """The task eta: prints factors, writes eta.json and pictures.

  Args:
    workdirs: of the runs, the dense one's first.
    dense: name of the arm to compare with, '' for the first.
    target: folder of the results; None is the one that holds all runs.
  """
  if not workdirs:
    raise config.UserError(
        '--task=eta needs --runs=DIR1,DIR2,...: folders of runs, a dense one'
        ' first.'
    )
  where = pathlib.Path(target or os.path.commonpath(
      [pathlib.Path(w).absolute().parent for w in workdirs]))
  result = eta.eta(workdirs, dense, where)
  path = where / 'eta.json'
  with checkpoint.writing(str(path)):
    path.write_text(json.dumps(result, indent=2), encoding='utf-8')
  print(eta.report(result))
  print('\n'.join(
      f'written: {where / name}' for name in ['eta.json', *files(result)]))


def files(result: run.Result) -> list[str]:
  """Names of the files that a result mentions."""
  found = []
  for key, value in result.items():
    if isinstance(value, dict):
      found += files(value)
    elif key in ('picture', 'texts'):
      found.append(value)
  return found


def report(results: run.Result) -> str:
  """Losses in lines for a reader; other tasks say theirs as they go."""
  lines = []
  for mode, by_name in results.get('loss', {}).items():
    if mode == 'gap':
      lines.append('causal - noncausal validation loss: ' + ', '.join(
          f'{name} {gap:+.3f}' for name, gap in by_name.items()))
    elif mode not in ('step', 'positions', 'picture'):
      lines += [
          f'{mode} validation loss, {name}: {value["loss"]:.3f} nats, unigram'
          f' entropy {value["unigram"]:.3f}, margin {value["margin"]:.3f}'
          for name, value in by_name.items()
      ]
  return '\n'.join(lines)


def __getattr__(name: str) -> Any:
  """`LmEvalModel`, which is only imported where it is asked for."""
  if name == 'LmEvalModel':
    from mom_jax.tasks import lm_eval_adapter
    return lm_eval_adapter.LmEvalModel
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def main(overrides: list[str]) -> None:
  """Runs the command from its flags."""
  f = flags.FLAGS
  if f.task == 'eta':
    if overrides:
      raise config.UserError(
          f'--config.{overrides[0]}: --task=eta reads logs as they are; leave'
          ' it out.'
      )
    compare(f.runs, f.dense, f.workdir)
    return
  if f.runs or f.dense:
    raise config.UserError(
        f'--runs and --dense are for --task=eta, not --task={f.task}.')
  if not f.workdir:
    raise config.UserError('--workdir=DIR is needed: the folder of a run.')
  names(f.task)
  trained = run.load(f.workdir)
  trained = dataclasses.replace(trained, cfg=config.override_some(
      trained.cfg, overrides, checkpoint.MAY_CHANGE))
  results = evaluate(trained, f.task)
  print(report(results))
  made = ['evaluation.json'] + [
      name for result in results.values() for name in files(result)]
  print('\n'.join(f'written: {trained.workdir / name}' for name in made))


def define_flags() -> None:
  flags.DEFINE_string('workdir', None, 'folder of a training run')
  flags.DEFINE_string(
      'task', 'all', f'what to do, with commas: {", ".join(TASKS)}; synthetic'
      f' tasks, with settings or not, {", ".join(synthetic.TASKS)}; sets of the'
      f' recall suite, with :FILE, {", ".join(suite.SUITE)}; all is'
      f' {", ".join(ALL)}; or eta by itself')
  flags.DEFINE_list('runs', [], 'eta: folders of runs, the dense one first')
  flags.DEFINE_string(
      'dense', '', 'eta: name of the arm to compare with; by default that of'
      ' the first run')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
