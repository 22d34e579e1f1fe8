"""The joint vocabulary of text and image tokens.

  0 .. n-1             text, n = size of the text tokenizer (bytes: 256)
  n .. n+3             pad, eos, boi (begin of image), eoi (end of image)
  n+4 .. n+3+codes     image codes

A document is [eos, part, part, ..., eos]; an image part is [boi, codes, eoi].
Image codes have modality 1, everything else modality 0.

The text tokenizer of a published model has its own special tokens; then there
are no others and no images, and a document is [bos, text, eos].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import pathlib
import shutil
from typing import Any

from jaxtyping import Int
import numpy as np

from mom_jax import config, digest
from mom_jax.data import images, pictures, text
from mom_jax.data.document import Part

SPECIALS = ('pad', 'eos', 'boi', 'eoi')
VOCABULARY, CODEBOOK, TEXT = 'vocabulary.json', 'codebook.npz', 'text'
# All that `Vocabulary.save` may write.
FILES = (VOCABULARY, CODEBOOK, *(TEXT + s for s in text.TEXT_TOKENIZERS))


class Vocabulary:
  """Text and image tokenizers with joint ids.

  Attributes:
    text: the text tokenizer.
    image: the image tokenizer, or None without images.
    special_ids: ids of 'bos', 'eos' and 'pad' in the text tokenizer, or None;
      'stop' lists all that end a text where there are more than eos.
    stop: ids that end a text in generation.
    bos, pad, eos, boi, eoi: ids of the special tokens; boi and eoi are -1 if
      the text tokenizer has its own.
    image_start: id of image code 0.
    codes: number of image codes.
    size: number of all ids.
  """

  def __init__(
      self,
      text_tokenizer: text.TextTokenizer,
      image_tokenizer: images.ImageTokenizer | None,
      image_name: str = '',
      special_ids: Mapping[str, Any] | None = None,
  ):
    self.text, self.image = text_tokenizer, image_tokenizer
    self.image_name = image_name if image_tokenizer else ''
    n = text_tokenizer.size
    self.special_ids = special_ids
    if special_ids is None:
      self.pad, self.eos, self.boi, self.eoi = range(n, n + len(SPECIALS))
      self.bos = self.eos
      self.image_start = n + len(SPECIALS)
    else:
      if image_tokenizer:
        raise ValueError(
            'a text tokenizer with special tokens allows no images.')
      self.bos, self.eos, self.pad = (
          special_ids[k] for k in ('bos', 'eos', 'pad'))
      self.boi = self.eoi = -1
      self.image_start = n
    self.stop = tuple((special_ids or {}).get('stop', [self.eos]))
    self.codes = image_tokenizer.codes if image_tokenizer else 0
    self.tokens_per_image = (
        image_tokenizer.tokens_per_image if image_tokenizer else 0
    )
    self.size = self.image_start + self.codes

  @property
  def fingerprint(self) -> str:
    """Text that is equal for vocabularies with equal tokens."""
    image = self.image.fingerprint if self.image else ''
    special = []
    if self.special_ids is not None:
      special = [json.dumps(self.special_ids, sort_keys=True)]
    return digest.of(text.fingerprint(self.text), image, *special)

  def check(self, cfg: config.Config) -> None:
    """Raise UserError if the model does not fit this vocabulary."""
    if cfg.model.vocab_size < self.size:
      raise config.UserError(
          f'config.model.vocab_size={cfg.model.vocab_size} must be'
          f' {self.size} or more: {self.text.size} text tokens,'
          f' {len(SPECIALS)} special tokens and {self.codes} image codes; set'
          f' --config.model.vocab_size={self.size}.'
      )
    side = cfg.model.image_side
    if side and self.codes and side**2 != self.tokens_per_image:
      raise config.UserError(
          f'config.model.image_side={side} must be the square root of'
          f' {self.tokens_per_image}, the tokens of an image, or 0 for no'
          ' position embeddings.'
      )

  def encode_text(self, value: str) -> Int[np.ndarray, ' T']:
    return self.text.encode(value)

  def read_image(self, path: pathlib.Path) -> np.ndarray:
    """Read a picture in the size of the tokenizer, uint8 [size, size, 3].

    Raises:
      ValueError: it cannot be read.
    """
    if self.image is None:
      raise ValueError('this vocabulary has no image codes.')
    return pictures.read(path, self.image.image_size)

  def encode_image(self, image: np.ndarray) -> Int[np.ndarray, ' T']:
    """Encode an image uint8 [size, size, 3] as [boi, codes, eoi]."""
    if self.image is None:
      raise ValueError('this vocabulary has no image codes.')
    codes_P = self.image.encode(image[None])[0] + self.image_start
    return np.concatenate([[self.boi], codes_P, [self.eoi]]).astype(np.int32)

  def encode(
      self, parts: Sequence[Part], end: bool = True
  ) -> Int[np.ndarray, ' T']:
    """Encode as [bos, parts..., eos], without the last eos if not `end`."""
    return self.join([self.encode_part(part) for part in parts], end)

  def encode_part(self, part: Part) -> Int[np.ndarray, ' T']:
    if isinstance(part, str):
      return self.encode_text(part)
    return self.encode_image(part)

  def join(
      self, tokens: Sequence[np.ndarray], end: bool = True
  ) -> Int[np.ndarray, ' T']:
    """Make a document of its encoded parts."""
    last = [[self.eos]] if end else []
    return np.concatenate([[self.bos], *tokens, *last]).astype(np.int32)

  def decode(self, tokens: Int[np.ndarray, ' T'] | Sequence[int]) -> list[Part]:
    """Decode to texts and images in order; eos and pad end a text.

    An image without all its codes becomes the text '[image: 12 of 64 codes]'.
    """
    parts: list[Part] = []
    ids: list[int] = []
    codes: list[int] = []

    special = {self.bos, self.pad, self.eos, *self.stop}

    def flush_text():
      if ids:
        parts.append(self.text.decode(ids))
        ids.clear()

    def flush_image():
      if not codes:
        return
      whole = self.tokens_per_image
      if len(codes) == whole:
        parts.append(self.image.decode(np.array([codes], np.int32))[0])
      else:
        parts.append(f'[image: {len(codes)} of {whole} codes]')
      codes.clear()

    for token in np.asarray(tokens).tolist():
      if token >= self.image_start + self.codes or token < 0:
        raise ValueError(
            f'token {token} is outside the vocabulary of {self.size} ids.'
        )
      if token >= self.image_start:
        flush_text()
        codes.append(token - self.image_start)
      else:
        flush_image()
        if token < self.text.size and token not in special:
          ids.append(token)
        else:
          flush_text()
    flush_image()
    flush_text()
    return parts

  def modality(self, tokens: Int[np.ndarray, '*S']) -> Int[np.ndarray, '*S']:
    """Return 1 for image codes, else 0, int32."""
    return (np.asarray(tokens) >= self.image_start).astype(np.int32)

  def save(self, directory: str | pathlib.Path) -> None:
    """Write the files that `load` reads, without training data."""
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(self.image, images.PatchCodebook):
      self.image.save(folder / CODEBOOK)
      image = CODEBOOK
    else:
      image = self.image_name
    if self.text.suffix:
      (folder / (TEXT + self.text.suffix)).write_bytes(self.text.content)
    description = {
        'text': TEXT + self.text.suffix if self.text.suffix else 'bytes',
        'image': image,
        'special_ids': self.special_ids and dict(self.special_ids),
        'fingerprint': self.fingerprint,
        'size': self.size,
        **{name: getattr(self, name) for name in SPECIALS},
        'image_start': self.image_start,
        'codes': self.codes,
    }
    temporary = folder / (VOCABULARY + '.tmp')
    temporary.write_text(json.dumps(description, indent=2))
    shutil.move(temporary, folder / VOCABULARY)


def load(
    directory: str | pathlib.Path, function: str = ''
) -> Vocabulary:
  """Read the files of `Vocabulary.save`.

  Args:
    function: 'package.module:function' that the user allows to be called if
      the image tokenizer is one; files alone call nothing.
  Raises:
    UserError: a file is missing, damaged or has changed.
  """
  folder = pathlib.Path(directory)
  try:
    description = json.loads((folder / VOCABULARY).read_text())
    text_name, image_name = description['text'], description['image']
    fingerprint = description['fingerprint']
    if not all(isinstance(x, str) for x in (text_name, image_name)):
      raise TypeError('names must be strings')
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise config.UserError(
        f'{folder / VOCABULARY} must hold the vocabulary of a run'
        f' ({type(e).__name__}: {e}); give the workdir of a training run.'
    ) from e
  if text_name != 'bytes':
    text_name = str(folder / pathlib.PurePath(text_name).name)
  if not image_name:
    image = None
  elif image_name == CODEBOOK:
    image = images.load(str(folder / CODEBOOK))
  elif function == image_name:
    image = images.from_function(image_name)
  else:
    raise config.UserError(
        f'{folder} was made with the image tokenizer {image_name!r}; if you'
        f' trust it, set --config.data.tokenizer.image={image_name}.')
  made = Vocabulary(
      text.load(text_name), image, image_name, description.get('special_ids'))
  if made.fingerprint != fingerprint:
    raise config.UserError(
        f'the tokenizer files in {folder} are not those that were saved with'
        ' the run; restore them from a copy of it.'
    )
  return made


def from_file(
    path: str | pathlib.Path, special_ids: Mapping[str, Any]
) -> Vocabulary:
  """Make a vocabulary of a published text tokenizer.

  Args:
    path: of a tokenizers .json or SentencePiece .model file.
    special_ids: as of `Vocabulary`.
  Raises:
    UserError: the file is missing or damaged, or a package is missing.
  """
  return Vocabulary(text.load(str(path)), None, special_ids=special_ids)
