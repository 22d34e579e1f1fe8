"""Cost at matched loss: how many FLOPs one training needs for another's loss.

  eta(L) = C_dense(L) / C(L),  C(L) = FLOPs after which a run's loss is L

A run's losses are made a falling curve first (isotonic regression), which
averages noise where a loss rises again; between its points log C is a monotone
cubic in L. Seeds are averaged in log C, at the same loss.

Source: eta of arXiv 2407.21770, section 4; the fit and its interval are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import interpolate, optimize, stats

CONFIDENCE = 0.95


class Curve(NamedTuple):
  """Losses of a run, strictly falling, and the FLOPs at which it has them."""

  log_flops_N: np.ndarray
  loss_N: np.ndarray

  def log_flops(self, loss: np.ndarray) -> np.ndarray:
    """log C at losses within the curve's own."""
    return interpolate.PchipInterpolator(
        self.loss_N[::-1], self.log_flops_N[::-1])(loss)


class Savings(NamedTuple):
  """Factors at losses, with the interval that seeds give; NaN without seeds."""

  loss_N: np.ndarray
  eta_N: np.ndarray
  low_N: np.ndarray
  high_N: np.ndarray


def curve(flops_N: np.ndarray, loss_N: np.ndarray) -> Curve | None:
  """The falling curve nearest to a run's losses, None if it does not fall.

  Args:
    flops_N: spent at each loss, increasing; losses before any are left out.
    loss_N: nats; what is not finite is left out.
  """
  keep_N = np.isfinite(loss_N) & (flops_N > 0)
  log_N, loss_N = np.log(flops_N[keep_N]), loss_N[keep_N]
  if len(loss_N) < 2:
    return None
  first = optimize.isotonic_regression(loss_N, increasing=False).blocks
  size = np.diff(first)
  mean = lambda x_N: np.add.reduceat(x_N, first[:-1]) / size
  if len(size) < 2:
    return None
  return Curve(mean(log_N), mean(loss_N))


def common(curves: Sequence[Curve]) -> tuple[float, float] | None:
  """(lowest, highest) loss that all curves have, None if there is none."""
  lowest = max(c.loss_N[-1] for c in curves)
  highest = min(c.loss_N[0] for c in curves)
  return (float(lowest), float(highest)) if lowest < highest else None


def savings(
    dense: Sequence[Curve], others: Sequence[Curve], loss_N: np.ndarray
) -> Savings:
  """eta at losses that all curves have.

    log eta = mean over seeds log C_dense - mean over seeds log C

  Low and high are Welch's interval of this difference, at `CONFIDENCE`; NaN
  where either side has one seed.
  """
  mean_N = np.zeros(len(loss_N))
  variance_N, freedom_N = np.zeros_like(mean_N), np.zeros_like(mean_N)
  for sign, curves in ((1, dense), (-1, others)):
    log_SN = np.stack([c.log_flops(loss_N) for c in curves])
    mean_N += sign * log_SN.mean(0)
    if len(curves) < 2:
      variance_N += np.nan
      continue
    own_N = log_SN.var(0, ddof=1) / len(curves)
    variance_N += own_N
    freedom_N += own_N**2 / (len(curves) - 1)
  # No spread at all leaves nothing to be uncertain of.
  freedom_N = np.divide(
      variance_N**2, freedom_N, out=np.full_like(mean_N, np.inf),
      where=freedom_N > 0)
  half_N = stats.t.ppf((1 + CONFIDENCE) / 2, freedom_N) * np.sqrt(variance_N)
  return Savings(np.asarray(loss_N), np.exp(mean_N),
                 np.exp(mean_N - half_N), np.exp(mean_N + half_N))
