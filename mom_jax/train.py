"""Trains a model, or goes on with the run in the workdir.

  python -m mom_jax.train --config=configs/quickstart.py --workdir=runs/q

The workdir gets config.json, checkpoints/, metrics.jsonl, tensorboard/ and, if
asked for, profile/. The same command again goes on where the run stopped, to
the bit; so it does after a crash. SIGTERM and Ctrl-C save first. Exit code 0:
done, or stopped on demand; 2: something to correct, said in one line.
"""

from __future__ import annotations

import os

from absl import flags

from mom_jax import cli, config

_CONFIG = flags.DEFINE_string(
    'config', None, 'recipe (.py with get_config) or config.json', required=True
)
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'folder of the run', required=True
)


def fit(
    cfg: config.Config, workdir: str | os.PathLike[str]
) -> dict[str, object]:
  """Trains `cfg` in `workdir` up to `train.steps`.

  Returns:
    The last value of every metric (see `mom_jax.metrics`).
  Raises:
    UserError: something to correct, in one line; the last good checkpoint and
      the metrics so far are in the workdir.
  """
  from mom_jax import loop  # slow to import and not needed for --help

  return loop.run(cfg, workdir)


def main(overrides: list[str]) -> None:
  fit(config.load(_CONFIG.value, overrides), _WORKDIR.value)


if __name__ == '__main__':
  cli.run(main)
