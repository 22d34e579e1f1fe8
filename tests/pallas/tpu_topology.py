"""Compiles for a TPU without one, by libtpu (extra 'tpu-compile')."""

import importlib.util
import os

import jax
from jax.experimental import topologies
import numpy as np
import pytest

# The smallest topology of each generation; v5p has two cores behind a device.
TOPOLOGIES = {
    'v5e': 'v5e:2x2',
    'v5p': 'v5p:2x2x1',
    'v6e': 'v6e:2x2',
    'tpu7x': 'tpu7x:2x2x1',
}
# Nothing here asks a metadata server or takes hold of a TPU.
_ENVIRONMENT = {
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_ACCELERATOR_TYPE': 'v5p-8',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
}
_MEBI = 2**20


def devices(generation: str, slices: int = 1) -> list[jax.Device]:
  """Devices of that generation; skips the test where libtpu is absent."""
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip("libtpu is absent: pip install '.[tpu-compile]'")
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  topology = topologies.get_topology_desc(
      platform='tpu', topology_name=TOPOLOGIES[generation],
      **({'num_slices': slices} if slices > 1 else {}))
  return topology.devices


def mesh(generation: str, names=('x',)) -> jax.sharding.Mesh:
  """One device of that generation; skips the test where libtpu is absent."""
  one = np.array(devices(generation)[:1]).reshape((1,) * len(names))
  return jax.sharding.Mesh(one, names)


def compile_for(generation: str, fn, *args, **jit):
  """`jax.jit(fn, **jit)` compiled for one device of that generation.

  Args:
    generation: a key of TOPOLOGIES.
    fn: a function of arrays; what it closes over must not be arrays.
    *args: trees of arrays or shapes. Values are not used.
  Returns:
    What `jax.stages.Lowered.compile` returns.
  """
  here = mesh(generation)
  sharding = jax.sharding.NamedSharding(here, jax.sharding.PartitionSpec())
  shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
  # Lowering asks the mesh in scope which TPU it is for.
  with jax.sharding.use_abstract_mesh(here.abstract_mesh):
    return jax.jit(fn, **jit).lower(*shapes).compile()


def has_kernel(compiled) -> bool:
  """True if a Pallas kernel is in the program."""
  return 'tpu_custom_call' in compiled.as_text()


def temporary_mebibytes(compiled) -> float:
  """HBM that the program needs beside its arguments and results."""
  return compiled.memory_analysis().temp_size_in_bytes / _MEBI
