"""FLOPs that runs save compared with a dense one, from their logs."""

from __future__ import annotations

from collections.abc import Sequence
import json
import os
import pathlib
import re
from typing import NamedTuple

import numpy as np

from mom_jax import config, figures
from mom_jax.models import flops
from mom_jax.tasks import compute_matched
from mom_jax.tasks.run import Result
from mom_jax.training import checkpoint, metrics

GRID = 25  # losses at which eta is given
# Kind of loss: its name in the log, and its name in runs whose router sees the
# future.
KINDS = {
    'causal': ('val_loss', None),
    'noncausal': ('val_loss', 'val_loss'),
    'training': ('loss', 'loss'),
}
# Settings in which runs of one arm, and runs on the same data, may differ.
_SEED = (*checkpoint.MAY_CHANGE, 'train.seed')
_DATA = ('data.batch_size', 'data.workers', 'data.cache')


class Log(NamedTuple):
  """Settings and metrics of a run."""

  workdir: pathlib.Path
  cfg: config.Config
  records: list[metrics.Record]


class Arm(NamedTuple):
  """Runs that differ only in their seed."""

  name: str
  logs: list[Log]


def eta(workdirs: Sequence[str], dense: str, target: pathlib.Path) -> Result:
  """Factors by which arms need fewer FLOPs than the dense arm for its loss.

  Args:
    workdirs: of runs; those that differ only in their seed are one arm, named
      by the common beginning of their folder names.
    dense: name of the arm to compare with; '' = that of the first run.
    target: folder of the pictures.
  Returns:
    'arms': settings and costs; 'causal', 'noncausal' (with the routers of
    training, which may see the future) and 'training': by 'all' and modality
    and arm, `eta` with its interval at the lowest `loss` that every run of both
    arms reaches, the `loss_range` that they share, and the `curve` of eta over
    it.
  Raises:
    UserError: too few runs, a run without a log, or two arms that share no
      loss.
  """
  known = arms([_log(pathlib.Path(w)) for w in workdirs])
  base = _base(known, dense)
  names = ('all', *base.logs[0].cfg.model.modalities)
  result: Result = {
      'dense': base.name, 'arms': {a.name: _about(a) for a in known}}
  for kind in KINDS:
    if kind == 'noncausal' and not any(
        'val_loss_noncausal' in r for a in known for log in a.logs
        for r in log.records):
      continue
    panels = {}
    for name in names:
      curves = {a.name: _series(a, kind, name) for a in known}
      if all(points for of in curves.values() for points in of):
        panels[name] = curves
    if not panels:
      continue
    result[kind] = {
        name: _savings(curves, base.name, f'{kind} loss of {name}')
        for name, curves in panels.items()
    }
    result[kind]['picture'] = f'eta_{kind}.png'
    figures.savings(
        target / f'eta_{kind}.png', panels,
        {name: result[kind][name] for name in panels}, base.name)
  return result


def report(result: Result) -> str:
  """Format the factors as lines."""
  lines = []
  for kind in KINDS:
    for arm in result['arms']:
      found = [
          f'{name} {_shown(by_arm[arm])}'
          for name, by_arm in result.get(kind, {}).items()
          if name != 'picture' and arm in by_arm and 'eta' in by_arm[arm]]
      if found:
        lines.append(f'{kind}, {arm}: ' + ', '.join(found))
  return '\n'.join(lines)


def _shown(value: Result) -> str:
  interval = ''
  if value['low'] is not None:
    interval = f' ({value["low"]:.2f} to {value["high"]:.2f})'
  return f'{value["eta"]:.2f}x{interval} at {value["loss"]:.3f} nats'


def _log(workdir: pathlib.Path) -> Log:
  cfg = checkpoint.read_config(workdir)
  if cfg.train.init_from:
    raise config.UserError(
        f'--runs has {workdir}, which started from the parameters of'
        f' {cfg.train.init_from} (train.init_from), so its own FLOPs are not'
        ' its whole cost; leave it out.'
    )
  records = metrics.read_jsonl(workdir)
  if not any('val_loss' in r for r in records):
    raise config.UserError(
        f'--runs has {workdir}, whose metrics.jsonl has no validation loss;'
        " train with 'jsonl' in config.train.writers and"
        ' config.data.validation above 0.'
    )
  return Log(workdir, cfg, records)


