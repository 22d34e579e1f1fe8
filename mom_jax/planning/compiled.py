"""The training step compiled for TPUs that are not at hand, by libtpu."""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import os
import pathlib
import re
import tempfile
import threading
import time
from typing import Any

import jax
from jax.experimental import topologies
import numpy as np

from mom_jax import chips, config
from mom_jax.data import Batch
from mom_jax.parallel import sharding
from mom_jax.planning import cost, suggestions, traffic
from mom_jax.training import step

# Nothing here asks a metadata server or takes hold of a TPU.
_ENVIRONMENT = {
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_ACCELERATOR_TYPE': 'v5p-8',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
}
SCHEDULED = 'after_optimizations_after_buffer_assignment'
PAGE = 1 << 14  # bytes that temporaries are a multiple of; v5e, v5p, v6e


@dataclasses.dataclass(frozen=True)
class PlannedStep:
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
        " absent; pip install 'mom_jax[tpu-compile]' (Linux on x86-64).")
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


def location(device: Any) -> traffic.Location:
  """The location of one of `devices`."""
  return traffic.Location(
      getattr(device, 'slice_index', 0) or 0, tuple(device.coords), device.id)


def lower_step(
    cfg: config.Config, devices: list[Any]
) -> tuple[jax.stages.Lowered, step.State, jax.sharding.Mesh]:
  """(The step of `training.step`, its abstract state, the mesh)."""
  mesh = sharding.make_mesh(**cfg.mesh.sizes, devices=devices)
  sharding.check_batch(cfg.data.batch_size // cfg.train.grad_accum_steps,
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


def read_program(folder: str, stage: str) -> str:
  """The program as libtpu dumps it at a stage of compilation.

  `Compiled.as_text` reads it by jaxlib, which fails where libtpu is newer and
  uses instructions that jaxlib does not know.
  """
  files = list(pathlib.Path(folder).glob(f'*.jit_step.*.{stage}.txt'))
  if len(files) != 1:
    raise RuntimeError(f'libtpu wrote {len(files)} programs, not one.')
  return files[0].read_text(encoding='utf-8')


def plan_step(
    cfg: config.Config, topology: chips.Topology, quick: bool = False
) -> PlannedStep:
  """Compiles the training step and adds up what it costs a device.

  Args:
    quick: generates no code, which takes longer than all else; then
      instructions have no estimate of their cycles, and the program no size.
  Raises:
    UserError: libtpu is absent or knows no such topology; the compiler cannot
      fit the program into memory.
    ValueError: the settings do not fit the mesh.
  """
  mesh = sharding.make_mesh(**cfg.mesh.sizes, devices=devices(topology))
  with tempfile.TemporaryDirectory() as folder:
    if quick:
      _, abstract = step.init(cfg, mesh)
      _schedule(cfg, topology, folder)
      used = scheduled_memory(read_program(
          folder, 'after_optimizations-buffer-assignment'), abstract)
      # The list has the bytes in use; libtpu allocates whole pages.
      listed = used['activations and temporaries']
      used['activations and temporaries'] = -(-listed // PAGE) * PAGE
      text = read_program(folder, SCHEDULED)
    else:
      compiled, abstract = _compile(cfg, topology, folder)
      used = memory(compiled, abstract)
      text = read_program(folder, 'after_codegen')
  locations = [location(d) for d in mesh.devices.flat]
  return PlannedStep(
      cost.program_cost(text, topology, locations), used, dict(mesh.shape))


def _compile(
    cfg: config.Config, topology: chips.Topology, folder: str
) -> tuple[jax.stages.Compiled, step.State]:
  lowered, abstract, mesh = lower_step(cfg, devices(topology))
  try:
    return lowered.compile(compiler_options={
        'xla_dump_to': folder, 'xla_dump_hlo_as_text': True}), abstract
  except jax.errors.JaxRuntimeError as e:
    needed = re.search(r'Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm', str(e))
    if not needed:
      raise
    used = float(needed[1]) * 1024 ** ('KMG'.index(needed[2]) + 1)
    free = suggestions.usable_bytes(topology)
    kinds = state_bytes(abstract)
    raise config.UserError(
        f'--topology={topology.name} does not fit: a device needs'
        f' {used / chips.GIB:.1f} of {free / chips.GIB:.1f} GiB;'
        f' {suggestions.suggest(cfg, dict(mesh.shape), kinds, used, free)}'
    ) from e


def _schedule(
    cfg: config.Config, topology: chips.Topology, folder: str
) -> None:
  """Compiles in a process of its own, until the dump is complete."""
  context = multiprocessing.get_context('spawn')
  errors = context.SimpleQueue()
  child = context.Process(
      target=_compile_in_child, args=(cfg, topology, folder, errors))
  child.start()
  while child.is_alive() and not _is_scheduled(folder):
    time.sleep(0.5)
  child.kill()
  child.join()
  if not errors.empty():
    raise errors.get()


def _is_scheduled(folder: str) -> bool:
  """True once the dump holds the whole scheduled program.

  Its entry comes last and ends with a brace at the start of a line.
  """
  try:
    text = read_program(folder, SCHEDULED)
  except RuntimeError:
    return False
  return 'ENTRY ' in text and text.rstrip().endswith('\n}')


def _compile_in_child(cfg, topology, folder, errors) -> None:
  parent = os.getppid()

  def exit_with_parent():  # compiling does not stop by itself
    while os.getppid() == parent:
      time.sleep(1)
    os._exit(1)

  threading.Thread(target=exit_with_parent, daemon=True).start()
  try:
    _compile(cfg, topology, folder)
  except (config.UserError, ValueError, NotImplementedError) as e:
    errors.put(type(e)(str(e)))


def memory(compiled: jax.stages.Compiled, abstract: step.State) -> dict[
    str, float]:
  """Bytes of a device by kind; donated arrays count once."""
  stats = compiled.memory_analysis()
  kinds = state_bytes(abstract)
  given = float(stats.argument_size_in_bytes)
  kinds['batch and padding'] = given - sum(kinds.values())
  kinds['activations and temporaries'] = float(stats.temp_size_in_bytes)
  kinds['results'] = float(
      stats.output_size_in_bytes - stats.alias_size_in_bytes)
  kinds['program'] = float(stats.generated_code_size_in_bytes)
  return kinds


def scheduled_memory(buffers: str, abstract: step.State) -> dict[str, float]:
  """Read what `memory` returns from libtpu's allocations; HBM is colour 0."""
  kept = 'output', 'maybe-live-out'  # the tuple of results, and its parts
  sizes = dict.fromkeys(('parameter', 'preallocated-temp', *kept), 0.0)
  for size, what in re.findall(
      r'^allocation \d+: size (\d+), page \d+, ([a-z-]+)', buffers, re.M):
    if what in sizes:
      sizes[what] += float(size)
  kinds = state_bytes(abstract)
  kinds['batch and padding'] = sizes['parameter'] - sum(kinds.values())
  kinds['activations and temporaries'] = sizes['preallocated-temp']
  kinds['results'] = sum(sizes[what] for what in kept)
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
