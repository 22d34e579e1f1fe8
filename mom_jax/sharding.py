"""Where arrays lie on many devices; the only file that names mesh axes.

Activations are split over the batch. How parameters lie is a table from their
logical axes to mesh axes, a line of `STRATEGIES`; a new layout is a new line.
The mesh in use is the one `jax.set_mesh` set; without one, everything here that
concerns activations does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np

# Mesh axes, outermost first: name to what lies along it.
AXES = {
    'data': 'replicas of the parameters; each takes a share of the batch',
    'fsdp': 'devices that split the parameters and the batch',
}
BATCH_AXES = ('data', 'fsdp')

# Logical axis of a parameter -> mesh axis, in order of preference. The first
# pair whose mesh axis divides the dimension applies; a mesh axis is used once a
# parameter. What is left, such as norm scales, lies whole on every device.
STRATEGIES: dict[str, tuple[tuple[str, str], ...]] = {
    'replicated': (),
    'fsdp': (
        ('embed', 'fsdp'),
        ('vocab', 'fsdp'),
        ('mlp', 'fsdp'),
        ('heads', 'fsdp'),
        ('kv', 'fsdp'),
    ),
}


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    devices: list[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """A mesh over all devices of all processes.

  Args:
    data: size of the axis 'data'; -1 takes the devices that are left.
    fsdp: size of the axis 'fsdp'; -1 likewise.
    devices: all devices by default.
  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  count = len(devices if devices is not None else jax.devices())
  sizes = dict(data=data, fsdp=fsdp)
  shown = ' and '.join(f'config.mesh.{k}={v}' for k, v in sizes.items())
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1 or any(s < 1 and s != -1 for s in sizes.values()):
    raise ValueError(
        f'{shown}: sizes must be above 0, and one of them may be -1 for the'
        ' devices that are left.'
    )
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if count % fixed or (not free and fixed != count):
    raise ValueError(
        f'{shown} do not fit the {count} devices at hand; their product must'
        f' be {count}. Set config.mesh.data=-1 and config.mesh.fsdp to a'
        f' divisor of {count}.'
    )
  for name in free:
    sizes[name] = count // fixed
  return jax.make_mesh(
      tuple(sizes[name] for name in AXES),
      tuple(AXES),
      axis_types=(AxisType.Auto,) * len(AXES),
      devices=devices,
  )


def param_shardings(
    abstract: Any, mesh: jax.sharding.Mesh, strategy: str
) -> Any:
  """How parameters lie on the mesh.

  Args:
    abstract: a tree of parameters (or of their shapes) in flax's boxes, as
      `LM.init` returns them; a leaf without a box is replicated.
    strategy: a key of `STRATEGIES`.
  Returns:
    The tree without boxes, a `NamedSharding` for each leaf.
  Raises:
    ValueError: unknown strategy, or one that could split no parameter at all
      over a mesh axis of more than one device that it uses.
  """
  if strategy not in STRATEGIES:
    raise ValueError(
        f'config.mesh.strategy={strategy!r} is unknown; known:'
        f' {", ".join(sorted(STRATEGIES))}.'
    )
  table = STRATEGIES[strategy]
  boxed = lambda x: isinstance(x, nn.Partitioned)
  shardings = jax.tree.map(
      lambda x: NamedSharding(
          mesh,
          _spec(x.names, x.value.shape, mesh, table)
          if boxed(x)
          else PartitionSpec(),
      ),
      abstract,
      is_leaf=boxed,
  )
  used = {axis for s in jax.tree.leaves(shardings) for axis in s.spec}
  for axis in dict.fromkeys(axis for _, axis in table):
    if mesh.shape[axis] > 1 and axis not in used:
      raise ValueError(
          f'config.mesh.{axis}={mesh.shape[axis]} divides no dimension of any'
          f' parameter that strategy {strategy!r} splits; choose a divisor of'
          f' config.model.width or config.mesh.{axis}=1.'
      )
  return shardings


def _spec(names, shape, mesh, table) -> PartitionSpec:
  spec: list[str | None] = [None] * len(shape)
  for logical, axis in table:
    if logical in names and axis not in spec:
      i = names.index(logical)
      if spec[i] is None and shape[i] % mesh.shape[axis] == 0:
        spec[i] = axis
  return PartitionSpec(*spec)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Axis 0 split over the batch axes."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Any = None) -> int:
  """Parts that a batch is split into by `mesh`, or by the mesh in use."""
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def check_batch(rows: int, shards: int) -> None:
  """Raises ValueError unless `rows` can be split into `shards` equal parts."""
  if rows % shards:
    raise ValueError(
        f'{rows} rows cannot be split over the {shards} devices of the batch'
        f' axes {", ".join(BATCH_AXES)}; make config.data.batch_size (divided'
        f' by config.train.accumulate) a multiple of {shards}.'
    )


def shard_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
  """Global arrays from the rows that this process read.

  Args:
    batch: a tree of numpy arrays; axis 0 holds this process's rows. Every
      process gives equally many; process 0's come first.
  Raises:
    ValueError: the rows cannot be split evenly over the devices.
  """
  sharding, shards = batch_sharding(mesh), batch_shards(mesh)

  def one(local):
    local = np.asarray(local)
    check_batch(local.shape[0] * jax.process_count(), shards)
    return jax.make_array_from_process_local_data(sharding, local)

  return jax.tree.map(one, batch)


def constrain_batch(x: jax.Array) -> jax.Array:
  """`x` with axis 0 split over the batch axes and all others whole."""
  mesh = jax.sharding.get_abstract_mesh()
  if not _splits_batch(mesh):
    return x
  check_batch(x.shape[0], batch_shards(mesh))
  return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def batch_local(fn: Callable[..., Any]) -> Callable[[Any, Any], Any]:
  """Runs `fn(batched, shared)` on each device's rows alone.

  For code that sorts rows: a sort over a sharded axis would gather it.

  Args:
    fn: takes (batched, shared), returns a tree; every leaf of `batched` and of
      the result has the batch on axis 0.
  Returns:
    A function of the same signature. `shared` is whole on every device and its
    gradient is summed over them. Without a mesh, or inside another such call,
    it is `fn`.
  """

  def run(batched: Any, shared: Any) -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    if not _splits_batch(mesh):
      return fn(batched, shared)
    for leaf in jax.tree.leaves(batched):
      check_batch(leaf.shape[0], batch_shards(mesh))
    rows = PartitionSpec(BATCH_AXES)
    # Kernels do not say how their results vary over the mesh: no check.
    return jax.shard_map(
        fn,
        in_specs=(rows, PartitionSpec()),
        out_specs=rows,
        check_vma=False,
    )(batched, shared)

  return run


def _splits_batch(mesh: Any) -> bool:
  """Whether the mesh in use leaves a split of the batch to us."""
  return (
      not mesh.empty
      and batch_shards(mesh) > 1
      and not set(BATCH_AXES) & set(mesh.manual_axes)
  )
