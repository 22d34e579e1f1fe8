"""Compute-matched comparison: FLOPs of two trainings at the same loss.

  eta(L) = C_dense(L) / C(L),  C(L) = FLOPs after which a run's loss is L

Isotonic regression first makes the losses of a run a falling curve, which
averages noise where a loss rises again. Between its points log C is a monotone
cubic in L. Seeds are averaged in log C at equal loss.

Source: eta of arXiv 2407.21770, section 4; the fit and its interval are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import interpolate, optimize, stats

CONFIDENCE = 0.95


class Curve(NamedTuple):
  """Strictly falling losses of a run and the FLOPs at which it reaches them."""

  log_flops_N: np.ndarray
  loss_N: np.ndarray

  def log_flops(self, loss: np.ndarray) -> np.ndarray:
    """Interpolate log C at losses within the curve."""
    return interpolate.PchipInterpolator(
        self.loss_N[::-1], self.log_flops_N[::-1])(loss)


class Savings(NamedTuple):
  """Factors at losses, with their interval over seeds, NaN for one seed."""

  loss_N: np.ndarray
  eta_N: np.ndarray
  low_N: np.ndarray
  high_N: np.ndarray


def curve(flops_N: np.ndarray, loss_N: np.ndarray) -> Curve | None:
  """Fit a falling curve to the losses of a run; None if they do not fall.

  Args:
    flops_N: FLOPs at each loss, increasing; points at 0 are left out.
    loss_N: nats; non-finite ones are left out.
  """
  keep_N = np.isfinite(loss_N) & (flops_N > 0)
  log_N, loss_N = np.log(flops_N[keep_N]), loss_N[keep_N]
  if len(loss_N) < 2:
    return None
  first = optimize.isotonic_regression(loss_N, increasing=False).blocks
  size = np.diff(first)
  if len(size) < 2:
    return None
  log_N, loss_N = (
      np.add.reduceat(x_N, first[:-1]) / size for x_N in (log_N, loss_N))
  return Curve(log_N, loss_N)


def common_range(curves: Sequence[Curve]) -> tuple[float, float] | None:
  """Return the (lowest, highest) loss that all curves reach, None if none."""
  lowest = max(c.loss_N[-1] for c in curves)
  highest = min(c.loss_N[0] for c in curves)
  return (float(lowest), float(highest)) if lowest < highest else None


def savings(
    dense: Sequence[Curve], others: Sequence[Curve], loss_N: np.ndarray
) -> Savings:
  """Compute eta at losses that all curves reach.

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
    of_mean_N = log_SN.var(0, ddof=1) / len(curves)
    variance_N += of_mean_N
    freedom_N += of_mean_N**2 / (len(curves) - 1)
  # Without any spread there is no uncertainty.
  freedom_N = np.divide(
      variance_N**2, freedom_N, out=np.full_like(mean_N, np.inf),
      where=freedom_N > 0)
  half_N = stats.t.ppf((1 + CONFIDENCE) / 2, freedom_N) * np.sqrt(variance_N)
  return Savings(np.asarray(loss_N), np.exp(mean_N),
                 np.exp(mean_N - half_N), np.exp(mean_N + half_N))
