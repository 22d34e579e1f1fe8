"""Stages of scripts/gpu_kit.sh with their time limits, cases with costs.

  python scripts/gpu_cases.py PART OUT              a line for each stage
  python scripts/gpu_cases.py PART OUT --cases      the same, with their cases

A line: name, seconds, 'needed' where the kit stops if it fails, command.

Knows neither jax nor torch, so the process of each reads the same table.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys

FORWARD, BOTH, DX, DW = 'forward', 'forward+backward', 'dx', 'dw'
CHUNK = 64  # rows of a chunk, for costs


@dataclasses.dataclass(frozen=True)
class Case:
  """A shape of an operation, bfloat16.

  Attributes:
    op: gated_delta, gla (additive, decay by channel), conv (short convolution
      and SiLU), grouped_matmul, the same of rows by number (gathered_matmul),
      grouped_swiglu, decode or attention.
    shape: B rows of T tokens, H heads of D, or R rows in G groups, matrices
      D x F; of conv, W taps of F channels; of decode, N states; of
      gathered_matmul, N rows of which R are taken.
    passes: what is timed.
  """

  op: str
  shape: dict[str, int]
  passes: tuple[str, ...] = (FORWARD, BOTH)

  @property
  def name(self) -> str:
    sizes = ' '.join(f'{key}={n}' for key, n in self.shape.items())
    return f'{self.op} {sizes}'

  def cost(self, pass_: str) -> tuple[float, float]:
    """(operations, bytes moved) at the least; of memories in chunk form."""
    s = self.shape
    if self.op == 'gated_delta':
      D, C, rows = s['D'], CHUNK, s['B'] * s['T'] * s['H']
      flop, moved = 6 * D**2 + 10 * C * D + 8 * C**2, 8 * D
      if pass_ == BOTH:
        flop += 16 * D**2 + 28 * C * D + 12 * C**2
        moved += 14 * D
      return rows * flop, rows * moved
    if self.op == 'gla':  # decays and their gradients are float32
      D, C, rows = s['D'], CHUNK, s['B'] * s['T'] * s['H']
      flop, moved = 4 * D**2 + 4 * C * D, 12 * D
      if pass_ == BOTH:
        flop += 10 * D**2 + 10 * C * D
        moved += 22 * D
      return rows * flop, rows * moved
    if self.op == 'conv':
      rows = s['B'] * s['T'] * s['F']
      flop, moved = 2 * s['W'] * rows, 4 * rows
      return (3 * flop, 2.5 * moved) if pass_ == BOTH else (flop, moved)
    if self.op == 'decode':
      states = s['N'] * s['H'] * s['D'] ** 2
      return 6 * states, 8 * states
    if self.op == 'attention':
      rows = s['B'] * s['T'] * s['H']
      flop, moved = 2 * rows * s['T'] * s['D'], 8 * rows * s['D']
      return (3.5 * flop, 3 * moved) if pass_ == BOTH else (flop, moved)
    R, D, F, G = s['R'], s['D'], s['F'], s['G']
    held = 2 if self.op == 'grouped_swiglu' else 1
    flop = 2 * held * R * D * F
    moved = 2 * (s.get('N', R) * D + R * F + held * G * D * F)
    if pass_ != BOTH:
      return flop, moved
    back = 2 * (2 * R * D + 2 * held * R * F + 2 * held * G * D * F)
    return 3 * flop, moved + back

  def floor_ms(self, pass_: str, peak: float, bandwidth: float) -> float:
    flop, moved = self.cost(pass_)
    return 1e3 * max(flop / peak, moved / bandwidth)

  def toy(self) -> Case:
    """The same on a CPU."""
    small = dict(
        B=1, T=128, H=2, D=64, R=256, F=64, G=4, N=4, W=4)
    return dataclasses.replace(self, shape={
        key: min(n, small[key]) for key, n in self.shape.items()})


_PRODUCTS = (FORWARD, DX, DW)
CASES = (
    Case('gated_delta', dict(B=1, T=8192, H=32, D=128)),
    Case('gated_delta', dict(B=8, T=2048, H=16, D=128)),
    # A MoM layer's rows: 32,768 tokens in two memories each and a shared one.
    Case('gated_delta', dict(B=48, T=2048, H=4, D=256)),
    Case('decode', dict(N=192, H=4, D=256), (FORWARD,)),
    Case('decode', dict(N=192, H=8, D=128), (FORWARD,)),
    # MoM's keys, of width 1,024 and 2,048; MoMa's experts in and out.
    Case('grouped_matmul', dict(R=65536, D=1024, F=1024, G=5), _PRODUCTS),
    Case('grouped_matmul', dict(R=65536, D=2048, F=1024, G=5), _PRODUCTS),
    Case('grouped_matmul', dict(R=24576, D=2816, F=1024, G=8), _PRODUCTS),
    Case('grouped_matmul', dict(R=24576, D=5504, F=2048, G=8), _PRODUCTS),
    # lax.ragged_dot multiplies every row by every matrix: small shapes only.
    Case('grouped_matmul', dict(R=2048, D=512, F=512, G=8), _PRODUCTS),
    # Tokens that go to two memories each.
    Case('gathered_matmul', dict(N=32768, R=65536, D=1024, F=2048, G=4),
         (FORWARD, DW)),
    Case('grouped_swiglu', dict(R=24576, D=1024, F=2816, G=8)),
    Case('grouped_swiglu', dict(R=24576, D=2048, F=5504, G=8)),
    Case('attention', dict(B=1, T=8192, H=32, D=128)),
    Case('gla', dict(B=8, T=2048, H=16, D=128)),
    Case('conv', dict(B=8, T=2048, F=1024, W=4)),
)
SMALL = CASES[9].name
LENGTHS = (2048, 8192, 32768, 65536)  # tokens a row of a training step
CONTEXTS = (1024, 8192, 65536, 524288)  # tokens before a decoded one
TOKENS = 32768  # of a training step
# A MoM layer of configs/mom_380m.py: width, heads, their size, memories, top k.
LAYER = dict(D=1024, H=4, K=256, M=4, A=2)
LAYER_NAME = f'MoM layer T={TOKENS} ' + ' '.join(
    f'{key}={n}' for key, n in LAYER.items())
RECIPES = ('mom_380m', 'mom_1b3', 'moma_435m')


@dataclasses.dataclass(frozen=True)
class Stage:
  """A process with a time box.

  Attributes:
    needed: the kit stops where it fails.
  """

  name: str
  seconds: int
  command: str
  cases: tuple[str, ...] = ()
  needed: bool = False


def stages(part: str, out: str) -> list[Stage]:
  """Return the stages of 'kernels' or 'models', each below ten minutes."""
  ours = f'python scripts/bench_gpu.py --out={out} --stage='
  theirs = f'python scripts/bench_torch.py --out={out} --stage='
  models = f'python scripts/bench_gpu_models.py --out={out} --stage='
  kernels = tuple(
      f'{case.name}: {", ".join(case.passes)}' for case in CASES)
  steps = tuple(
      f'training {recipe}, rows of {length} tokens' for recipe in RECIPES
      for length in LENGTHS)
  contexts = tuple(
      f'decode {recipe}, after {context} tokens' for recipe in RECIPES
      for context in CONTEXTS)
  first = [
      Stage('environment', 30, ours + 'environment', (
          'versions, device, target config of XLA; ceilings: copy, matmul',)),
      Stage('smoke', 40, ours + 'smoke', (
          'one kernel of each operation against plain XLA',), needed=True)]
  last = [Stage('table', 15, f'python scripts/gpu_table.py {out}')]
  if part == 'kernels':
    return first + [
        Stage('tests', 140, (
            'python -m pytest -m gpu -n 8 -p no:cacheprovider'
            ' tests/pallas/test_chunk_memory_gpu.py'
            ' tests/pallas/test_grouped_gpu.py'), (
                'every entry of every table of tiles; NaN in memory before;'
                ' the same bits twice',)),
        Stage('ours', 140, ours + 'ours', kernels),
        Stage('torch', 145, theirs + 'kernels', (
            'fla chunk_gated_delta_rule, fused_recurrent_gated_delta_rule,'
            ' chunk_gla, ShortConvolution; causal-conv1d; torch._grouped_mm;'
            ' scaled_dot_product_attention',)),
        Stage('jax rivals', 60, ours + 'rivals', (
            'tokamax ragged_dot (mosaic, triton); jax.lax.ragged_dot on'
            f' {SMALL}; batched einsum; cuDNN attention',)),
    ] + last
  if part == 'models':
    return first + [
        *(Stage(
            f'training {recipe}', 110, f'{models}training --recipe={recipe}',
            tuple(s for s in steps if f' {recipe},' in s))
          for recipe in RECIPES),
        Stage('layer', 40, models + 'layer', (LAYER_NAME,)),
        Stage('decode', 70, models + 'decode', contexts),
        Stage('torch models', 60, theirs + 'models', (
            'fla MomForCausalLM of the size of mom_380m: training steps;'
            ' MomAttention at 32,768 tokens',)),
    ] + last
  raise SystemExit(f'unknown part {part!r}; known: kernels, models.')


def main() -> None:
  part, out = sys.argv[1], sys.argv[2]
  found = stages(part, out)
  total = sum(stage.seconds for stage in found)
  assert total < 600, total
  for stage in found:
    needed = 'needed' if stage.needed else 'optional'
    print(f'{stage.name}\t{stage.seconds}\t{needed}\t{stage.command}')
    if '--cases' in sys.argv:
      for case in stage.cases:
        print(f'    {case}')


def results(out: str) -> pathlib.Path:
  """The file that rows are appended to."""
  return pathlib.Path(out, 'results.jsonl')


if __name__ == '__main__':
  main()
