"""Named cases of short_conv."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from mom_jax.pallas.short_conv.parts import Part, Parts, num_convolved


def heads(width: int, head_dim: int, gates: int = 5) -> Parts:
  """Queries in one array; keys, values and gates in another."""
  key = Part(width, silu=True, l2_dim=head_dim)
  value = Part(width, silu=True)
  return ((key,), (key, value, Part(gates, conv=False)))


@dataclasses.dataclass(frozen=True)
class Case:
  """Lengths of documents or groups; -n is n padding rows."""

  lengths: tuple[int, ...]
  parts: Parts
  taps: int = 4
  bias: bool = False

  @property
  def rows(self) -> int:
    return sum(map(abs, self.lengths))

  def operands(self, seed: int = 0, dtype=jnp.float32) -> tuple:
    """Arguments of short_conv except parts."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    F = num_convolved(self.parts)
    reach = [np.arange(n) if n > 0 else np.full(-n, -1) for n in self.lengths]
    return (
        tuple(draw(self.rows, sum(p.width for p in ps)) for ps in self.parts),
        draw(self.taps, F) if self.taps else None,
        draw(F) if self.bias else None,
        jnp.asarray(np.concatenate(reach), jnp.int32))


CASES = {
    'mom': Case((30, 1, 2, 40, -23, 160), heads(256, 256)),
    'small_heads': Case((100, 28, -64, 128), heads(128, 64)),
    'bias': Case((129, 2, -1, 124), heads(128, 128), bias=True),
    'two_taps': Case((64,), heads(128, 128), taps=2),
    'no_conv': Case((60, -4), heads(128, 128), taps=0),
    'plain': Case((127, 1), ((Part(128), Part(256, silu=True)),), taps=3),
    'all_padding': Case((-128,), heads(128, 128)),
}
# Sizes that kernels do not support.
ODD = {
    'few_rows': Case((3, 2), heads(16, 8)),
    'narrow': Case((70,), ((Part(24, silu=True, l2_dim=8), Part(7)),)),
}
