"""Evaluations of a trained run: each task is a function of a `Run`.

A task returns values for evaluation.json and may write pictures to the workdir.
A new task is a function in this folder and its line in `TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from mom_jax.data import synthetic
from mom_jax.tasks import (
    errors,
    eta,
    flips,
    length,
    loss,
    recall,
    routing,
    samples,
    suite,
    throughput,
)
from mom_jax.tasks.run import Result, Run, load

__all__ = ['Run', 'TASKS', 'WITH_ARGUMENT', 'eta', 'lm_eval_adapter', 'load']

TASKS: dict[str, Callable[[Run], Result]] = {
    'loss': loss.loss,
    'curve': loss.curve,
    'routing': routing.routing,
    'samples': samples.samples,
    'flips': flips.flips,
    'errors': errors.errors,
    'length': length.length,
    'throughput': throughput.throughput,
}


class TaskWithArgument(NamedTuple):
  """A task whose name is followed by an argument, 'mqar:pairs=8', 'fda:FILE'.

  Attributes:
    run: called with the run and the text.
    check: raises UserError for a text that cannot be run.
  """

  run: Callable[[Run, str], Result]
  check: Callable[[str], Any]


WITH_ARGUMENT: dict[str, TaskWithArgument] = {
    **{name: TaskWithArgument(recall.recall, synthetic.parse)
       for name in synthetic.TASKS},
    **{name: TaskWithArgument(suite.contains, suite.check)
       for name in suite.SUITE},
}
