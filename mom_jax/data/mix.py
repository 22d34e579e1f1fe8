"""Mixing of sources in fixed proportions."""

from __future__ import annotations

from collections.abc import Sequence
import sys

import grain
import numpy as np

WINDOW = 256  # pieces among which the order of the sources is random
RESOLUTION = 10**9  # fractions are multiples of 1 / RESOLUTION


class Mix(grain.transforms.DatasetSelectionMap):
  """A random order of sources in exact proportions; each keeps its own order.

  Of the first k pieces, source 0 gives n_0 = floor(k p_0), source 1 gives
  floor((k - n_0) p_1 / (1 - p_0)), and so on. This holds at every multiple of
  WINDOW; within a window the order is random. A regular order would give
  readers, which take every n-th piece, unequal proportions.

  Args:
    weights: relative numbers of pieces of the sources.
    seed: of the order.
  """

  def __init__(self, weights: Sequence[float], seed: int):
    fractions = np.array(weights, np.float64) / np.sum(weights)
    self._parts = [max(1, round(float(f) * RESOLUTION)) for f in fractions]
    self._seed = seed
    self._cached: tuple[int, np.ndarray, np.ndarray] | None = None

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> tuple[int, int]:
    window, position = divmod(index, WINDOW)
    cached = self._cached
    if cached is None or cached[0] != window:
      cached = self._cached = (window, *self._order(window))
    _, source_W, index_W = cached
    return int(source_W[position]), int(index_W[position])

  def _counts(self, total: int) -> list[int]:
    """Count the pieces of each source among the first `total`."""
    counts, left = [], sum(self._parts)
    for parts in self._parts:
      counts.append(total * parts // left)
      total, left = total - counts[-1], left - parts
    return counts

  def _order(self, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each position of a window, and the index in it."""
    first = self._counts(window * WINDOW)
    after = self._counts((window + 1) * WINDOW)
    counts = [b - a for a, b in zip(first, after)]
    rng = np.random.default_rng((self._seed, window))
    source_W = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    index_W = np.zeros(WINDOW, np.int64)
    for source, (start, count) in enumerate(zip(first, counts)):
      index_W[source_W == source] = start + np.arange(count)
    return source_W, index_W
