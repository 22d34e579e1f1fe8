"""Bytes that a collective moves over each kind of link, and the least time.

On a torus a group uses both directions of a ring along each dimension that it
spans, one direction at a time where the ends are not joined. Per chip, of n:

  all-gather, reduce-scatter  (n - 1) / n of the array
  all-reduce                  twice that
  all-to-all                  (n - 1) / n of what a chip sends, across the cut

A group that spans slices (or GPU nodes) crosses the data-centre network (DCN)
once: first inside a slice, then each chip 1 / n of the array between slices. A
program for several slices of TPUs is that of one slice; what crosses the DCN
is in it as a send to the host and a receive, whose attributes name the
collective.
Source: "How to Scale Your Model", jax-ml.github.io/scaling-book, sharding.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import NamedTuple

import numpy as np

from mom_jax import chips
from mom_jax.planning import hlo

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
         'ragged-all-to-all', 'collective-permute')


@dataclasses.dataclass(frozen=True)
class Location:
  """Slice (or GPU node) of a device and its coordinates in the torus.

  Attributes:
    id: of the device, in programs for several slices.
  """

  slice: int
  coords: tuple[int, ...]
  id: int = -1


class Transfer(NamedTuple):
  """Bytes that a chip sends over links and DCN; the least seconds they take."""

  ici_bytes: float
  dcn_bytes: float
  ici_s: float
  dcn_s: float


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective, as every chip takes part in it.

  Attributes:
    array_bytes: of the gathered or unreduced array; of all-to-all and permute,
      of what a chip sends.
    group_size: devices that take part.
    overlapped: other work runs between its start and its end.
    label: op_name of the instruction.
  """

  kind: str
  array_bytes: float
  group_size: int
  overlapped: bool
  label: str
  transfer: Transfer

  @property
  def seconds(self) -> float:
    """Least time, over ICI and then over DCN."""
    return self.transfer.ici_s + self.transfer.dcn_s


def collective_kind(instruction: hlo.Instruction) -> str | None:
  """One of `KINDS`, or None for all else and for the end of a collective."""
  if instruction.op == 'send':
    name = _host_attribute(instruction, 'megascale_transfer_type')
    part = _host_attribute(instruction, 'megascale_ragged_operand_index')
    if not name or part not in ('', '0'):  # offsets and sizes travel apart
      return None
    name = name.lower().replace('_', '-')
    return {'one-to-one': 'collective-permute'}.get(name, name)
  name = instruction.op.removesuffix('-start')
  return name if name in KINDS else None


def rendezvous(instruction: hlo.Instruction) -> str:
  """The name that a send and its receive share; '' for other instructions."""
  return _host_attribute(instruction, 'host_transfer_rendezvous')


def _host_attribute(instruction: hlo.Instruction, name: str) -> str:
  """An attribute of a transfer to the host: a string or groups of integers."""
  found = re.search(
      rf'\b_xla_{name}=(?:"([^"]*)"|(\{{[\d,>{{}}-]+\}}))', instruction.attrs)
  return (found[1] or found[2]) if found else ''


def collective(
    kind: str, instruction: hlo.Instruction, operand_bytes: float,
    locations: list[Location], topology: chips.Topology, overlapped: bool,
) -> Collective:
  """The traffic of an instruction.

  Args:
    kind: which a fusion around the instruction may have changed.
    operand_bytes: on a device.
    locations: of the devices, in the program's order.
  """
  is_send = instruction.op == 'send'
  members = _dcn_group(instruction, locations) if is_send else [
      locations[i] for i in replica_group(instruction, len(locations))]
  n = len(members)
  array_bytes = operand_bytes * n if kind == 'all-gather' else operand_bytes
  moved = transfer(kind, array_bytes, members, topology)
  if is_send:  # of an all-to-all, rows for the own slice too
    dcn_bytes = moved.ici_bytes + moved.dcn_bytes
    moved = Transfer(0.0, dcn_bytes, 0.0, dcn_bytes / topology.chip.dcn)
  return Collective(
      kind, array_bytes, n, overlapped, instruction.label, moved)


