"""A batch of packed sequences."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
  """Sequences of packed documents.

  Attributes:
    tokens: int32 [B, T], ids of the joint vocabulary, `pad` on padding.
    modality: int32 [B, T], 1 on image codes, 0 on all other tokens.
    segment: int32 [B, T], number of the document in its sequence, from 1; 0 is
      padding.
    weight: float32 [B, T], loss weight of the token as a target: 1, or 0 on
      padding and on the first token of a segment, which no token predicts.
  """

  tokens: np.ndarray
  modality: np.ndarray
  segment: np.ndarray
  weight: np.ndarray
