"""Code that the benchmarks share: the clock, the machine, the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import json
import os
import pathlib
import platform
import statistics
import time
from typing import Any

import jax
import jaxlib

from mom_jax import config

Row = dict[str, Any]


def interleave(
    runs: Mapping[str, Callable[[], Any]], repetitions: int
) -> dict[str, float]:
  """Median seconds of each run, results on the device waited for.

  All run in turns, A B A B, so that whatever else the machine does hits all
  alike. Each runs once untimed before, which is where it may compile.
  """
  for run in runs.values():
    jax.block_until_ready(run())
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(repetitions):
    for name, run in runs.items():
      started = time.perf_counter()
      jax.block_until_ready(run())
      seconds[name].append(time.perf_counter() - started)
  return {name: statistics.median(times) for name, times in seconds.items()}


def machine(dtype: str) -> dict[str, str]:
  """Return the hardware and the versions that a number depends on."""
  devices = jax.devices()
  return {
      'device': f'{len(devices)} x {devices[0].device_kind}',
      'cores': str(os.cpu_count()),
      'jax': jax.__version__,
      'jaxlib': jaxlib.__version__,
      'Python': platform.python_version(),
      'dtype': dtype,
  }


def check_output(path: str | None) -> None:
  """Raises UserError if no file can be written there, before any work."""
  folder = pathlib.Path(path or '.').expanduser().absolute().parent
  if not os.access(folder, os.W_OK):
    raise config.UserError(
        f'--output={path}: {folder} is no folder to write to; create it first.')


def check_positive(name: str, value: int) -> None:
  if value < 1:
    raise config.UserError(f'--{name}={value} must be above 0.')


def report(
    header: Mapping[str, str], tables: Mapping[str, Sequence[Row]],
    output: str | None,
) -> None:
  """Prints Markdown; writes {'machine', 'tables'} as JSON to `output`."""
  print(', '.join(f'{key} {value}' for key, value in header.items()))
  for title, rows in tables.items():
    print(f'\n{title}\n\n{markdown(rows)}')
  if output:
    text = json.dumps({'machine': header, 'tables': tables}, indent=2)
    pathlib.Path(output).expanduser().write_text(text + '\n')


def markdown(rows: Sequence[Row]) -> str:
  """A table with the columns of the first row; None is an empty cell."""
  names = list(rows[0])
  body = [[_cell(row[name]) for name in names] for row in rows]
  left = [any(isinstance(row[name], str) for row in rows) for name in names]
  lines = [names, ['---' if x else '---:' for x in left], *body]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def _cell(value: Any) -> str:
  if value is None:
    return ''
  if isinstance(value, int):
    return f'{value:,}'
  if not isinstance(value, float):
    return str(value)
  if abs(value) >= 1000:
    return f'{value:,.0f}'
  return f'{value:.2e}' if 0 < abs(value) < 1e-3 else f'{value:.3g}'
