"""Named cases of grouped_matmul, for tests and benchmarks."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
  """Shapes; `rows` counts rows past the last group too."""

  sizes: tuple[int, ...]
  rows: int
  width: int
  hidden: int

  def operands(self, seed: int = 0, dtype=jnp.float32) -> tuple:
    """Arguments of grouped_matmul."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(self.rows, self.width))
    w = rng.normal(size=(len(self.sizes), self.width, self.hidden))
    w /= self.width**0.5
    return (
        jnp.asarray(x, dtype), jnp.asarray(w, dtype),
        jnp.asarray(self.sizes, jnp.int32),
    )

  def indices(self, tokens: int, seed: int = 0) -> tuple:
    """`row_index` and `inverse_index` into an x of so many tokens.

    Each group takes some tokens, in order. One row in five of a group and all
    rows past the last group are padding.
    """
    rng = np.random.default_rng(seed)
    row_index = np.full(self.rows, tokens)
    start = 0
    for size in self.sizes:
      taken = min(size - size // 5, tokens)
      row_index[start:start + taken] = np.sort(
          rng.choice(tokens, taken, replace=False))
      start += size
    inverse = [np.flatnonzero(row_index == n) for n in range(tokens)]
    max_rows = max(map(len, inverse))
    inverse = [
        np.append(rows, [self.rows] * (max_rows - len(rows)))
        for rows in inverse]
    return (jnp.asarray(row_index, jnp.int32),
            jnp.asarray(np.stack(inverse, 1), jnp.int32))


CASES = {
    'even': Case((64, 64, 64, 64), 256, 32, 48),
    'uneven_with_rest': Case((150, 0, 1, 37), 300, 32, 24),
    'one_group': Case((200,), 200, 16, 16),
    'one_group_takes_all': Case((0, 0, 300, 0), 300, 16, 8),
    'all_empty': Case((0, 0, 0), 150, 16, 8),
    'few_rows': Case((3, 0, 2, 1), 7, 16, 8),
    'single_rows': Case((1,) * 9, 12, 8, 24),
    'odd_sizes': Case((129, 127, 13), 271, 17, 5),
    'many_groups': Case((5, 0, 17, 31) * 4, 230, 16, 8),
}

# Shapes of the quickstart: projections of memories, experts in and out.
BENCHMARKS = {
    'mom_project': Case((512,) * 4 + (1024,), 3072, 128, 66),
    'moma_in': Case((128,) * 8, 1024, 128, 512),
    'moma_out': Case((128,) * 8, 1024, 256, 128),
    'skewed': Case((800, 50, 0, 1, 100, 17, 30, 26), 1024, 128, 512),
    'large': Case((3072,) * 8, 24576, 128, 512),
    'many_small': Case((32,) * 64, 2304, 128, 256),
}
