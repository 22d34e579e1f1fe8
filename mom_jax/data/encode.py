"""Documents as tokens, and the vocabulary of a configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import json
import os
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from mom_jax import config, digest
from mom_jax.data import (
    cache,
    images,
    shards,
    sources,
    synthetic,
    tally,
    text,
    tokenizers,
)
from mom_jax.data.document import Part

FIT_IMAGES = 8192  # maximum number of images that a codebook is fitted to
FIT_TEXT = 1 << 23  # characters of each source that a tokenizer is fitted to


@runtime_checkable
class Documents(Protocol):
  """Token sequences in random access.

  Attributes:
    name: the source, as in config.data.sources.
    fingerprint: changes with the tokens, not with the place of the source.
    length_N: tokens of each document.
  """

  name: str
  fingerprint: str
  length_N: np.ndarray

  def part(
      self, index: int, start: int = 0, stop: int | None = None
  ) -> np.ndarray:
    """Return int32 tokens of a document [eos, ..., eos], at little cost."""

  def counts(
      self, index: int, start: int = 0, stop: int | None = None
  ) -> np.ndarray:
    """Mark the tokens of a part that count as targets, bool."""


@dataclasses.dataclass(frozen=True)
class InMemory:
  """Documents of a split in one array of tokens, starting at `start_N`."""

  name: str
  fingerprint: str
  tokens_S: np.ndarray
  start_N: np.ndarray
  length_N: np.ndarray

  def part(
      self, index: int, start: int = 0, stop: int | None = None
  ) -> np.ndarray:
    first = self.start_N[index]
    start, stop, _ = slice(start, stop).indices(self.length_N[index])
    return self.tokens_S[first + start:first + stop].astype(np.int32)

  def counts(
      self, index: int, start: int = 0, stop: int | None = None
  ) -> np.ndarray:
    return np.ones(
        len(range(self.length_N[index])[slice(start, stop)]), bool)


class Splits(NamedTuple):
  """Training and validation documents of a source, and its tally."""

  train: Documents
  validation: Documents
  tally: tally.Tally


def check(cfg: config.Config) -> None:
  """Raise UserError for sources and tokenizers that are plainly missing.

  It opens nothing that takes time, so that it can come before all else.
  """
  data = cfg.data
  for spec in data.sources:
    if spec.startswith(sources.TOKENIZED + ':'):
      shards.check(spec)
    elif spec.startswith(sources.SYNTHETIC + ':'):
      try:
        synthetic.parse(spec.removeprefix(sources.SYNTHETIC + ':'))
      except config.UserError as e:
        raise config.UserError(
            f'config.data.sources has {spec!r}: {e}') from e
    else:
      sources.check_source(spec)
  folder = data.image_folder
  if folder and not os.path.isdir(os.path.expanduser(folder)):
    raise config.UserError(
        f'config.data.image_folder={folder!r} is no folder; give the one that'
        ' image paths start from.')
  tokenised = any(s.startswith(sources.TOKENIZED + ':') for s in data.sources)
  if not tokenised and not cfg.train.init_from:
    text.check(data.tokenizer.text)
    images.check(data.tokenizer.image)


def build_vocabulary(cfg: config.Config) -> tokenizers.Vocabulary:
  """Build the vocabulary of a configuration and check that the model fits.

  Raises:
    UserError: something is missing, or model.vocab_size is too small.
  """
  vocabulary = make_vocabulary(cfg.data)
  vocabulary.check(cfg)
  return vocabulary


def make_vocabulary(data: config.Data) -> tokenizers.Vocabulary:
  """Build the vocabulary of config.data.tokenizer for config.data.sources.

  Tokenised shards contain the vocabulary they were made with. Otherwise
  'bpe:SIZE' and 'patch_vq' are fitted to the training texts and images of the
  sources. Sources without images give a vocabulary without image codes;
  synthetic tasks use the text tokens of any vocabulary.

  Raises:
    UserError: something is missing, or does not fit what shards were made with.
  """
  prepared = [s for s in data.sources if s.startswith(sources.TOKENIZED + ':')]
  if prepared:
    return shards.vocabulary(prepared, data.tokenizer)
  settings = data.tokenizer
  size = text.fitted_size(settings.text)
  text_tokenizer = (
      _fitted_text(data, size) if size else text.load(settings.text))
  if settings.image == 'patch_vq':
    image = _fitted_images(data)
  elif settings.image.endswith('.npz'):
    image = images.load(settings.image, settings)
  else:
    image = images.from_function(settings.image)
  return tokenizers.Vocabulary(text_tokenizer, image, settings.image)


def _readable(data: config.Data) -> list[str]:
  return [spec for spec in data.sources if not sources.is_tokens(spec)]


def _fitted_text(data: config.Data, size: int) -> text.HuggingFace:
  """Fit BPE to the training texts, every source with equal weight."""
  corpora = []
  for spec in _readable(data):
    found, left = [], FIT_TEXT
    for part in training_parts(sources.open_source(spec, data), data):
      if isinstance(part, str) and part:
        found.append(part[:left])
        left -= len(found[-1])
      if not left:
        break
    corpora.append(found)
  lengths = [sum(map(len, found)) for found in corpora]
  texts = [
      part for found, length in zip(corpora, lengths) if length
      for part in found * round(max(lengths) / length)
  ]
  name = digest.of('\0'.join(texts).encode('utf-8', 'replace'), 'bpe 1')
  made = cache.arrays(
      data.cache, f'bpe-{size}-{name}',
      lambda: {'json': np.frombuffer(text.fit(texts, size), np.uint8)},
  )
  return text.HuggingFace(made['json'].tobytes())


def _fitted_images(data: config.Data) -> images.PatchCodebook | None:
  pixels: list[np.ndarray] = []
  for spec in _readable(data):
    source = sources.open_source(spec, data)
    read = source.tally
    read.used[tally.DOCUMENT] = len(source)
    for part in training_parts(source, data):
      if not isinstance(part, str):
        pixels.append(part)
        read.used[tally.IMAGE] += 1
      if read.used[tally.IMAGE] == FIT_IMAGES:
        break
    read.check(spec)
  if not pixels:
    return None
  stacked = np.stack(pixels[:FIT_IMAGES])
  settings = data.tokenizer
  name = digest.of(
      stacked.tobytes(), f'{settings.patch} {settings.codes}', 'k-means 1'
  )
  made = cache.arrays(
      data.cache, f'codebook-{name}',
      lambda: {'codebook': images.fit(stacked, settings).codebook_CD},
  )
  return images.PatchCodebook(
      made['codebook'], settings.patch, settings.image_size
  )


def training_parts(
    source: sources.Source, data: config.Data
) -> Iterator[Part]:
  """Yield the parts of training documents in a fixed random order."""
  held_N = source_split(source, data)
  order_N = np.random.default_rng(0).permutation(np.flatnonzero(~held_N))
  for index in order_N.tolist():
    yield from source[index].parts


def source_split(source: sources.Source, data: config.Data) -> np.ndarray:
  """Mark the held-out documents of a source, bool [N]."""
  keys = [source.key(i) for i in range(len(source))]
  return sources.split(sources.hashes(keys), data.validation)


class Encoded(NamedTuple):
  """Tokens of documents that are not empty, their indices, and a tally."""

  tokens: list[np.ndarray]
  kept: list[int]
  tally: tally.Tally


def encode_documents(
    source: sources.Source, indices: Sequence[int],
    vocabulary: tokenizers.Vocabulary,
) -> Encoded:
  """Encode the documents of some indices."""
  source.tally = read = tally.Tally()
  tokens, kept = [], []
  for index in indices:
    parts = source[index].parts
    if vocabulary.image is None:
      texts = tuple(part for part in parts if isinstance(part, str))
      if len(texts) < len(parts):
        read.leave_out(tally.IMAGE, tally.NO_CODES, source.where(index),
                       len(parts) - len(texts))
      parts = texts
    if parts:
      encoded = [vocabulary.encode_part(part) for part in parts]
      tokens.append(vocabulary.join(encoded))
      kept.append(index)
      read.used[tally.DOCUMENT] += 1
      for part, ids in zip(parts, encoded):
        _count_part(read, vocabulary, part, ids, source.where(index))
    else:
      read.leave_out(tally.DOCUMENT, tally.EMPTY, source.where(index))
  return Encoded(tokens, kept, read)


def _count_part(
    read: tally.Tally, vocabulary: tokenizers.Vocabulary, part: Part,
    ids: np.ndarray, where: str,
) -> None:
  """Add a part to a tally, and what its ids do not hold."""
  if not isinstance(part, str):
    read.used[tally.IMAGE] += 1
    return
  lost = vocabulary.text.unknown(part, ids)
  read.used[tally.CHARACTER] += len(part) - len(lost)
  if lost:
    read.leave_out(
        tally.CHARACTER, tally.UNKNOWN, f'{lost[0]!r} in {where}', len(lost))


def open_documents(
    spec: str, cfg: config.Config, vocabulary: tokenizers.Vocabulary
) -> Splits:
  """Open a source as tokens, split into training and validation.

  Embedded sources are tokenised once and cached. Files are tokenised into
  memory every time; use scripts/prepare_data.py for large ones.
  """
  if spec.startswith(sources.TOKENIZED + ':'):
    return Splits(
        *(shards.open_shards(spec, split, vocabulary)
          for split in ('train', 'validation')), tally.Tally())
  if spec.startswith(sources.SYNTHETIC + ':'):
    held = None if cfg.data.validation else 0
    return Splits(
        synthetic.open_documents(spec, vocabulary, 'train'),
        synthetic.open_documents(spec, vocabulary, 'validation', held),
        tally.Tally())
  source = sources.open_source(spec, cfg.data)

  def encode_all() -> cache.Arrays:
    return _encoded(source, vocabulary)

  encoded = encode_all() if source.fingerprint is None else cache.arrays(
      cfg.data.cache,
      f'{source.fingerprint}-encoded-{vocabulary.fingerprint}', encode_all)
  read = tally.Tally(**json.loads(encoded['tally'].tobytes()))
  read.check(spec)
  length_N = encoded['lengths']
  if not length_N.size:
    raise config.UserError(
        f'config.data.sources has {spec!r}, which holds no documents; leave it'
        ' out.'
    )
  start_N = np.cumsum(length_N) - length_N
  held_N = sources.split(encoded['hashes'], cfg.data.validation)
  tokens_S = encoded['tokens']
  fingerprint = digest.of(
      tokens_S.tobytes(), length_N.tobytes(), encoded['hashes'].tobytes())
  train, validation = (
      InMemory(spec, fingerprint, tokens_S, start_N[side], length_N[side])
      for side in (~held_N, held_N))
  return Splits(train, validation, read)


def _encoded(
    source: sources.Source, vocabulary: tokenizers.Vocabulary
) -> cache.Arrays:
  """Encode all documents of a source; the tally is JSON."""
  encoded = encode_documents(source, range(len(source)), vocabulary)
  read = json.dumps(encoded.tally.to_json()).encode()
  kind = np.uint16 if vocabulary.size <= 2**16 else np.int32
  return {
      'tokens': np.concatenate(encoded.tokens or [np.zeros(0)]).astype(kind),
      'lengths': np.array([len(t) for t in encoded.tokens], np.int64),
      'hashes': sources.hashes([source.key(i) for i in encoded.kept]),
      'tally': np.frombuffer(read, np.uint8),
  }
