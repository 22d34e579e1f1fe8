"""The setting to change where a step does not fit into memory."""

from __future__ import annotations

import math

from mom_jax import chips, config

RESERVED = 0.02  # fraction of the memory that the runtime keeps for itself
STATE_KINDS = ('parameters', 'optimizer', 'averages')


def usable_bytes(topology: chips.Topology) -> float:
  """Bytes of a device that a program may use."""
  return (1 - RESERVED) * topology.chip.memory / topology.chip.devices


def suggest(
    cfg: config.Config, mesh: dict[str, int], memory: dict[str, float],
    used: float, capacity: float,
) -> str | None:
  """A sentence that names the setting to change, or None if the step fits.

  Args:
    mesh: sizes of its axes.
    memory: bytes by kind, the state among them.
    used: bytes needed in all.
    capacity: bytes of a device.
  """
  if used <= capacity:
    return None
  state = sum(memory.get(k, 0.0) for k in STATE_KINDS)
  rows = cfg.data.batch_size // cfg.train.grad_accum_steps
  shards = math.prod(mesh.values())
  free = capacity - state
  if free < 0.1 * capacity:
    return (
        f'the state alone takes {state / chips.GIB:.1f} of'
        f' {capacity / chips.GIB:.1f} GiB: double config.mesh.fsdp, or take'
        ' more chips.')
  factor = 2 ** math.ceil(math.log2((used - state) / free))
  if rows % (factor * shards) == 0:
    return ('activations need too much: set config.train.grad_accum_steps='
            f'{cfg.train.grad_accum_steps * factor}.')
  if cfg.model.remat != 'full':
    return ('activations need too much and a device has few rows left: set'
            ' config.model.remat=full.')
  return ('activations of one row per device need too much: shorten'
          f' config.data.seq_len={cfg.data.seq_len} or take larger chips.')
