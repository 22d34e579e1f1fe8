"""Cache of arrays that are expensive to make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import pathlib
import secrets

from absl import logging
import numpy as np

from mom_jax import config

Arrays = Mapping[str, np.ndarray]


def arrays(folder: str, name: str, build: Callable[[], Arrays]) -> Arrays:
  """Return the arrays in folder/name.npz; build them if missing or damaged.

  The file is written under another name and renamed, so processes that build at
  the same time leave one complete file.

  Raises:
    UserError: the folder cannot be written, or there is no home folder.
  """
  try:
    path = pathlib.Path(folder).expanduser() / f'{name}.npz'
  except RuntimeError as e:
    raise config.UserError(
        f'config.data.cache={folder!r}: there is no home folder; give another'
        ' with --config.data.cache=DIR.') from e
  if path.exists():
    try:
      with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}
    except Exception:  # damage makes numpy raise almost anything
      logging.warning('%s is damaged and is made again', path)
  made = build()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(path, made)
  except OSError as e:
    raise config.UserError(
        f'config.data.cache={folder!r} must be a folder that can be written'
        f' ({e.strerror}); give another with --config.data.cache=DIR.'
    ) from e
  return made


def write_arrays(path: pathlib.Path, values: Arrays) -> None:
  """Write an .npz file atomically, with the permissions that umask says."""
  temporary = path.with_name(f'{path.stem}{secrets.token_hex(8)}.tmp')
  try:
    with temporary.open('xb') as file:
      np.savez(file, **values)
    temporary.replace(path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
