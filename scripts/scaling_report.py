"""The tables of docs/scaling.md from the plans that scaling.sh left.

  python scripts/scaling_report.py runs/scaling
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

from mom_jax import chips

COLUMNS = ('topology', 'mesh', 'grad accum', 'GiB per chip', 'compute', 'HBM',
           'ICI', 'exposed', 'step', 'MFU', 'tokens/s', 'days')
WEAK = ('chips', 'mesh', 'tokens per chip', 'compute', 'HBM', 'ICI', 'exposed',
        'fraction of the step', 'weak-scaling bound', 'limited by')


def mesh(p: dict[str, Any]) -> str:
  return ' '.join(f'{k}={v}' for k, v in p['mesh'].items() if v > 1) or '1'


def row(p: dict[str, Any]) -> list[str]:
  """A plan as cells; times in milliseconds."""
  ms = lambda s: f'{1e3 * s:,.0f}'
  fits = '' if p['fits'] else ', does not fit'
  return [
      p['topology'], mesh(p), str(p['grad_accum_steps']),
      f'{p["memory_used"] / chips.GIB:.1f} of'
      f' {p["device_memory"] / chips.GIB:.0f}{fits}',
      *(ms(p['bounds'][k]) for k in ('compute', 'HBM', 'ICI')),
      ms(p['exposed_s']), ms(p['step_s']),
      f'{p["mfu"]:.1%} to {p["mfu_bound"]:.1%}',
      f'{p["tokens_per_s"]:,.0f}', f'{p["days"]:.1f}']


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def weak(plans: list[dict[str, Any]]) -> list[list[str]]:
  """Rows of the weak-scaling table.

  The bound is own / (own + exposed), own being the least time of a chip's own
  work: a stricter measure than the step as libtpu estimates it.
  """
  found = []
  for p in sorted(plans, key=lambda p: p['chips']):
    own = max(p['bounds']['compute'], p['bounds']['HBM'])
    ms = [p['bounds'][k] for k in ('compute', 'HBM', 'ICI')] + [p['exposed_s']]
    found.append([
        str(p['chips']), mesh(p), f'{p["tokens_per_step"] // p["chips"]:,}',
        *(f'{1e3 * s:,.1f}' for s in ms), f'{p["communication_fraction"]:.1%}',
        f'{own / (own + p["exposed_s"]):.1%}', p['limited_by']])
  return found


def main() -> None:
  plans = {path.stem: json.loads(path.read_text())
           for path in sorted(pathlib.Path(sys.argv[1]).glob('*.json'))}
  print(table(COLUMNS, [
      row(p) for name, p in plans.items() if not name.startswith('weak')]))
  scaled = [p for name, p in plans.items() if name.startswith('weak')]
  if scaled:
    print()
    print(table(WEAK, weak(scaled)))


if __name__ == '__main__':
  main()
