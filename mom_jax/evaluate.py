"""Measures a trained model and draws what it does.

  python -m mom_jax.evaluate --workdir=runs/quickstart

Results go to the workdir: numbers to evaluation.json, pictures beside it.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import json
import sys

from absl import flags

from mom_jax import checkpoint, cli, config
from mom_jax.tasks import loss, routing, run, samples

# A new task is a function in tasks/ and its line here; 'all' runs all in order.
TASKS: dict[str, Callable[[run.Run], run.Result]] = {
    'loss': loss.loss,
    'curve': loss.curve,
    'routing': routing.routing,
    'samples': samples.samples,
}


def names(task: str) -> list[str]:
  """The tasks of 'all' or of a list with commas.

  Raises:
    UserError: one is unknown.
  """
  chosen = list(TASKS) if task == 'all' else task.split(',')
  for name in chosen:
    if name not in TASKS:
      raise config.UserError(
          f'--task={task}: unknown task {name!r}; known: all,'
          f' {", ".join(TASKS)}.'
      )
  return chosen


def evaluate(trained: run.Run, task: str = 'all') -> run.Result:
  """Runs tasks and adds their results to workdir/evaluation.json.

  Returns:
    {task: result}, each with the step of the checkpoint.
  """
  results = {}
  for name in names(task):
    print(f'evaluating: {name}', file=sys.stderr, flush=True)
    results[name] = {'step': trained.step, **TASKS[name](trained)}
  path = trained.workdir / 'evaluation.json'
  known = {}
  if path.is_file():
    try:
      known = json.loads(path.read_text(encoding='utf-8'))
    except json.JSONDecodeError:
      print(f'warning: {path} is damaged and is written anew', file=sys.stderr)
  with checkpoint.writing(str(path)):
    partial = path.with_suffix('.json.partial')
    partial.write_text(json.dumps(known | results, indent=2), encoding='utf-8')
    partial.replace(path)
  return results


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
  """The losses in lines for a reader."""
  lines = []
  for mode, by_name in results.get('loss', {}).items():
    if mode != 'step':
      lines += [
          f'{mode} validation loss, {name}: {value["loss"]:.3f} nats, unigram'
          f' entropy {value["unigram"]:.3f}, margin {value["margin"]:.3f}'
          for name, value in by_name.items()
      ]
  return '\n'.join(lines)


def main(overrides: list[str]) -> None:
  """Runs the command from its flags."""
  f = flags.FLAGS
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
      'task', 'all', f'what to do, with commas: all, {", ".join(TASKS)}')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
