"""Plans a training on accelerators before any is rented.

  python -m mom_jax.plan --config=configs/mom_1b3.py --topology=v5p-64
  python -m mom_jax.plan --config=configs/mom_1b3.py --topology=v6e-256 \\
    --sweep=fsdp,data --config.train.grad_accum_steps=2 --quick

Compiles the training step for the TPUs named, without one (libtpu, extra
tpu-compile), and adds up the compiled program: memory of a chip, FLOPs, bytes
over ICI and DCN by collective, the least time of each resource, expected speed,
and the setting to change where it does not fit. GPUs (h100-64, b200-8) are
planned by arithmetic, which compiles nothing. All are estimates; nothing was
run. Exit code 0: it fits; 1: it does not; 2: something to correct.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from typing import Any

from absl import flags

from mom_jax import chips, cli, config


def make_plan(
    cfg: config.Config, topology: chips.Topology, tokens: float | None = None,
    quick: bool = False,
) -> dict[str, Any]:
  """The plan of a training step; `planning.report.plan` shows its keys.

  Args:
    tokens: of the training; by default steps x batch.
    quick: as for `planning.compiled.plan_step`.
  Raises:
    UserError: something to correct.
  """
  from mom_jax.planning import arithmetic, compiled, report

  if tokens is None:
    tokens = float(cfg.train.steps * cfg.data.batch_size * cfg.data.seq_len)
  try:
    if topology.is_tpu:
      step = compiled.plan_step(cfg, topology, quick)
      stage = 'scheduled' if quick else 'compiled'
      basis = f'{stage} for {topology.libtpu} by libtpu, not run'
    else:
      step = arithmetic.plan_step(cfg, topology)
      basis = 'by arithmetic, nothing compiled or run'
  except config.UserError:
    raise
  except (ValueError, NotImplementedError) as e:
    if '\n' in str(e):
      raise
    raise config.UserError(str(e)) from e
  return report.plan(cfg, topology, step, tokens, basis)


def meshes(
    cfg: config.Config, axes: list[str], devices: int
) -> list[config.Config]:
  """The config with every factorization of the devices over some mesh axes.

  Raises:
    UserError: no such axis, or the other axes do not divide the devices.
  """
  sizes = cfg.mesh.sizes
  for axis in axes:
    if axis not in sizes:
      raise config.UserError(
          f'--sweep={axis} is no axis of the mesh; known: {", ".join(sizes)}.')
  rest = devices
  for axis, size in sizes.items():
    if axis not in axes:
      if size < 1 or rest % size:
        raise config.UserError(
            f'config.mesh.{axis}={size} does not divide the {rest} devices that'
            ' are left; set it to a divisor or name it in --sweep.')
      rest //= size
  found = []

  def split(left, names, chosen):
    if len(names) == 1:
      found.append(chosen | {names[0]: left})
      return
    for size in range(1, left + 1):
      if left % size == 0:
        split(left // size, names[1:], chosen | {names[0]: size})

  split(rest, axes, {})
  return [config.override(cfg, [f'mesh.{k}={v}' for k, v in one.items()])
          for one in found]


def sweep(
    cfgs: list[config.Config], topology: chips.Topology, tokens: float | None,
    quick: bool,
) -> list[dict[str, Any]]:
  """Plan every config; progress and impossible ones go to stderr."""
  plans, started = [], time.monotonic()
  for done, cfg in enumerate(cfgs, 1):
    name = ' '.join(f'{k}={v}' for k, v in cfg.mesh.sizes.items())
    try:
      plans.append(make_plan(cfg, topology, tokens, quick))
      p = plans[-1]
      note = f'{1e3 * p["step_s"]:.0f} ms, ' + (
          'fits' if p['fits'] else 'does not fit')
    except config.UserError as e:
      note = f'impossible: {e}'
    elapsed = time.monotonic() - started
    left = elapsed / done * (len(cfgs) - done)
    print(f'{done}/{len(cfgs)} {name}: {note} ({elapsed:.0f} s, about'
          f' {left:.0f} s left)', file=sys.stderr, flush=True)
  if not plans:
    raise config.UserError('no mesh of --sweep is possible.')
  return plans


def main(overrides: list[str]) -> None:
  f = flags.FLAGS
  try:
    topology = chips.topology(f.topology)
  except ValueError as e:
    raise config.UserError(str(e)) from e
  cfg = config.load(f.config, overrides)
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  import jax
  if not topology.is_tpu:
    jax.config.update('jax_num_cpu_devices', topology.devices)
  from mom_jax.planning import report

  if f.sweep:
    cfgs = meshes(cfg, f.sweep, topology.devices)
    plans = sweep(cfgs, topology, f.tokens, f.quick)
    print(report.ranking(plans))
  else:
    plans = [make_plan(cfg, topology, f.tokens, f.quick)]
    print(report.text(plans[0]))
  if f.json:
    pathlib.Path(f.json).write_text(
        json.dumps(plans if f.sweep else plans[0], indent=2) + '\n',
        encoding='utf-8')
  if not any(p['fits'] for p in plans):
    sys.exit(1)


def define_flags() -> None:
  flags.DEFINE_string(
      'config', None,
      'recipe (.py with get_config, run as code) or config.json', required=True)
  flags.DEFINE_string(
      'topology', None, 'chips: v5e-N, v5p-N, v6e-N, tpu7x-N as Cloud TPU names'
      ' them, v5p:4x4x8, 2xv5e-256 for two slices; h100-N, b200-N',
      required=True)
  flags.DEFINE_list(
      'sweep', [], 'mesh axes, e.g. fsdp,data: plans every split of the devices'
      ' over them and ranks the plans')
  flags.DEFINE_bool(
      'quick', False, 'TPUs: read the scheduled program and generate no code,'
      ' in a fraction of the time; without estimates of cycles')
  flags.DEFINE_float(
      'tokens', None, 'tokens of the training; by default steps x batch')
  cli.define_path('json', None, 'file for the same numbers')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
