"""Sources of documents and the fixed split into training and validation.

A document is a sequence of parts, text or image, and a split key. All
documents with one key fall on the same side of the split. Adding a source is
one function and its line in SOURCES.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import hashlib
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from mom_jax import config
from mom_jax.data import embedded, files, synthetic, tally
from mom_jax.data.document import Document

__all__ = ['Document', 'Source', 'SOURCES', 'open_source', 'hashes', 'split']


@runtime_checkable
class Source(Protocol):
  """Documents in random access.

  Attributes:
    fingerprint: changes with the documents; None if unknown, and then nothing
      made from them is cached.
    tally: what was left out while reading.
  """

  fingerprint: str | None
  tally: tally.Tally

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Document: ...

  def key(self, index: int) -> str:
    """Return the split key of a document without reading its images."""

  def content(self) -> str:
    """Return a digest of the documents, without that of image files."""

  def where(self, index: int) -> str:
    """Return where a document is, for messages."""


class Opener(NamedTuple):
  """Functions for 'name' or 'name:argument', and the argument's name.

  Attributes:
    open: opens the source.
    check: raises UserError if there is nothing to open, in no time.
  """

  open: Callable[[str, config.Data], Source]
  check: Callable[[str], None]
  argument: str


SOURCES = {
    'openmoji': Opener(embedded.openmoji, embedded.check_openmoji, ''),
    'kjv': Opener(embedded.kjv, embedded.check_kjv, ''),
    'jsonl': Opener(files.jsonl, files.check_jsonl, 'PATH'),
    'parquet': Opener(files.parquet, files.check_parquet, 'PATH'),
}
# Sources of tokens, without texts and images.
TOKENIZED, SYNTHETIC = 'array_record', synthetic.NAME


def is_tokens(spec: str) -> bool:
  """Return True if a spec names tokens, not texts and images."""
  return spec.partition(':')[0] in (TOKENIZED, SYNTHETIC)


def open_source(spec: str, data: config.Data) -> Source:
  """Open 'name' or 'name:argument' of SOURCES.

  Raises:
    UserError: unknown name, missing or superfluous argument, or anything that
      the source finds missing or unreadable.
  """
  opener, argument = _opener(spec)
  return opener.open(argument, data)


def check_source(spec: str) -> None:
  """Raise UserError if a source of SOURCES is unknown, missing or empty."""
  opener, argument = _opener(spec)
  opener.check(argument)


def _opener(spec: str) -> tuple[Opener, str]:
  name, _, argument = spec.partition(':')
  if name not in SOURCES:
    known = [n + (f':{o.argument}' if o.argument else '')
             for n, o in SOURCES.items()]
    raise config.UserError(
        f'config.data.sources has the unknown source {spec!r}; known:'
        f' {", ".join(known)}, {TOKENIZED}:GLOB, {SYNTHETIC}:TASK.'
    )
  if bool(argument) != bool(SOURCES[name].argument):
    wanted = SOURCES[name].argument
    raise config.UserError(
        f'config.data.sources has {spec!r}; write'
        f' {name + (":" + wanted if wanted else "")!r}.'
    )
  return SOURCES[name], argument


def hashes(keys: Sequence[str]) -> np.ndarray:
  """Return the first eight bytes of BLAKE2b of each key, as uint64 [N]."""
  digests = b''.join(
      hashlib.blake2b(
          key.encode('utf-8', 'surrogatepass'), digest_size=8).digest()
      for key in keys
  )
  return np.frombuffer(digests, '<u8')


def split(hash_N: np.ndarray, fraction: float) -> np.ndarray:
  """Mark held-out documents, bool [N].

  A document is held out iff hash / 2^64 < fraction, whatever else the source
  has. If there are none although fraction > 0, the key with the smallest hash
  is held out, provided that another key remains.
  """
  held_N = hash_N < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))
  if fraction > 0 and hash_N.size and not held_N.any():
    held_N = hash_N == hash_N.min()
    if held_N.all():
      held_N = ~held_N
  return held_N
