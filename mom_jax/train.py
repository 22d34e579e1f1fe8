"""Train a model, or resume the run in the workdir.

  python -m mom_jax.train --config=configs/quickstart.py --workdir=runs/q

The workdir gets config.json, checkpoints/, metrics.jsonl, tensorboard/ and, if
requested, profile/. The same command resumes the run where it stopped, to the
bit, also after a crash. While a run trains, its lease.json keeps others out.
SIGTERM and Ctrl-C save first. Exit code 0: done, or stopped on demand; 2: an
error to correct, in one line.

On several hosts, run the same command on each, with a workdir that all of them
share and config.data.readers a multiple of the number of processes. Slurm,
JobSets and JAX_COORDINATOR_ADDRESS are recognised; TPU VMs of a pod take
--distributed, anything else --coordinator, --processes and --process. A signal
to any process makes all save the same step. Exit code 3: another process was
lost; start all of them again.
"""

from __future__ import annotations

import os

from absl import flags

from mom_jax import cli, config

# Seconds without a sign after which another process counts as lost.
PATIENCE = 60.0

_CONFIG = flags.DEFINE_string(
    'config', None, 'recipe (.py with get_config, run as code) or config.json',
    required=True)
_WORKDIR = cli.define_path(
    'workdir', None, 'folder of the run', required=True
)

_COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT where process 0 listens')
_PROCESSES = flags.DEFINE_integer(
    'processes', None, 'number of processes of the run')
_PROCESS = flags.DEFINE_integer(
    'process', None, 'index of this process, from 0')
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'let jax find the other processes, as on TPU VMs')
_PATIENCE = flags.DEFINE_float(
    'patience', PATIENCE,
    'seconds without a sign after which a process counts as lost')


def fit(
    cfg: config.Config, workdir: str | os.PathLike[str],
    patience: float = PATIENCE,
) -> dict[str, object]:
  """Train `cfg` in `workdir` up to `train.steps`.

  Args:
    patience: seconds without a sign after which a process counts as lost.
  Returns:
    The last value of every metric (see `training.metrics`).
  Raises:
    UserError: an error to correct, in one line; the last good checkpoint and
      the metrics so far are in the workdir.
  """
  from mom_jax.training import loop  # slow to import and not needed for --help

  try:
    folder = cli.path(os.fspath(workdir))
  except ValueError as e:
    raise config.UserError(f'workdir={workdir}: {e}') from e
  return loop.run(cfg, folder, patience)


def main(overrides: list[str]) -> None:
  cfg = config.load(_CONFIG.value, overrides)
  from mom_jax.data import encode

  encode.check(cfg)
  from mom_jax import compilation
  from mom_jax.training import multihost

  compilation.keep(cfg)
  patience = _PATIENCE.value
  with multihost.distributed(
      _COORDINATOR.value, _PROCESSES.value, _PROCESS.value,
      _DISTRIBUTED.value, patience):
    fit(cfg, _WORKDIR.value, patience)


if __name__ == '__main__':
  cli.run(main)
