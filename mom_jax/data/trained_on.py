"""What a run is trained on, in data.json of its workdir.

The position in a checkpoint counts documents, so it means something only for
the documents that it was saved with.
"""

from __future__ import annotations

from collections.abc import Sequence
import json
import pathlib
from typing import Any

from mom_jax import config, digest
from mom_jax.data import encode

FILE = 'data.json'
KEYS = {'source', 'documents', 'tokens', 'fingerprint'}


def keep(
    workdir: pathlib.Path, cfg: config.Config,
    documents: Sequence[encode.Splits], write: bool,
) -> list[str]:
  """Write what a run is trained on, or compare it with what was written.

  Places do not count: the same documents may come from elsewhere.

  Args:
    write: write the file if it is missing or has to change.
  Returns:
    Lines that say what has changed, if data.allow_changed.
  Raises:
    UserError: other documents, without data.allow_changed.
  """
  path = workdir / FILE
  now = [_describe(spec, splits)
         for spec, splits in zip(cfg.data.sources, documents)]
  before = _read(path) if path.is_file() else None
  changed = [] if before is None else _changes(before, now)
  if changed and not cfg.data.allow_changed:
    raise config.UserError(
        f'config.data.sources gives other documents than those that the run in'
        f' --workdir={workdir} was trained on: {", ".join(changed)}. Restore'
        ' them, choose another --workdir, or go on at the same position of the'
        ' new ones with --config.data.allow_changed=true.')
  if write and (before is None or changed):
    temporary = path.with_suffix('.json.partial')
    temporary.write_text(json.dumps(now, indent=2), encoding='utf-8')
    temporary.replace(path)
  return [f'documents have changed: {line}' for line in changed]


def _changes(
    before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
  if len(before) != len(now):
    return [f'{len(now)} sources (then {len(before)})']
  return [
      f'{new["source"]} (then {old["documents"]:,} documents of'
      f' {old["tokens"]:,} tokens, now {new["documents"]:,} of'
      f' {new["tokens"]:,})'
      for old, new in zip(before, now)
      if old['fingerprint'] != new['fingerprint']]


def _describe(spec: str, splits: encode.Splits) -> dict[str, Any]:
  both = splits.train, splits.validation
  return {
      'source': spec,
      'documents': sum(len(side.length_N) for side in both),
      'tokens': sum(int(side.length_N.sum()) for side in both),
      'fingerprint': digest.of(*(side.fingerprint for side in both)),
  }


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
    if found and all(set(one) >= KEYS for one in found):
      return found
    reason = 'entries are missing'
  except (OSError, ValueError, TypeError) as e:
    reason = str(e)
  raise config.UserError(
      f'{path} must hold what the run was trained on ({reason}); restore it'
      ' from a copy, or remove it if you are sure that the data are the same.')
