"""Documents from files: JSON lines and Parquet.

One line or row is one document, in one of two forms:

  {"parts": [{"text": "A cat."}, {"image": "cats/1.png"}, {"text": "And ..."}]}
  {"text": "A cat.", "image": "cats/1.png"}          (either may be missing)

An image is a path relative to the file, or, in Parquet, its encoded bytes or a
struct of `bytes` and `path`. An optional "key" (string) decides the split:
documents with one key stay together. Without it the key is the content, so
equal documents stay together. Unreadable images are left out of their document
and counted, and so are documents without parts.
"""

from __future__ import annotations

from collections import Counter
import hashlib
import io
import json
import pathlib
from typing import Any

import numpy as np

from mom_jax import config
from mom_jax.data import pictures
from mom_jax.data.document import Document, Part


class Records:
  """Documents from the rows of one file.

  Args:
    reader: has `__len__` and `row(index) -> dict`.
    path: of the file; image paths are relative to its folder.
    size: height and width of images in pixels.
  """

  fingerprint = None

  def __init__(self, reader: Any, path: pathlib.Path, size: int):
    self._reader, self._path, self._size = reader, path, size
    self.problems = Counter()

  def __len__(self) -> int:
    return len(self._reader)

  def key(self, index: int) -> str:
    return self._key(self._reader.row(index))

  def __getitem__(self, index: int) -> Document:
    row = self._reader.row(index)
    parts = []
    for part in self._parts(row, index):
      loaded = self._load(part, index)
      if loaded is not None:
        parts.append(loaded)
    return Document(tuple(parts), self._key(row))

  def _key(self, row: dict[str, Any]) -> str:
    if isinstance(row.get('key'), str):
      return row['key']
    return hashlib.blake2b(repr(sorted(row.items())).encode()).hexdigest()

  def _parts(self, row: dict[str, Any], index: int) -> list[dict[str, Any]]:
    parts = row.get('parts')
    if parts is None and not {'text', 'image'} & set(row):
      raise self._wrong(index, f'has the fields {sorted(row)}')
    if parts is None:
      parts = [{name: row[name]} for name in ('text', 'image')
               if row.get(name) is not None]
    if not isinstance(parts, list) or not all(
        isinstance(p, dict) for p in parts):
      raise self._wrong(index, '"parts" is no list of objects')
    return parts

  def _load(self, part: dict[str, Any], index: int) -> Part | None:
    """Load a part; None for an empty text or an unreadable image (counted)."""
    text, image = part.get('text'), part.get('image')
    if (text is None) == (image is None):
      raise self._wrong(index, f'has a part with the fields {sorted(part)}')
    if text is not None:
      if not isinstance(text, str):
        raise self._wrong(index, f'has a text of type {type(text).__name__}')
      return text or None
    if isinstance(image, dict):
      image = image.get('bytes') or image.get('path')
    if not isinstance(image, (str, bytes)):
      raise self._wrong(index, f'has an image of type {type(image).__name__}')
    try:
      file = io.BytesIO(image) if isinstance(image, bytes) else (
          self._path.parent / image)
      return pictures.read(file, self._size)
    except pictures.Unreadable:
      self.problems['broken image'] += 1
      return None

  def _wrong(self, index: int, what: str) -> config.UserError:
    return config.UserError(
        f'{self._path} document {index} {what}; a document is {{"parts":'
        ' [{"text": ...} or {"image": ...}, ...]} or {"text": ..., "image":'
        ' ...}.'
    )


def _existing(kind: str, argument: str) -> pathlib.Path:
  path = pathlib.Path(argument).expanduser()
  if not path.is_file():
    raise config.UserError(
        f'config.data.sources has {kind + ":" + argument!r}, but there is no'
        ' such file; give the path of one.'
    )
  return path


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
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
      reason = str(e)
    raise config.UserError(
        f'{self._path} line {self._line_N[index]} must be one JSON object'
        f' ({reason}); the file may be cut off: repair or remove the line.'
    )


class ParquetRows:
  """Rows of a Parquet file; the last row group stays in memory."""

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
    self._path, self._errors = path, (pyarrow.ArrowException, OSError)
    try:
      self._file = pq.ParquetFile(path)
    except self._errors as e:
      raise self._unreadable(e) from e
    sizes = [self._file.metadata.row_group(g).num_rows
             for g in range(self._file.num_row_groups)]
    self._start_N = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    self._columns = [c for c in self.COLUMNS if c in
                     self._file.schema_arrow.names]
    self._group, self._rows = -1, []

  def __len__(self) -> int:
    return int(self._start_N[-1])

  def row(self, index: int) -> dict[str, Any]:
    group = int(np.searchsorted(self._start_N, index, 'right')) - 1
    if group != self._group:
      try:
        table = self._file.read_row_group(group, self._columns)
      except self._errors as e:
        raise self._unreadable(e) from e
      self._group, self._rows = group, table.to_pylist()
    return self._rows[index - self._start_N[group]]

  def _unreadable(self, error: Exception) -> config.UserError:
    return config.UserError(
        f'config.data.sources has {"parquet:" + str(self._path)!r}, which is'
        f' no whole Parquet file ({str(error).splitlines()[0]}); copy or write'
        ' it again.'
    )


def jsonl(argument: str, data: config.Data) -> Records:
  path = _existing('jsonl', argument)
  return Records(JsonLines(path), path, data.tokenizer.image_size)


def parquet(argument: str, data: config.Data) -> Records:
  path = _existing('parquet', argument)
  return Records(ParquetRows(path), path, data.tokenizer.image_size)
