"""Cost of a compiled step: FLOPs, bytes, collectives, least time.

  compute   FLOPs of matrix products (dot, convolution, kernels that declare
            them); float32 products of highest precision take six passes
  HBM       bytes that instructions read and write in main memory; of an array
            that it slices, a fusion reads the slice
  links     see `traffic`

A loop counts times its iterations; one whose iterations depend on data counts
once and is listed. Of a conditional the costliest branch counts.

Instructions of a device run one after another, each as long as its FLOPs, its
bytes or (TPUs) the compiler's own estimate of its cycles take. A collective
adds its time, less that of the instructions between its start and its end.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import numpy as np

from mom_jax import chips
from mom_jax.planning import hlo, traffic

_FREE = {'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast',
         'after-all', 'partition-id', 'replica-id', 'opt-barrier', 'domain',
         'copy-done', 'async-done', 'async-update', 'all-gather-done',
         'all-reduce-done', 'collective-permute-done', 'send-done',
         'recv-done'}
_FREE_TARGETS = {'AllocateBuffer', 'ConcatBitcast', 'ZeroCrop', 'Sharding',
                 'AssumeGatherIndicesInBound', 'GatherScatterIndicesBitpacked'}
_SLICES = ('dynamic-slice', 'slice', 'gather')
_SAME = ('bitcast', 'reshape', 'copy', 'convert', 'transpose')


@dataclasses.dataclass
class Cost:
  """Cost of one step on one device; times are lower bounds.

  Attributes:
    busy_s: seconds of the instructions, one after another.
    exposed_s: seconds of collectives that no other work hides.
    collectives: with the number of their runs, in the order of the program.
    unknown_loops: labels of loops whose iterations depend on data.
  """

  flops: float = 0.0
  hbm_bytes: float = 0.0
  busy_s: float = 0.0
  exposed_s: float = 0.0
  collectives: list[tuple[traffic.Collective, int]] = dataclasses.field(
      default_factory=list)
  unknown_loops: list[str] = dataclasses.field(default_factory=list)

  def add(self, other: Cost, times: int = 1) -> None:
    self.flops += times * other.flops
    self.hbm_bytes += times * other.hbm_bytes
    self.busy_s += times * other.busy_s
    self.exposed_s += times * other.exposed_s
    self.collectives += [(c, n * times) for c, n in other.collectives]
    self.unknown_loops += other.unknown_loops

  @property
  def ici_bytes(self) -> float:
    return sum((n * c.transfer.ici_bytes for c, n in self.collectives), 0.0)

  @property
  def dcn_bytes(self) -> float:
    return sum((n * c.transfer.dcn_bytes for c, n in self.collectives), 0.0)

  @property
  def ici_s(self) -> float:
    return sum((n * c.transfer.ici_s for c, n in self.collectives), 0.0)

  @property
  def dcn_s(self) -> float:
    return sum((n * c.transfer.dcn_s for c, n in self.collectives), 0.0)


def program_cost(
    text: str, topology: chips.Topology, locations: list[traffic.Location]
) -> Cost:
  """Adds up a compiled program.

  Args:
    text: as XLA prints it after compilation.
    locations: of the devices, in the order of the program's partitions.
  """
  return CostModel(hlo.parse(text), topology, locations).computation(None)


class CostModel:
  """Costs of a module's computations, each computed once.

  Args:
    locations: as for `program_cost`.
  """

  def __init__(
      self, module: hlo.Module, topology: chips.Topology,
      locations: list[traffic.Location],
  ):
    self.module, self.topology, self.locations = module, topology, locations
    chip = topology.chip
    self.peak = chip.flops / chip.devices
    self.rate = chip.hbm / chip.devices
    self.computation = functools.cache(self._computation)
    self.moved = functools.cache(self._moved)
    self.send_of = {
        name: _send_of(c) for name, c in module.computations.items()}

  def instruction(
      self, i: hlo.Instruction, here: hlo.Computation
  ) -> Cost:
    """Cost of one instruction of a computation, its collectives left out."""
    total = Cost()
    self._add_instruction(i, here, total)
    return total

  def _computation(self, name: str | None) -> Cost:
    """Cost of a computation; None is the entry."""
    module = self.module
    here = module.entry if name is None else module.computations[name]
    total, seen = Cost(), {}
    begin, end = {}, {}  # of what runs beside others, in seconds of `busy_s`
    for i in here.instructions:
      before = total.busy_s
      self._add_instruction(i, here, total)
      for name in i.operands if i.op.endswith('-done') else ():
        end[self.send_of[here.name].get(name, name)] = before
      for found, starts in self._collectives(i, here):
        key = self._key(i, found)
        if not starts or key in seen:
          end[key] = before
          continue
        seen[key] = found
        total.collectives.append((found, 1))
        if found.overlapped:
          begin[key] = total.busy_s
        else:
          total.exposed_s += found.seconds
    total.exposed_s += sum(
        max(0.0, seen[key].seconds - max(0.0, end.get(key, at) - at))
        for key, at in begin.items())
    return total

  def _key(self, i, found):
    """One key for all pieces of a collective that fusions share."""
    if i.op == 'fusion' and found.overlapped:
      return found.label, found.kind, found.array_bytes
    return i.name

  def _add_instruction(self, i: hlo.Instruction, here, total: Cost) -> None:
    if i.op == 'while':
      iterations = self.module.iterations(i, here)
      if iterations is None:
        total.unknown_loops.append(i.label)
        iterations = 1
      for role in ('body', 'condition'):
        total.add(self.computation(i.calls[role][0]), iterations)
    elif i.op == 'conditional':
      names = [n for names in i.calls.values() for n in names]
      total.add(max(map(self.computation, names), key=lambda c: c.busy_s))
    elif i.op == 'call':
      total.add(self.computation(i.calls['to_apply'][0]))
    elif i.op not in _FREE:
      flops, moved = self._flops(i, here), self._bytes(i, here)
      total.flops += flops
      total.hbm_bytes += moved
      if not traffic.collective_kind(i):
        total.busy_s += max(
            flops / self.peak, moved / self.rate, self._estimated(i))

  def _estimated(self, i) -> float:
    """Seconds by the compiler's own estimate of cycles, or 0."""
    found = re.search(r'"estimated_cycles":"(\d+)"', i.attrs)
    clock = self.topology.chip.clock
    return int(found[1]) / clock if found and clock else 0.0

  # Collectives.

  def _collectives(self, i, here):
    """Collectives that an instruction is or, as a fusion, holds.

    Each with a flag, true if the instruction starts it: of the fusions that
    share a collective one starts it, others (in loops, too) continue it, one
    ends it.
    """
    kind = traffic.collective_kind(i)
    if kind:
      overlapped = i.op.endswith('-start') or i.op == 'send'
      yield self._collective(kind, i, here, overlapped), True
    elif i.op in ('fusion', 'async-start'):
      for name in i.calls.get('calls', ()):
        inside = self.module.computations[name]
        for j in inside.instructions:
          kind = traffic.collective_kind(j)
          if kind == 'all-reduce' and name.startswith('all-reduce-scatter'):
            yield self._collective('reduce-scatter', j, inside, False), True
          elif kind:
            piece = None if i.op == 'async-start' else _piece(name, inside)
            overlapped = i.op == 'async-start' or piece is not None
            yield (self._collective(kind, j, inside, overlapped),
                   piece in (None, 'Start'))
          elif j.op == 'fusion':
            yield from self._collectives(j, inside)

  def _collective(self, kind, i, here, overlapped):
    sizes = [_sum(here.by_name[name].shape) for name in i.operands]
    operand_bytes = sum(sizes, 0.0)
    if kind == 'ragged-all-to-all':
      # The smaller of the buffers that are sent and received, as if full.
      end = next((recv for recv, send in self.send_of[here.name].items()
                  if send == i.name), i.name)
      operand_bytes = min(sizes[0], here.by_name[end].shape[0].bytes)
    return traffic.collective(
        kind, i, operand_bytes, self.locations, self.topology, overlapped)

  # FLOPs.

  def _flops(self, i: hlo.Instruction, here: hlo.Computation) -> float:
    if i.op == 'dot':
      lhs = here.by_name[i.operands[0]].shape[0]
      summed = [int(d) for d in re.findall(
          r'\d+', i.attr('lhs_contracting_dims') or '')]
      k = math.prod(lhs.dims[d] for d in summed)
      return 2.0 * i.shape[0].size * k * _passes(i, here)
    if i.op == 'convolution':
      return convolution_flops(i, here) * _passes(i, here)
    if i.op == 'custom-call':
      found = re.search(
          r'"cost_estimate":\{[^}]*"flops":"?(\d+)', i.attrs.replace(' ', ''))
      return float(found[1]) if found else 0.0
    if i.op in ('fusion', 'async-start'):
      return sum((
          self._flops(j, self.module.computations[name])
          for name in i.calls.get('calls', ())
          for j in self.module.computations[name].instructions), 0.0)
    return 0.0

  # Bytes of main memory.

  def _bytes(self, i: hlo.Instruction, here: hlo.Computation) -> float:
    if i.op == 'custom-call' and (
        i.attr('custom_call_target') or '').strip('"') in _FREE_TARGETS:
      return 0.0
    if i.op == 'copy-start':
      return _hbm(i.shape[:2])
    if i.op in ('send', 'recv'):
      return _hbm(i.shape[:1])

    def operand(k):
      return here.by_name[i.operands[k]].shape

    if i.op in _SLICES:
      source = operand(0)[0]
      return _hbm(i.shape) + (i.shape[0].bytes if source.hbm else 0)
    if i.op == 'dynamic-update-slice':
      return _hbm(operand(1)) + (
          operand(1)[0].bytes if i.shape[0].hbm else 0)
    if i.op == 'scatter':
      update = operand(len(i.operands) // 2 + 1)
      return _hbm(update) + 2 * (_sum(update) if i.shape[0].hbm else 0)
    if i.op == 'fusion':
      return self._fusion_bytes(i, here)
    return _hbm(i.shape) + sum(
        _hbm(here.by_name[name].shape) for name in dict.fromkeys(i.operands))

  def _fusion_bytes(self, i, here) -> float:
    name = i.calls['calls'][0]
    reads, writes = self.moved(name)
    total = 0.0
    for k, operand in enumerate(i.operands):
      shape = here.by_name[operand].shape
      if shape and all(a.hbm for a in shape):
        total += min(_sum(shape), reads.get(k, 0.0))
    for array, written in zip(i.shape, writes):
      if array.hbm:
        total += min(array.bytes, written)
    return total

  def _moved(self, name: str) -> tuple[dict[int, float], list[float]]:
    """Bytes that a fused computation reads of each parameter, and writes."""
    inside = self.module.computations[name]
    reads = {k: self._read(inside, p.name, p) for k, p in
             inside.parameters.items()}
    root = inside.root
    ends = ([inside.by_name[n] for n in root.operands]
            if root.op == 'tuple' else [root])
    writes = []
    for end in ends:
      source = end
      while source.op in _SAME and source.operands:
        source = inside.by_name[source.operands[0]]
      if source.op == 'dynamic-update-slice':
        writes.append(_sum(inside.by_name[source.operands[1]].shape))
      else:
        writes += [a.bytes for a in end.shape]
    return reads, writes

  def _read(self, inside, name, param) -> float:
    """Slices of a parameter, or all of it once anything takes it whole."""
    total, whole = 0.0, _sum(param.shape)
    for use in inside.uses(name):
      if use.op in _SLICES and use.operands[0] == name:
        total += _sum(use.shape)
      elif use.op == 'dynamic-update-slice' and use.operands[0] == name:
        continue
      elif use.op in ('bitcast', 'reshape', 'get-tuple-element'):
        total += self._read(inside, use.name, param)
      elif use.op == 'tuple':
        continue
      elif use.op == 'fusion':
        reads, _ = self.moved(use.calls['calls'][0])
        total += sum(reads.get(k, 0.0) for k, operand in
                     enumerate(use.operands) if operand == name)
      else:
        return whole
    return min(total, whole)


def _send_of(here: hlo.Computation) -> dict[str, str]:
  """Names of receives -> their sends; both end with the later of them."""
  sends = {traffic.rendezvous(i): i.name for i in here.instructions
           if i.op == 'send' and traffic.collective_kind(i)}
  return {i.name: sends[traffic.rendezvous(i)] for i in here.instructions
          if i.op == 'recv' and traffic.rendezvous(i) in sends}


def _piece(name: str, inside: hlo.Computation) -> str | None:
  """Start, Done or Middle for a fusion that is a piece of a collective."""
  for i in inside.instructions:
    found = re.search(r'"AsyncCollective(Start|Done)"', i.attrs)
    if found:
      return found[1]
  return 'Middle' if name.startswith('async_collective') else None


def _sum(shape) -> float:
  return sum((a.bytes for a in shape), 0.0)


def _hbm(shape) -> float:
  return sum((a.bytes for a in shape if a.hbm), 0.0)


def _passes(i, here) -> int:
  """Passes of bfloat16 that a product of this precision takes."""
  if here.by_name[i.operands[0]].shape[0].dtype != 'f32':
    return 1
  precision = i.attr('operand_precision') or ''
  return 6 if 'highest' in precision else 3 if 'high' in precision else 1


def convolution_flops(i: hlo.Instruction, here: hlo.Computation) -> float:
  """FLOPs at the positions where the window meets an element of the array.

  Not where it meets padding or holes: libtpu writes products with batch axes as
  convolutions whose holes keep batches apart.
  """
  lhs, rhs, out = (
      dict(zip(labels, array.dims)) for labels, array in zip(
          re.split('_|->', i.attr('dim_labels')),
          (here.by_name[i.operands[0]].shape[0],
           here.by_name[i.operands[1]].shape[0], i.shape[0])))
  window = _window(i.attr('window') or '{}')
  positions = 1
  for label in sorted(c for c in lhs if c.isdigit()):
    d = int(label)
    low, _ = window['pad'][d] if 'pad' in window else (0, 0)
    base, step, spread = (
        window[name][d] if name in window else 1
        for name in ('lhs_dilate', 'stride', 'rhs_dilate'))
    x = (np.arange(out[label])[:, None] * step
         + np.arange(rhs[label])[None] * spread - low)
    meets = (x >= 0) & (x <= (lhs[label] - 1) * base) & (x % base == 0)
    positions *= int(meets.sum())
  batch_groups = int(i.attr('batch_group_count') or 1)
  return 2.0 * positions * rhs['i'] * out['f'] * (lhs['b'] // batch_groups)


def _window(text: str) -> dict[str, list]:
  found: dict[str, list] = {}
  for name, value in re.findall(r'(\w+)=([-\dx_]+)', text):
    parts = value.split('x')
    if name == 'pad':
      found[name] = [tuple(map(int, p.split('_'))) for p in parts]
    else:
      found[name] = [int(p) for p in parts]
  return found
