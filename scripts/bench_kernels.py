r"""Times every backend of every operation in mom_jax/pallas, and naive rivals.

  python scripts/bench_kernels.py --steps=20 --output=kernels.json
  python scripts/bench_kernels.py --cases='grouped_matmul/*,*delta_head*'
  python scripts/bench_kernels.py --list

Per case: median ms of the forward pass and of forward and backward together,
all backends and rivals in turns. GFLOP/s are of forward and backward, with
the operations the case asks for (token by token, backward twice as much as
forward, padding and masked work not counted). Errors are max |x - y| / max |y|
against the reference backend on the same operands in float32, over the results
and over the gradients. What cannot run here is listed with its reason.

Rivals, marked *: for chunk_memory a scan over time in which all memories
advance side by side (the reference visits row by row), for grouped_matmul
jax.lax.ragged_dot and an einsum with a one-hot matrix of groups.

Takes no settings of a recipe.
"""

from __future__ import annotations

from collections.abc import Callable
import fnmatch
import functools
from typing import Any, NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import rivals
import timing

from mom_jax import cli, config, pallas
from mom_jax.pallas.chunk_memory import api as memory_api
from mom_jax.pallas.chunk_memory import cases as memory_cases
from mom_jax.pallas.grouped_matmul import api as matmul_api
from mom_jax.pallas.grouped_matmul import cases as matmul_cases

CASES = flags.DEFINE_list(
    'cases', [], "patterns of op/case, tests' cases included; none is all"
    ' shapes meant for benchmarks')
LIST = flags.DEFINE_bool('list', False, 'name the cases and stop')
STEPS = flags.DEFINE_integer('steps', 10, 'timed repetitions')
DTYPE = flags.DEFINE_enum(
    'dtype', 'float32', ['float32', 'bfloat16'],
    'type of q, k, v and of x, w')
OUTPUT = cli.define_path('output', None, 'JSON file for the same numbers')


class Bench(NamedTuple):
  """A case ready to run.

  Attributes:
    backends: by name, functions of (*operands, *indices).
    operands: the differentiable arguments, in the dtype asked for.
    indices: arguments that say which row is whose.
    real_R: rows that are no padding.
    flop: operations of the forward pass.
  """

  backends: dict[str, Callable[..., jax.Array]]
  operands: tuple[Any, ...]
  indices: tuple[Any, ...]
  real_R: np.ndarray
  flop: float


# The quickstart's shapes: in each of two rows four memories that get half of
# 512 tokens each, and a shared one that gets all.
_QUICK = dict(
    lengths=(256,) * 8 + (512,) * 2, heads=2, key=16, value=16, chunk=32,
    state=False, unused=10)
MEMORY_BENCHMARKS = {
    'gated_delta': memory_cases.Case(**_QUICK),
    'delta': memory_cases.Case(**_QUICK, decay='none'),
    'gated_linear': memory_cases.Case(**_QUICK, delta=False),
    'delta_channel_decay': memory_cases.Case(**_QUICK, decay='channel'),
    'gated_delta_uneven': memory_cases.Case(
        **_QUICK | dict(lengths=(900, 40, 60, 24) * 2 + (512,) * 2)),
    'gated_delta_long': memory_cases.Case(
        **_QUICK | dict(lengths=(4096,), unused=0)),
}


def chunk_memory(case: memory_cases.Case, dtype: Any) -> Bench:
  operands, settings = case.operands(dtype=dtype)
  state_GHKV = settings['initial_state_GHKV']
  if state_GHKV is None:
    state_GHKV = jnp.zeros(
        (len(case.lengths), case.heads, case.key, case.value), jnp.float32)
  slot_TG = rivals.places(settings['group_N'], case.lengths, case.chunk)
  extra = settings['removal_key_RHK'], settings['value_decay_RHV']

  def ours(backend, *args):
    *rows, removal_key, value_decay, state_GHKV, group_N, segment_R, _ = args
    return pallas.chunk_memory(
        *rows, initial_state_GHKV=state_GHKV, group_N=group_N,
        segment_R=segment_R, removal_key_RHK=removal_key,
        value_decay_RHV=value_decay, exclusive=case.exclusive,
        chunk=case.chunk, backend=backend)[0]

  def over_time(*args):
    *rows, removal_key, value_decay, state_GHKV, _, segment_R, slot_TG = args
    if segment_R is not None:
      raise NotImplementedError('keeps no documents apart')
    if case.exclusive or removal_key is not None or value_decay is not None:
      raise NotImplementedError('knows gated and delta updates alone')
    return rivals.scan_over_time(*rows, state_GHKV, slot_TG)

  R = len(operands[0])
  products = 3 if case.delta or case.removal else 2
  each = products * 2 * case.key * case.value * case.heads
  return Bench(
      {name: functools.partial(ours, name) for name in memory_api.BACKENDS} | {
          'scan over time *': over_time},
      (*operands, *extra, state_GHKV),
      (settings['group_N'], settings['segment_R'], jnp.asarray(slot_TG)),
      np.isin(np.arange(R), slot_TG), float(sum(case.lengths) * each))


