"""Text tokenizers: bytes, Hugging Face tokenizers, SentencePiece."""

from __future__ import annotations

from collections.abc import Sequence
import pathlib
from typing import Protocol, runtime_checkable

import numpy as np

from mom_jax import config
from mom_jax.data import cache


@runtime_checkable
class TextTokenizer(Protocol):
  """Turns text into ids 0 .. size-1 and back.

  Attributes:
    size: number of ids.
    suffix: of the file that holds the tokenizer; '' if there is none.
    content: that file's bytes.
  """

  size: int
  suffix: str
  content: bytes

  def encode(self, text: str) -> np.ndarray:
    """int32 ids."""

  def decode(self, ids: Sequence[int]) -> str:
    """Text; bytes that are no UTF-8 become U+FFFD."""


class Bytes:
  """UTF-8 bytes."""

  size, suffix, content = 256, '', b''

  def encode(self, text: str) -> np.ndarray:
    # A lone surrogate, which JSON can hold, has no UTF-8 form: '?' stands in.
    data = text.encode('utf-8', 'replace')
    return np.frombuffer(data, np.uint8).astype(np.int32)

  def decode(self, ids: Sequence[int]) -> str:
    return bytes(ids).decode('utf-8', 'replace')


class HuggingFace:
  """A tokenizer.json of the package tokenizers."""

  suffix = '.json'

  def __init__(self, content: bytes):
    import tokenizers
    self.content = content
    self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    self.size = max(self._tokenizer.get_vocab().values()) + 1

  def encode(self, text: str) -> np.ndarray:
    encoded = self._tokenizer.encode(text, add_special_tokens=False)
    return np.array(encoded.ids, np.int32)

  def decode(self, ids: Sequence[int]) -> str:
    return self._tokenizer.decode(list(ids), skip_special_tokens=False)


class SentencePiece:
  """A .model file of the package sentencepiece."""

  suffix = '.model'

  def __init__(self, content: bytes):
    import sentencepiece
    self.content = content
    self._processor = sentencepiece.SentencePieceProcessor(
        model_proto=content
    )
    self.size = self._processor.vocab_size()

  def encode(self, text: str) -> np.ndarray:
    return np.array(self._processor.encode(text), np.int32)

  def decode(self, ids: Sequence[int]) -> str:
    return self._processor.decode([int(i) for i in ids])


TEXT_TOKENIZERS = {'.json': HuggingFace, '.model': SentencePiece}


def load(name: str) -> TextTokenizer:
  """Reads 'bytes' or a tokenizer file, told by its ending.

  Raises:
    UserError: unknown name, missing or damaged file, missing package.
  """
  if name == 'bytes':
    return Bytes()
  key = f'config.data.tokenizer.text={name!r}'
  path = pathlib.Path(name).expanduser()
  if path.suffix not in TEXT_TOKENIZERS:
    raise config.UserError(
        f"{key} must be 'bytes', a tokenizers .json file or a SentencePiece"
        ' .model file.'
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
