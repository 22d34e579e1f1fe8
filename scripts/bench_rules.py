r"""Times every memory rule, beside a loop over tokens and softmax attention.

  python scripts/bench_rules.py --lengths=512,2048,8192 --output=rules.json

One layer, one row, one memory without a router: the plain layer of the rule in
its chunk form, the same layer token by token (the backend `reference`), and
causal softmax attention of the same width and number of heads. Keys of based
and rebased have 16 channels, as in configs/rules.py, before their features.
All of a length run in turns. tokens/s are of the forward pass and of forward
and backward together; the ratios are of the second. `temporary MiB` is what the
compiled forward and backward pass needs beside parameters and input, as XLA
reports it, at --memory_lengths, for which nothing runs; --lengths= leaves out
the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent import futures
import dataclasses
import functools
import os
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
OUTPUT = flags.DEFINE_string('output', None, 'JSON file for the same numbers')
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
            writes=2 if name == 'gated_delta_product' else 1),
        attention=config.Attention(
            num_heads=HEADS.value, num_kv_heads=HEADS.value, head_dim=size))
    mixer = block.MIXERS[ATTENTION if name == ATTENTION else 'mom']
    self.module = mixer.module(model)
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


class Programs:
  """Compiled layers; each is made once, many side by side."""

  def __init__(self):
    self._layer = functools.cache(Layer)
    self._made: dict[Job, jax.stages.Compiled] = {}

  def make(self, jobs: Iterable[Job]) -> None:
    jobs = [job for job in jobs if job not in self._made]
    for name, backend, *_ in jobs:
      self._layer(name, backend)
    one = lambda job: self._layer(*job[:2]).compile(*job[2:])
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      self._made |= zip(jobs, pool.map(one, jobs))

  def ready(self, job: Job) -> functools.partial:
    layer = self._layer(*job[:2])
    return functools.partial(
        self._made[job], layer.params, *layer.inputs(job[3]))

  def temporary(self, job: Job) -> float | None:
    """MiB."""
    found = self._made[job].memory_analysis()
    return None if found is None else found.temp_size_in_bytes / 2**20


def speed(
    names: list[str], length: int, programs: Programs
) -> list[timing.Row]:
  """Rows of one length: rules, and attention at the end."""
  jobs = [(name, 'auto', kind, length) for name in (*names, ATTENTION)
          for kind in ('forward', 'both')]
  jobs += [(name, 'reference', 'both', length) for name in names]
  programs.make(jobs)
  seconds = timing.interleave(
      {job[:3]: programs.ready(job) for job in jobs}, STEPS.value)
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
    names: list[str], lengths: list[int], programs: Programs
) -> list[timing.Row]:
  jobs = {(name, length): (name, 'auto', 'both', length)
          for name in (*names, ATTENTION) for length in lengths}
  programs.make(jobs.values())
  return [
      {'rule': name} | {
          f'MiB at {length:,}': programs.temporary(jobs[name, length])
          for length in lengths}
      for name in (*names, ATTENTION)]


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
  tables, programs = {}, Programs()
  if lengths:
    tables['Speed'] = [
        row for length in lengths for row in speed(names, length, programs)]
  at = _lengths('memory_lengths', MEMORY_LENGTHS.value)
  if at:
    tables['Temporary memory'] = memory(names, at, programs)
  timing.report(timing.machine('float32') | {
      'width': str(WIDTH.value), 'heads': str(HEADS.value),
      'repetitions': str(STEPS.value)}, tables, OUTPUT.value)


if __name__ == '__main__':
  cli.run(main)