def grouped_matmul(case: matmul_cases.Case, dtype: Any) -> Bench:
  x, w, sizes = case.operands(dtype=dtype)
  ours = lambda backend, *args: pallas.grouped_matmul(*args, backend=backend)
  return Bench(
      {name: functools.partial(ours, name) for name in matmul_api.BACKENDS} | {
          'ragged_dot *': jax.lax.ragged_dot,
          'one-hot einsum *': rivals.one_hot_einsum},
      (x, w), (sizes,), np.arange(case.rows) < sum(case.sizes),
      2.0 * sum(case.sizes) * case.width * case.hidden)


OPS = {
    'chunk_memory': (chunk_memory, MEMORY_BENCHMARKS, memory_cases.CASES),
    'grouped_matmul': (
        grouped_matmul, matmul_cases.BENCHMARKS, matmul_cases.CASES),
}


def measure(op: str, name: str, case: Any, steps: int) -> list[timing.Row]:
  """One row for each backend and rival, the fastest first."""
  bench = OPS[op][0](case, jnp.dtype(DTYPE.value))
  # The reference gets the rounded operands, in float32.
  precise = jax.tree.map(lambda x: x.astype(jnp.float32), bench.operands)
  reference = bench.backends['reference']
  shape = jax.eval_shape(reference, *precise, *bench.indices).shape
  weight = np.random.default_rng(1).normal(size=shape)
  weight[~bench.real_R] = 0
  truth = jax.jit(_both(reference))(precise, bench.indices, jnp.asarray(
      weight, jnp.float32))
  runs, errors, absent = {}, {}, {}
  for backend, forward in bench.backends.items():
    args = bench.operands, bench.indices
    try:
      dtype = jax.eval_shape(forward, *args[0], *args[1]).dtype
    except NotImplementedError as e:
      absent[backend] = str(e)
      continue
    both = functools.partial(
        jax.jit(_both(forward)), *args, jnp.asarray(weight, dtype))
    errors[backend] = [_error(x, y) for x, y in zip(both(), truth)]
    runs[backend, 'forward'] = functools.partial(
        jax.jit(forward), *args[0], *args[1])
    runs[backend, 'both'] = both
  seconds = timing.interleave(runs, steps)
  rows = [
      {
          'case': f'{op}/{name}', 'backend': backend,
          'forward ms': 1e3 * seconds[backend, 'forward'],
          'forward+backward ms': 1e3 * seconds[backend, 'both'],
          'GFLOP/s': 3 * bench.flop / seconds[backend, 'both'] / 1e9,
          'error': error, 'gradient error': gradient_error,
      }
      for backend, (error, gradient_error) in errors.items()
  ]
  rows.sort(key=lambda row: row['forward+backward ms'])
  return rows + [
      dict.fromkeys(rows[0]) | {
          'case': f'{op}/{name}', 'backend': f'{backend}: absent, {reason}'}
      for backend, reason in absent.items()
  ]


def _both(forward: Callable[..., jax.Array]) -> Callable[..., Any]:
  """(result, gradients of its weighted sum)."""

  def run(operands, indices, weight):
    out, pull = jax.vjp(lambda *xs: forward(*xs, *indices), *operands)
    return out, pull(weight)

  return run


def _error(got: Any, truth: Any) -> float:
  """Largest over the arrays; each relative to its own largest value."""

  def one(x, y):
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    return float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30))

  return max(jax.tree.leaves(jax.tree.map(one, got, truth)))


def chosen(patterns: list[str]) -> dict[tuple[str, str], Any]:
  """(op, case name) -> case; UserError for a pattern that matches nothing."""
  every = {
      (op, name): case for op, (_, benchmarks, tests) in OPS.items()
      for name, case in (benchmarks | tests).items()}
  if not patterns:
    return {(op, name): case for op, (_, benchmarks, _) in OPS.items()
            for name, case in benchmarks.items()}
  for pattern in patterns:
    if not any(fnmatch.fnmatch('/'.join(at), pattern) for at in every):
      raise config.UserError(
          f'--cases={pattern} matches no case; --list names them.')
  return {at: case for at, case in every.items()
          if any(fnmatch.fnmatch('/'.join(at), p) for p in patterns)}


def main(overrides: list[str]) -> None:
  if overrides:
    raise config.UserError(f'--config.{overrides[0]}: no recipe is used here.')
  timing.check_positive('steps', STEPS.value)
  timing.check_output(OUTPUT.value)
  if LIST.value:
    print('\n'.join('/'.join(at) for at in chosen(CASES.value or ['*'])))
    return
  header = timing.machine(DTYPE.value) | {'repetitions': str(STEPS.value)}
  tables = {}
  for (op, name), case in chosen(CASES.value).items():
    tables.setdefault(op, []).extend(measure(op, name, case, STEPS.value))
  timing.report(header, tables, OUTPUT.value)


if __name__ == '__main__':
  cli.run(main)
