"""Synthetic tasks on recall and state tracking: training data and evaluation.

A task has settings, a generator of samples over symbols 0 .. n-1, and the
symbols that may be an answer. Only answers count as targets. A new task is a
generator and its entry in TASKS.

  synthetic:mqar            a source of config.data.sources
  synthetic:mqar:pairs=16   with settings; also evaluate --task=mqar:pairs=16

A sample is a document: bos, then its symbols, which are the first text tokens
of the vocabulary. Samples are made when they are read, from a seed, a split and
an index; all samples of a task with given settings have the same length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np

from mom_jax import config

NAME = 'synthetic'
HELD_OUT = 1 << 12  # samples of the validation split
MAX_SAMPLES = 1 << 26  # each takes some bytes of memory
SPLITS = ('train', 'validation')
Settings = Mapping[str, Any]


class Sample(NamedTuple):
  """Symbols, and a mask of those that are answers."""

  symbol_T: np.ndarray  # int64
  answer_T: np.ndarray  # bool


@dataclasses.dataclass(frozen=True)
class Task:
  """A synthetic task.

  Attributes:
    doc: one line.
    settings: names and defaults of its settings.
    load: the setting that makes it harder, and values to evaluate it at.
    length: symbols per sample.
    min_symbols: fewest symbols n that it needs.
    answers: symbols that may be an answer, given n.
    make: generator, called with a random generator, settings and n.
    check: text of a rule between settings that is broken, else None.
  """

  doc: str
  settings: Settings
  load: tuple[str, tuple[int, ...]]
  length: Callable[[Settings], int]
  min_symbols: Callable[[Settings], int]
  answers: Callable[[Settings, int], range]
  make: Callable[[np.random.Generator, Settings, int], Sample]
  check: Callable[[Settings], str | None] = lambda s: None


def _answered(symbol_T: np.ndarray, positions: np.ndarray) -> Sample:
  answer_T = np.zeros(len(symbol_T), bool)
  answer_T[positions] = True
  return Sample(symbol_T, answer_T)


def _distinct(rng: np.random.Generator, low: int, high: int, count: int):
  return low + rng.permutation(high - low)[:count]  # faster than rng.choice


# Multi-query associative recall: pairs, then every key once more, at distances
# of a power law, followed by its value. Keys are of the lower half of the
# symbols, values of the upper. Source: arXiv 2312.04927 and its code (power
# 0.01). Deviations: the value follows the query in the input, no later query
# repeats it, and all other symbols are values, so that no pair is contradicted.


def _mqar_length(s: Settings) -> int:
  return s['length'] or 4 * s['pairs']


def _mqar_check(s: Settings) -> str | None:
  length = _mqar_length(s)
  if length % 2 or length < 4 * s['pairs']:
    return (f'length={length} must be even and at least 4 pairs ='
            f' {4 * s["pairs"]}, or 0 for that')
  return None


def _mqar(rng: np.random.Generator, s: Settings, n: int) -> Sample:
  pairs, length = s['pairs'], _mqar_length(s)
  keys_P = _distinct(rng, 0, n // 2, pairs)
  values_P = _distinct(rng, n // 2, n, pairs)
  context = np.stack([keys_P, values_P], 1).ravel()
  gaps = (length - 2 * pairs) // 2
  # The first of exponential clocks: equal to drawing gaps one by one in
  # proportion to s^-0.99, for which rng.choice takes thirty times as long.
  time_S = rng.standard_exponential(gaps) * np.arange(1, gaps + 1) ** 0.99
  position_P = 2 * time_S.argsort()[:pairs]
  rest_T = rng.integers(n // 2, n, length - 2 * pairs)
  rest_T[position_P], rest_T[position_P + 1] = keys_P, values_P
  return _answered(
      np.concatenate([context, rest_T]), 2 * pairs + position_P + 1)


# Needle in a haystack: keys and values among filler; at the end all keys are
# asked for in a random order. Keys are of the first quarter of the symbols,
# values of the second, filler of the rest. Source: the form of arXiv
# 2404.06654, single and multi-key with several queries; our symbols.


def _needle(rng: np.random.Generator, s: Settings, n: int) -> Sample:
  needles, size = s['needles'], 1 + s['values']
  filler = s['length'] - 2 * needles * size
  pin_NV = np.concatenate([
      _distinct(rng, 0, n // 4, needles)[:, None],
      rng.integers(n // 4, n // 2, (needles, s['values'])),
  ], 1)
  hay_T = rng.integers(n // 2, n, filler)
  at_N = np.sort(rng.integers(0, filler + 1, needles))
  parts = []
  for pin_V, piece_T in zip(pin_NV, np.split(hay_T, at_N)):
    parts += [piece_T, pin_V]
  parts.append(hay_T[at_N[-1]:])
  asked_N = rng.permutation(needles)
  parts.append(pin_NV[asked_N].ravel())
  begin = s['length'] - needles * size
  position_NV = begin + np.arange(needles)[:, None] * size + np.arange(1, size)
  return _answered(np.concatenate(parts), position_NV.ravel())


def _needle_check(s: Settings) -> str | None:
  least = 2 * s['needles'] * (1 + s['values'])
  if s['length'] < least:
    return f'length={s["length"]} must be at least {least}'
  return None


# Phone book: names of several letters with numbers of several digits; at the
# end one name is asked for. Names are distinct, letters need not be. Source:
# arXiv 2402.01032, section 4; our symbols.


def _phonebook(rng: np.random.Generator, s: Settings, n: int) -> Sample:
  entries, letters, digits = s['entries'], s['letters'], s['digits']
  base = n // 2
  number_E = rng.choice(base**letters, entries, replace=False)
  name_EL = number_E[:, None] // base ** np.arange(letters) % base
  book_ES = np.concatenate(
      [name_EL, rng.integers(base, n, (entries, digits))], 1)
  symbol_T = np.concatenate(
      [book_ES.ravel(), book_ES[rng.integers(entries)]])
  return _answered(symbol_T, np.arange(len(symbol_T) - digits, len(symbol_T)))


def _phonebook_length(s: Settings) -> int:
  return (s['entries'] + 1) * (s['letters'] + s['digits'])


def _phonebook_symbols(s: Settings) -> int:
  base = 2
  while base ** s['letters'] < s['entries']:
    base += 1
  return 2 * base


# Selective copying: items at random positions among blanks (symbol 0), a mark
# (symbol 1), the items in their order. Source: arXiv 2312.00752, section 4.1.1.


def _selective_copy(rng: np.random.Generator, s: Settings, n: int) -> Sample:
  items, length = s['items'], s['length']
  item_I = rng.integers(2, n, items)
  symbol_T = np.zeros(length, np.int64)
  symbol_T[length - 2 * items - 1:] = np.concatenate(
      [np.zeros(items, np.int64), [1], item_I])
  position_I = np.sort(_distinct(rng, 0, length - items - 1, items))
  symbol_T[position_I] = item_I
  return _answered(symbol_T, np.arange(length - items, length))


def _selective_copy_check(s: Settings) -> str | None:
  if s['length'] < 2 * s['items'] + 1:
    return (f'length={s["length"]} must be at least 2 items + 1 ='
            f' {2 * s["items"] + 1}')
  return None


# Words over a group: a sequence of elements, a mark, their product. Groups are
# permutations of 2 (parity), 3 and 5 things; element i, in lexicographic order,
# is symbol i, and the leftmost is applied first. Source: arXiv 2404.08819; here
# only the product of the whole word is asked for.

GROUPS = {'parity': 2, 's3': 3, 's5': 5}


def permutations(group: str) -> np.ndarray:
  """Return the elements of a group, [size, things]: i goes to element[i]."""
  return np.array(list(itertools.permutations(range(GROUPS[group]))))


_TABLES = {
    name: (elements, {tuple(e): i for i, e in enumerate(elements.tolist())})
    for name in GROUPS for elements in [permutations(name)]
}


def _state_tracking(rng: np.random.Generator, s: Settings, n: int) -> Sample:
  elements, number = _TABLES[s['group']]
  word_T = rng.integers(0, len(elements), s['length'])
  product = np.arange(elements.shape[1])
  for element in elements[word_T]:
    product = element[product]
  end = [len(elements), number[tuple(product.tolist())]]
  return _answered(np.concatenate([word_T, end]), np.array([len(word_T) + 1]))


def _order(s: Settings) -> int:
  return len(_TABLES[s['group']][0])


TASKS: dict[str, Task] = {
    'mqar': Task(
        'multi-query associative recall', {'pairs': 8, 'length': 0},
        ('pairs', (4, 8, 16, 32, 64)), _mqar_length,
        lambda s: 2 * s['pairs'], lambda s, n: range(n // 2, n), _mqar,
        _mqar_check),
    'needle': Task(
        'needles in a haystack', {'needles': 1, 'values': 4, 'length': 256},
        ('length', (64, 128, 256, 512, 1024)), lambda s: s['length'],
        lambda s: max(8, 4 * s['needles']), lambda s, n: range(n // 4, n // 2),
        _needle, _needle_check),
    'phonebook': Task(
        'one number of a phone book',
        {'entries': 8, 'letters': 2, 'digits': 4},
        ('entries', (4, 8, 16, 32, 64)), _phonebook_length, _phonebook_symbols,
        lambda s, n: range(n // 2, n), _phonebook),
    'selective_copy': Task(
        'items copied from among blanks', {'items': 8, 'length': 128},
        ('items', (4, 8, 16, 32)), lambda s: s['length'], lambda s: 4,
        lambda s, n: range(2, n), _selective_copy, _selective_copy_check),
    'state_tracking': Task(
        'product of a word over a group', {'group': 's3', 'length': 8},
        ('length', (2, 4, 8, 16, 32)), lambda s: s['length'] + 2,
        lambda s: _order(s) + 1, lambda s, n: range(_order(s)),
        _state_tracking),
}
# Settings of every task: symbols in use (0 = all text tokens), and training
# samples.
COMMON = {'symbols': 0, 'samples': 1 << 16}


@dataclasses.dataclass(frozen=True)
class Spec:
  """A task with all its settings, those of COMMON included."""

  name: str
  settings: Settings

  @property
  def task(self) -> Task:
    return TASKS[self.name]

  def at(self, load: int) -> Spec:
    """Return the same task at another load."""
    return parse(self.name, {**self.settings, self.task.load[0]: load})

  def text(self, *names: str) -> str:
    """Write the task with these settings as `parse` reads it."""
    return ':'.join(
        [self.name, *(f'{key}={self.settings[key]}' for key in names)])


def parse(text: str, settings: Settings | None = None) -> Spec:
  """Read 'mqar:pairs=8'; `settings` override the defaults.

  Raises:
    UserError: unknown task or setting, or values that fail a check.
  """
  name, *given = text.split(':')
  if name not in TASKS:
    raise config.UserError(
        f'unknown synthetic task {name!r}; known: {", ".join(TASKS)}.')
  task = TASKS[name]
  values = {**task.settings, **COMMON, **(settings or {})}
  for item in given:
    key, _, value = item.partition('=')
    if key not in values:
      raise config.UserError(
          f'{text!r}: {key!r} is no setting of {name}; known:'
          f' {", ".join(values)}.')
    if isinstance(values[key], str):
      values[key] = value
    elif value.isdecimal() and len(value) < 10:
      values[key] = int(value)
    else:
      raise config.UserError(
          f'{text!r}: {key}={value!r} must be a whole number below 10^9; write'
          f' for example {key}={values[key]}.')
  if values['samples'] > MAX_SAMPLES:
    raise config.UserError(
        f'{text!r}: samples={values["samples"]} must be at most'
        f' {MAX_SAMPLES}; a run repeats them in its next epoch.')
  _check(text, task, values)
  return Spec(name, values)


def _check(text: str, task: Task, values: Settings) -> None:
  for key, value in values.items():
    if key == 'group' and value not in GROUPS:
      raise config.UserError(
          f'{text!r}: group={value!r} must be one of {", ".join(GROUPS)}.')
    may_be_0 = key == 'symbols' or task.settings.get(key) == 0
    if not isinstance(value, str) and value < (0 if may_be_0 else 1):
      raise config.UserError(f'{text!r}: {key}={value} must be above 0.')
  broken = task.check(values)
  if broken:
    raise config.UserError(f'{text!r}: {broken}.')


class Documents:
  """Samples of a task as tokens; see `encode.Documents`.

  Args:
    spec: the task.
    ids: tokens for symbols, int [n]; the first `symbols` are used.
    bos: token before the first symbol.
    split: of SPLITS; their samples have different seeds.
    count: number of samples; by default that of the split.
  Raises:
    UserError: the task needs more symbols than there are.
  """

  def __init__(
      self, spec: Spec, ids: np.ndarray, bos: int, split: str,
      count: int | None = None,
  ):
    wanted = spec.settings['symbols']
    least = spec.task.min_symbols(spec.settings)
    symbols = wanted or len(ids)
    if not least <= symbols <= len(ids):
      raise config.UserError(
          f'{spec.text(*spec.settings)!r} takes {symbols} symbols, which must'
          f' be {least} or more for its settings, and at most the'
          f' {len(ids)} text tokens of the vocabulary; set'
          ' config.data.tokenizer.text=symbols:SIZE, or symbols=SIZE.')
    self.name = f'{NAME}:{spec.text()}'
    self.fingerprint = f'{spec.text(*spec.settings)} of {symbols} symbols'
    self.spec, self.symbols = spec, symbols
    self.ids, self._bos = np.asarray(ids[:symbols], np.int32), bos
    self._split = SPLITS.index(split)
    if count is None:
      count = HELD_OUT if self._split else spec.settings['samples']
    length = 1 + spec.task.length(spec.settings)
    self.length_N = np.full(count, length, np.int64)
    self._last: tuple[int, Sample] | None = None

  @property
  def answers(self) -> np.ndarray:
    """Tokens that may be an answer."""
    some = self.spec.task.answers(self.spec.settings, self.symbols)
    return self.ids[some.start:some.stop]

  def _sample(self, index: int) -> Sample:
    last = self._last
    if last is None or last[0] != index:
      rng = np.random.default_rng((self._split, index))
      last = self._last = index, self.spec.task.make(
          rng, self.spec.settings, self.symbols)
    return last[1]

  def part(
      self, index: int, start: int = 0, stop: int | None = None
  ) -> np.ndarray:
    symbol_T = self.ids[self._sample(index).symbol_T]
    return np.concatenate([[self._bos], symbol_T]).astype(np.int32)[start:stop]

  def counts(
      self, index: int, start: int = 0, stop: int | None = None
  ) -> np.ndarray:
    answer_T = self._sample(index).answer_T
    return np.concatenate([[False], answer_T])[start:stop]


def open_documents(
    spec: str, vocabulary: Any, split: str, count: int | None = None
) -> Documents:
  """Open the samples of 'synthetic:TASK' or of 'TASK' in a vocabulary."""
  special = {vocabulary.bos, vocabulary.eos, vocabulary.pad}
  ids = np.array([i for i in range(vocabulary.text.size) if i not in special])
  return Documents(
      parse(spec.removeprefix(NAME + ':')), ids, vocabulary.bos, split, count)
