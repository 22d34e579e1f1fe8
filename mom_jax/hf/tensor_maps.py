"""Where published tensors lie in our tree and how their axes turn.

Tables of places are read both ways, so that a round trip is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any, NamedTuple

import numpy as np

from mom_jax import config

Tree = dict[str, Any]


class Place(NamedTuple):
  """Where a published tensor lies: a path in our tree and a part of the array.

  The array has shape `whole`; the tensor is `array[part]` of it, turned.
  """

  path: tuple[str, ...]
  whole: tuple[int, ...]
  part: tuple[int | slice, ...]
  to_ours: Callable[[np.ndarray], np.ndarray]
  to_theirs: Callable[[np.ndarray], np.ndarray]


# A tuple is one published tensor of several parts, stacked on its first axis.
Places = dict[str, 'Place | tuple[Place, ...]']


def linear(path, inputs, outputs) -> Place:
  """[out, in] to [*inputs, *outputs]."""
  shape = (*inputs, *outputs)
  return Place(
      path, shape, (), lambda w: w.T.reshape(shape),
      lambda p: p.reshape(math.prod(inputs), -1).T,
  )


def each(change: Callable[[Place], Place], place: Any) -> Any:
  """`change` of a place, or of each part of a stacked one."""
  if isinstance(place, Place):
    return change(place)
  return tuple(map(change, place))


def one_of(place: Place, index: int, count: int, axis: int = 0) -> Place:
  """The place as number `index` of `count` side by side on a new axis."""
  whole = (*place.whole[:axis], count, *place.whole[axis:])
  return place._replace(
      whole=whole, part=(slice(None),) * axis + (index, *place.part))


def conv(path, width, heads, size) -> Place:
  """[channels, 1, W] to [W, H, size]; the last tap is the current token."""
  shape = (width, heads, size)
  return Place(
      path, shape, (), lambda w: w[:, 0].T.reshape(shape),
      lambda p: p.reshape(width, -1).T[:, None],
  )


def flat(path, *shape: int) -> Place:
  """[all] to [*shape]."""
  return Place(
      path, shape, (), lambda w: w.reshape(shape), lambda p: p.reshape(-1))


def rows(path, count: int, *rest: int) -> Place:
  """[count, all] to [count, *rest]."""
  shape = (count, *rest)
  return Place(
      path, shape, (), lambda w: w.reshape(shape),
      lambda p: p.reshape(count, -1))


def plain(path, *shape: int) -> Place:
  return Place(path, shape, (), lambda w: w, lambda p: p)


def vector(path, size: int) -> Place:
  """[1, 1, size] to [size]."""
  return Place(
      path, (size,), (), lambda w: w.reshape(size),
      lambda p: p.reshape(1, 1, size))


def _wanted(place: Place) -> tuple[int, ...]:
  """Shape of the published tensor."""
  return place.to_theirs(np.empty(place.whole, np.float32)[place.part]).shape


def fill(
    places: Places, tensors: Mapping[str, np.ndarray],
    unused: Sequence[Place] = (),
) -> Tree:
  """Our tree of published tensors.

  Args:
    unused: parts of our tree that are not published, as nothing reads them; 0.
  Raises:
    UserError: a tensor is missing, unknown or misshapen.
  """
  missing, unknown = set(places) - set(tensors), set(tensors) - set(places)
  if missing or unknown:
    raise config.UserError(
        f'the checkpoint does not fit its config: missing tensors'
        f' {sorted(missing)}, unknown tensors {sorted(unknown)}.'
    )
  tree: Tree = {}
  for place in unused:
    _whole(tree, place)
  for name, place in places.items():
    parts = place if not isinstance(place, Place) else (place,)
    shapes = [_wanted(part) for part in parts]
    wanted = (sum(s[0] for s in shapes), *shapes[0][1:])
    theirs = np.asarray(tensors[name])
    if theirs.shape != wanted:
      raise config.UserError(
          f'tensor {name} has shape {theirs.shape}; the config asks for'
          f' {wanted}.'
      )
    ends = np.cumsum([s[0] for s in shapes])[:-1]
    for part, values in zip(parts, np.split(theirs, ends)):
      _whole(tree, part)[part.part] = part.to_ours(values)
  return tree


def _whole(tree: Tree, place: Place) -> np.ndarray:
  """The array in which a place lies, made if it is not there."""
  for key in place.path[:-1]:
    tree = tree.setdefault(key, {})
  return tree.setdefault(place.path[-1], np.zeros(place.whole, np.float32))


def pour(places: Places, params: Tree) -> dict[str, np.ndarray]:
  """The published tensors of our tree."""
  tensors = {}
  for name, place in places.items():
    parts = place if not isinstance(place, Place) else (place,)
    tensors[name] = np.concatenate([_theirs(part, params) for part in parts])
  return tensors


def _theirs(place: Place, params: Tree) -> np.ndarray:
  value = params
  for key in place.path:
    value = value[key]
  return place.to_theirs(np.asarray(value)[place.part])
