"""Where arrays lie on many devices; the only file that names mesh axes.

Activations are split over the batch and, along 'context', over time. How
parameters lie is a table from their logical axes to mesh axes, a line of
`STRATEGIES`; a new layout is a new line. Dense products are left to the
compiler, which follows the parameters; code that sorts rows says itself what
each device does (`batch_local`). The mesh in use is the one `jax.set_mesh` set;
without one, everything here that concerns activations does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
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
    'data': 'replicas of the parameters; each takes a share of the batch',
    'fsdp': 'devices that split the parameters and the batch',
    'expert': 'devices that split memories, experts and the batch',
    'tensor': 'devices that split heads and hidden width',
    'context': 'devices that split sequences',
}
# Those that may lie over the slow network.
SLICES = ('dcn_data', 'dcn_expert')
BATCH_AXES = (*SLICES, 'data', 'fsdp', 'expert')
# Who runs which group, where work goes on along time: see `exchange`,
# `rules.context`.
OWNERS = ('dcn_expert', 'expert')
TIME = 'context'

# What is split inside `batch_local`: logical axis to mesh axes.
LOCAL = {
    'batch': BATCH_AXES,
    'time': (TIME,),
    'memory': OWNERS,
    'expert': OWNERS,
    'heads': ('tensor',),
    'mlp': ('tensor',),
}
# Inside `batch_local` a parameter's axis of this name is whole; it comes split
# over those of these axes that store it (of strategy 'fsdp'), and is gathered.
STORED, STORES = 'embed', ('fsdp', 'expert', TIME)
# Logical, of activations [B, T, ...] and of what is whole on every device.
ROWS = PartitionSpec('batch', 'time')
WHOLE = PartitionSpec()


def _any_side(axis: str, of: str = '') -> tuple[tuple[str, str], ...]:
  """The sides of a matrix, in order of preference, for axes that only store."""
  sides = ('embed', 'vocab', 'mlp', 'heads', 'kv')
  return tuple((of + side, axis) for side in sides)


# Logical axis of a parameter -> mesh axis, in order of preference. The first
# pair of a mesh axis whose size divides what is left of the dimension applies;
# a mesh axis is used once a parameter, a dimension may be split over several.
# 'expert.embed' is 'embed' of parameters that have 'expert' too. What is left,
# such as norm scales, lies whole on every device; of dense parameters every
# slice has its own, and only sums of their gradients leave it.
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
        *_any_side('fsdp'),
        *_any_side('expert'),
        *_any_side('context'),
        *_any_side('dcn_expert', 'expert.'),
        *_any_side('dcn_expert', 'memory.'),
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
    data, fsdp, dcn_data, dcn_expert, expert, tensor, context: sizes of
      the axes, see `AXES`; one of them may be -1, which takes the devices that
      are left.
    devices: all devices by default.
  Raises:
    ValueError: the sizes do not multiply to the number of devices, or those of
      `SLICES` not to the number of slices that they form.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  given = dict(dcn_data=dcn_data, dcn_expert=dcn_expert, data=data, fsdp=fsdp,
               expert=expert, tensor=tensor, context=context)
  sizes = {name: given[name] for name in AXES}
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
      arrange(sizes, devices), tuple(AXES),
      axis_types=(AxisType.Auto,) * len(AXES))


def arrange(sizes: dict[str, int], devices: list[jax.Device]) -> np.ndarray:
  """Devices by their place in a mesh, neighbours along its inner axes.

  Devices that know which slice they are in meet those of other slices along
  `SLICES` alone.

  Args:
    sizes: of all axes, in the order of `AXES`.
  Raises:
    ValueError: the sizes of `SLICES` do not multiply to the number of slices.
  """
  shape = tuple(sizes[name] for name in AXES)
  slices = len({getattr(d, 'slice_index', None) for d in devices})
  if slices == 1:
    return mesh_utils.create_device_mesh(
        shape, devices, allow_split_physical_axes=True)
  across = {name: sizes[name] for name in SLICES}
  if math.prod(across.values()) != slices:
    shown = ', '.join(f'config.mesh.{k}={v}' for k, v in across.items())
    owners = math.gcd(slices, across['dcn_expert'])
    raise ValueError(
        f'{shown}, but the {len(devices)} devices form {slices} slices, which'
        ' only a slow network joins; set'
        f' config.mesh.dcn_data={slices // owners}'
        f' and config.mesh.dcn_expert={owners}.'
    )
  return mesh_utils.create_hybrid_device_mesh(
      tuple(1 if name in SLICES else sizes[name] for name in AXES),
      tuple(across.get(name, 1) for name in AXES), devices,
      allow_split_physical_axes=True)


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
  used = {axis for s in jax.tree.leaves(shardings)
          for axis in jax.tree.leaves(tuple(s.spec))}
  for axis in dict.fromkeys(axis for _, axis in table):
    if mesh.shape[axis] > 1 and axis not in used:
      sides = ', '.join(dict.fromkeys(
          name for name, a in table if a == axis and '.' not in name))
      raise ValueError(
          f'config.mesh.{axis}={mesh.shape[axis]} divides no dimension of any'
          f' parameter that strategy {strategy!r} splits ({sides}); choose a'
          f' divisor of config.model.width or config.mesh.{axis}=1.'
      )
  return shardings


def _spec(names, shape, mesh, table) -> PartitionSpec:
  spec: list[tuple[str, ...]] = [()] * len(shape)
  for side, axis in table:
    *of, logical = side.split('.')
    taken = any(axis in axes for axes in spec)
    if not {logical, *of} <= set(names) or taken or mesh.shape[axis] == 1:
      continue
    i = names.index(logical)
    parts = math.prod(mesh.shape[a] for a in (*spec[i], axis))
    if shape[i] % parts == 0:
      spec[i] += (axis,)
  return PartitionSpec(*(
      axes if len(axes) > 1 else axes[0] if axes else None for axes in spec))


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
        f' by config.train.grad_accum_steps) a multiple of {shards}.'
    )


def shard_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
  """Global arrays from the rows that this process read.

  Args:
    batch: a tree of numpy arrays; axis 0 holds the rows of this process's
      devices, in order (see `hosts.reader`).
  Raises:
    ValueError: the rows cannot be split evenly over the devices.
  """
  sharding, shards = batch_sharding(mesh), batch_shards(mesh)
  places = sharding.addressable_devices_indices_map((shards,)).values()
  here = len({index[0].start for index in places})

  def one(local):
    local = np.asarray(local)
    rows = local.shape[0] * shards // here
    check_batch(rows, shards)
    return jax.make_array_from_process_local_data(
        sharding, local, (rows, *local.shape[1:]))

  return jax.tree.map(one, batch)


def ways(name: str, mesh: Any = None) -> int:
  """Parts that a logical axis of `LOCAL` is split into inside `batch_local`."""
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  return math.prod(mesh.shape.get(axis, 1) for axis in LOCAL[name])


def owner_axes() -> dict[str, int]:
  """The axes that have several owners, with their sizes, outermost first."""
  shape = jax.sharding.get_abstract_mesh().shape
  return {axis: shape[axis] for axis in OWNERS if shape.get(axis, 1) > 1}


def check_ways(name: str, size: int, setting: str) -> int:
  """`size` over `ways(name)`.

  Raises:
    ValueError: it is no whole number; names `setting`, whose value `size` is.
  """
  parts = ways(name)
  if size % parts:
    axis = LOCAL[name][-1]
    raise ValueError(
        f'{setting}={size} cannot be split over config.mesh.{axis}={parts};'
        f' make it a multiple of {parts}, or config.mesh.{axis} a divisor of'
        f' {size}.'
    )
  return size // parts


def constrain_batch(x: jax.Array, whole: bool = False) -> jax.Array:
  """[B, T, ...] split over batch and time, and all other axes whole.

  Args:
    whole: time too is whole on every device. It is, whatever is asked, where
      its length cannot be split, as of one token in decoding.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not _is_ours(mesh):
    return x
  check_batch(x.shape[0], batch_shards(mesh))
  spec = PartitionSpec('batch')
  if not whole and x.ndim > 1 and x.shape[1] % ways('time', mesh) == 0:
    spec = ROWS
  return jax.lax.with_sharding_constraint(x, _physical(spec, mesh))


