"""The mesh, and how arrays are sharded over it.

The only file that names mesh axes. Activations are split over the batch and,
along 'context', over time. Parameters are sharded by a table from their logical
axes to mesh axes, an entry of `STRATEGIES`; a new layout is a new entry. Dense
products are left to the compiler, which follows the parameters; code that sorts
rows runs in `per_device.batch_local`. The mesh in use is the one `jax.set_mesh`
set; without one, everything here that concerns activations does nothing.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

# Mesh axes, outermost first: name to what lies along it.
AXES = {
    'dcn_data': 'slices that split the batch; a slow network (DCN) joins them',
    'dcn_expert': 'slices that split memories, experts and the batch',
    'data': 'replicas of the parameters; each takes a part of the batch',
    'fsdp': 'devices that split the parameters and the batch',
    'expert': 'devices that split memories, experts and the batch',
    'tensor': 'devices that split heads and hidden width',
    'context': 'devices that split sequences',
}
# Axes between slices, over the slow network.
DCN_AXES = ('dcn_data', 'dcn_expert')
BATCH_AXES = (*DCN_AXES, 'data', 'fsdp', 'expert')
# Devices along these own memories and experts, see `all_to_all`.
EXPERT_AXES = ('dcn_expert', 'expert')
# Devices along this share a sequence, see `rules.context_parallel`.
CONTEXT_AXIS = 'context'

# Logical axes that are split inside `per_device.batch_local`: the mesh axes.
LOGICAL_AXES = {
    'batch': BATCH_AXES,
    'time': (CONTEXT_AXIS,),
    'memory': EXPERT_AXES,
    'expert': EXPERT_AXES,
    'heads': ('tensor',),
    'mlp': ('tensor',),
}
# A parameter's logical axis that FSDP shards (strategy 'fsdp'), over those of
# these mesh axes that divide it; `batch_local` all-gathers it.
FSDP_SHARDED, FSDP_AXES = 'embed', ('fsdp', 'expert', CONTEXT_AXIS)
# Logical specs: of activations [B, T, ...], and of replicated arrays.
BATCH_TIME = PartitionSpec('batch', 'time')
REPLICATED = PartitionSpec()


def _any_dimension(axis: str, of: str = '') -> tuple[tuple[str, str], ...]:
  """Pairs that shard a parameter over `axis` along the first that it divides.

  Args:
    of: only parameters with this logical axis too.
  """
  names = ('embed', 'vocab', 'mlp', 'heads', 'kv')
  return tuple((f'{of}.{name}' if of else name, axis) for name in names)


# Logical axis of a parameter -> mesh axis, in order of preference. Of each mesh
# axis the first pair applies whose dimension it divides; a dimension may be
# split over several mesh axes. 'expert.embed' is 'embed' of parameters that
# have 'expert' too. All else, such as norm scales, is replicated. Dense
# parameters are replicated over slices: only their gradients cross the DCN.
STRATEGIES: dict[str, tuple[tuple[str, str], ...]] = {
    'replicated': (),
    'fsdp': (
        ('expert', 'dcn_expert'),
        ('memory', 'dcn_expert'),
        ('expert', 'expert'),
        ('memory', 'expert'),
        ('heads', 'tensor'),
        ('mlp', 'tensor'),
        ('vocab', 'tensor'),
        *_any_dimension('fsdp'),
        *_any_dimension('expert'),
        *_any_dimension('context'),
        *_any_dimension('dcn_expert', 'expert'),
        *_any_dimension('dcn_expert', 'memory'),
    ),
}


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    *,
    dcn_data: int = 1,
    dcn_expert: int = 1,
    expert: int = 1,
    tensor: int = 1,
    context: int = 1,
    devices: list[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """A mesh over all devices of all processes.

  Args:
    data, fsdp, dcn_data, dcn_expert, expert, tensor, context: sizes of the
      axes, see `AXES`; one of them may be -1, which takes the devices that are
      left.
    devices: all devices by default.
  Raises:
    ValueError: the product of the sizes is not the number of devices, or the
      product of those of `DCN_AXES` is not the number of slices.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  sizes = dict(dcn_data=dcn_data, dcn_expert=dcn_expert, data=data, fsdp=fsdp,
               expert=expert, tensor=tensor, context=context)
  shown = ', '.join(
      f'config.mesh.{k}={v}' for k, v in sizes.items()
      if v != 1 or k in ('data', 'fsdp'))
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
        f' be {count}. Set config.mesh.data=-1 and the others to sizes whose'
        f' product divides {count}.'
    )
  for name in free:
    sizes[name] = count // fixed
  return Mesh(
      arrange_devices(sizes, devices), tuple(AXES),
      axis_types=(AxisType.Auto,) * len(AXES))


