"""Where published tensors lie in our tree and how their axes turn.

Tables of places are read both ways, so that a round trip is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


Places = dict[str, Place]


def linear(path, inputs, outputs) -> Place:
  """[out, in] to [*inputs, *outputs]."""
  shape = (*inputs, *outputs)
  return Place(
      path, shape, (), lambda w: w.T.reshape(shape),
      lambda p: p.reshape(math.prod(inputs), -1).T,
  )


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


def fill(places: Places, tensors: Mapping[str, np.ndarray]) -> Tree:
  """Our tree of published tensors.

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
  for name, place in places.items():
    node = tree
    for key in place.path[:-1]:
      node = node.setdefault(key, {})
    whole = node.setdefault(
        place.path[-1], np.empty(place.whole, np.float32))
    theirs = np.asarray(tensors[name])
    wanted = place.to_theirs(whole[place.part]).shape
    if theirs.shape != wanted:
      raise config.UserError(
          f'tensor {name} has shape {theirs.shape}; the config asks for'
          f' {wanted}.'
      )
    whole[place.part] = place.to_ours(theirs)
  return tree


def pour(places: Places, params: Tree) -> dict[str, np.ndarray]:
  """The published tensors of our tree."""
  tensors = {}
  for name, place in places.items():
    value = params
    for key in place.path:
      value = value[key]
    part = np.asarray(value)[place.part]
    tensors[name] = np.ascontiguousarray(place.to_theirs(part))
  return tensors