def gathered(x: jax.Array) -> jax.Array:
  """A parameter, whole on every device; its gradient is summed over them."""
  if not _is_ours(jax.sharding.get_abstract_mesh()):
    return x
  return jax.lax.with_sharding_constraint(x, WHOLE)


def batch_local(
    fn: Callable[..., Any],
    batched: Any = ROWS,
    shared: Any = WHOLE,
    out: Any = ROWS,
) -> Callable[[Any, Any], Any]:
  """Runs `fn(batched, shared)` on each device's rows alone.

  For code that sorts rows: a sort over a sharded axis would gather it.

  Args:
    fn: takes (batched, shared), returns a tree.
    batched, shared, out: how leaves of the arguments and of the result are
      split: a logical PartitionSpec, of names in `LOCAL`, for each or for whole
      branches. By default all that is batched is [B, T, ...], and what is
      shared is whole on every device. `STORED` in `shared` is whole for `fn`.
  Returns:
    A function of the same signature. The gradient of what is whole is summed
    over devices; along `STORED` each gets its part of the sum alone, which
    moves half as many bytes. Without a mesh, or inside another such call, it is
    `fn`.
  """

  def run(x: Any, weights: Any) -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    if not _is_ours(mesh):
      return fn(x, weights)
    jax.tree.map(
        lambda spec, branch: [
            _check_split(spec, leaf.shape) for leaf in jax.tree.leaves(branch)],
        batched, x, is_leaf=_is_spec)
    physical = lambda tree: jax.tree.map(
        lambda spec: _physical(spec, mesh), tree, is_leaf=_is_spec)
    stored = jax.tree.map(
        lambda spec, branch: jax.tree.map(
            lambda leaf: _stored(spec, leaf.shape, mesh), branch),
        shared, weights, is_leaf=_is_spec)
    given = jax.tree.map(
        lambda spec, branch: jax.tree.map(
            lambda parts: _joined(_physical(spec, mesh), parts), branch,
            is_leaf=_is_spec),
        shared, stored, is_leaf=_is_spec)
    # Kernels do not say how their results vary over the mesh: no check.
    return jax.shard_map(
        lambda x, weights: fn(x, jax.tree.map(
            _gather, stored, weights, is_leaf=_is_spec)),
        in_specs=(physical(batched), given),
        out_specs=physical(out),
        check_vma=False,
    )(x, weights)

  return run


