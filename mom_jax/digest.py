"""Digests: short names of contents, and seals of records that show damage."""

from __future__ import annotations

from collections.abc import Mapping
import hashlib
import json
from typing import Any

SEAL = 'digest'


def of(*values: bytes | str) -> str:
  """Return a short name of contents: 16 hexadecimal digits."""
  state = hashlib.blake2b(digest_size=8)
  for value in values:
    data = value.encode() if isinstance(value, str) else value
    state.update(len(data).to_bytes(8, 'little'))
    state.update(data)
  return state.hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
  """Add a digest of the rest to a record of JSON values."""
  rest = {k: v for k, v in record.items() if k != SEAL}
  return rest | {SEAL: of(json.dumps(rest, sort_keys=True))}


def unsealed(record: Mapping[str, Any]) -> dict[str, Any]:
  """Return a record without its digest.

  Raises:
    ValueError: it is not what was sealed.
  """
  rest = {k: v for k, v in record.items() if k != SEAL}
  if record.get(SEAL) != sealed(rest)[SEAL]:
    raise ValueError('it is not what was written')
  return rest
