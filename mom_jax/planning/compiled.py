"""The training step compiled for TPUs that are not at hand, by libtpu.

The compiler's time grows with the blocks of a pattern, which are the body of a
loop. Where a pattern repeats a block, each kind of block is compiled by itself,
in a model of as many layers, and the plan is their mean by the kinds' shares:
whatever is outside of layers is in each of them, and whatever is in a layer as
often as there are such layers.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import re
import tempfile
from typing import Any

import jax
from jax.experimental import topologies
import numpy as np

from mom_jax import chips, config, sharding, step
from mom_jax.data.batch import Batch
from mom_jax.planning import cost, remedy, traffic

# Nothing here asks a metadata server or takes hold of a TPU.
_ENVIRONMENT = {
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_ACCELERATOR_TYPE': 'v5p-8',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
}


@dataclasses.dataclass(frozen=True)
class Step:
  """A training step on one device.

  Attributes:
    memory: bytes by kind: parameters, optimizer, averages, batch, activations
      (with all else that lives during a step) and program.
    mesh: sizes of the mesh axes.
  """

  cost: cost.Cost
  memory: dict[str, float]
  mesh: dict[str, int]


def devices(topology: chips.Topology) -> list[Any]:
  """The devices of a topology, as libtpu describes them.

  Raises:
    UserError: libtpu is absent or knows no such topology.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise config.UserError(
        f'--topology={topology.name} is compiled for by libtpu, which is'
        " absent; pip install 'mom_jax[tpu_compile]' (Linux on x86-64).")
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  slices = {'num_slices': topology.slices} if topology.slices > 1 else {}
  if topology.devices < 4:  # less than a host
    slices['chips_per_host_bounds'] = (
        list(topology.shape) + [1] * (3 - len(topology.shape)))
  try:
    found = topologies.get_topology_desc(
        platform='tpu', topology_name=topology.libtpu, **slices).devices
  except Exception as e:
    raise config.UserError(
        f'--topology={topology.name}: libtpu knows no {topology.libtpu}'
        f' ({" ".join(str(e).split())[:200]}).') from e
  if len(found) != topology.devices:
    raise config.UserError(
        f'--topology={topology.name}: libtpu describes {len(found)} devices in'
        f' place of {topology.devices}; plan for another chip.')
  return list(found)


def place(device: Any) -> traffic.Place:
  return traffic.Place(
      getattr(device, 'slice_index', 0) or 0, tuple(device.coords))


def lower_step(
    cfg: config.Config, found: list[Any]
) -> tuple[jax.stages.Lowered, step.State, jax.sharding.Mesh]:
  """The step of `mom_jax.step` for these devices; what it is called with."""
  mesh = sharding.make_mesh(**cfg.mesh.sizes, devices=found)
  sharding.check_batch(cfg.data.batch_size // cfg.train.accumulate,
                       sharding.batch_shards(mesh))
  shape = (cfg.data.batch_size, cfg.data.seq_len)
  split = sharding.batch_sharding(mesh)
  integer, real = (jax.ShapeDtypeStruct(shape, dtype, sharding=split)
                   for dtype in (np.int32, np.float32))
  # Kernels ask the mesh in scope which TPU they are made for.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    _, abstract = step.init(cfg, mesh)
    lowered = step.make_step(cfg, abstract).lower(
        abstract, Batch(integer, integer, integer, real))
    return lowered, abstract, mesh


def program(folder: str) -> str:
  """The program as libtpu writes it.

  jaxlib reads its own form of it for `Compiled.as_text`, and fails where libtpu
  is the newer one and uses instructions that jaxlib does not know.
  """
  files = list(pathlib.Path(folder).glob('*.jit_step.*.after_codegen.txt'))
  if len(files) != 1:
    raise RuntimeError(f'libtpu wrote {len(files)} programs, not one.')
  return files[0].read_text(encoding='utf-8')


def kinds_of(cfg: config.Config) -> dict[config.Config, float]:
  """What is compiled for a plan, and the share of each."""
  blocks = cfg.model.pattern.split()
  if len(set(blocks)) == len(blocks):
    return {cfg: 1.0}
  return {
      config.override(cfg, [f'model.pattern={block}']):
          blocks.count(block) / len(blocks)
      for block in dict.fromkeys(blocks)}


def plan_step(cfg: config.Config, topology: chips.Topology) -> Step:
  """What the training step costs a device.

  The state is that of the model; all else the mean over `kinds_of` it.

  Raises:
    UserError: libtpu is absent or knows no such topology; the compiler finds no
      way to fit the program into memory.
    ValueError: the settings do not fit the mesh.
  """
  parts = [(share, compile_step(one, topology))
           for one, share in kinds_of(cfg).items()]
  if len(parts) == 1:
    return parts[0][1]
  mesh = sharding.make_mesh(**cfg.mesh.sizes, devices=devices(topology))
  memory = {
      kind: sum(share * part.memory[kind] for share, part in parts)
      for kind in parts[0][1].memory
  } | state_bytes(step.init(cfg, mesh)[1])
  spent = cost.mean([(share, part.cost) for share, part in parts])
  return Step(spent, memory, dict(mesh.shape))


def compile_step(cfg: config.Config, topology: chips.Topology) -> Step:
  """Compiles the training step and adds up what it costs a device.

  Raises:
    UserError: libtpu is absent or knows no such topology; the compiler finds no
      way to fit the program into memory.
    ValueError: the settings do not fit the mesh.
  """
  found = devices(topology)
  lowered, abstract, mesh = lower_step(cfg, found)
  with tempfile.TemporaryDirectory() as folder:
    try:
      compiled = lowered.compile(compiler_options={
          'xla_dump_to': folder, 'xla_dump_hlo_as_text': True})
    except jax.errors.JaxRuntimeError as e:
      needed = re.search(r'Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm', str(e))
      if not needed:
        raise
      used = float(needed[1]) * 1024 ** ('KMG'.index(needed[2]) + 1)
      free = remedy.usable(topology)
      kinds = state_bytes(abstract)
      raise config.UserError(
          f'--topology={topology.name} does not fit: a device needs'
          f' {used / chips.GIB:.1f} of {free / chips.GIB:.1f} GiB;'
          f' {remedy.change(cfg, dict(mesh.shape), kinds, used, free)}') from e
    text = program(folder)
  places = [place(d) for d in mesh.devices.flat]
  spent = cost.of(text, topology, places)
  return Step(spent, memory(compiled, abstract), dict(mesh.shape))


def memory(compiled: jax.stages.Compiled, abstract: step.State) -> dict[
    str, float]:
  """Bytes of a device by kind; arrays that are donated count once."""
  stats = compiled.memory_analysis()
  kinds = state_bytes(abstract)
  given = float(stats.argument_size_in_bytes)
  kinds['batch and padding'] = given - sum(kinds.values())
  kinds['activations and temporaries'] = float(stats.temp_size_in_bytes)
  kinds['results'] = float(
      stats.output_size_in_bytes - stats.alias_size_in_bytes)
  kinds['program'] = float(stats.generated_code_size_in_bytes)
  return kinds


def state_bytes(abstract: step.State) -> dict[str, float]:
  """Bytes of a device's part of the state, without padding."""

  def size(tree):
    return float(sum(
        np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)))

  return {
      'parameters': size(abstract.params),
      'optimizer': size(abstract.optimizer) + size(abstract.counters),
      **({'averages': size(abstract.ema)} if abstract.ema is not None else {}),
  }
