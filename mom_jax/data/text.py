"""Text tokenizers: bytes, a fitted BPE, Hugging Face files, SentencePiece."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import json
import os
import pathlib
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mom_jax import config, digest

DIGITS = 9  # of the largest size or symbol


@runtime_checkable
class TextTokenizer(Protocol):
  """Map between text and ids 0 .. size-1.

  Attributes:
    size: number of ids.
    suffix: of the tokenizer's file; '' if there is none.
    content: bytes of that file.
  """

  size: int
  suffix: str
  content: bytes

  def encode(self, text: str) -> np.ndarray:
    """Encode text as int32 ids."""

  def unknown(self, text: str, ids: np.ndarray) -> str:
    """Return the characters of a text that its ids do not tell apart."""

  def decode(self, ids: Sequence[int]) -> str:
    """Decode ids to text; bytes that are no UTF-8 become U+FFFD."""


def _utf8(text: str) -> bytes:
  """Encode as UTF-8; '?' replaces lone surrogates, which JSON can hold."""
  return text.encode('utf-8', 'replace')


def surrogates(text: str) -> str:
  """Return the lone surrogates of a text."""
  try:
    text.encode()
    return ''
  except UnicodeEncodeError:
    return ''.join(c for c in text if '\ud800' <= c <= '\udfff')


class Bytes:
  """Tokenizer with UTF-8 bytes as ids."""

  size, suffix, content = 256, '', b''

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

  def unknown(self, text: str, ids: np.ndarray) -> str:
    del ids
    return surrogates(text)

  def decode(self, ids: Sequence[int]) -> str:
    return bytes(ids).decode('utf-8', 'replace')


class Symbols:
  """Tokenizer for synthetic tasks: decimal ids with blanks between."""

  suffix = '.symbols'

  def __init__(self, content: bytes):
    self.content = content
    self.size = int(content)

  def encode(self, text: str) -> np.ndarray:
    words = text.split()
    for word in words:
      if not _is_number(word) or int(word) >= self.size:
        raise config.UserError(
            f'{_beginning(word)} is no symbol of this vocabulary; texts are'
            f' numbers from 0 to {self.size - 1} with blanks between, such as'
            " '3 14'."
        )
    return np.array([int(word) for word in words], np.int32)

  def unknown(self, text: str, ids: np.ndarray) -> str:
    del text, ids
    return ''  # `encode` refuses what is no symbol

  def decode(self, ids: Sequence[int]) -> str:
    return ' '.join(map(str, ids))


class HuggingFace:
  """Tokenizer from a tokenizer.json of the package tokenizers.

  Truncation, padding and BPE dropout, which the file may ask for, are off: they
  are for batches of another program.
  """

  suffix = '.json'

  def __init__(self, content: bytes):
    import tokenizers
    tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    dropout = getattr(tokenizer.model, 'dropout', None)
    if tokenizer.truncation or tokenizer.padding or dropout:
      tokenizer.no_truncation()
      tokenizer.no_padding()
      if dropout:
        tokenizer.model.dropout = None
      content = tokenizer.to_str().encode()
    self.content, self._tokenizer = content, tokenizer
    vocabulary = tokenizer.get_vocab()
    self.size = max(vocabulary.values()) + 1
    settings = json.loads(content)
    model = settings['model']
    self._unknown = model.get('unk_id')
    if model.get('unk_token') is not None:
      self._unknown = vocabulary.get(model['unk_token'])
    self._complete = _has_all_bytes(settings, vocabulary)

  def encode(self, text: str) -> np.ndarray:
    return np.array(self._encoded(text).ids, np.int32)

  def _encoded(self, text: str) -> Any:
    try:
      return self._tokenizer.encode(
          _utf8(text).decode(), add_special_tokens=False)
    except Exception as e:  # the package raises plain Exception
      raise config.UserError(
          f'the text tokenizer cannot encode {_beginning(text)} ({e}); add an'
          ' unknown token to it or take one of bytes, such as'
          ' --config.data.tokenizer.text=bpe:2048.'
      ) from e

  def unknown(self, text: str, ids: np.ndarray) -> str:
    """Return what became an unknown token or, without one, no token at all.

    Blanks are not counted, since most tokenizers cut texts at them.
    """
    if self._complete:
      return surrogates(text)
    if self._unknown is not None:
      if not (ids == self._unknown).any():
        return ''
      encoded = self._encoded(text)
      spans = [text[slice(*span)] for token, span in zip(
          encoded.ids, encoded.offsets) if token == self._unknown]
      return ''.join(spans)
    edges = np.zeros(len(text) + 1, np.int64)
    offsets = np.array(self._encoded(text).offsets, np.int64).reshape(-1, 2)
    np.add.at(edges, offsets[:, 0], 1)
    np.add.at(edges, offsets[:, 1], -1)
    missed = np.flatnonzero(np.cumsum(edges)[:-1] == 0)
    return ''.join(text[i] for i in missed if not text[i].isspace())

  def decode(self, ids: Sequence[int]) -> str:
    return self._tokenizer.decode(list(ids), skip_special_tokens=False)


class SentencePiece:
  """Tokenizer from a .model file of the package sentencepiece."""

  suffix = '.model'

  def __init__(self, content: bytes):
    import sentencepiece
    self.content = content
    self._processor = sentencepiece.SentencePieceProcessor(
        model_proto=content
    )
    self.size = self._processor.vocab_size()

  def encode(self, text: str) -> np.ndarray:
    return np.array(self._processor.encode(_utf8(text).decode()), np.int32)

  def unknown(self, text: str, ids: np.ndarray) -> str:
    unknown = self._processor.unk_id()
    if not (ids == unknown).any():
      return surrogates(text)
    pieces = self._processor.encode(_utf8(text).decode(), out_type=str)
    return ''.join(p for p, token in zip(pieces, ids) if token == unknown)

  def decode(self, ids: Sequence[int]) -> str:
    return self._processor.decode([int(i) for i in ids])


def _has_all_bytes(settings: Any, vocabulary: Mapping[str, int]) -> bool:
  """Return True if every text is a sequence of tokens of this vocabulary."""
  import tokenizers
  model = settings['model']
  if model.get('byte_fallback'):
    return all(f'<0x{byte:02X}>' in vocabulary for byte in range(256))
  steps = json.dumps([settings['normalizer'], settings['pre_tokenizer']])
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  return (model['type'] in ('BPE', 'Unigram') and '"ByteLevel"' in steps
          and vocabulary.keys() >= set(alphabet))


def _beginning(text: str) -> str:
  return repr(text if len(text) <= 40 else text[:40] + '...')


def fit(texts: Iterable[str], size: int) -> bytes:
  """Fit BPE over bytes (GPT-2's); return a tokenizer.json of `size` ids."""
  import tokenizers
  level = tokenizers.pre_tokenizers.ByteLevel
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = level(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  clean = (_utf8(text).decode() for text in texts)
  tokenizer.train_from_iterator(clean, tokenizers.trainers.BpeTrainer(
      vocab_size=size, initial_alphabet=level.alphabet(), show_progress=False))
  return tokenizer.to_str().encode()


def _is_number(text: str) -> bool:
  return text.isdecimal() and len(text) <= DIGITS


def fitted_size(name: str) -> int:
  """Return SIZE of 'bpe:SIZE', 0 for any other name.

  Raises:
    UserError: SIZE is no whole number above 256.
  """
  kind, _, size = name.partition(':')
  if kind != 'bpe':
    return 0
  if not _is_number(size) or int(size) <= Bytes.size:
    raise config.UserError(
        f"config.data.tokenizer.text={name!r} must be 'bpe:SIZE' with a SIZE"
        f" above {Bytes.size}, the ids of single bytes, such as 'bpe:1024'."
    )
  return int(size)


TEXT_TOKENIZERS = {
    '.json': HuggingFace, '.model': SentencePiece, Symbols.suffix: Symbols}


def check(name: str) -> None:
  """Raise UserError if a name names no tokenizer, or a file that is missing."""
  kind, _, size = name.partition(':')
  if name == 'bytes' or fitted_size(name):
    return
  key = f'config.data.tokenizer.text={name!r}'
  if kind == 'symbols':
    if not _is_number(size) or not int(size):
      raise config.UserError(
          f"{key} must be 'symbols:SIZE' with a SIZE above 0, such as"
          " 'symbols:64'."
      )
    return
  path = pathlib.Path(os.path.expanduser(name))
  if path.suffix not in TEXT_TOKENIZERS:
    raise config.UserError(
        f"{key} must be 'bytes', 'bpe:SIZE', 'symbols:SIZE', a tokenizers"
        ' .json file or a SentencePiece .model file.'
    )
  if not path.is_file():
    raise config.UserError(
        f"{key}: no such file; give the path of one or 'bytes'."
    )


def load(name: str) -> TextTokenizer:
  """Load 'bytes', 'symbols:SIZE' or a tokenizer file, by its ending.

  Raises:
    UserError: unknown name, missing or damaged file, missing package.
  """
  check(name)
  if name == 'bytes':
    return Bytes()
  kind, _, size = name.partition(':')
  if kind == 'symbols':
    return Symbols(size.encode())
  key = f'config.data.tokenizer.text={name!r}'
  path = pathlib.Path(os.path.expanduser(name))
  try:
    return TEXT_TOKENIZERS[path.suffix](path.read_bytes())
  except ModuleNotFoundError as e:
    raise config.UserError(
        f'{key} needs the package {e.name}; run: pip install {e.name}.'
    ) from e
  except Exception as e:  # both packages raise plain Exception or RuntimeError
    raise config.UserError(
        f'{key} is no readable {path.suffix} tokenizer'
        f' ({str(e).splitlines()[0] if str(e) else type(e).__name__}); copy or'
        ' train it again.'
    ) from e


def fingerprint(tokenizer: TextTokenizer) -> str:
  return digest.of(type(tokenizer).__name__, tokenizer.content)
