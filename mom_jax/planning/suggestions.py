"""What to change where a step does not fit into memory."""

from __future__ import annotations

import math

from mom_jax import chips, config

RESERVED = 0.02  # of the memory, what the runtime keeps for itself
STATE = ('parameters', 'optimizer', 'averages')


def usable(topology: chips.Topology) -> float:
  """Bytes of a device that a program may use."""
  return (1 - RESERVED) * topology.chip.memory / topology.chip.devices


def change(
    cfg: config.Config, mesh: dict[str, int], memory: dict[str, float],
    used: float, capacity: float,
) -> str | None:
  """The setting to change, or None where all fits.

  Args:
    mesh: sizes of its axes.
    memory: bytes by kind, the state among them.
    used: bytes that are needed in all.
    capacity: bytes at hand.
  """
  if used <= capacity:
    return None
  state = sum(memory.get(k, 0.0) for k in STATE)
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
    return ('activations take too much: set config.train.grad_accum_steps='
            f'{cfg.train.grad_accum_steps * factor}.')
  if cfg.model.remat != 'full':
    return ('activations take too much and a device has few rows left: set'
            ' config.model.remat=full.')
  return ('activations of one row a device take too much: shorten'
          f' config.data.seq_len={cfg.data.seq_len} or take larger chips.')