def arrange_devices(
    sizes: dict[str, int], devices: list[jax.Device]
) -> np.ndarray:
  """The array of devices of a mesh, neighbours along its inner axes.

  Devices of several slices are arranged so that only `DCN_AXES` lead from one
  slice to another.

  Args:
    sizes: of all axes, in the order of `AXES`.
  Raises:
    ValueError: the product of the sizes of `DCN_AXES` is not the number of
      slices.
  """
  shape = tuple(sizes[name] for name in AXES)
  slices = len({getattr(d, 'slice_index', None) for d in devices})
  if slices == 1:
    return mesh_utils.create_device_mesh(
        shape, devices, allow_split_physical_axes=True)
  dcn_sizes = {name: sizes[name] for name in DCN_AXES}
  if math.prod(dcn_sizes.values()) != slices:
    shown = ', '.join(f'config.mesh.{k}={v}' for k, v in dcn_sizes.items())
    dcn_expert = math.gcd(slices, sizes['dcn_expert'])
    raise ValueError(
        f'{shown}, but the {len(devices)} devices form {slices} slices, which'
        ' only a slow network joins; set'
        f' config.mesh.dcn_data={slices // dcn_expert}'
        f' and config.mesh.dcn_expert={dcn_expert}.'
    )
  return mesh_utils.create_hybrid_device_mesh(
      tuple(1 if name in DCN_AXES else sizes[name] for name in AXES),
      tuple(dcn_sizes.get(name, 1) for name in AXES), devices,
      allow_split_physical_axes=True)


def param_shardings(
    abstract: Any, mesh: jax.sharding.Mesh, strategy: str
) -> Any:
  """Shardings of parameters over the mesh.

  Args:
    abstract: a tree of parameters (or of their shapes) in flax's boxes, as
      `LM.init` returns them; a leaf without a box is replicated.
    strategy: a key of `STRATEGIES`.
  Returns:
    The tree without boxes, a `NamedSharding` for each leaf.
  Raises:
    ValueError: unknown strategy, or one that cannot shard any parameter over a
      mesh axis of more than one device that it uses.
  """
  if strategy not in STRATEGIES:
    raise ValueError(
        f'config.mesh.strategy={strategy!r} is unknown; known:'
        f' {", ".join(sorted(STRATEGIES))}.'
    )
  table = STRATEGIES[strategy]

  def sharding_of(leaf: Any) -> NamedSharding:
    if not _is_boxed(leaf):
      return replicated_sharding(mesh)
    return NamedSharding(
        mesh, _param_spec(leaf.names, leaf.value.shape, mesh, table))

  shardings = jax.tree.map(sharding_of, abstract, is_leaf=_is_boxed)
  used = {axis for s in jax.tree.leaves(shardings)
          for axis in jax.tree.leaves(tuple(s.spec))}
  for axis in dict.fromkeys(axis for _, axis in table):
    if mesh.shape[axis] > 1 and axis not in used:
      names = ', '.join(dict.fromkeys(
          name for name, a in table if a == axis and '.' not in name))
      raise ValueError(
          f'config.mesh.{axis}={mesh.shape[axis]} divides no dimension of any'
          f' parameter that strategy {strategy!r} splits ({names}); choose a'
          f' divisor of config.model.width or config.mesh.{axis}=1.'
      )
  return shardings


def _is_boxed(x: Any) -> bool:
  return isinstance(x, nn.Partitioned)


def _param_spec(
    names: tuple[str | None, ...], shape: tuple[int, ...],
    mesh: jax.sharding.Mesh, table: tuple[tuple[str, str], ...],
) -> PartitionSpec:
  axes: list[tuple[str, ...]] = [()] * len(shape)
  for pattern, axis in table:
    *of, name = pattern.split('.')
    taken = any(axis in a for a in axes)
    if not {name, *of} <= set(names) or taken or mesh.shape[axis] == 1:
      continue
    i = names.index(name)
    parts = math.prod(mesh.shape[a] for a in (*axes[i], axis))
    if shape[i] % parts == 0:
      axes[i] += (axis,)
  return PartitionSpec(*(
      a if len(a) > 1 else a[0] if a else None for a in axes))


