"""What a collective moves over which links, and how long that takes at least.

On a torus a group uses both directions of a ring along each dimension that it
spans, one direction at a time where the ends are not joined. Per chip, of n:

  all-gather, reduce-scatter  (n - 1) / n of the whole
  all-reduce                  twice that
  all-to-all                  (n - 1) / n of its own part, over the cut in half

A group that spans slices (or GPU nodes) goes over the data-centre network once:
inside a slice first, then each chip its share between slices. A program for
several slices of TPUs is that of one of them; what crosses the network stands
in it as a send to the host and a receive, which say what they are a part of.
Source: "How to Scale Your Model", jax-ml.github.io/scaling-book, sharding.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from mom_jax import chips
from mom_jax.planning import hlo

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
         'ragged-all-to-all', 'collective-permute')


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a device is: slice (or GPU node) and coordinates in its torus.

  Attributes:
    id: its number in programs for several slices.
  """

  slice: int
  coords: tuple[int, ...]
  id: int = -1


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective, as every chip takes part in it.

  Attributes:
    whole: bytes of the gathered or unreduced array; of all-to-all and permute,
      what a chip sends.
    members: devices of a group.
    hidden: it runs beside other work, from a start to an end.
    ici_bytes, dcn_bytes: a chip sends as much over links and network.
    ici_s, dcn_s: seconds this takes at least.
  """

  kind: str
  whole: float
  members: int
  hidden: bool
  label: str
  ici_bytes: float
  dcn_bytes: float
  ici_s: float
  dcn_s: float

  @property
  def seconds(self) -> float:
    return self.ici_s + self.dcn_s


def kind(instruction: hlo.Instruction) -> str | None:
  """Of which kind a collective is, or None if it is none (or its end)."""
  if instruction.op == 'send':
    name = _network(instruction, 'megascale_transfer_type')
    part = _network(instruction, 'megascale_ragged_operand_index')
    if not name or part not in ('', '0'):  # beside rows go their few places
      return None
    name = name.lower().replace('_', '-')
    return {'one-to-one': 'collective-permute'}.get(name, name)
  name = instruction.op.removesuffix('-start')
  return name if name in KINDS else None


def rendezvous(instruction: hlo.Instruction) -> str:
  """What a send and its receive have in common; '' of others."""
  return _network(instruction, 'host_transfer_rendezvous')


def _network(instruction: hlo.Instruction, name: str) -> str:
  """What a send or receive says of itself: a string or groups of numbers."""
  found = re.search(
      rf'\b_xla_{name}=(?:"([^"]*)"|(\{{[\d,>{{}}-]+\}}))', instruction.attrs)
  return (found[1] or found[2]) if found else ''


def collective(
    what: str, instruction: hlo.Instruction, given: float, places: list[Place],
    topology: chips.Topology, hidden: bool,
) -> Collective:
  """The traffic of an instruction.

  Args:
    what: its kind, which a fusion around it may have changed.
    given: bytes of its operands on a device.
    places: of the devices, in the program's order.
  """
  sent = instruction.op == 'send'
  members = _over_network(instruction, places) if sent else [
      places[i] for i in group(instruction, len(places))]
  n = len(members)
  whole = given * n if what == 'all-gather' else given
  moved = move(what, whole, members, topology)
  if sent:  # also what is for the own slice
    far = moved[0] + moved[1]
    moved = 0.0, far, 0.0, far / topology.chip.dcn
  return Collective(what, whole, n, hidden, instruction.label, *moved)


def _over_network(
    instruction: hlo.Instruction, places: list[Place]
) -> list[Place]:
  """The first group of a send: devices, or slices of which each sends to its
  like.
  """
  target = _network(instruction, 'megascale_target')
  found = re.fullmatch(r'\{([\d,:]+)\}x\{[\d,:]+\}', target)
  if not found:
    of = {p.id: p for p in places}
    ids = re.search(r'\{([\d,>-]+)\}', target)
    return [of[int(i)] for i in re.findall(r'\d+', ids[1])]
  slices: list[int] = []
  for part in found[1].split(','):
    ends = [int(i) for i in part.split(':')]
    slices += range(ends[0], ends[-1] + 1)
  first = {p.slice: p for p in reversed(places)}
  return [first[i - 1] for i in slices]


def move(
    what: str, whole: float, members: list[Place], topology: chips.Topology
) -> tuple[float, float, float, float]:
  """(bytes over ICI, over DCN, seconds on ICI, on DCN) of a chip."""
  chip = topology.chip
  slices = len({p.slice for p in members})
  first = members[0].slice
  inside = {p.coords for p in members if p.slice == first}
  m = len(inside)
  if slices * m == 1:
    return 0.0, 0.0, 0.0, 0.0
  twice = 2 if what == 'all-reduce' else 1
  if what.endswith('all-to-all') or what == 'collective-permute':
    # Of two devices one sends all to the other.
    share = 1 if what == 'collective-permute' else (slices - 1) / slices
    far = whole * share if slices > 1 else 0.0
    near = (whole - far) * (m - 1) / m
    return near, far, near * _slowest(what, inside, topology), far / chip.dcn
  near, far = twice * whole * (m - 1) / m, 0.0
  if slices > 1:
    far = twice * whole * (slices - 1) / slices / m
  rate = _rate(inside, topology)
  return near, far, near / rate if m > 1 else 0.0, far / chip.dcn


def _spans(inside, topology) -> list[tuple[int, int, bool]]:
  """(chips, hops between them, whether a ring) for each dimension spanned."""
  found = []
  for dim, at in enumerate(zip(*inside)):
    count = len(set(at))
    if count > 1:
      side = topology.shape[dim]
      step = max(1, (max(at) - min(at)) // (count - 1))
      found.append((count, step, count * step >= side and topology.wraps(dim)))
  return found


def _rate(inside, topology) -> float:
  """Bytes/s into a chip from its group."""
  if not topology.is_tpu:
    return topology.chip.link
  return topology.chip.link * sum(
      (2.0 if ring else 1.0) / step
      for _, step, ring in _spans(inside, topology))


def _slowest(what, inside, topology) -> float:
  """Seconds per byte that a chip sends all over its group, or to the next."""
  if not topology.is_tpu or what == 'collective-permute':
    return 1 / topology.chip.link
  spans = _spans(inside, topology)
  if not spans:
    return 0.0
  worst = max(count * step / (8 if ring else 4) for count, step, ring in spans)
  return worst / topology.chip.link


def group(instruction: hlo.Instruction, devices: int) -> list[int]:
  """The group of the first device; all of them where none are named."""
  if instruction.op.startswith('collective-permute'):
    return list(range(min(2, devices)))
  attrs = instruction.attrs
  found = re.search(r'replica_groups=\{\{([\d,]+)\}', attrs)
  if found:
    return [int(i) for i in found[1].split(',')]
  found = re.search(
      r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attrs)
  if found:
    to, of, order = (_numbers(x) for x in found.groups())
    ids = np.arange(math.prod(of)).reshape(of)
    return (ids.transpose(order) if order else ids).reshape(to)[0].tolist()
  found = re.search(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}', attrs)
  if found:
    return _mesh_group(*found.groups())
  return list(range(devices))


def _mesh_group(mesh: str, over: str) -> list[int]:
  """Of mesh['a'=4,'b'=2] {'a':(2)2}: axes, or pieces (size before) size."""
  sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
  ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
  index: list[list[int]] = [[0] for _ in sizes]
  for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over):
    if not before:
      steps = list(range(sizes[name]))
    else:
      after = sizes[name] // int(before) // int(size)
      steps = [i * after for i in range(int(size))]
    at = list(sizes).index(name)
    index[at] = sorted({a + b for a in index[at] for b in steps})
  return ids[np.ix_(*index)].reshape(-1).tolist()


def _numbers(text: str | None) -> list[int]:
  return [int(i) for i in text.split(',')] if text else []
