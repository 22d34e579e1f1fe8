r"""Counts what our kernels and their rivals cost on TPUs, without a TPU.

  pip install '.[tpu-compile]'
  python scripts/bench_tpu_static.py --output=tpu.json
  python scripts/bench_tpu_static.py --cases='grouped_matmul/large/*'
  python scripts/bench_tpu_static.py --cases='*/small*/*/tpu' --budget
  python scripts/bench_tpu_static.py --list

libtpu compiles each program, tpu_static.py walks its schedule. Per program:
estimated cycles of one device with waits for memory, in thousands; the roofline
(operations asked for, or arguments and results moved once, whichever takes
longer) and the estimate over it; share of time in which the matrix units take
rows, and of the operations that use none; VMEM and register spills of the
costliest kernel; bytes in HBM besides arguments and results. The same sources
and versions give the same numbers.

A note marks what the walk cannot know: control flow that depends on data. Loops
of XLA whose number of turns depends on the load get its mean. Rivals, marked *:
megablox and jax.lax.ragged_dot, and chunks with a triangular solve in XLA as
MaxText has them. --budget writes the estimates into scripts/tpu_budget.json,
which a test compares with.

Takes no settings of a recipe.
"""

from __future__ import annotations

import fnmatch
import importlib.metadata
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

from absl import flags
import jax
import timing
import tpu_cases
import tpu_static

from mom_jax import cli, config

CASES = flags.DEFINE_list(
    'cases', [], 'patterns of op/shape/pass/backend; none is all but the small')
LIST = flags.DEFINE_bool('list', False, 'name the programs and stop')
TARGETS = flags.DEFINE_list(
    'targets', ['v5p', 'v6e'], 'TPUs: ' + ', '.join(tpu_static.TOPOLOGY))
OUTPUT = cli.define_path('output', None, 'JSON file for the same numbers')
BUDGET = flags.DEFINE_bool('budget', False, 'write the estimates down')

HERE = pathlib.Path(__file__).parent
BUDGET_FILE = HERE / 'tpu_budget.json'
LATENCY_NS = 450.0  # as tpu_static.py has it by default


class _Loops(dict):
  """The same number of turns for every loop of unknown length."""

  def __init__(self, turns: float):
    super().__init__()
    self.turns = turns

  def get(self, key, default=None):
    del key, default
    return self.turns


def measure(name: str, target: str) -> timing.Row:
  """A row of the table; RuntimeError if it does not compile."""
  with tempfile.TemporaryDirectory() as folder:
    spec = f'{HERE / "tpu_cases.py"}:case:{name!r}'
    tpu_static.run_child(spec, 0, target, folder, [])
    loops = _Loops(tpu_cases.program(name).loops)
    r = tpu_static.analyse(folder, LATENCY_NS, None, loops)
  top = r['ops'][0]
  ops = lambda has: sum(o['est'] for o in r['ops'] if has(o)) / r['est']
  unsure = ops(lambda o: o['unresolved'] or o['truncated'])
  return {
      'program': name,
      'TPU': target,
      'kilocycles': r['est'] / 1e3,
      'roofline': max(r['roof_mxu'], r['roof_hbm']) / 1e3,
      'ratio': r['roofline_ratio'],
      'MXU': r['mxu_cycles'] / r['est'],
      'no MXU': ops(lambda o: not o['mxu_cycles']),
      'VMEM MiB': (top['vmem'] or 0) / 2**20,
      'spills': top['spill'],
      'HBM MB': r['hbm_bytes'] / 1e6,
      'temporary MB': r['temp_bytes'] / 1e6,
      'note': f'{unsure:.0%} depends on data' if unsure else '',
  }


def absent(name: str, target: str, reason: str) -> timing.Row:
  columns = ('kilocycles', 'roofline', 'ratio', 'MXU', 'no MXU', 'VMEM MiB',
             'spills', 'HBM MB', 'temporary MB')
  reason = reason.strip().splitlines()[-1][:120]
  return {'program': name, 'TPU': target, **dict.fromkeys(columns),
          'note': f'does not compile: {reason}'}


def chosen(patterns: list[str]) -> list[str]:
  """Names of programs; UserError for a pattern that matches nothing."""
  every = tpu_cases.names()
  for pattern in patterns:
    if not fnmatch.filter(every, pattern):
      raise config.UserError(
          f'--cases={pattern} matches no program; --list names them.')
  if not patterns:
    return [name for name in every if '/small/' not in name]
  return [name for name in every
          if any(fnmatch.fnmatch(name, p) for p in patterns)]


def versions() -> dict[str, str]:
  """Return the versions that the numbers depend on, and the data type."""
  return {'jax': jax.__version__,
          'libtpu': importlib.metadata.version('libtpu'), 'dtype': 'bfloat16'}


def keep(rows: list[timing.Row], path: pathlib.Path = BUDGET_FILE) -> None:
  """Adds the estimates to the budget."""
  budget: dict[str, Any] = (
      json.loads(path.read_text()) if path.exists() else {'cycles': {}})
  for row in rows:
    at = budget['cycles'].setdefault(row['program'], {})
    at[row['TPU']] = round(1e3 * row['kilocycles'])
  budget['versions'] = versions()
  path.write_text(json.dumps(budget, indent=2, sort_keys=True) + '\n')


def main(overrides: list[str]) -> None:
  if overrides:
    raise config.UserError(f'--config.{overrides[0]}: no recipe is used here.')
  timing.check_output(OUTPUT.value)
  for target in TARGETS.value:
    if target not in tpu_static.TOPOLOGY:
      raise config.UserError(
          f'--targets={target} is unknown; known:'
          f' {", ".join(tpu_static.TOPOLOGY)}.')
  names = chosen(CASES.value or (['*'] if LIST.value else []))
  if LIST.value:
    print('\n'.join(names))
    return
  os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [
      str(HERE.parent), os.environ.get('PYTHONPATH')]))
  rows = []
  for name in names:
    for target in TARGETS.value:
      try:
        rows.append(measure(name, target))
      except RuntimeError as e:
        rows.append(absent(name, target, str(e)))
      row = rows[-1]
      print(name, target, row['kilocycles'] and round(row['kilocycles']),
            row['note'], file=sys.stderr, flush=True)
  timing.report(versions(), {'TPU, static': rows}, OUTPUT.value)
  if BUDGET.value:
    keep([row for row in rows if row['kilocycles'] is not None])


if __name__ == '__main__':
  cli.run(main)
