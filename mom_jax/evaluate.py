"""Evaluate a trained model.

  python -m mom_jax.evaluate --workdir=runs/quickstart

Numbers go to evaluation.json in the workdir, or in --output, pictures beside
it; each task's when it is done.

  python -m mom_jax.evaluate --task=eta --runs=runs/dense-0,runs/moe-0,...

compares runs by their logs: the FLOPs that each needs for the loss of the dense
one. Runs that differ only in their seed are one arm. Results go to --workdir,
by default the folder of the runs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

from absl import flags

from mom_jax import cli, compilation, config, tasks
from mom_jax.training import checkpoint

ALL = ('loss', 'curve', 'routing', 'samples')  # other tasks take many passes
SETTINGS = (
    *config.USE, 'data.sources', 'data.image_folder', 'train.eval_batches')
Result = dict[str, Any]


def names(task: str) -> list[str]:
  """List the tasks of 'all' or of a list with commas.

  Raises:
    UserError: one is unknown.
  """
  chosen = list(ALL) if task == 'all' else task.split(',')
  for text in chosen:
    name = text.partition(':')[0]
    if name in tasks.WITH_ARGUMENT:
      tasks.WITH_ARGUMENT[name].check(text)
    elif text not in tasks.TASKS:
      raise config.UserError(
          f'--task={task}: unknown task {text!r}; known: all,'
          f' {", ".join([*tasks.TASKS, *tasks.WITH_ARGUMENT])}, and eta alone.'
      )
  return chosen


def evaluate(run: tasks.Run, task: str = 'all') -> Result:
  """Run tasks; print and write each one's results when it is done.

  They are added to evaluation.json in `run.output`.

  Returns:
    {task: result}, each with the step of the checkpoint.
  """
  results = {}
  for text in names(task):
    with compilation.waiting(f'evaluating {text}'):
      if text in tasks.TASKS:
        found = tasks.TASKS[text](run)
      else:
        found = tasks.WITH_ARGUMENT[text.partition(':')[0]].run(run, text)
    results[text] = {'step': run.step, **found}
    if lines := report({text: results[text]}):
      print(lines, flush=True)
    _add(run.output / 'evaluation.json', {text: results[text]})
  return results


def check_output(folder: pathlib.Path) -> None:
  """Raise UserError if results cannot be written to a folder; make it."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise _no_output(folder, e.strerror) from e
  if not os.access(folder, os.W_OK):
    raise _no_output(folder, 'no permission')


def _no_output(folder: pathlib.Path, reason: str | None) -> config.UserError:
  return config.UserError(
      f'results cannot be written to {folder} ({reason}); give another folder'
      ' with --output=DIR.')


def _add(path: pathlib.Path, results: Result) -> None:
  """Add results to the file of all tasks."""
  known = {}
  if path.is_file():
    try:
      known = json.loads(path.read_text(encoding='utf-8'))
    except json.JSONDecodeError:
      print(f'warning: {path} is damaged and is overwritten', file=sys.stderr)
  with checkpoint.writing(str(path)):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix('.json.partial')
    partial.write_text(json.dumps(known | results, indent=2), encoding='utf-8')
    partial.replace(path)


def compare(workdirs: list[str], dense: str, target: str | None) -> None:
  """Run the task eta: print factors, write eta.json and pictures.

  Args:
    workdirs: of the runs, the dense one first.
    dense: name of the arm to compare with, '' for the first.
    target: folder of the results; None = the folder of all runs.
  """
  if not workdirs:
    raise config.UserError(
        '--task=eta needs --runs=DIR1,DIR2,..., folders of runs, the dense one'
        ' first.'
    )
  folder = pathlib.Path(target or os.path.commonpath(
      [pathlib.Path(w).absolute().parent for w in workdirs]))
  result = tasks.eta.eta(workdirs, dense, folder)
  path = folder / 'eta.json'
  with checkpoint.writing(str(path)):
    path.write_text(json.dumps(result, indent=2), encoding='utf-8')
  print(tasks.eta.report(result))
  print('\n'.join(
      f'written: {folder / name}' for name in ['eta.json', *files(result)]))


def files(result: Result) -> list[str]:
  """List the files that a result names."""
  found = []
  for key, value in result.items():
    if isinstance(value, dict):
      found += files(value)
    elif key in ('picture', 'texts'):
      found.append(value)
  return found


def report(results: Result) -> str:
  """Format losses as lines; other tasks print theirs."""
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
  """Import `LmEvalModel` on demand."""
  if name == 'LmEvalModel':
    from mom_jax.tasks import lm_eval_adapter
    return lm_eval_adapter.LmEvalModel
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def main(overrides: list[str]) -> None:
  """Run the command from its flags."""
  f = flags.FLAGS
  if f.task == 'eta':
    if overrides:
      raise config.UserError(
          f'--config.{overrides[0]}: --task=eta reads logs only; leave it'
          ' out.'
      )
    compare(cli.paths('runs', f.runs), f.dense, f.workdir)
    return
  if f.runs or f.dense:
    raise config.UserError(
        f'--runs and --dense belong to --task=eta, not --task={f.task}; leave'
        ' them out.')
  if not f.workdir:
    raise config.UserError(
        '--workdir=DIR is missing; give the folder of a run.')
  names(f.task)
  check_output(pathlib.Path(f.output or f.workdir))
  run = tasks.load(
      f.workdir, f.output, config.given(overrides, 'data.tokenizer.image'))
  run = dataclasses.replace(
      run, cfg=config.override_some(run.cfg, overrides, SETTINGS))
  compilation.keep(run.cfg)
  results = evaluate(run, f.task)
  written = ['evaluation.json'] + [
      name for result in results.values() for name in files(result)]
  print('\n'.join(f'written: {run.output / name}' for name in written))


def define_flags() -> None:
  cli.define_path('workdir', None, 'folder of a training run')
  cli.define_path(
      'output', None, 'folder for the results (default: the workdir)')
  flags.DEFINE_string(
      'task', 'all', f'tasks, with commas: {", ".join(tasks.TASKS)}; with'
      f' arguments, {", ".join(tasks.WITH_ARGUMENT)}; all, which is'
      f' {", ".join(ALL)}; or eta alone')
  flags.DEFINE_list('runs', [], 'eta: folders of runs, the dense one first')
  flags.DEFINE_string(
      'dense', '', 'eta: name of the arm to compare with (default that of the'
      ' first run)')


if __name__ == '__main__':
  define_flags()
  cli.run(main, settings=SETTINGS)
