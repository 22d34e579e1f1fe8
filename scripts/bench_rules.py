r"""Times every memory rule, beside a loop over tokens and softmax attention.

  python scripts/bench_rules.py --lengths=512,2048,8192 --output=rules.json

One layer, one row, one memory without a router: the plain layer of the rule in
its chunk form, the same layer token by token (the backend `reference`), and
causal softmax attention of the same width and number of heads. All of a length
run in turns. tokens/s are of the forward pass and of forward and backward
together; the ratios are of the second. `temporary MiB` is what the compiled
forward and backward pass needs beside parameters and input, as XLA reports it,
at --memory_lengths, for which nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
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

  def __init__(self, name: str, backend: str = 'auto'):
    size = WIDTH.value // HEADS.value
    model = dataclasses.replace(
        config.Config().model, width=WIDTH.value,
        mixer=config.Mixer(
            rule='linear' if name == ATTENTION else name,
            num_memories=1, top_k=1, shared=False, num_heads=HEADS.value,
            key_dim=size, value_dim=size, chunk=64, backend=backend,
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

  def ready(self, length: int) -> dict[str, Callable[[], Any]]:
    args = self.params, *self.inputs(length)
    return {name: functools.partial(jax.jit(getattr(self, name)), *args)
            for name in ('forward', 'both')}

  def temporary(self, length: int) -> int | None:
    compiled = jax.jit(self.both).lower(
        self.params, *self.inputs(length)).compile()
    memory = compiled.memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes


def speed(names: list[str], length: int) -> list[timing.Row]:
  """Rows of one length: rules, and attention at the end."""
  runs = {}
  for name in names:
    for backend in ('auto', 'reference'):
      for kind, run in Layer(name, backend).ready(length).items():
        runs[name, backend, kind] = run
  for kind, run in Layer(ATTENTION).ready(length).items():
    runs[ATTENTION, 'auto', kind] = run
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


def memory(names: list[str], lengths: list[int]) -> list[timing.Row]:
  rows = []
  for name in (*names, ATTENTION):
    layer = Layer(name)
    found = [layer.temporary(length) for length in lengths]
    rows.append({'rule': name} | {
        f'MiB at {length:,}': None if size is None else size / 2**20
        for length, size in zip(lengths, found)})
  return rows


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
  tables = {}
  if lengths:
    tables['Speed'] = [
        row for length in lengths for row in speed(names, length)]
  at = _lengths('memory_lengths', MEMORY_LENGTHS.value)
  if at:
    tables['Temporary memory'] = memory(names, at)
  timing.report(timing.machine('float32') | {
      'width': str(WIDTH.value), 'heads': str(HEADS.value),
      'repetitions': str(STEPS.value)}, tables, OUTPUT.value)


if __name__ == '__main__':
  cli.run(main)
