"""Accelerators: speeds and sizes, and topologies of many.

Sources: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x: peak, HBM, ICI as
bidirectional bandwidth of a chip over all its links, DCN or network cards of a
host over its chips), data sheets of NVIDIA A100, H100 SXM, H200 SXM and DGX
B200 (half of the bidirectional NVLink rate, one 200 or 400 Gbit/s card per
GPU).
"""

from __future__ import annotations

import dataclasses
import math
import re

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Speeds and sizes of a chip; rates are per second, links one way.

  Attributes:
    kinds: jax's device_kind.
    flops: dense bfloat16 FLOP/s.
    memory: bytes of HBM, of which a program may use all but what is reserved.
    hbm: bytes/s of HBM.
    link: bytes/s of one link between chips, one way; of a GPU all its NVLinks.
    dims: torus dimensions of the links; 0 is a switch.
    dcn: bytes/s into or out of the data-centre network, per chip.
    devices: jax devices behind a chip.
    cores: TensorCores of a chip, where names of topologies count those.
    host: chips of a host; of a GPU node, which NVLink spans.
    clock: cycles/s of a TensorCore, from its peak and its matrix units.
  """

  name: str
  kinds: tuple[str, ...]
  flops: float
  memory: float
  hbm: float
  link: float
  dims: int
  dcn: float
  devices: int = 1
  cores: int = 1
  host: int = 4
  clock: float = 0.0


CHIPS = {chip.name: chip for chip in (
    Chip('v4', ('TPU v4',), 275e12, 32 * GIB, 1228e9, 50e9, 3, 6.25e9,
         cores=2, clock=1.05e9),
    Chip('v5e', ('TPU v5 lite',), 197e12, 16 * GIB, 819e9, 50e9, 2, 3.125e9,
         host=8, clock=1.5e9),
    Chip('v5p', ('TPU v5p', 'TPU v5'), 459e12, 95 * GIB, 2765e9, 100e9, 3,
         6.25e9, cores=2, clock=1.75e9),
    Chip('v6e', ('TPU v6 lite',), 918e12, 32 * GIB, 1640e9, 100e9, 2, 12.5e9,
         host=8, clock=1.75e9),
    Chip('tpu7x', ('TPU7x',), 2307e12, 192 * GIB, 7380e9, 100e9, 3, 12.5e9,
         devices=2, cores=2, clock=2.2e9),
    Chip('a100', ('NVIDIA A100-SXM4-80GB', 'NVIDIA A100-SXM4-40GB'), 312e12,
         80e9, 2039e9, 300e9, 0, 25e9, host=8),
    Chip('h100', ('NVIDIA H100 80GB HBM3',), 989e12, 80e9, 3350e9, 450e9, 0,
         50e9, host=8),
    Chip('h200', ('NVIDIA H200',), 989e12, 141e9, 4800e9, 450e9, 0, 50e9,
         host=8),
    Chip('b200', ('NVIDIA B200',), 2250e12, 180e9, 8000e9, 900e9, 0, 50e9,
         host=8),
)}

# Chips of a slice -> its shape, for the shapes that Cloud TPU offers.
_FLAT = {1: '1x1', 4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8',
         128: '8x16', 256: '16x16'}
_CUBES = {4: '2x2x1', 8: '2x2x2', 16: '2x2x4', 32: '2x4x4', 64: '4x4x4',
          128: '4x4x8', 256: '4x8x8', 512: '8x8x8', 1024: '8x8x16',
          2048: '8x16x16', 4096: '16x16x16'}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Chips that a plan is made for.

  Attributes:
    name: as the user wrote it.
    chips: of all slices, or of all GPU nodes.
    shape: chips along each torus dimension of a slice; () for GPUs.
    slices: joined by the data-centre network; GPU nodes.
  """

  name: str
  chip: Chip
  chips: int
  shape: tuple[int, ...]
  slices: int

  @property
  def devices(self) -> int:
    return self.chips * self.chip.devices

  @property
  def is_tpu(self) -> bool:
    return self.chip.dims > 0

  @property
  def libtpu(self) -> str:
    """Name of a slice for libtpu."""
    return f'{self.chip.name}:' + 'x'.join(map(str, self.shape))

  def wraps(self, dim: int) -> bool:
    """Return True if the links of a torus dimension form a ring.

    2D slices have rings along sides of 16; 3D ones are made of cubes of 4 x 4 x
    4, whose optical links close every side that is a multiple of 4.
    """
    if self.chip.dims == 2:
      return self.shape[dim] >= 16
    return all(side % 4 == 0 for side in self.shape)

  def describe(self) -> str:
    chip = self.chip
    if not self.is_tpu:
      return f'{self.chips} {chip.name} in {self.slices} node(s)'
    shape = 'x'.join(map(str, self.shape))
    counts = ', the name counts TensorCores' if chip.cores > 1 else ''
    many = f', {self.slices} slices' if self.slices > 1 else ''
    return f'{self.chips} {chip.name} chips, {shape}{many}{counts}'


def peak_flops(kind: str, count: int) -> float | None:
  """FLOP/s of `count` jax devices of a kind, or None if it is unknown."""
  for chip in CHIPS.values():
    if kind in chip.kinds:
      return chip.flops / chip.devices * count
  return None


def topology(name: str) -> Topology:
  """Read 'v5p-256', 'v6e:16x16', '2xv5e-256' or 'h100-64'.

  As in Cloud TPU's names the number counts TensorCores for v4, v5p and tpu7x,
  chips for v5e and v6e, and GPUs for the others.

  Raises:
    ValueError: there is no such chip, or it is not offered in that number.
  """
  match = re.fullmatch(r'(?:(\d+)x)?([a-z]+\d+\w*?)(?:-(\d+)|:([\dx]+))', name)
  if not match or match[2] not in CHIPS:
    raise ValueError(
        f'--topology={name} is unknown; write CHIP-NUMBER such as v5p-256,'
        f' v6e:16x16 or 2xv5e-256 with a chip of {", ".join(CHIPS)}.')
  slices, chip = int(match[1] or 1), CHIPS[match[2]]
  if chip.dims == 0:
    return _gpus(name, chip, slices * int(match[3] or 0))
  table = _FLAT if chip.dims == 2 else _CUBES
  if match[4]:
    shape = tuple(int(side) for side in match[4].split('x'))
  else:
    count, rest = divmod(int(match[3]), chip.cores)
    if rest or count not in table:
      offered = ', '.join(f'{chip.name}-{n * chip.cores}' for n in table)
      raise ValueError(f'--topology={name} is not offered; known: {offered}.')
    shape = tuple(int(side) for side in table[count].split('x'))
  if len(shape) != chip.dims or min(shape) < 1 or slices < 1:
    raise ValueError(
        f'--topology={name} must have {chip.dims} sides, as in'
        f' {chip.name}:{list(table.values())[-1]}.')
  return Topology(name, chip, slices * math.prod(shape), shape, slices)


def _gpus(name, chip, count) -> Topology:
  if count < 1 or count > chip.host and count % chip.host:
    raise ValueError(
        f'--topology={name} must name 1 to {chip.host} GPUs or whole nodes of'
        f' {chip.host}.')
  return Topology(name, chip, count, (), -(-count // chip.host))
