"""What was read of a source, what was left out of it, and when that is refused.

Things are counted in units: documents, images, parts, characters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from mom_jax import config

LEAST = 0.1  # fraction of a source that must be usable
EARLY = 64  # things after which a source may be refused before its end
DOCUMENT, IMAGE, PART, CHARACTER = 'document', 'image', 'part', 'character'

MISSING = 'missing image'
BROKEN = 'broken image'
OUTSIDE = 'image outside the folder of images'
NO_CONTENT = 'image without content'
NO_CODES = 'image for which the vocabulary has no codes'
EMPTY_PART = 'empty part'
EMPTY = 'empty document'
UNKNOWN = 'character that the text tokenizer does not know'

_FOLDER = 'give their folder as --config.data.image_folder=DIR'
SUGGESTIONS = {
    MISSING: _FOLDER,
    BROKEN: 'copy or make them again',
    OUTSIDE: _FOLDER,
    NO_CONTENT: 'write the source again',
    NO_CODES: 'the shards, or all training documents, are texts alone; prepare'
              ' shards with images or leave the images out',
    EMPTY: 'leave the source out or write it again',
    UNKNOWN: 'take a tokenizer of bytes, such as'
             ' --config.data.tokenizer.text=bpe:2048',
}


class LeftOut(NamedTuple):
  """Things of one unit that were left out for one reason."""

  unit: str
  count: int
  example: str


class Tally:
  """Numbers of things used, and of things left out by reason.

  Attributes:
    used: by unit.
    left_out: by reason, with the first example.
  """

  def __init__(
      self, used: Mapping[str, int] | None = None,
      left_out: Mapping[str, Any] | None = None,
  ):
    self.used = Counter(used or {})
    self.left_out = {
        reason: LeftOut(*found) for reason, found in (left_out or {}).items()}

  def leave_out(
      self, unit: str, reason: str, example: str, count: int = 1
  ) -> None:
    before = self.left_out.get(reason, LeftOut(unit, 0, example))
    self.left_out[reason] = before._replace(count=before.count + count)

  def add(self, other: Tally) -> None:
    self.used += other.used
    for reason, found in other.left_out.items():
      self.leave_out(found.unit, reason, found.example, found.count)

  def to_json(self) -> dict[str, Any]:
    return {'used': dict(self.used), 'left_out': self.left_out}

  def lines(self) -> list[str]:
    """Return one line for each reason."""
    return [
        f'{found.count:,} x {reason}, for example {found.example}'
        for reason, found in sorted(self.left_out.items())]

  def check(self, spec: str, early: bool = False) -> None:
    """Refuse a source of which next to nothing can be used.

    A few images among many documents do not count.

    Args:
      spec: the source.
      early: more of it will be read, so a few things do not count.
    Raises:
      UserError: less than LEAST of its documents, images or characters is left.
    """
    for unit in (IMAGE, CHARACTER, DOCUMENT):
      reasons = {
          reason: found for reason, found in self.left_out.items()
          if found.unit == unit}
      lost = sum(found.count for found in reasons.values())
      total = self.used[unit] + lost
      few = unit == IMAGE and lost < LEAST * self.used[DOCUMENT]
      if not lost or self.used[unit] >= LEAST * total or few or (
          early and total < EARLY):
        continue
      reason = max(reasons, key=lambda r: reasons[r].count)
      raise config.UserError(
          f'config.data.sources has {spec!r}, and {lost:,} of its'
          f' {total:,} {unit}s cannot be used: {reasons[reason].count:,} x'
          f' {reason}, for example {reasons[reason].example};'
          f' {SUGGESTIONS[reason]}.')
