"""Code that the reports share: finished runs, tables, small files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import json
import pathlib
from typing import Any

from PIL import Image

from mom_jax import config
from mom_jax.training import checkpoint, metrics


def finished(
    paths: Iterable[pathlib.Path],
) -> list[tuple[pathlib.Path, config.Config]]:
  """(workdir, settings) of every run that was validated at its last step."""
  found = []
  for path in sorted(paths):
    if (path / 'config.json').is_file():
      cfg = checkpoint.read_config(path)
      if any(r['step'] == cfg.train.steps and 'val_loss' in r
             for r in metrics.read_jsonl(path)):
        found.append((path, cfg))
  return found


def picture(source: pathlib.Path, target: pathlib.Path) -> None:
  """The same in 128 colours, which is small."""
  with Image.open(source) as image:
    image.convert('RGB').quantize(128).save(target, optimize=True)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table in Markdown."""
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in lines) + '\n'


def spread(values: Sequence[float], digits: int = 3) -> str:
  """Mean and the distance of the farthest seed."""
  mean = sum(values) / len(values)
  far = max(abs(v - mean) for v in values)
  return f'{mean:.{digits}f} ± {far:.{digits}f}'


def write_json(path: pathlib.Path, value: Any) -> None:
  """Small: numbers to six digits, no blanks."""
  path.write_text(
      json.dumps(_rounded(value), separators=(',', ':')), encoding='utf-8')


def _rounded(value: Any) -> Any:
  """Numbers to six digits, whatever holds them."""
  if isinstance(value, dict):
    return {k: _rounded(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_rounded(v) for v in value]
  return float(f'{value:.6g}') if isinstance(value, float) else value
