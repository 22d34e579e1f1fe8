"""Backends and their selection, device types, mesh axes of arrays.

All code asks `platform()` for the kind of device that programs are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import contextvars
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

_INTERPRETED = contextvars.ContextVar('interpreted', default=False)


@dataclasses.dataclass(frozen=True)
class Backend:
  """One way to compute an operation.

  Attributes:
    name: its key in the operation's BACKENDS.
    supported: takes the operation's operands and static settings; returns None,
      or the reason why this backend cannot run them here.
    fwd: the operation, and its residuals for the backward pass.
    bwd: cotangents of the operands.
  """

  name: str
  supported: Callable[..., str | None]
  fwd: Callable[..., Any]
  bwd: Callable[..., Any]


def anywhere(*args: Any, **settings: Any) -> None:
  """`supported` of a backend that runs any call on any device."""
  del args, settings


def select(
    op: str, backends: Mapping[str, Backend], name: str, *args, **settings
) -> Backend:
  """Return a backend by name, or for 'auto' the first one that can run.

  Args:
    op: name of the operation, for messages.
    backends: best first; the token-by-token reference last.
    name: a key of `backends` or 'auto'.
    *args: passed to `supported`, as are the settings.
    **settings: static settings of the call.

  Raises:
    ValueError: no backend has that name; the message lists those that exist.
    NotImplementedError: the named backend cannot run this call, and why.
  """
  if name == 'auto':
    for backend in backends.values():
      if backend.supported(*args, **settings) is None:
        return backend
  if name not in backends:
    raise ValueError(
        f'unknown backend {name!r} of {op}; known: auto, '
        + ', '.join(sorted(backends)) + '.'
    )
  reason = backends[name].supported(*args, **settings)
  if reason is not None:
    raise NotImplementedError(f'{op} with backend={name!r}: {reason}')
  return backends[name]


def platform() -> str:
  """The platform that programs are traced for: 'cpu', 'gpu' or 'tpu'.

  That of the mesh in scope, whose devices need not exist here, so that programs
  can be compiled for a TPU without one. Without a mesh, the default backend.
  'tpu' inside `interpret`.
  """
  if _INTERPRETED.get():
    return 'tpu'
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    return jax.default_backend()
  return {'cuda': 'gpu', 'rocm': 'gpu'}.get(device.platform, device.platform)


@contextlib.contextmanager
def interpret(**params: Any) -> Iterator[None]:
  """Run TPU kernels on any device, slowly, by simulating a TPU's memories.

  Args:
    **params: fields of `pltpu.InterpretParams`, such as detect_races.
  """
  params = {'uninitialized_memory': 'nan'} | params
  token = _INTERPRETED.set(True)
  try:
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**params)):
      yield
  finally:
    _INTERPRETED.reset(token)


def tpu_info() -> pltpu.TpuInfo:
  """Cores, matrix units and memories of the TPU that programs are for."""
  if _INTERPRETED.get():
    return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V6E, 1)
  return pltpu.get_tpu_info()


def inverse_permutation(order: jax.Array) -> jax.Array:
  """Invert a permutation of [0, n).

  By a sort on TPUs, where a scatter takes ten cycles per element.
  """
  n = jnp.arange(len(order), dtype=order.dtype)
  if platform() == 'tpu':
    return jax.lax.sort((order, n), num_keys=1)[1]
  return jnp.zeros_like(order).at[order].set(n, unique_indices=True)


class GpuTarget(NamedTuple):
  """The GPU that programs are for.

  Attributes:
    capability: compute capability, 90 for sm_90.
    present: False if programs are only compiled for it.
  """

  capability: int
  present: bool


# Compute capability by part of jax's device_kind, for GPUs that are absent.
CAPABILITIES = {
    'A100': 80, 'A10': 86, 'L4': 89, 'H100': 90, 'H200': 90, 'B200': 100,
    'RTX PRO 6000': 120}


def gpu_target() -> GpuTarget:
  """Return the GPU that programs are for.

  Raises:
    ValueError: the GPU in scope is neither present nor known.
  """
  if jax.default_backend() == 'gpu':
    capability = jax.local_devices()[0].compute_capability
    return GpuTarget(int(capability.replace('.', '')), True)
  kind = jax.sharding.get_abstract_mesh().abstract_device.device_kind
  for name, capability in CAPABILITIES.items():
    if name in kind:
      return GpuTarget(capability, False)
  raise ValueError(
      f'GPU {kind!r} has no known compute capability; add it to CAPABILITIES.')


def takes_numpy(function: Callable[..., Any]) -> Callable[..., Any]:
  """Turn the NumPy arrays that a function is called with into JAX arrays.

  Outside `jit`, NumPy arrays would reach code that asks for `x.at` or indexes
  them with traced numbers.
  """

  @functools.wraps(function)
  def call(*args, **kwargs):
    args, kwargs = jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x,
        (args, kwargs))
    return function(*args, **kwargs)

  return call


def vary_alike(*arrays: jax.Array | None) -> tuple[jax.Array | None, ...]:
  """Make all arrays vary over the same mesh axes, inside `shard_map`.

  Loops need carries of one type; the transpose of this cast sums the gradient
  of a replicated operand over devices. Outside `shard_map` nothing changes.
  """
  axes = frozenset().union(*(_axes(a) for a in _arrays(arrays)))
  return tuple(None if a is None else _vary(a, axes) for a in arrays)


def zeros(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.Array:
  """Zeros that vary over the same mesh axes as `like`."""
  return _vary(jnp.zeros(shape, dtype), _axes(like))


def shape_like(
    shape: tuple[int, ...], dtype: Any, like: jax.Array
) -> jax.ShapeDtypeStruct:
  """An output of `pallas_call` that varies over the same axes as `like`."""
  return jax.ShapeDtypeStruct(
      shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def _arrays(arrays):
  return [a for a in arrays if a is not None]


def _vary(a, axes):
  missing = tuple(sorted(axes - _axes(a)))
  return jax.lax.pcast(a, missing, to='varying') if missing else a


def _axes(a):
  return jax.typeof(a).manual_axis_type.varying
