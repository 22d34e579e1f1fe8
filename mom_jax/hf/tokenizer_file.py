"""A tokenizer.json for other programs, of a text tokenizer of ours."""

from __future__ import annotations

from collections.abc import Sequence


def with_specials(content: bytes, specials: Sequence[str]) -> bytes | None:
  """Add special tokens to a tokenizer.json, with the ids after all others.

  Args:
    content: of the file; nothing for the tokenizer of bytes.
  Returns:
    The new content; None if the ids of the file leave gaps, so that special
    tokens would get others than ours.
  """
  import tokenizers
  if content:
    tokenizer = tokenizers.Tokenizer.from_str(content.decode())
  else:
    tokenizer = _bytes()
  ids = tokenizer.get_vocab().values()
  if len(set(ids)) != max(ids) + 1:
    return None
  tokenizer.add_special_tokens(
      [tokenizers.AddedToken(name, special=True) for name in specials])
  size = max(ids) + 1
  if [tokenizer.token_to_id(name) for name in specials] != list(
      range(size, size + len(specials))):
    return None
  return tokenizer.to_str().encode()


def _bytes():
  """Make a tokenizer whose ids are the bytes of UTF-8."""
  import tokenizers
  level = tokenizers.pre_tokenizers.ByteLevel
  # Printable bytes stand for themselves, the others for characters from 256 up.
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in printable]
  ids = {chr(b): b for b in printable}
  ids |= {chr(256 + i): b for i, b in enumerate(others)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, []))
  tokenizer.pre_tokenizer = level(add_prefix_space=False, use_regex=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  return tokenizer
