"""Text tokenizers: bytes, a fitted BPE, Hugging Face files, SentencePiece."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import pathlib
from typing import Protocol, runtime_checkable

import numpy as np

from mom_jax import config
from mom_jax.data import cache


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

  def decode(self, ids: Sequence[int]) -> str:
    """Decode ids to text; bytes that are no UTF-8 become U+FFFD."""


def _utf8(text: str) -> bytes:
  """Encode as UTF-8; '?' replaces lone surrogates, which JSON can hold."""
  return text.encode('utf-8', 'replace')


class Bytes:
  """Tokenizer with UTF-8 bytes as ids."""

  size, suffix, content = 256, '', b''

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

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
      if not word.isdecimal() or int(word) >= self.size:
        raise config.UserError(
            f'{word!r} is no symbol of this vocabulary; texts are numbers from'
            f" 0 to {self.size - 1} with blanks between, such as '3 14'."
        )
    return np.array([int(word) for word in words], np.int32)

  def decode(self, ids: Sequence[int]) -> str:
    return ' '.join(map(str, ids))


class HuggingFace:
  """Tokenizer from a tokenizer.json of the package tokenizers."""

  suffix = '.json'

  def __init__(self, content: bytes):
    import tokenizers
    self.content = content
    self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    self.size = max(self._tokenizer.get_vocab().values()) + 1

  def encode(self, text: str) -> np.ndarray:
    encoded = self._tokenizer.encode(
        _utf8(text).decode(), add_special_tokens=False)
    return np.array(encoded.ids, np.int32)

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

  def decode(self, ids: Sequence[int]) -> str:
    return self._processor.decode([int(i) for i in ids])


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


def fitted_size(name: str) -> int:
  """Return SIZE of 'bpe:SIZE', 0 for any other name.

  Raises:
    UserError: SIZE is no whole number above 256.
  """
  kind, _, size = name.partition(':')
  if kind != 'bpe':
    return 0
  if not size.isdecimal() or int(size) <= Bytes.size:
    raise config.UserError(
        f"config.data.tokenizer.text={name!r} must be 'bpe:SIZE' with a SIZE"
        f" above {Bytes.size}, the ids of single bytes, such as 'bpe:1024'."
    )
  return int(size)


TEXT_TOKENIZERS = {
    '.json': HuggingFace, '.model': SentencePiece, Symbols.suffix: Symbols}


def load(name: str) -> TextTokenizer:
  """Load 'bytes', 'symbols:SIZE' or a tokenizer file, by its ending.

  Raises:
    UserError: unknown name, missing or damaged file, missing package.
  """
  if name == 'bytes':
    return Bytes()
  key = f'config.data.tokenizer.text={name!r}'
  kind, _, size = name.partition(':')
  if kind == 'symbols':
    if not size.isdecimal() or not int(size):
      raise config.UserError(
          f"{key} must be 'symbols:SIZE' with a SIZE above 0, such as"
          " 'symbols:64'."
      )
    return Symbols(size.encode())
  path = pathlib.Path(name).expanduser()
  if path.suffix not in TEXT_TOKENIZERS:
    raise config.UserError(
        f"{key} must be 'bytes', 'bpe:SIZE', 'symbols:SIZE', a tokenizers"
        ' .json file or a SentencePiece .model file.'
    )
  if not path.is_file():
    raise config.UserError(
        f"{key}: no such file; give the path of one or 'bytes'."
    )
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
  return cache.digest(type(tokenizer).__name__, tokenizer.content)
