"""What becomes of the columns of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

UNIT_EPS = 1e-6  # inside the root of the length of a head


class Part(NamedTuple):
  """Columns of an array, side by side with those of other parts.

  Attributes:
    width: number of columns.
    conv: False are handed on as they are.
    silu: what is convolved goes through SiLU.
    unit: channels of a head, which get unit length at last; 0 is none.
  """

  width: int
  conv: bool = True
  silu: bool = False
  unit: int = 0


Parts = tuple[tuple[Part, ...], ...]


class Place(NamedTuple):
  """Where a part is.

  Attributes:
    array, start: the array, and the part's first column there.
    tap: its first column of the taps.
  """

  part: Part
  array: int
  start: int
  tap: int

  @property
  def columns(self) -> slice:
    return slice(self.start, self.start + self.part.width)

  def own(self, w):
    """Its taps or its bias of all [..., F], in float32; None stays."""
    if w is None:
      return None
    return w[..., self.tap:self.tap + self.part.width].astype('float32')


def places(parts: Parts) -> Iterator[Place]:
  """All parts in order."""
  tap = 0
  for i, of_array in enumerate(parts):
    start = 0
    for part in of_array:
      yield Place(part, i, start, tap)
      start += part.width
      tap += part.width * part.conv


def each(through, xs, conv_WF, bias_F, reach_R, *, parts):
  """All parts in order, what is convolved as `through` makes it.

  Args:
    through: (part, its columns, its taps, its bias, reach_R) -> columns.
  """
  ys = []
  for place in places(parts):
    y_RF = xs[place.array][:, place.columns]
    if place.part.conv:
      y_RF = through(
          place.part, y_RF, place.own(conv_WF), place.own(bias_F), reach_R)
    ys.append(y_RF)
  return tuple(ys)


def convolved(parts: Parts) -> int:
  """Columns that the convolution runs over."""
  return sum(p.width for ps in parts for p in ps if p.conv)
