"""Compiles for an NVIDIA GPU without one (extra 'gpu-compile')."""

from collections.abc import Mapping
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies
import numpy as np
import pytest

# What XLA needs to know of an H100.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def abstract_mesh(kind: str = 'NVIDIA H100 80GB HBM3'):
  """A mesh of one GPU of that kind, for tracing alone."""
  device = jax.sharding.AbstractDevice(
      device_kind=kind, num_cores=132, platform='gpu')
  return jax.sharding.AbstractMesh((1,), ('x',), abstract_device=device)


def mesh(axes: Mapping[str, int]) -> jax.sharding.Mesh:
  """H100s of one machine; skips the test where they cannot be compiled for."""
  for name in ('jax_cuda13_plugin', 'triton'):
    if importlib.util.find_spec(name) is None:
      pytest.skip(f"{name} is absent: pip install '.[gpu-compile]'")
  os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
  topology = topologies.get_topology_desc(
      platform='cuda', topology=f'1x1x{math.prod(axes.values())}',
      target_config=_H100)
  devices = np.array(topology.devices).reshape(tuple(axes.values()))
  return jax.sharding.Mesh(devices, tuple(axes))


def compile_for_h100(fn, *args, axes: Mapping[str, int] | None = None, **jit):
  """`jax.jit(fn, **jit)` compiled for H100s; of args only shapes count.

  Args:
    fn: what is compiled.
    *args: arrays or shapes, which every device has whole.
    axes: of the mesh in scope; None is one device, 'x'.
    **jit: of `jax.jit`.
  """
  here = mesh(axes or {'x': 1})
  sharding = jax.sharding.NamedSharding(here, jax.sharding.PartitionSpec())
  shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
  with jax.sharding.use_abstract_mesh(here.abstract_mesh):
    return jax.jit(fn, **jit).lower(*shapes).compile()


def assert_kernels_multiply(compiled) -> None:
  """Every matrix product is in a Triton kernel, none is left to XLA."""
  text = compiled.as_text()
  assert 'triton_kernel_call' in text
  left = re.findall(r'= \S+ (?:dot|convolution)\(.*|.*cublas.*', text)
  assert not left, left


def assert_no_communication(compiled) -> None:
  """No device waits for another one."""
  for operation in ('all-', 'collective', 'reduce-scatter'):
    assert operation not in compiled.as_text(), operation
