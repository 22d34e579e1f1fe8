"""Code per device (`shard_map`) with logical axis names.

Dense products are left to the compiler. Code that sorts rows is not: a sort
over a sharded axis would gather it. `batch_local` runs such code on the part of
the arrays that a device holds, named by logical axes.
"""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from mom_jax.parallel import sharding


def batch_local(
    fn: Callable[..., Any],
    batched: Any = sharding.BATCH_TIME,
    shared: Any = sharding.REPLICATED,
    out: Any = sharding.BATCH_TIME,
) -> Callable[[Any, Any], Any]:
  """Run `fn(batched, shared)` on the rows that each device holds.

  Args:
    fn: takes (batched, shared), returns a tree.
    batched, shared, out: how leaves of the arguments and of the result are
      split: a logical PartitionSpec, of names in `sharding.LOGICAL_AXES`, for
      each leaf or for whole branches. By default all that is batched is
      [B, T, ...], and what is shared is whole on every device. An axis
      `FSDP_SHARDED` of `shared` is whole for `fn`.
  Returns:
    A function of the same signature. Gradients of replicated arrays are summed
    over devices; along an FSDP-sharded axis they are reduce-scattered, which
    moves half as many bytes. Without a mesh, or inside another such call, it is
    `fn`.
  """

  def run(x: Any, weights: Any) -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    if not sharding.is_active(mesh):
      return fn(x, weights)
    _map_specs(_check_split, batched, x)
    layout = _map_specs(_weight_layout, shared, weights)

    def on_device(x: Any, weights: Any) -> Any:
      return fn(x, jax.tree.map(_gather, layout, weights, is_leaf=_is_layout))

    # Kernels do not declare how their results vary over the mesh: no check.
    return jax.shard_map(
        on_device,
        in_specs=(
            _mesh_specs(batched),
            jax.tree.map(_stored_spec, layout, is_leaf=_is_layout)),
        out_specs=_mesh_specs(out),
        check_vma=False,
    )(x, weights)

  return run


def psum(x: jax.Array, name: str) -> jax.Array:
  """Sum over the parts of a logical axis, inside `batch_local`."""
  if sharding.axis_size(name) == 1:
    return x
  return jax.lax.psum(x, sharding.LOGICAL_AXES[name])


class _WeightLayout(NamedTuple):
  """Mesh axes of a parameter: those of its local part, and those of FSDP."""

  local: PartitionSpec
  fsdp: PartitionSpec


def _weight_layout(spec: PartitionSpec, leaf: Any) -> _WeightLayout:
  """Return the mesh axes of a parameter, those of FSDP apart."""
  mesh = jax.sharding.get_abstract_mesh()
  taken = {axis for name in spec
           for axis in sharding.LOGICAL_AXES.get(name, ())}
  axes: list[tuple[str, ...]] = [()] * len(spec)
  for i, name in enumerate(spec):
    for axis in sharding.FSDP_AXES if name == sharding.FSDP_SHARDED else ():
      parts = math.prod(mesh.shape.get(a, 1) for a in (*axes[i], axis))
      if axis not in taken and mesh.shape.get(axis, 1) > 1 and (
          leaf.shape[i] % parts == 0):
        axes[i] += (axis,)
  return _WeightLayout(
      sharding.to_mesh_axes(spec), PartitionSpec(*(a or None for a in axes)))


def _stored_spec(layout: _WeightLayout) -> PartitionSpec:
  return PartitionSpec(*(
      local or fsdp for local, fsdp in zip(*layout, strict=True)))


def _gather(layout: _WeightLayout, x: jax.Array) -> jax.Array:
  """All-gather what is FSDP-sharded; its transpose is a reduce-scatter."""
  for i, axes in enumerate(layout.fsdp):
    if axes:
      x = jax.lax.all_gather(x, axes, axis=i, tiled=True)
  return x


def _check_split(spec: PartitionSpec, leaf: Any) -> None:
  if 'batch' in spec:
    sharding.check_batch(leaf.shape[0], sharding.batch_shards())
  parts = sharding.axis_size('time')
  if 'time' in spec and leaf.shape[1] % parts:
    raise ValueError(
        f'{leaf.shape[1]} tokens of a sequence cannot be split over'
        f' config.mesh.{sharding.CONTEXT_AXIS}={parts}; make'
        ' config.data.seq_len (and what mod/ blocks pick of it) a multiple'
        f' of {parts}.'
    )


def _map_specs(fn: Callable, specs: Any, tree: Any) -> Any:
  """Map fn(spec, leaf) over a tree, where a spec is that of a whole branch."""

  def branch(spec: PartitionSpec, part: Any) -> Any:
    return jax.tree.map(lambda leaf: fn(spec, leaf), part)

  return jax.tree.map(branch, specs, tree, is_leaf=_is_spec)


def _mesh_specs(specs: Any) -> Any:
  return jax.tree.map(sharding.to_mesh_axes, specs, is_leaf=_is_spec)


def _is_spec(x: Any) -> bool:
  return isinstance(x, PartitionSpec)


def _is_layout(x: Any) -> bool:
  return isinstance(x, _WeightLayout)
