"""The tables of docs/scaling.md from the plans that scaling.sh left.

  python scripts/scaling_report.py runs/scaling
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

from mom_jax import chips

COLUMNS = ('topology', 'mesh', 'accumulate', 'GiB a chip', 'compute', 'HBM',
           'ICI', 'exposed', 'step', 'MFU', 'tokens/s', 'days')


def row(p: dict[str, Any]) -> list[str]:
  """A plan as cells; times in milliseconds."""
  ms = lambda s: f'{1e3 * s:,.0f}'
  mesh = ' '.join(f'{k}={v}' for k, v in p['mesh'].items() if v > 1) or '1'
  fits = '' if p['fits'] else ', does not fit'
  return [
      p['topology'], mesh, str(p['accumulate']),
      f'{p["memory_used"] / chips.GIB:.1f} of'
      f' {p["memory_of_device"] / chips.GIB:.0f}{fits}',
      *(ms(p['bounds'][k]) for k in ('compute', 'HBM', 'ICI')),
      ms(p['exposed_s']), ms(p['step_s']),
      f'{p["mfu"]:.1%} to {p["mfu_bound"]:.1%}',
      f'{p["tokens_per_s"]:,.0f}', f'{p["days"]:.1f}']


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def weak(plans: list[dict[str, Any]]) -> list[list[str]]:
  """Against the fewest chips: what a step of as much work takes longer."""
  plans = sorted(plans, key=lambda p: p['chips'])
  first = plans[0]
  return [
      [str(p['chips']), f'{1e3 * p["step_s"]:,.0f}',
       f'{p["communication_share"]:.1%}', f'{p["bounds"]["ICI"] * 1e3:,.0f}',
       f'{first["step_s"] / p["step_s"]:.1%}', p['limited_by']]
      for p in plans]


def main() -> None:
  plans = {path.stem: json.loads(path.read_text())
           for path in sorted(pathlib.Path(sys.argv[1]).glob('*.json'))}
  print(table(COLUMNS, [
      row(p) for name, p in plans.items() if not name.startswith('weak')]))
  scaled = [p for name, p in plans.items() if name.startswith('weak')]
  if scaled:
    print()
    print(table(('chips', 'step, ms', 'communication share', 'ICI, ms',
                 'weak-scaling bound', 'limited by'), weak(scaled)))


if __name__ == '__main__':
  main()