def _dcn_group(
    instruction: hlo.Instruction, locations: list[Location]
) -> list[Location]:
  """The first group of a send.

  The target lists devices, or slices whose devices send each to its like.
  """
  target = _host_attribute(instruction, 'megascale_target')
  found = re.fullmatch(r'\{([\d,:]+)\}x\{[\d,:]+\}', target)
  if not found:
    of_id = {location.id: location for location in locations}
    ids = re.search(r'\{([\d,>-]+)\}', target)
    return [of_id[int(i)] for i in re.findall(r'\d+', ids[1])]
  slices: list[int] = []
  for part in found[1].split(','):
    ends = [int(i) for i in part.split(':')]
    slices += range(ends[0], ends[-1] + 1)
  first = {location.slice: location for location in reversed(locations)}
  return [first[i - 1] for i in slices]


def transfer(
    kind: str, array_bytes: float, members: list[Location],
    topology: chips.Topology,
) -> Transfer:
  """Traffic of one chip in a collective of these members."""
  chip = topology.chip
  slices = len({location.slice for location in members})
  first = members[0].slice
  coords = {
      location.coords for location in members if location.slice == first}
  m = len(coords)
  if slices * m == 1:
    return Transfer(0.0, 0.0, 0.0, 0.0)
  passes = 2 if kind == 'all-reduce' else 1
  if kind.endswith('all-to-all') or kind == 'collective-permute':
    # Of two devices one sends all to the other.
    remote = 1 if kind == 'collective-permute' else (slices - 1) / slices
    dcn = array_bytes * remote if slices > 1 else 0.0
    ici = (array_bytes - dcn) * (m - 1) / m
    seconds = ici * _seconds_per_byte(kind, coords, topology)
    return Transfer(ici, dcn, seconds, dcn / chip.dcn)
  ici, dcn = passes * array_bytes * (m - 1) / m, 0.0
  if slices > 1:
    dcn = passes * array_bytes * (slices - 1) / slices / m
  rate = _gather_rate(coords, topology)
  return Transfer(ici, dcn, ici / rate if m > 1 else 0.0, dcn / chip.dcn)


class _Span(NamedTuple):
  """A dimension of the torus along which a group has several chips."""

  chips: int
  hops: int  # from one to the next
  is_ring: bool


def _spans(coords, topology) -> list[_Span]:
  found = []
  for dim, at in enumerate(zip(*coords)):
    count = len(set(at))
    if count > 1:
      side = topology.shape[dim]
      hops = max(1, (max(at) - min(at)) // (count - 1))
      is_ring = count * hops >= side and topology.wraps(dim)
      found.append(_Span(count, hops, is_ring))
  return found


def _gather_rate(coords, topology) -> float:
  """Bytes/s into a chip from its group."""
  if not topology.is_tpu:
    return topology.chip.link
  return topology.chip.link * sum(
      (2.0 if span.is_ring else 1.0) / span.hops
      for span in _spans(coords, topology))


def _seconds_per_byte(kind, coords, topology) -> float:
  """Seconds per byte that a chip sends to all of its group, or to the next.
  """
  if not topology.is_tpu or kind == 'collective-permute':
    return 1 / topology.chip.link
  spans = _spans(coords, topology)
  if not spans:
    return 0.0
  slowest = max(
      span.chips * span.hops / (8 if span.is_ring else 4) for span in spans)
  return slowest / topology.chip.link


def replica_group(
    instruction: hlo.Instruction, num_devices: int
) -> list[int]:
  """The group of the first device; all devices where none are named."""
  if instruction.op.startswith('collective-permute'):
    return list(range(min(2, num_devices)))
  attrs = instruction.attrs
  found = re.search(r'replica_groups=\{\{([\d,]+)\}', attrs)
  if found:
    return [int(i) for i in found[1].split(',')]
  found = re.search(
      r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attrs)
  if found:
    to, of, order = (_integers(x) for x in found.groups())
    ids = np.arange(math.prod(of)).reshape(of)
    return (ids.transpose(order) if order else ids).reshape(to)[0].tolist()
  found = re.search(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}', attrs)
  if found:
    return _mesh_group(*found.groups())
  return list(range(num_devices))


def _mesh_group(mesh: str, axes: str) -> list[int]:
  """Group of mesh['a'=4,'b'=2] {'a':(2)2}: axes or pieces (size before) size.
  """
  sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
  ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
  index: list[list[int]] = [[0] for _ in sizes]
  for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
    if not before:
      steps = list(range(sizes[name]))
    else:
      after = sizes[name] // int(before) // int(size)
      steps = [i * after for i in range(int(size))]
    at = list(sizes).index(name)
    index[at] = sorted({a + b for a in index[at] for b in steps})
  return ids[np.ix_(*index)].reshape(-1).tolist()


def _integers(text: str | None) -> list[int]:
  return [int(i) for i in text.split(',')] if text else []