def replicated_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Axis 0 split over the batch axes."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Any = None) -> int:
  """Number of parts that `mesh`, or the mesh in use, splits a batch into."""
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def check_batch(rows: int, shards: int) -> None:
  """Raise ValueError unless `rows` can be split into `shards` equal parts."""
  if rows % shards:
    raise ValueError(
        f'{rows} rows cannot be split over the {shards} devices of the batch'
        f' axes {", ".join(BATCH_AXES)}; make config.data.batch_size (divided'
        f' by config.train.grad_accum_steps) a multiple of {shards}.'
    )


def shard_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
  """Global arrays from the rows that this process read.

  Args:
    batch: a tree of numpy arrays; axis 0 holds the rows of this process's
      devices, in order (see `multihost.data_process`).
  Raises:
    ValueError: the rows cannot be split evenly over the devices.
  """
  sharding, shards = batch_sharding(mesh), batch_shards(mesh)
  indices = sharding.addressable_devices_indices_map((shards,)).values()
  local_shards = len({index[0].start for index in indices})

  def global_array(local):
    local = np.asarray(local)
    rows = local.shape[0] * shards // local_shards
    check_batch(rows, shards)
    return jax.make_array_from_process_local_data(
        sharding, local, (rows, *local.shape[1:]))

  return jax.tree.map(global_array, batch)


def axis_size(name: str, mesh: Any = None) -> int:
  """Number of parts that `batch_local` splits a logical axis into."""
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  return math.prod(mesh.shape.get(axis, 1) for axis in LOGICAL_AXES[name])


def split_size(name: str, size: int, setting: str) -> int:
  """A device's part of `size` along a logical axis.

  Raises:
    ValueError: it is no whole number; names `setting`, whose value `size` is.
  """
  parts = axis_size(name)
  if size % parts:
    axis = LOGICAL_AXES[name][-1]
    raise ValueError(
        f'{setting}={size} cannot be split over config.mesh.{axis}={parts};'
        f' make it a multiple of {parts}, or config.mesh.{axis} a divisor of'
        f' {size}.'
    )
  return size // parts


def expert_axes() -> dict[str, int]:
  """Sizes of the `EXPERT_AXES` that have several devices."""
  shape = jax.sharding.get_abstract_mesh().shape
  return {axis: shape[axis] for axis in EXPERT_AXES if shape.get(axis, 1) > 1}


def to_mesh_axes(spec: PartitionSpec) -> PartitionSpec:
  """A logical spec in axes of the mesh in use; other names are not split."""
  mesh = jax.sharding.get_abstract_mesh()
  return PartitionSpec(*(
      tuple(a for a in LOGICAL_AXES.get(name, ()) if a in mesh.shape) or None
      for name in spec))


def constrain_batch(x: jax.Array, whole_time: bool = False) -> jax.Array:
  """[B, T, ...] split over batch and time; all other axes are whole.

  Args:
    whole_time: time is not split. Nor is it, whatever is asked, where its
      length cannot be, as of one token in decoding.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not is_active(mesh):
    return x
  check_batch(x.shape[0], batch_shards(mesh))
  spec = PartitionSpec('batch')
  if not whole_time and x.ndim > 1 and x.shape[1] % axis_size('time') == 0:
    spec = BATCH_TIME
  return jax.lax.with_sharding_constraint(x, to_mesh_axes(spec))


def constrain_replicated(x: jax.Array) -> jax.Array:
  """A parameter, whole on every device; its gradient is summed over them."""
  if not is_active(jax.sharding.get_abstract_mesh()):
    return x
  return jax.lax.with_sharding_constraint(x, REPLICATED)


def is_active(mesh: Any) -> bool:
  """True for a mesh of several devices, outside of `batch_local`."""
  return (
      not mesh.empty
      and math.prod(mesh.shape.get(axis, 1) for axis in AXES) > 1
      and not set(AXES) & set(mesh.manual_axes)
  )
