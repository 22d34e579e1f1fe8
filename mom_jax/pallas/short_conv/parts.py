"""Parts of arrays of rows, and the columns where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

L2_EPS = 1e-6  # inside the root of the l2 norm


class Part(NamedTuple):
  """Columns of an array that are processed in the same way.

  Attributes:
    width: number of columns.
    conv: False passes the columns through unchanged.
    silu: SiLU after the convolution.
    l2_dim: channels per head to l2-normalise at the end; 0 is no norm.
  """

  width: int
  conv: bool = True
  silu: bool = False
  l2_dim: int = 0


Parts = tuple[tuple[Part, ...], ...]


class Columns(NamedTuple):
  """Location of a part.

  Attributes:
    array, start: the array, and the part's first column there.
    tap: its first column in the taps.
  """

  part: Part
  array: int
  start: int
  tap: int

  @property
  def span(self) -> slice:
    return slice(self.start, self.start + self.part.width)

  def weights(self, w):
    """The part's columns of the taps or bias [..., F], float32; None stays."""
    if w is None:
      return None
    return w[..., self.tap:self.tap + self.part.width].astype('float32')


def columns(parts: Parts) -> Iterator[Columns]:
  """Yield the location of each part, in order."""
  tap = 0
  for i, of_array in enumerate(parts):
    start = 0
    for part in of_array:
      yield Columns(part, i, start, tap)
      start += part.width
      tap += part.width * part.conv


def map_convolved(fn, xs, conv_WF, bias_F, reach_R, *, parts):
  """Return all parts in order, the convolved ones mapped by `fn`.

  Args:
    fn: (part, its columns, its taps, its bias, reach_R) -> columns.
  """
  ys = []
  for c in columns(parts):
    y_RF = xs[c.array][:, c.span]
    if c.part.conv:
      y_RF = fn(c.part, y_RF, c.weights(conv_WF), c.weights(bias_F), reach_R)
    ys.append(y_RF)
  return tuple(ys)


def num_convolved(parts: Parts) -> int:
  """Number of columns that are convolved."""
  return sum(p.width for ps in parts for p in ps if p.conv)