def sum_parts(x: jax.Array, name: str) -> jax.Array:
  """Inside `batch_local`: the sum over the parts of a logical axis."""
  if ways(name) == 1:
    return x
  return jax.lax.psum(x, LOCAL[name])


def _is_spec(x: Any) -> bool:
  return isinstance(x, PartitionSpec)


def _check_split(spec: PartitionSpec, shape: tuple[int, ...]) -> None:
  if 'batch' in spec:
    check_batch(shape[0], batch_shards())
  if 'time' in spec and shape[1] % ways('time'):
    raise ValueError(
        f'{shape[1]} tokens of a row cannot be split over'
        f' config.mesh.{TIME}={ways("time")}; make config.data.seq_len (and'
        f' what mod/ blocks pick of it) a multiple of {ways("time")}.'
    )


def _physical(spec: PartitionSpec, mesh: Any) -> PartitionSpec:
  """Mesh axes, of those that the mesh has, for logical ones."""
  axes = lambda name: tuple(
      a for a in LOCAL.get(name, ()) if a in mesh.shape)
  return PartitionSpec(*(axes(name) or None for name in spec))


def _stored(
    spec: PartitionSpec, shape: tuple[int, ...], mesh: Any
) -> PartitionSpec:
  """The axes that `STORED` of an array is split over, at its place."""
  taken = {axis for name in spec for axis in LOCAL.get(name, ())}
  parts: list[tuple[str, ...]] = [()] * len(spec)
  for i, name in enumerate(spec):
    for axis in STORES if name == STORED else ():
      ways_ = math.prod(mesh.shape.get(a, 1) for a in (*parts[i], axis))
      if axis not in taken and mesh.shape.get(axis, 1) > 1 and (
          shape[i] % ways_ == 0):
        parts[i] += (axis,)
  return PartitionSpec(*(axes or None for axes in parts))


def _joined(a: PartitionSpec, b: PartitionSpec) -> PartitionSpec:
  return PartitionSpec(*(x or y for x, y in zip(a, b, strict=True)))


def _gather(spec: PartitionSpec, x: jax.Array) -> jax.Array:
  for i, axes in enumerate(spec):
    if axes:
      x = jax.lax.all_gather(x, axes, axis=i, tiled=True)
  return x


def _is_ours(mesh: Any) -> bool:
  """Whether the mesh in use leaves a split of activations to us."""
  return (
      not mesh.empty
      and math.prod(mesh.shape.get(axis, 1) for axis in AXES) > 1
      and not set(AXES) & set(mesh.manual_axes)
  )
