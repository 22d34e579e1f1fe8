"""Documents, and images in the size of the tokenizer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

Part = str | np.ndarray  # text, or an image: uint8 [size, size, 3]


class Document(NamedTuple):
  """Parts in reading order, and the split key."""

  parts: tuple[Part, ...]
  key: str


def to_pixels(image: Image.Image, size: int) -> np.ndarray:
  """Scale the central square, on white, to uint8 [size, size, 3]."""
  if image.mode != 'RGB':
    layer = image.convert('RGBA')
    image = Image.new('RGB', layer.size, 'white')
    image.paste(layer, (0, 0), layer)
  side = min(image.size)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  image = image.crop((left, top, left + side, top + side))
  if side != size:
    image = image.resize((size, size), Image.Resampling.LANCZOS)
  return np.asarray(image, np.uint8)
