"""Which source the k-th piece of a mix comes from."""

from __future__ import annotations

from collections.abc import Sequence
import sys

import grain
import numpy as np

WINDOW = 256  # pieces within which the order of the sources is random
PARTS = 10**9  # shares are whole multiples of 1 / PARTS


class Mix(grain.transforms.DatasetSelectionMap):
  """A random order of sources in exact shares, each source in its own order.

  Of the first k pieces, source 0 gives n_0 = floor(k p_0), source 1 gives
  floor((k - n_0) p_1 / (1 - p_0)), and so on; this holds at every multiple of
  WINDOW, and within a window the order is drawn at random. A regular order
  would give reader processes, which take every n-th piece, unequal shares.

  Args:
    weights: relative number of pieces of each source.
    seed: of the order.
  """

  def __init__(self, weights: Sequence[float], seed: int):
    shares = np.array(weights, np.float64) / np.sum(weights)
    self._parts = [max(1, round(float(s) * PARTS)) for s in shares]
    self._seed = seed
    self._cached: tuple[int, np.ndarray, np.ndarray] | None = None

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> tuple[int, int]:
    window, place = divmod(index, WINDOW)
    cached = self._cached
    if cached is None or cached[0] != window:
      cached = self._cached = (window, *self._order(window))
    _, source_W, index_W = cached
    return int(source_W[place]), int(index_W[place])

  def _counts(self, total: int) -> list[int]:
    """How many of the first `total` pieces each source gives."""
    counts, left = [], sum(self._parts)
    for parts in self._parts:
      counts.append(total * parts // left)
      total, left = total - counts[-1], left - parts
    return counts

  def _order(self, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Source, and index in it, of each place of a window."""
    first = self._counts(window * WINDOW)
    after = self._counts((window + 1) * WINDOW)
    counts = [b - a for a, b in zip(first, after)]
    rng = np.random.default_rng((self._seed, window))
    source_W = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    index_W = np.zeros(WINDOW, np.int64)
    for source, (start, count) in enumerate(zip(first, counts)):
      index_W[source_W == source] = start + np.arange(count)
    return source_W, index_W
