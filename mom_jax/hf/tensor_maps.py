"""Maps between published tensors and our parameters.

One table is used in both directions, so that a round trip is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any, NamedTuple

import numpy as np

from mom_jax import config

Tree = dict[str, Any]


class TensorMap(NamedTuple):
  """A published tensor as a part of one of our parameters.

  Attributes:
    path: keys of the parameter in our tree.
    shape: of the parameter.
    index: the tensor is `to_theirs(parameter[index])`.
    to_ours, to_theirs: change of the order of axes, both ways.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  index: tuple[int | slice, ...]
  to_ours: Callable[[np.ndarray], np.ndarray]
  to_theirs: Callable[[np.ndarray], np.ndarray]


# A tuple is one published tensor of several parts, stacked on its first axis.
TensorMaps = dict[str, 'TensorMap | tuple[TensorMap, ...]']


def linear(path, inputs, outputs) -> TensorMap:
  """Map [out, in] to [*inputs, *outputs]."""
  shape = (*inputs, *outputs)
  return TensorMap(
      path, shape, (), lambda w: w.T.reshape(shape),
      lambda p: p.reshape(math.prod(inputs), -1).T,
  )


def map_parts(
    change: Callable[[TensorMap], TensorMap],
    maps: TensorMap | tuple[TensorMap, ...],
) -> Any:
  """Change a map, or each part of a stacked one."""
  if isinstance(maps, TensorMap):
    return change(maps)
  return tuple(map(change, maps))


def one_of(
    tensor: TensorMap, index: int, count: int, axis: int = 0
) -> TensorMap:
  """Map a tensor to entry `index` of `count` on a new axis."""
  shape = (*tensor.shape[:axis], count, *tensor.shape[axis:])
  return tensor._replace(
      shape=shape, index=(slice(None),) * axis + (index, *tensor.index))


def conv(path, width, heads, size) -> TensorMap:
  """Map [channels, 1, W] to [W, H, size]; the last tap is the current token."""
  shape = (width, heads, size)
  return TensorMap(
      path, shape, (), lambda w: w[:, 0].T.reshape(shape),
      lambda p: p.reshape(width, -1).T[:, None],
  )


def flat(path, *shape: int) -> TensorMap:
  """Map [all] to [*shape]."""
  return TensorMap(
      path, shape, (), lambda w: w.reshape(shape), lambda p: p.reshape(-1))


def rows(path, count: int, *rest: int) -> TensorMap:
  """Map [count, all] to [count, *rest]."""
  shape = (count, *rest)
  return TensorMap(
      path, shape, (), lambda w: w.reshape(shape),
      lambda p: p.reshape(count, -1))


def plain(path, *shape: int) -> TensorMap:
  """Map a tensor to a parameter of the same shape."""
  return TensorMap(path, shape, (), lambda w: w, lambda p: p)


def vector(path, size: int) -> TensorMap:
  """Map [1, 1, size] to [size]."""
  return TensorMap(
      path, (size,), (), lambda w: w.reshape(size),
      lambda p: p.reshape(1, 1, size))


def _published_shape(tensor: TensorMap) -> tuple[int, ...]:
  ours = np.empty(tensor.shape, np.float32)[tensor.index]
  return tensor.to_theirs(ours).shape


def to_params(
    maps: TensorMaps, tensors: Mapping[str, np.ndarray],
    unused: Sequence[TensorMap] = (),
) -> Tree:
  """Convert published tensors to our parameters.

  Args:
    unused: parts of our parameters that are not published since nothing reads
      them; they become 0.
  Raises:
    UserError: a tensor is missing, unknown or misshapen.
  """
  missing, unknown = set(maps) - set(tensors), set(tensors) - set(maps)
  if missing or unknown:
    raise config.UserError(
        f'the checkpoint does not fit its config: missing tensors'
        f' {sorted(missing)}, unknown tensors {sorted(unknown)}.'
    )
  tree: Tree = {}
  for part in unused:
    _parameter(tree, part)
  for name, parts in maps.items():
    parts = (parts,) if isinstance(parts, TensorMap) else parts
    shapes = [_published_shape(part) for part in parts]
    wanted = (sum(s[0] for s in shapes), *shapes[0][1:])
    theirs = np.asarray(tensors[name])
    if theirs.shape != wanted:
      raise config.UserError(
          f'tensor {name} has shape {theirs.shape}; the config asks for'
          f' {wanted}.'
      )
    ends = np.cumsum([s[0] for s in shapes])[:-1]
    for part, values in zip(parts, np.split(theirs, ends)):
      _parameter(tree, part)[part.index] = part.to_ours(values)
  return tree


def _parameter(tree: Tree, part: TensorMap) -> np.ndarray:
  """Return the parameter that a tensor is part of; make it if missing."""
  for key in part.path[:-1]:
    tree = tree.setdefault(key, {})
  return tree.setdefault(part.path[-1], np.zeros(part.shape, np.float32))


def to_tensors(maps: TensorMaps, params: Tree) -> dict[str, np.ndarray]:
  """Convert our parameters to published tensors."""
  tensors = {}
  for name, parts in maps.items():
    parts = (parts,) if isinstance(parts, TensorMap) else parts
    tensors[name] = np.concatenate([_theirs(part, params) for part in parts])
  return tensors


def _theirs(part: TensorMap, params: Tree) -> np.ndarray:
  value = params
  for key in part.path:
    value = value[key]
  return part.to_theirs(np.asarray(value)[part.index])