def arms(logs: Sequence[Log]) -> list[Arm]:
  """Group runs into arms, in order.

  Raises:
    UserError: their data differ, so their losses cannot be compared.
  """
  found: dict[str, list[Log]] = {}
  for log in logs:
    differing = [
        line for line in config.differing(logs[0].cfg, log.cfg)
        if line.startswith('config.data.')
        and line.split(':')[0].removeprefix('config.') not in _DATA
    ]
    if differing:
      raise config.UserError(
          f'--runs has {logs[0].workdir} and {log.workdir}, whose losses are of'
          f' different data: {"; ".join(differing)}. Leave one out.'
      )
    values = {k: v for k, v, _ in config.settings(log.cfg) if k not in _SEED}
    note = metrics.read_upcycled(log.workdir)
    values |= {k: note.get(k) for k in ('seed_step', 'schedule', 'optimizer')}
    found.setdefault(json.dumps(values), []).append(log)
  named = [(arm_name(group), group) for group in found.values()]
  names = [name for name, _ in named]
  return [
      Arm(name if names.count(name) == 1 else str(group[0].workdir), group)
      for name, group in named
  ]


def arm_name(logs: Sequence[Log]) -> str:
  """Return the common beginning of folder names, without seed numbers."""
  name = os.path.commonprefix([log.workdir.name for log in logs])
  bare = re.sub(r'[-_.]*(seed)?[-_.]*\d*$', '', name)
  return bare or logs[0].workdir.absolute().parent.name


def _base(known: Sequence[Arm], dense: str) -> Arm:
  """Return the arm that the others are compared with."""
  if len(known) < 2:
    what = ', '.join(f'{len(a.logs)} of {a.name}' for a in known) or 'none'
    raise config.UserError(
        '--runs=DIR1,DIR2,... needs runs of two arms or more, a dense one'
        f' first; it has {what}.'
    )
  if not dense:
    return known[0]
  for arm in known:
    if arm.name == dense:
      return arm
  raise config.UserError(
      f'--dense={dense} is no arm of --runs; they are'
      f' {", ".join(a.name for a in known)}.'
  )


def _about(arm: Arm) -> Result:
  cfg = arm.logs[0].cfg
  total, active = flops.count_params(cfg)
  steps = [log.records[-1]['step'] for log in arm.logs]
  return {
      'runs': [str(log.workdir) for log in arm.logs],
      'seeds': [log.cfg.train.seed for log in arm.logs],
      'parameters': total, 'active_parameters': active,
      'flops_per_token': flops.train_flops_per_token(cfg),
      'steps': steps,
      'flops': [metrics.total_train_flops(log.workdir, log.cfg, step)
                for log, step in zip(arm.logs, steps)],
  }


def _series(
    arm: Arm, kind: str, name: str
) -> list[list[tuple[float, float]]]:
  """List (FLOPs, loss) of each run of an arm; empty if it logs no such loss."""
  plain, future = KINDS[kind]
  suffix = '' if name == 'all' else f'_{name}'
  found = []
  for log in arm.logs:
    steps, values = [], []
    if future:
      steps, values = figures.series(
          log.records, f'{future}{suffix}_noncausal')
    if not steps:
      steps, values = figures.series(log.records, f'{plain}{suffix}')
    found.append([
        (metrics.total_train_flops(log.workdir, log.cfg, step), value)
        for step, value in zip(steps, values)])
  return found


def _savings(
    series: dict[str, list[list[tuple[float, float]]]], dense: str, what: str
) -> dict[str, Result]:
  """Return the final loss of each arm and the factors of all but the dense."""
  curves = {}
  for arm, of in series.items():
    curves[arm] = [compute_matched.curve(*np.array(points).T) for points in of]
    if None in curves[arm]:
      raise config.UserError(
          f'--runs: the {what} of {arm} does not fall, so it cannot be'
          ' matched; train longer or leave that arm out.'
      )
  result: dict[str, Result] = {}
  for arm, runs in curves.items():
    final = [points[-1][1] for points in series[arm]]
    result[arm] = {'final_loss': float(np.mean(final)), 'final_losses': final}
    if arm == dense:
      continue
    loss_range = compute_matched.common_range([*curves[dense], *runs])
    if loss_range is None:
      raise config.UserError(
          f'--runs: {arm} and {dense} share no {what}; validate more often'
          ' (train.eval_every) or leave that arm out.'
      )
    found = compute_matched.savings(
        curves[dense], runs, np.linspace(*loss_range, GRID))
    listed = {
        key: [float(x) if np.isfinite(x) else None for x in values]
        for key, values in zip(('loss', 'eta', 'low', 'high'), found)
    }
    result[arm] |= {key: values[0] for key, values in listed.items()}
    result[arm] |= {'loss_range': list(loss_range), 'curve': listed}
  return result
