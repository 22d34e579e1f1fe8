"""Documents from files: JSON lines and Parquet.

One line or row is one document, in one of two forms:

  {"parts": [{"text": "A cat."}, {"image": "cats/1.png"}, {"text": "And ..."}]}
  {"text": "A cat.", "image": "cats/1.png"}          (either may be missing)

An image is a path, or a struct of `bytes` and `path`, or, in Parquet, its
encoded bytes. Paths start from data.image_folder, by default the folder of the
file, and cannot leave it. An optional "key" (string or whole number) decides
the split: documents with one key stay together. Without it the key is the
content, so equal documents stay together. Images that are missing or cannot be
read, and documents without parts, are left out and counted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
import hashlib
import io
import json
import os
import pathlib
from typing import Any

import numpy as np

from mom_jax import config
from mom_jax.data import pictures, tally
from mom_jax.data.document import Document, Part

CACHED = 1 << 28  # bytes of row groups that are kept in memory
MAX_GROUP = 1 << 31  # bytes of a row group; it is read as a whole


class Records:
  """Documents from the rows of one file.

  Args:
    reader: has `__len__` and `row(index) -> dict`.
    path: of the file.
    data: image_folder and the size of images are read.
  """

  fingerprint = None

  def __init__(self, reader: Any, path: pathlib.Path, data: config.Data):
    self._reader, self._path = reader, path
    self._size = data.tokenizer.image_size
    folder = data.image_folder or path.parent
    self._folder = os.path.abspath(os.path.expanduser(folder))
    self.tally = tally.Tally()

  def __len__(self) -> int:
    return len(self._reader)

  def content(self) -> str:
    with open(self._path, 'rb') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()

  def where(self, index: int) -> str:
    return f'{self._path} document {index}'

  def key(self, index: int) -> str:
    return self._key(self._reader.row(index), index)

  def __getitem__(self, index: int) -> Document:
    row = self._reader.row(index)
    parts = []
    for part in self._parts(row, index):
      loaded = self._load(part, index)
      if loaded is not None:
        parts.append(loaded)
    return Document(tuple(parts), self._key(row, index))

  def _key(self, row: dict[str, Any], index: int) -> str:
    key = row.get('key')
    if isinstance(key, str | int) and not isinstance(key, bool):
      return str(key)
    if key is not None:
      raise self._wrong(index, f'has a key of type {type(key).__name__}')
    try:
      content = repr(sorted(row.items()))
    except RecursionError as e:
      raise self._wrong(index, 'is nested too deeply') from e
    return hashlib.blake2b(content.encode()).hexdigest()

  def _parts(self, row: dict[str, Any], index: int) -> list[Any]:
    if not {'parts', 'text', 'image'} & set(row):
      raise self._wrong(index, f'has the fields {_names(row)}')
    parts = row.get('parts')
    if parts is None:
      return [{name: row[name]} for name in ('text', 'image')
              if row.get(name) is not None]
    if not isinstance(parts, list) or not all(
        isinstance(p, dict | None) for p in parts):
      raise self._wrong(index, '"parts" is no list of objects')
    return parts

  def _load(self, part: dict[str, Any] | None, index: int) -> Part | None:
    """Load a part; None if it is empty or cannot be used (counted)."""
    if part is None or (part and all(v is None for v in part.values())):
      self._leave_out(tally.PART, tally.EMPTY_PART, self.where(index))
      return None
    text, image = part.get('text'), part.get('image')
    if (text is None) == (image is None):
      raise self._wrong(index, f'has a part with the fields {_names(part)}')
    if text is None:
      return self._load_image(image, index)
    if not isinstance(text, str):
      raise self._wrong(index, f'has a text of type {type(text).__name__}')
    return text or None

  def _load_image(self, image: Any, index: int) -> np.ndarray | None:
    if isinstance(image, dict):
      content, path = image.get('bytes'), image.get('path')
      if not isinstance(content, bytes | None):
        raise self._wrong(
            index, f'has image bytes of type {type(content).__name__}')
      image = content or path or b''
    if not isinstance(image, str | bytes):
      raise self._wrong(index, f'has an image of type {type(image).__name__}')
    where = self.where(index)
    if not image:
      return self._leave_out(tally.IMAGE, tally.NO_CONTENT, where)
    file = io.BytesIO(image) if isinstance(image, bytes) else None
    if file is None:
      where = os.path.normpath(os.path.join(self._folder, image))
      if os.path.commonpath((self._folder, where)) != self._folder:
        return self._leave_out(
            tally.IMAGE, tally.OUTSIDE, f'{where} (not in {self._folder})')
      if not os.path.isfile(where):
        return self._leave_out(tally.IMAGE, tally.MISSING, where)
      file = pathlib.Path(where)
    try:
      return pictures.read(file, self._size)
    except pictures.Unreadable as e:
      return self._leave_out(tally.IMAGE, tally.BROKEN, f'{where} ({e})')

  def _leave_out(self, unit: str, reason: str, example: str) -> None:
    self.tally.leave_out(unit, reason, repr(example)[1:-1])

  def _wrong(self, index: int, what: str) -> config.UserError:
    return config.UserError(
        f'{self.where(index)} {what}; a document is {{"parts":'
        ' [{"text": ...} or {"image": ...}, ...]} or {"text": ..., "image":'
        ' ...}, and its "key", if any, a string or a whole number.'
    )


def _names(fields: Iterable[str]) -> str:
  names = str(sorted(fields))
  return names if len(names) <= 200 else names[:200] + '...'


def _existing(kind: str, argument: str) -> pathlib.Path:
  path = pathlib.Path(os.path.expanduser(argument))
  if not path.is_file():
    raise config.UserError(
        f'config.data.sources has {kind + ":" + argument!r}, but there is no'
        ' such file; give the path of one.'
    )
  try:
    with open(path, 'rb'):
      return path
  except OSError as e:
    raise config.UserError(
        f'config.data.sources has {kind + ":" + argument!r}, which cannot be'
        f' read ({e.strerror}); give a file that can be.'
    ) from e


class JsonLines:
  """Rows of a JSON lines file, by their offsets."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    offsets, lines, start = [], [], 0
    with open(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          offsets.append(start)
          lines.append(number)
        start += len(line)
    self._offset_N, self._line_N = np.array(offsets), np.array(lines)

  def __len__(self) -> int:
    return len(self._offset_N)

  def row(self, index: int) -> dict[str, Any]:
    with open(self._path, 'rb') as file:
      file.seek(self._offset_N[index])
      line = file.readline()
    try:
      row = json.loads(line)
      if isinstance(row, dict):
        return row
      reason = 'it is no object'
    except (ValueError, RecursionError) as e:
      reason = str(e)
    raise config.UserError(
        f'{self._path} line {self._line_N[index]} must be one JSON object'
        f' ({reason}); the file may be cut off: repair or remove the line.'
    )


class ParquetRows:
  """Rows of a Parquet file; the last row groups stay in memory."""

  COLUMNS = ('parts', 'text', 'image', 'key')

  def __init__(self, path: pathlib.Path):
    try:
      import pyarrow
      from pyarrow import parquet as pq
    except ModuleNotFoundError as e:
      raise config.UserError(
          f'config.data.sources has {"parquet:" + str(path)!r}, which needs'
          " the package pyarrow; run: pip install 'mom_jax[parquet]'."
      ) from e
    self._path = path
    self._errors = (pyarrow.ArrowException, OSError, ValueError)
    try:
      self._file = pq.ParquetFile(path)
      names = self._file.schema_arrow.names
      groups = [self._file.metadata.row_group(g)
                for g in range(self._file.num_row_groups)]
      sizes = [group.num_rows for group in groups]
    except self._errors as e:
      raise self._unreadable(e) from e
    self._columns = [c for c in self.COLUMNS if c in names]
    self._check(names, groups)
    self._start_N = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    self._tables: OrderedDict[int, Any] = OrderedDict()

  def _check(self, names: list[str], groups: list[Any]) -> None:
    if not set(self._columns) - {'key'}:
      raise config.UserError(
          f'{self._path} has the columns {_names(names)}, but documents need'
          " 'parts', or 'text' or 'image' or both; rename its columns.")
    largest = max((g.total_byte_size for g in groups), default=0)
    if largest > MAX_GROUP:
      raise config.UserError(
          f'{self._path} has a row group of {largest:,} bytes, and'
          f' {MAX_GROUP:,} are the most; write it with smaller row groups.')

  def __len__(self) -> int:
    return int(self._start_N[-1])

  def row(self, index: int) -> dict[str, Any]:
    group = int(np.searchsorted(self._start_N, index, 'right')) - 1
    try:
      row, = self._table(group).slice(
          index - self._start_N[group], 1).to_pylist()
    except self._errors as e:
      raise self._unreadable(e) from e
    return row

  def _table(self, group: int) -> Any:
    """Read a row group, or take it from those in memory."""
    if group not in self._tables:
      self._tables[group] = self._file.read_row_group(group, self._columns)
      while len(self._tables) > 1 and sum(
          table.nbytes for table in self._tables.values()) > CACHED:
        self._tables.popitem(last=False)
    self._tables.move_to_end(group)
    return self._tables[group]

  def _unreadable(self, error: Exception) -> config.UserError:
    reason = ' '.join(str(error).split()) or type(error).__name__
    return config.UserError(
        f'config.data.sources has {"parquet:" + str(self._path)!r}, which is'
        f' no whole Parquet file ({reason}); copy or write it again.'
    )


def jsonl(argument: str, data: config.Data) -> Records:
  path = _existing('jsonl', argument)
  return Records(JsonLines(path), path, data)


def parquet(argument: str, data: config.Data) -> Records:
  path = _existing('parquet', argument)
  return Records(ParquetRows(path), path, data)


def check_jsonl(argument: str) -> None:
  """Raise UserError if a JSON lines file is missing, unreadable or empty."""
  path = _existing('jsonl', argument)
  with open(path, 'rb') as file:
    if not any(line.strip() for line in file):
      raise _empty(f'jsonl:{argument}')


def check_parquet(argument: str) -> None:
  """Raise UserError if a Parquet file is missing, unreadable or empty."""
  if not len(ParquetRows(_existing('parquet', argument))):
    raise _empty(f'parquet:{argument}')


def _empty(spec: str) -> config.UserError:
  return config.UserError(
      f'config.data.sources has {spec!r}, which holds no documents; leave it'
      ' out.')
