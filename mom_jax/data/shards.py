"""Tokenised documents in ArrayRecord shards, as scripts/prepare_data.py writes.

A folder of shards holds

  index.json                               written last: the folder is complete
  vocabulary/                              tokenizers, see tokenizers.load
  SPLIT-00000-of-00008.array_record        tokens of documents, little-endian,
                                           of index.json's dtype, in records of
                                           up to RECORD tokens of one document
  SPLIT-00000-of-00008.lengths.npy         tokens of each document, int64

with SPLIT train or validation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import glob as globbing
import hashlib
import io
import itertools
import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from mom_jax import config, digest
from mom_jax.data import images, text, tokenizers

INDEX, FOLDER = 'index.json', 'vocabulary'
RECORDS, LENGTHS = '.array_record', '.lengths.npy'
FORMAT = 2
RECORD = 2**13  # tokens of a record, so that parts of documents cost little
SUGGESTION = 'write the shards with scripts/prepare_data.py'


class Digests(NamedTuple):
  """Digests of the tokens of a shard and of its lengths file."""

  tokens: str
  lengths: str


def write(
    path: pathlib.Path, documents: Iterable[np.ndarray], dtype: str
) -> Digests:
  """Write one shard atomically; its lengths file comes last."""
  from array_record.python import array_record_module
  temporary = path.with_name(path.name + '.tmp')
  writer = array_record_module.ArrayRecordWriter(str(temporary), 'group_size:1')
  lengths, content = [], hashlib.blake2b(digest_size=8)
  try:
    for tokens in documents:
      content.update(tokens.astype(dtype).tobytes())
      for start in range(0, len(tokens), RECORD):
        writer.write(tokens[start:start + RECORD].astype(dtype).tobytes())
      lengths.append(len(tokens))
    writer.close()
  except RuntimeError as e:
    raise OSError(str(e)) from e
  temporary.replace(path)
  finished = lengths_path(path)
  temporary = finished.with_name(finished.name + '.tmp')
  file = io.BytesIO()
  np.save(file, np.array(lengths, np.int64))
  temporary.write_bytes(file.getvalue())
  temporary.replace(finished)
  return Digests(content.hexdigest(), digest.of(file.getvalue()))


def lengths_path(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(path.name.removesuffix(RECORDS) + LENGTHS)


class Shards:
  """Documents of shards in random access.

  Args:
    name: the source.
    shards: files and their digests.
    dtype: of the tokens.
    size: of the vocabulary.
  """

  def __init__(
      self, name: str, shards: Mapping[pathlib.Path, Digests], dtype: str,
      size: int,
  ):
    self.name, self._dtype, self._size = name, dtype, size
    self._paths = list(shards)
    self.fingerprint = digest.of(*itertools.chain(*shards.values()))
    lengths = [
        self._lengths(path, digests) for path, digests in shards.items()]
    self.length_N = np.concatenate([np.zeros(0, np.int64), *lengths])
    self._first_S = np.cumsum([0, *map(len, lengths)])
    self._readers: dict[int, Any] = {}
    records = [-(-length_N // RECORD) for length_N in lengths]
    self._record_N = np.concatenate(
        [np.zeros(0, np.int64), *(np.cumsum(r) - r for r in records)])
    for shard, wanted in enumerate(int(r.sum()) for r in records):
      found = self._reader(shard).num_records()
      if found != wanted:
        raise config.UserError(
            f'{self._paths[shard]} must be a whole ArrayRecord file of the'
            f' {wanted} records in its lengths file, but'
            f' {found} can be read; {SUGGESTION}.'
        )

  def _lengths(self, path: pathlib.Path, digests: Digests) -> np.ndarray:
    try:
      data = lengths_path(path).read_bytes()
      if digest.of(data) != digests.lengths:
        raise ValueError('they are not those that were written')
      return np.load(io.BytesIO(data), allow_pickle=False)
    except (OSError, ValueError) as e:
      raise config.UserError(
          f'{lengths_path(path)} must hold the lengths of {path.name}'
          f' ({type(e).__name__}: {e}); {SUGGESTION}.'
      ) from e

  def _reader(self, shard: int) -> Any:
    from array_record.python import array_record_module
    if shard not in self._readers:
      path = self._paths[shard]
      try:
        reader = array_record_module.ArrayRecordReader(
            str(path), 'readahead_buffer_size:0,max_parallelism:0'
        )
      except (RuntimeError, ValueError, OSError) as e:
        raise self._damaged(path, e) from e
      self._readers[shard] = reader
    return self._readers[shard]

  def _damaged(self, path: pathlib.Path, error: Exception) -> config.UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return config.UserError(
        f'{path} must be a whole ArrayRecord file ({reason}); {SUGGESTION}.'
    )

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, '_readers': {}}  # readers open again on demand

  def part(
      self, index: int, start: int = 0, stop: int | None = None
  ) -> np.ndarray:
    start, stop, _ = slice(start, stop).indices(self.length_N[index])
    first, last = start // RECORD, -(-stop // RECORD)
    records = [self._record(index, number) for number in range(first, last)]
    tokens = np.concatenate([np.zeros(0, np.int32), *records])
    return tokens[start - first * RECORD:stop - first * RECORD]

  def counts(
      self, index: int, start: int = 0, stop: int | None = None
  ) -> np.ndarray:
    return np.ones(
        len(range(self.length_N[index])[slice(start, stop)]), bool)

  def _record(self, index: int, number: int) -> np.ndarray:
    """Read a record of a document."""
    shard = int(np.searchsorted(self._first_S, index, 'right')) - 1
    record = int(self._record_N[index]) + number
    try:
      data = self._reader(shard).read([record])[0]
    except (RuntimeError, ValueError, IndexError, OSError) as e:
      raise self._damaged(self._paths[shard], e) from e
    where = f'{self._paths[shard]} record {record}'
    length = min(RECORD, int(self.length_N[index]) - number * RECORD)
    if len(data) != length * np.dtype(self._dtype).itemsize:
      raise config.UserError(
          f'{where} has {len(data)} bytes instead of {length} tokens of type'
          f' {self._dtype}; {SUGGESTION}.'
      )
    tokens = np.frombuffer(data, self._dtype)
    if length and int(tokens.max()) >= self._size:
      raise config.UserError(
          f'{where} has the token {int(tokens.max())} outside the vocabulary'
          f' of {self._size} ids; {SUGGESTION}.'
      )
    return tokens.astype(np.int32)


def _files(spec: str) -> list[pathlib.Path]:
  pattern = spec.partition(':')[2]
  found = globbing.glob(os.path.expanduser(pattern))
  paths = sorted(pathlib.Path(f) for f in found if f.endswith(RECORDS))
  if not paths:
    raise config.UserError(
        f'config.data.sources has {spec!r}, which matches no {RECORDS} file;'
        " give a pattern such as 'array_record:DIR/*.array_record'."
    )
  return paths


def _index(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / INDEX
  try:
    index = json.loads(path.read_text())
    if index['format'] != FORMAT:
      raise config.UserError(
          f'{path} has format {index["format"]}, but only {FORMAT} is known;'
          f' {SUGGESTION}.'
      )
    return digest.unsealed(index)
  except FileNotFoundError as e:
    raise config.UserError(
        f'{path} is missing, so the shards are unfinished or not ours; run'
        f' scripts/prepare_data.py --out={folder} (again): it resumes where it'
        ' stopped.'
    ) from e
  except config.UserError:
    raise
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise config.UserError(
        f'{path} is damaged ({type(e).__name__}: {e}); {SUGGESTION}.'
    ) from e


def check(spec: str) -> None:
  """Raise UserError if a pattern matches no finished shards."""
  for folder in {p.parent for p in _files(spec)}:
    _index(folder)


def vocabulary(
    specs: Sequence[str], settings: config.Tokenizer
) -> tokenizers.Vocabulary:
  """Load the vocabulary of all shards of all specs.

  Raises:
    UserError: the shards or their vocabularies differ from each other or from
      the settings.
  """
  folders = sorted({p.parent for spec in specs for p in _files(spec)})
  found = {}
  for folder in folders:
    recorded = config.Tokenizer(**_index(folder)['tokenizer'])
    made = tokenizers.load(folder / FOLDER, settings.image)
    _check_settings(folder, made, recorded, settings)
    found.setdefault(made.fingerprint, (folder, made))
  if len(found) > 1:
    (one, _), (other, _), *_ = found.values()
    raise config.UserError(
        f'the shards in {one} and {other} were made with different tokenizers'
        ' and cannot be mixed; prepare both with the same tokenizer settings.'
    )
  return next(iter(found.values()))[1]


def _check_settings(
    folder: pathlib.Path, made: tokenizers.Vocabulary,
    recorded: config.Tokenizer, settings: config.Tokenizer,
) -> None:
  """Raise UserError if settings name other tokenizers than made the shards."""
  names, stored = ['text'], {
      'text': folder / FOLDER / (tokenizers.TEXT + made.text.suffix),
      'image': folder / FOLDER / tokenizers.CODEBOOK}
  if made.image is not None:
    names += ['image', 'image_size']
    if isinstance(made.image, images.PatchCodebook):
      names += ['patch', 'codes']
  for name in names:
    mine, theirs = getattr(settings, name), getattr(recorded, name)
    if not (_same_content(name, mine, made) if _is_file(mine)
            else mine == theirs):
      key = f'config.data.tokenizer.{name}'
      wanted = stored[name] if _has_ending(theirs) else theirs
      raise config.UserError(
          f'{key}={mine!r} differs from {theirs!r}, which made the shards in'
          f' {folder}; set --{key}={wanted} or prepare them again.')


def _same_content(
    name: str, path: str, made: tokenizers.Vocabulary) -> bool:
  if name == 'text':
    return text.fingerprint(text.load(path)) == text.fingerprint(made.text)
  return images.load(path).fingerprint == made.image.fingerprint


def _has_ending(value: object) -> bool:
  endings = {'.npz', *text.TEXT_TOKENIZERS}
  return isinstance(value, str) and pathlib.Path(value).suffix in endings


def _is_file(value: object) -> bool:
  return _has_ending(value) and os.path.isfile(os.path.expanduser(value))


def open_shards(
    spec: str, split: str, expected: tokenizers.Vocabulary
) -> Shards:
  """Open the documents of one split in the shards that match a pattern.

  Raises:
    UserError: no shards, damaged shards, or another vocabulary.
  """
  paths = _files(spec)
  indices = {folder: _index(folder) for folder in {p.parent for p in paths}}
  for folder, index in indices.items():
    if index['vocabulary'] != expected.fingerprint:
      raise config.UserError(
          f'config.data.sources has {spec!r}, made with other tokenizers than'
          f' this run ({folder / FOLDER}); prepare the shards again, or start'
          ' a run whose only other sources agree with them.'
      )
  of_split = [p for p in paths if p.name.startswith(f'{split}-')]
  if not of_split and split == 'train':
    raise config.UserError(
        f'config.data.sources has {spec!r}, which matches no'
        f' train-*{RECORDS} file; widen the pattern.'
    )
  digests = {path: _digests(path, indices[path.parent]) for path in of_split}
  dtype = indices[paths[0].parent]['dtype']
  return Shards(spec, digests, dtype, expected.size)


def _digests(path: pathlib.Path, index: dict[str, Any]) -> Digests:
  name = path.name.removesuffix(RECORDS)
  if name not in index['digests']:
    raise config.UserError(
        f'{path} is not among the shards that {path.parent / INDEX} lists;'
        f' remove it, or {SUGGESTION}.')
  return Digests(*index['digests'][name])

