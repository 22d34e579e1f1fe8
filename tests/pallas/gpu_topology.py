"""Compiles for an NVIDIA GPU without one (extra 'gpu-compile')."""

import importlib.util
import os

import jax
from jax.experimental import topologies
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


def mesh() -> jax.sharding.Mesh:
  """One H100; skips the test where it cannot be compiled for."""
  for name in ('jax_cuda13_plugin', 'triton'):
    if importlib.util.find_spec(name) is None:
      pytest.skip(f"{name} is absent: pip install '.[gpu-compile]'")
  os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
  topology = topologies.get_topology_desc(
      platform='cuda', topology='1x1x1', target_config=_H100)
  return jax.sharding.Mesh(topology.devices, ('x',))


def compile_for_h100(fn, *args, **jit):
  """`jax.jit(fn, **jit)` compiled for one H100; of args only shapes count."""
  here = mesh()
  sharding = jax.sharding.NamedSharding(here, jax.sharding.PartitionSpec())
  shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
  with jax.sharding.use_abstract_mesh(here.abstract_mesh):
    return jax.jit(fn, **jit).lower(*shapes).compile()
