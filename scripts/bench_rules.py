r"""Times every memory rule, beside a loop over tokens and softmax attention.

  python scripts/bench_rules.py --lengths=512,2048,8192 --output=rules.json

One layer, one row, one memory without a router: the plain layer of the rule in
its chunk form, the same layer token by token (the backend `reference`), and
causal softmax attention of the same width and number of heads. Keys of based
and rebased have 16 channels, as in configs/rules.py, before their features.
All of a length run in turns. tokens/s are of the forward pass and of forward
and backward together; the ratios are of the second. `temporary MiB` is what the
compiled forward and backward pass needs besides parameters and input, as XLA
reports it, at --memory_lengths, for which nothing runs; --lengths= leaves out
the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import dataclasses
import functools
import os
import sys
from typing import Any

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import timing

from mom_jax import cli, config, rules
from mom_jax.models import block

RULES = flags.DEFINE_list('rules', [], 'rules to time; none is all')
LENGTHS = flags.DEFINE_list(
    'lengths', ['512', '2048', '8192'], 'tokens of the row, timed')
MEMORY_LENGTHS = flags.DEFINE_list(
    'memory_lengths', ['2048', '8192', '32768'], 'tokens of the row, compiled')
WIDTH = flags.DEFINE_integer('width', 256, 'width of the layer')
HEADS = flags.DEFINE_integer('heads', 4, 'heads; they fill the width')
STEPS = flags.DEFINE_integer('steps', 3, 'timed repetitions')
OUTPUT = cli.define_path('output', None, 'JSON file for the same numbers')
ATTENTION = 'attention'


class Layer:
  """A token mixer with its parameters, ready to compile for any length."""

  def __init__(self, name: str, backend: str):
    size = WIDTH.value // HEADS.value
    key = 16 if name in ('based', 'rebased') else size
    model = dataclasses.replace(
        config.Config().model, width=WIDTH.value,
        mixer=config.Mixer(
            rule='linear' if name == ATTENTION else name,
            num_memories=1, top_k=1, shared=False, num_heads=HEADS.value,
            key_dim=key, value_dim=size, chunk=64, backend=backend,
            num_householder=2 if name == 'gated_delta_product' else 1),
        attention=config.Attention(
            num_heads=HEADS.value, num_kv_heads=HEADS.value, head_dim=size))
    mixer = block.MIXERS[ATTENTION if name == ATTENTION else 'mom']
    self.module = mixer.make(model)
    x, segment = self.inputs(64)
    self.params = nn.meta.unbox(jax.jit(self.module.init)(
        jax.random.key(0), x, None, segment))

  @staticmethod
  def inputs(length: int) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(1), (1, length, WIDTH.value))
    return x, jnp.ones((1, length), jnp.int32)

  def forward(self, params: Any, x: jax.Array, segment: jax.Array) -> jax.Array:
    return self.module.apply(params, x, None, segment)[0]

  def both(self, params: Any, x: jax.Array, segment: jax.Array) -> Any:
    loss = lambda params, x: self.forward(params, x, segment).sum()
    return jax.value_and_grad(loss, (0, 1))(params, x)

  def compile(self, kind: str, length: int) -> jax.stages.Compiled:
    return jax.jit(getattr(self, kind)).lower(
        self.params, *self.inputs(length)).compile()


# (rule, backend), forward or both, tokens.
Job = tuple[str, str, str, int]


def compiled(jobs: Sequence[Job], layer: Callable[..., Layer]) -> Iterator[
    jax.stages.Compiled]:
  """Layers for their jobs, many made side by side.

  Whoever keeps those of all rules and lengths runs out of memory maps.
  """
  layers = [layer(*job[:2]) for job in jobs]
  one = lambda layer, job: layer.compile(*job[2:])
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    yield from pool.map(one, layers, jobs)


def speed(
    names: list[str], length: int, layer: Callable[..., Layer]
) -> list[timing.Row]:
  """Rows of one length: rules, and attention at the end."""
  jobs = [(name, 'auto', kind, length) for name in (*names, ATTENTION)
          for kind in ('forward', 'both')]
  jobs += [(name, 'reference', 'both', length) for name in names]
  runs = {
      job[:3]: functools.partial(
          program, layer(*job[:2]).params, *Layer.inputs(length))
      for job, program in zip(jobs, compiled(jobs, layer))}
  seconds = timing.interleave(runs, STEPS.value)
  attention = seconds[ATTENTION, 'auto', 'both']
  rows = []
  for name in (*names, ATTENTION):
    forward, both = (seconds[name, 'auto', k] for k in ('forward', 'both'))
    loop = seconds.get((name, 'reference', 'both'))
    rows.append({
        'tokens a row': length, 'rule': name,
        'forward tokens/s': length / forward,
        'forward+backward tokens/s': length / both,
        'times token by token': loop and loop / both,
        'times attention': attention / both,
    })
  return rows


def memory(
    names: list[str], lengths: list[int], layer: Callable[..., Layer]
) -> list[timing.Row]:
  jobs = [(name, 'auto', 'both', length)
          for name in (*names, ATTENTION) for length in lengths]
  found = iter([_temporary(program) for program in compiled(jobs, layer)])
  return [
      {'rule': name} | {f'MiB at {n:,}': next(found) for n in lengths}
      for name in (*names, ATTENTION)]


def _temporary(program: jax.stages.Compiled) -> float | None:
  """MiB."""
  found = program.memory_analysis()
  return None if found is None else found.temp_size_in_bytes / 2**20


def _lengths(name: str, values: list[str]) -> list[int]:
  if not all(v.isdecimal() and int(v) for v in values):
    raise config.UserError(
        f'--{name}={",".join(values)} must be whole numbers above 0.')
  return [int(v) for v in values]


def main(overrides: list[str]) -> None:
  if overrides:
    raise config.UserError(
        f'--config.{overrides[0]}: no recipe is used here; see --help.')
  timing.check_positive('steps', STEPS.value)
  timing.check_output(OUTPUT.value)
  names = RULES.value or sorted(rules.RULES)
  unknown = sorted(set(names) - set(rules.RULES))
  if unknown:
    raise config.UserError(
        f'--rules={",".join(names)} has unknown {unknown}; known:'
        f' {", ".join(sorted(rules.RULES))}.')
  if WIDTH.value < 1 or HEADS.value < 1 or WIDTH.value % (2 * HEADS.value):
    raise config.UserError(
        f'--width={WIDTH.value} must be a multiple of twice'
        f' --heads={HEADS.value}.')
  lengths = _lengths('lengths', LENGTHS.value)
  at = _lengths('memory_lengths', MEMORY_LENGTHS.value)
  tables, layer = {}, functools.cache(Layer)
  for length in lengths:
    print(f'timing rows of {length:,} tokens', file=sys.stderr, flush=True)
    tables.setdefault('Speed', []).extend(speed(names, length, layer))
  if at:
    print('compiling for memory', file=sys.stderr, flush=True)
    tables['Temporary memory'] = memory(names, at, layer)
  timing.report(timing.machine('float32') | {
      'width': str(WIDTH.value), 'heads': str(HEADS.value),
      'repetitions': str(STEPS.value)}, tables, OUTPUT.value)


if __name__ == '__main__':
  cli.run(main)
