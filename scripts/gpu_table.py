"""Makes the table of a run of scripts/gpu_kit.sh.

  python scripts/gpu_table.py DIR

Reads DIR/results.jsonl, prints Markdown and writes DIR/table.md and
DIR/results.json. A row is a case and a pass: our time, the best of the others
with its name, their ratio (above 1: we are faster), the floor that the
machine's own ceilings set, our share of it, our error. Who was absent, and why,
is below.
"""

from __future__ import annotations

import json
import pathlib
import sys

import gpu_cases

OURS = 'mom_jax'
# Does less than what it is compared with, so it is named and never the best.
EASIER = ('batched einsum',)
COLUMNS = ('case', 'pass', 'ours ms', 'best rival ms', 'rival', 'rival / ours',
           'floor ms', '% of floor', 'error', 'tokens/s', 'GiB', 'MFU %')


def read(folder: str) -> list[dict]:
  path = gpu_cases.results(folder)
  lines = path.read_text().split('\n') if path.exists() else []
  return [json.loads(line) for line in lines if line]


def ceilings(rows: list[dict]) -> tuple[float, float] | None:
  """(operations, bytes) a second that this machine reached, if it was asked."""
  found = {row['ceiling']: row for row in rows if 'ceiling' in row}
  if set(found) < {'matmul', 'copy'}:
    return None
  return found['matmul']['flops'], found['copy']['bandwidth']


def table(rows: list[dict]) -> list[dict]:
  """A row for each case and pass, in the order in which they came."""
  most = ceilings(rows)
  cases = {case.name: case for case in gpu_cases.CASES}
  together: dict[tuple[str, str], list[dict]] = {}
  for row in rows:
    if 'case' in row:
      together.setdefault((row['case'], row['pass']), []).append(row)
  return [
      _row(*at, found, cases.get(at[0]), most)
      for at, found in together.items()]


def _row(name, pass_, found, case, most):
  timed = [row for row in found if 'ms' in row]
  ours = next((row for row in timed if row['who'] == OURS), {})
  others = [row for row in timed if row['who'] != OURS
            and not row['who'].startswith(EASIER)]
  best = min(others, key=lambda row: row['ms'], default={})
  both = ours and best
  floor = case and most and case.floor_ms(pass_, *most)
  number = lambda x, digits=3: '' if x is None else f'{x:.{digits}g}'
  scaled = lambda key, by: None if ours.get(key) is None else ours[key] * by
  return dict(zip(COLUMNS, (
      name, pass_, number(ours.get('ms')), number(best.get('ms')),
      best.get('who', ''), number(best['ms'] / ours['ms']) if both else '',
      number(floor or None),
      number(100 * floor / ours['ms']) if ours and floor else '',
      number(ours.get('error'), 2), number(ours.get('tokens/s'), 4),
      number(scaled('bytes', 2**-30)), number(scaled('of peak', 100)))))


def absent(rows: list[dict]) -> list[str]:
  """List measurements that have no time, and why; stages that ended early."""
  out = [
      f'{row["who"]}: {row["case"]}, {row["pass"]}: {row["absent"]}'
      for row in rows if 'absent' in row]
  return out + [
      f'stage {row["stage"]}: {row["ended"]}' for row in rows
      if 'stage' in row]


def markdown(rows: list[dict]) -> str:
  made = table(rows)
  lines = [COLUMNS, ['---'] * len(COLUMNS)]
  lines += [[row[name] for name in COLUMNS] for row in made]
  text = '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'
  missing = absent(rows)
  if missing:
    text += '\nAbsent:\n\n' + '\n'.join(f'- {line}' for line in missing) + '\n'
  return text


def main() -> None:
  folder = sys.argv[1]
  rows = read(folder)
  text = markdown(rows)
  pathlib.Path(folder, 'table.md').write_text(text)
  pathlib.Path(folder, 'results.json').write_text(
      json.dumps({'rows': rows, 'table': table(rows)}, indent=1) + '\n')
  print(text)


if __name__ == '__main__':
  main()
