r"""Times a training step of a recipe on the devices at hand.

  python scripts/bench_training.py --config=configs/quickstart.py \
      --lengths=256,512,1024,2048,4096 --steps=10 --output=training.json

Two tables, in Markdown:

The parts of a step, at the recipe's own shape and on its own data. `data` is
the mean time to make a batch, on the host and over to the device, when one is
asked for after another; the others are medians of --steps repetitions that take
turns. `backward` is gradient minus forward and `optimizer` is step minus
gradient, so both carry the noise of two measurements. `training` is a step as
in a run, with data made beside it. Tokens are those of documents, not padding.

Growth with the length of a row, at as constant a number of tokens a step as
whole rows allow, with random tokens, one document a row: the recipe beside the
same model with softmax attention as token mixer, in turns. `temporary MiB` is
what the compiled step needs on a device besides state and batch.

FLOPs are those of mom_jax/models/flops.py: what the model asks for, not what a
kernel spends. One process only.
"""

from __future__ import annotations

import contextlib
import functools
import time

from absl import flags
import jax
import numpy as np
import stepping
import timing

from mom_jax import cli, config
from mom_jax.data import pipeline
from mom_jax.models import flops
from mom_jax.parallel import sharding
from mom_jax.training import step

CONFIG = flags.DEFINE_string('config', None, 'recipe to measure', required=True)
LENGTHS = flags.DEFINE_list(
    'lengths', ['256', '512', '1024', '2048', '4096'],
    'tokens a row of the second table, which is left out if empty')
STEPS = flags.DEFINE_integer('steps', 10, 'timed repetitions')
OUTPUT = cli.define_path('output', None, 'JSON file for the same numbers')


def breakdown(
    cfg: config.Config, mesh: jax.sharding.Mesh, steps: int
) -> list[timing.Row]:
  """Rows of the first table."""
  make, abstract = step.init(cfg, mesh)
  run = step.make_step(cfg, abstract)
  # As trained comes last; the micro-batches one after another, as in a step.
  forward = list(step.make_evaluation(cfg).values())[-1]
  gradient = jax.jit(functools.partial(step.gradient, cfg))
  training, key = stepping.Training(make()), jax.random.key(cfg.train.seed)
  A = cfg.train.grad_accum_steps
  with contextlib.closing(pipeline.train_iterator(cfg)) as data:
    data_seconds = _making(cfg, mesh, data, steps)
    batch = sharding.shard_batch(next(data), mesh)
    micro = jax.tree.map(lambda x: x[::A], batch)
    seconds = timing.interleave({
        'forward': lambda: [
            forward(training.state.params, micro) for _ in range(A)],
        'gradient': lambda: gradient(training.state.params, batch, key),
        'step': lambda: training.step(run, batch),
    }, steps)
    whole, whole_tokens = _loop(mesh, data, run, training, steps)
  tokens = int((batch.segment > 0).sum())
  fwd = flops.forward_flops_per_token(cfg)
  parts = (
      ('data', data_seconds, tokens, None),
      ('forward', seconds['forward'], tokens, fwd),
      ('backward', seconds['gradient'] - seconds['forward'], tokens, 2 * fwd),
      ('optimizer', seconds['step'] - seconds['gradient'], tokens, None),
      ('step', seconds['step'], tokens, 3 * fwd),
      ('training', whole, whole_tokens, 3 * fwd),
  )
  return [
      {
          'part': name,
          'ms': 1e3 * time_,
          'share of step': time_ / seconds['step'],
          'tokens/s': count / time_ if name in ('step', 'training') else None,
          'MFLOP a token': each and each / 1e6,
          'GFLOP/s': each and each * count / time_ / 1e9,
      }
      for name, time_, count, each in parts
  ]


