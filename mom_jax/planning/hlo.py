"""Compiled programs as XLA prints them: computations and instructions.

Reads what `jax.stages.Compiled.as_text` returns for CPUs, GPUs and TPUs, as far
as costs need it: shapes, operands, the computations that an instruction runs
and the iterations of a loop.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

_BITS = {'pred': 8, 's4': 4, 'u4': 4, 's2': 2, 'u2': 2, 'bf16': 16, 'f16': 16,
         'f4e2m1fn': 4, 'c64': 64, 'c128': 128, 'token': 0, 'opaque': 0}
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?')
_CALLS = re.compile(
    r'\b(calls|to_apply|body|condition|called_computations|'
    r'branch_computations|true_computation|false_computation)='
    r'(\{[^}]*\}|%[^\s,)]+)')


@dataclasses.dataclass(frozen=True)
class Array:
  """An array of a shape; `hbm` is true if it lies in main memory."""

  dtype: str
  dims: tuple[int, ...]
  hbm: bool

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> float:
    bits = _BITS.get(self.dtype)
    if bits is None:
      digits = re.search(r'\d+', self.dtype)
      bits = int(digits[0]) if digits else 32
    return self.size * bits / 8


@dataclasses.dataclass
class Instruction:
  """One line of a computation.

  Attributes:
    shape: its results, flat.
    operands: names of instructions of the same computation.
    attrs: text after the parentheses.
    inner: text in the parentheses: operands, the value of a constant, the index
      of a parameter.
  """

  name: str
  op: str
  shape: tuple[Array, ...]
  operands: tuple[str, ...]
  attrs: str
  inner: str
  root: bool

  def attr(self, name: str) -> str | None:
    """The text of an attribute up to the next comma outside of brackets."""
    at = re.search(rf'\b{name}=', self.attrs)
    if not at:
      return None
    rest, depth = self.attrs[at.end():], 0
    for i, c in enumerate(rest):
      depth += (c in '{[(') - (c in '}])')
      if c == ',' and depth == 0:
        return rest[:i]
    return rest

  @functools.cached_property
  def calls(self) -> dict[str, list[str]]:
    """Names of computations, by role: body, condition, calls, ..."""
    return {role: re.findall(r'%([^\s,}]+)', names)
            for role, names in _CALLS.findall(self.attrs)}

  @property
  def channel(self) -> str | None:
    return self.attr('channel_id')

  @property
  def label(self) -> str:
    """The part of the model that it comes from, by op_name."""
    found = re.search(r'op_name="([^"]*)"', self.attrs)
    return found[1] if found else self.name


@dataclasses.dataclass
class Computation:
  name: str
  instructions: list[Instruction]

  def __post_init__(self):
    self.by_name = {i.name: i for i in self.instructions}

  @functools.cached_property
  def root(self) -> Instruction:
    return next((i for i in self.instructions if i.root), self.instructions[-1])

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    return {int(i.inner): i for i in self.instructions if i.op == 'parameter'}

  def uses(self, name: str) -> list[Instruction]:
    return self._uses.get(name, [])

  @functools.cached_property
  def _uses(self) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {}
    for i in self.instructions:
      for operand in dict.fromkeys(i.operands):
        found.setdefault(operand, []).append(i)
    return found


@dataclasses.dataclass
class Module:
  computations: dict[str, Computation]
  entry: Computation

  def iterations(self, loop: Instruction, inside: Computation) -> int | None:
    """Iterations of a `while`, or None if they depend on data."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attrs)
    if known:
      return int(known[1])
    condition = self.computations[loop.calls['condition'][0]]
    test, where = condition.root, condition
    if test.op == 'fusion':
      where = self.computations[test.calls['calls'][0]]
      outer = test
      test = where.root
    else:
      outer = None
    if test.op != 'compare' or 'direction=LT' not in test.attrs:
      return None
    counter, limit = (self._source(where, name, outer, condition)
                      for name in test.operands)
    if limit.op != 'constant' or counter.op != 'get-tuple-element':
      return None
    index = int(counter.attr('index'))
    first = self._initial(loop, inside, index)
    step = self._step(self.computations[loop.calls['body'][0]], index)
    return -(-(int(limit.inner) - first) // step)

  def _source(self, where, name, outer, condition) -> Instruction:
    """The instruction behind a value in a loop's test, fusions looked through.
    """
    found = where.by_name[name]
    while found.op in ('copy', 'bitcast', 'reshape', 'convert'):
      found = where.by_name[found.operands[0]]
    if found.op == 'parameter' and outer is not None:
      return self._source(
          condition, outer.operands[int(found.inner)], None, condition)
    return found

  def _step(self, body: Computation, index: int) -> int:
    """The increment of the counter: 1, or more in an unrolled loop."""
    if body.root.op != 'tuple':
      return 1
    value, outer, where = body.by_name[body.root.operands[index]], None, body
    while value.op in ('copy', 'bitcast'):
      value = body.by_name[value.operands[0]]
    if value.op == 'fusion':
      outer, where = value, self.computations[value.calls['calls'][0]]
      value = where.root
    if value.op != 'add':
      return 1
    parts = [self._source(where, name, outer, body) for name in value.operands]
    return sum(int(x.inner) for x in parts if x.op == 'constant') or 1

  def _initial(self, loop, inside, index) -> int:
    """The first value of a loop's counter; counters of scans begin at 0."""
    start = inside.by_name[loop.operands[0]]
    if start.op != 'tuple':
      return 0
    value = inside.by_name[start.operands[index]]
    while value.op in ('copy', 'bitcast', 'copy-done', 'copy-start'):
      value = inside.by_name[value.operands[0]]
    return int(value.inner) if value.op == 'constant' else 0


def arrays(text: str) -> tuple[Array, ...]:
  """All arrays of a shape, tuples flattened."""
  return tuple(
      Array(dtype, tuple(int(d.lstrip('<=')) for d in dims.split(',') if d),
            not re.search(r'S\(\d+\)', layout or ''))
      for dtype, dims, layout in _ARRAY.findall(text))


def parse(text: str) -> Module:
  """Reads a module.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations, entry, name, lines = {}, None, None, []
  for line in text.splitlines():
    if name is None:
      head = re.match(r'(ENTRY )?%?([^\s(]+) \(.*\{\s*$', line)
      if head:
        name, lines = head[2], []
        entry = name if head[1] else entry
    elif line.startswith('}'):
      computations[name] = Computation(name, lines)
      name = None
    else:
      found = parse_instruction(line)
      if found:
        lines.append(found)
  if entry is None:
    raise ValueError('the text holds no compiled program: no ENTRY.')
  return Module(computations, computations[entry])


def parse_instruction(line: str) -> Instruction | None:
  """Reads one line of a computation; None if it holds no instruction."""
  head = re.match(r'\s+(ROOT )?%?(\S+) = ', line)
  if not head:
    return None
  rest = line[head.end():]
  end = _closing(rest, 0) if rest.startswith('(') else rest.index(' ')
  shape, rest = rest[:end], rest[end:].lstrip()
  opening = rest.index('(')
  closing = _closing(rest, opening)
  inner = rest[opening + 1:closing - 1]
  operands = tuple(re.findall(r'%([^\s,)]+)', inner))
  return Instruction(head[2], rest[:opening], arrays(shape), operands,
                     rest[closing:], inner, bool(head[1]))


def _closing(text: str, start: int) -> int:
  """Index after the parenthesis that closes the one opened at `start`."""
  depth = 0
  for found in re.finditer(r'[()]', text[start:]):
    depth += 1 if found[0] == '(' else -1
    if depth == 0:
      return start + found.end()
  raise ValueError(f'unbalanced parentheses in {text[:80]!r}')
