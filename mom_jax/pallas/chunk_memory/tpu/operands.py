"""Static description of a call, and how the kernels cut it into blocks."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple


class Problem(NamedTuple):
  """Sizes, and the terms that the recurrence has.

  Attributes:
    decay: 'none', or per 'head', 'key' or 'value'.
    delta: beta is given.
    removal: removal keys are given.
  """

  heads: int
  key_dim: int
  value_dim: int
  decay: str
  delta: bool
  removal: bool

  @property
  def solves(self) -> bool:
    """True if the update of a row depends on the state before it."""
    return self.delta or self.removal

  @property
  def state_shape(self) -> tuple[int, int]:
    """Shape of a head's state in the kernels."""
    if self.decay == 'key':
      return self.value_dim, self.key_dim
    return self.key_dim, self.value_dim


@dataclasses.dataclass(frozen=True)
class BlockShape:
  """The part of the rows that a grid step takes.

  Attributes:
    chunk: C, rows of a chunk.
    chunks: n, chunks per step.
    heads: h, heads per step.
    vmem: limit of fast memory, bytes; v5p and 7x have 64 MiB a core.
  """

  chunk: int
  chunks: int
  heads: int
  vmem: int = 56 * 2**20

  @property
  def rows(self) -> int:
    return self.chunk * self.chunks


class RowOperands(NamedTuple):
  """Operands with one entry per row; None is absent.

  q, k, v, removal_key and g per channel have heads side by side, [R, H X]; g
  per head and beta have rows in the lanes, [H, R].
  """

  q: Any
  k: Any
  v: Any
  g: Any = None
  beta: Any = None
  removal_key: Any = None


class Residuals(NamedTuple):
  """Arrays that the forward pass keeps for the backward pass."""

  before: Any  # state before each chunk, [N, H, *state_shape]
  inverse: Any = None  # T of each chunk, [N, H, C, C], float32
  y: Any = None  # Y, [R, H V]
