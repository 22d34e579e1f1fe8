"""Tolerances by dtype, and the comparison that uses them.

An error counts relative to max(1, largest entry of the reference). These
numbers are never loosened in place.
"""

import numpy as np

OUTPUT = {'float32': 2e-5, 'bfloat16': 2e-2}
GRADIENT = {'float32': 1e-4, 'bfloat16': 4e-2}


def error(got, want) -> float:
  """Largest absolute error over max(1, largest entry of `want`)."""
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  assert got.shape == want.shape, (got.shape, want.shape)
  if not want.size:
    return 0.0
  assert np.isfinite(want).all()
  worst = np.abs(got - want).max() / max(1.0, np.abs(want).max())
  return float(worst) if np.isfinite(worst) else float('inf')


def outputs_agree(got, want, dtype='float32', name=''):
  _agree(got, want, OUTPUT[dtype], name)


def gradients_agree(got, want, dtype='float32', name=''):
  _agree(got, want, GRADIENT[dtype], name)


def _agree(got, want, tolerance, name):
  worst = error(got, want)
  assert worst <= tolerance, f'{name}: error {worst:.2e} > {tolerance:.0e}'