def _making(cfg, mesh, data, steps: int) -> float:
  """Mean seconds to make a batch and bring it over."""
  # What was made ahead counts for nothing, and rows come in bursts of BINS.
  for _ in range(pipeline.PREFETCH * max(1, cfg.data.workers) + 1):
    next(data)
  burst = -(-pipeline.BINS // cfg.data.batch_size)
  count = -(-steps // burst) * burst
  started = time.perf_counter()
  for _ in range(count):
    jax.block_until_ready(sharding.shard_batch(next(data), mesh))
  return (time.perf_counter() - started) / count


def _loop(mesh, data, run, training, steps: int) -> tuple[float, float]:
  """(mean seconds, mean tokens) a step, metrics fetched one step late."""
  advance = lambda: training.step(
      run, sharding.shard_batch(next(data), mesh)).tokens
  pending = jax.block_until_ready(advance())
  tokens, started = [], time.perf_counter()
  for _ in range(steps):
    values, pending = pending, advance()
    tokens.append(int(values))
  tokens.append(int(pending))
  return (time.perf_counter() - started) / steps, float(np.mean(tokens[1:]))


def growth(
    cfg: config.Config, mesh: jax.sharding.Mesh, lengths: list[int], steps: int
) -> list[timing.Row]:
  """Rows of the second table."""
  runs, temporary, shapes = {}, {}, {}
  patterns = {
      c.model.pattern: c for c in (cfg, stepping.with_attention(cfg))}
  for pattern, of_pattern in patterns.items():
    make, abstract = step.init(of_pattern, mesh)
    jitted = step.make_step(of_pattern, abstract)
    training = stepping.Training(make())
    for length in lengths:
      shapes[pattern, length] = stepping.with_length(
          of_pattern, mesh, length)
      batch = stepping.random_batch(shapes[pattern, length], mesh)
      compiled = jitted.lower(abstract, batch).compile()
      memory = compiled.memory_analysis()
      temporary[pattern, length] = memory and memory.temp_size_in_bytes
      runs[pattern, length] = functools.partial(training.step, compiled, batch)
  # Both patterns of a length side by side.
  runs = dict(sorted(runs.items(), key=lambda item: item[0][1]))
  seconds = timing.interleave(runs, steps)
  tokens = {
      at: shape.data.batch_size * shape.data.seq_len
      for at, shape in shapes.items()}
  a_token = {at: seconds[at] / tokens[at] for at in runs}
  return [
      {
          'tokens a row': length,
          'rows': shapes[pattern, length].data.batch_size,
          'pattern': pattern,
          's a step': seconds[pattern, length],
          'tokens/s': 1 / a_token[pattern, length],
          'time / first': (
              a_token[pattern, length] / a_token[pattern, min(lengths)]),
          'time / recipe': (
              seconds[pattern, length] / seconds[cfg.model.pattern, length]),
          'temporary MiB': (
              None if temporary[pattern, length] is None
              else temporary[pattern, length] / 2**20),
          'MFLOP a token': flops.train_flops_per_token(
              shapes[pattern, length]) / 1e6,
      }
      for pattern, length in runs
  ]


def _lengths() -> list[int]:
  try:
    lengths = sorted({int(text) for text in LENGTHS.value})
  except ValueError:
    lengths = [0]
  if min(lengths, default=1) < 1:
    raise config.UserError(
        f'--lengths={",".join(LENGTHS.value)} must be whole numbers above 0.')
  return lengths


def main(overrides: list[str]) -> None:
  timing.check_positive('steps', STEPS.value)
  timing.check_output(OUTPUT.value)
  lengths = _lengths()
  cfg = config.load(CONFIG.value, overrides)
  try:
    mesh = sharding.make_mesh(**cfg.mesh.sizes)
    sharding.check_batch(
        cfg.data.batch_size // cfg.train.grad_accum_steps,
        sharding.batch_shards(mesh))
  except ValueError as e:
    raise config.UserError(str(e)) from e
  header = timing.machine(cfg.model.dtype) | {
      'recipe': CONFIG.value,
      'batch': f'{cfg.data.batch_size} x {cfg.data.seq_len} tokens',
      'repetitions': str(STEPS.value),
  }
  with jax.set_mesh(mesh):
    tables = {'Parts of a step': breakdown(cfg, mesh, STEPS.value)}
    if lengths:
      tables['Growth with the length of a row'] = growth(
          cfg, mesh, lengths, STEPS.value)
  timing.report(header, tables, OUTPUT.value)


if __name__ == '__main__':
  cli.run(main)
