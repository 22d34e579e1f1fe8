"""Documents: texts and images in reading order."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Part = str | np.ndarray  # text, or an image: uint8 [size, size, 3]


class Document(NamedTuple):
  """Parts in reading order, and the split key."""

  parts: tuple[Part, ...]
  key: str
