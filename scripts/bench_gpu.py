"""Stages of scripts/gpu_kit.sh that time operations in JAX.

  python scripts/bench_gpu.py --out=DIR --stage=environment|smoke|ours|rivals

Each row is appended to DIR/results.jsonl when it is there, so that a run that
is ended keeps what it has. A time is the median of 7: of the kernels alone, by
CUPTI (`kernels`), or, where CUPTI is not at hand, of calls one after another
for 200 ms (`wall`); inputs are random and three sets of them take turns, which
do not fit the cache together. An error is max |x - y| / max |y| over results
and gradients, against the plain XLA backend in float32.

--toy takes small shapes and any device: it tries this script, not a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
import functools
import importlib.util
import json
import pathlib
import statistics
import sys
import time
import types
from typing import Any

import gpu_cases
import jax
import jax.numpy as jnp
import numpy as np
import timing

from mom_jax import pallas
from mom_jax.models import attention, history
from mom_jax.pallas import triton_call
from mom_jax.routing import dispatch

SETS, REPETITIONS, LEAST = 3, 7, 0.2  # sets of inputs; medians of; seconds
Forward = Callable[..., Any]


class Results:
  """Rows, appended as they come."""

  def __init__(self, folder: str):
    self.path = gpu_cases.results(folder)
    self.path.parent.mkdir(parents=True, exist_ok=True)

  def add(self, **row: Any) -> None:
    with self.path.open('a') as file:
      file.write(json.dumps(row) + '\n')
    print(json.dumps(row), flush=True)


def clock(run: Callable, sets: Sequence[tuple]) -> tuple[float, str]:
  """(milliseconds, by which clock) of a jitted function."""
  for args in sets:
    jax.block_until_ready(run(*args))
  each = _kernels(run, sets)
  if each is not None:
    return each, 'kernels'
  started = time.perf_counter()
  jax.block_until_ready(run(*sets[0]))
  count = max(1, int(LEAST / (time.perf_counter() - started)))
  seconds = []
  for _ in range(REPETITIONS):
    started = time.perf_counter()
    for i in range(count):
      out = run(*sets[i % len(sets)])
    jax.block_until_ready(out)
    seconds.append((time.perf_counter() - started) / count)
  return 1e3 * statistics.median(seconds), 'wall'


def _kernels(run, sets):
  """Median milliseconds of all kernels of a call, or None without CUPTI."""
  if jax.default_backend() != 'gpu':
    return None
  try:
    from jax.experimental.mosaic.gpu import profiler
    found = [profiler.measure(run)(*sets[i % len(sets)])[1]
             for i in range(REPETITIONS)]
  except Exception as e:  # of many types, by version and driver
    print(f'no CUPTI: {e!r}', file=sys.stderr)
    return None
  return None if None in found else statistics.median(found)


def operands(case: gpu_cases.Case, seed: int) -> tuple[tuple, tuple]:
  """(differentiable arguments, indices) of a case."""
  s, rng = case.shape, np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(
      rng.standard_normal(shape, np.float32), jnp.bfloat16)
  if case.op == 'attention':
    shape = s['B'], s['T'], s['H'], s['D']
    return (draw(*shape), draw(*shape), draw(*shape)), ()
  if case.op == 'conv':
    R, at_R = s['B'] * s['T'], jnp.arange(s['B'] * s['T'])
    layout = dispatch.group(
        at_R, at_R // s['T'], num_tokens=R, num_groups=s['B'])
    return (draw(R, s['F']), draw(s['W'], s['F']) / s['W']), (
        layout, jnp.ones(R, jnp.int32))
  if case.op in ('gated_delta', 'gla', 'decode'):
    G = s['N'] if case.op == 'decode' else s['B']
    R, chunk = (G * s['T'], gpu_cases.CHUNK) if 'T' in s else (G, 1)
    unit = lambda x: x / jnp.linalg.norm(
        x.astype(jnp.float32), axis=-1, keepdims=True).astype(x.dtype)
    shape = R, s['H'], s['D']
    uniform = lambda low, axes=2: jnp.asarray(
        rng.uniform(low, low + 1, shape[:axes]), jnp.float32)
    args = unit(draw(*shape)), unit(draw(*shape)), draw(*shape)
    group_N = jnp.repeat(jnp.arange(G, dtype=jnp.int32), R // chunk // G)
    if case.op == 'decode':
      state = rng.standard_normal((G, s['H'], s['D'], s['D']), np.float32)
      return (*args, uniform(-1), uniform(0), jnp.asarray(state)), (group_N,)
    if case.op == 'gla':
      return (*args, 0.1 * uniform(-1, 3)), (group_N,)
    return (*args, 0.1 * uniform(-1), uniform(0)), (group_N,)
  G, R = s['G'], s['R']
  share = rng.dirichlet(np.full(G, 20.0)) * R
  sizes = np.diff(np.round(np.cumsum(share)), prepend=0).astype(np.int32)
  held = 2 if case.op == 'grouped_swiglu' else 1
  w = draw(G, s['D'], held * s['F']) / s['D'] ** 0.5
  indices = [sizes]
  if case.op == 'gathered_matmul':  # in order in each group
    indices.append(np.concatenate([
        np.sort(rng.integers(0, s['N'], n, np.int32)) for n in sizes]))
  return (draw(s.get('N', R), s['D']), w.astype(jnp.bfloat16)), tuple(
      map(jnp.asarray, indices))


def ours(case: gpu_cases.Case, backend: str = 'auto') -> Forward:
  """The operation as the library computes it here."""
  if case.op == 'attention':
    T = case.shape['T']
    mask = jnp.tril(jnp.ones((1, T, T), bool))
    return lambda q, k, v: attention.attend(q, k, v, mask, backend)
  if case.op in ('grouped_matmul', 'grouped_swiglu'):
    return functools.partial(getattr(pallas, case.op), backend=backend)
  if case.op == 'gathered_matmul':
    return lambda x, w, sizes, row_index: pallas.grouped_matmul(
        x, w, sizes, row_index=row_index, backend=backend)
  if case.op == 'conv':
    return lambda u, w, layout, segment: jax.nn.silu(
        history.Past(layout, segment).convolve(u, w, 'window_BGWF'))
  chunk = 1 if case.op == 'decode' else gpu_cases.CHUNK
  groups = case.shape.get('B', case.shape.get('N'))

  def run(q, k, v, log_decay, *more):
    beta, *state, group_N = (None, *more) if case.op == 'gla' else more
    return pallas.chunk_memory(
        q, k, v, log_decay, beta, group_N=group_N, chunk=chunk,
        initial_state_GHKV=state[0] if state else None, num_groups=groups,
        backend=backend)

  return run


def _first(out):
  return out[0] if isinstance(out, tuple) else out


def of_pass(forward: Forward, pass_: str) -> Callable:
  """Return a pass as a function of (operands, indices, cotangent)."""

  def run(args, indices, weight):
    call = lambda *args: forward(*args, *indices)
    if pass_ == gpu_cases.FORWARD:
      return call(*args)
    out, pull = jax.vjp(lambda *args: _first(call(*args)), *args)
    grads = pull(weight.astype(out.dtype))
    if pass_ == gpu_cases.BOTH:
      return out, grads
    return grads[0 if pass_ == gpu_cases.DX else 1]

  return jax.jit(run)


def inputs(case: gpu_cases.Case, seed: int) -> tuple[tuple, tuple, jax.Array]:
  """(operands, indices, cotangent of the result)."""
  args, indices = operands(case, seed)
  shape = _first(jax.eval_shape(ours(case, 'xla'), *args, *indices))
  weight = np.random.default_rng(seed + SETS).standard_normal(
      shape.shape, np.float32)
  return args, indices, jnp.asarray(weight, shape.dtype)


def error(got: Any, want: Any) -> float:
  def one(x, y):
    x, y = (a.astype(jnp.float32) for a in (x, y))
    worst = float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(y).max(), 1e-30))
    return worst if np.isfinite(worst) else float('inf')

  return max(jax.tree.leaves(jax.tree.map(one, got, want)))


def truth(case, pass_, args, indices, weight):
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), args)
  with jax.default_matmul_precision('highest'):
    return of_pass(ours(case, 'xla'), pass_)(wide, indices, weight)


def time_case(
    results: Results, who: str, case: gpu_cases.Case, name: str,
    forward: Forward, check: bool = True,
) -> None:
  """A row for each pass; an exception becomes the reason of its absence."""
  for pass_ in case.passes:
    row = dict(case=name, **{'pass': pass_}, who=who)
    try:
      sets = [inputs(case, seed) for seed in range(SETS)]
      run = of_pass(forward, pass_)
      ms, by = clock(run, sets)
      row |= dict(ms=ms, clock=by)
      if check:
        want = truth(case, pass_, *sets[0])
        row |= dict(error=error(run(*sets[0]), want))
    except Exception as e:  # one case may not fit where others do
      row |= dict(absent=f'{type(e).__name__}: {str(e)[:200]}')
    results.add(**row)


def environment(results: Results, toy: bool) -> None:
  """Versions, and what the machine can do at most."""
  found = timing.machine('bfloat16') | {
      'backend': jax.default_backend(),
      'kernels': triton_call.missing() or 'jax-triton'}
  results.add(environment=found)
  if jax.default_backend() == 'gpu':
    from jax.experimental import topologies
    topology = topologies.get_topology_for_devices(jax.devices())
    config = getattr(topology, 'target_config', None)
    pathlib.Path(results.path.parent, 'target_config.txt').write_text(
        str(config))
  n, numbers = (256, 2**16) if toy else (8192, 2**30)
  square = [jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16)
            for i in range(2)]
  ms, by = clock(jax.jit(jnp.matmul), [tuple(square)])
  results.add(ceiling='matmul', flops=2e3 * n**3 / ms, clock=by)
  long = jnp.ones(numbers, jnp.float32)
  ms, by = clock(jax.jit(lambda x: x + 1), [(long,)])
  results.add(ceiling='copy', bandwidth=2e3 * long.nbytes / ms, clock=by)


def smoke(results: Results) -> None:
  """A small case of each operation; raises if one is wrong."""
  seen = set()
  for case in gpu_cases.CASES:
    if case.op in seen:
      continue
    seen.add(case.op)
    small, pass_ = case.toy(), case.passes[-1]
    given = inputs(small, 0)
    got = of_pass(ours(small), pass_)(*given)
    worst = error(got, truth(small, pass_, *given))
    results.add(smoke=small.name, error=worst)
    if not worst < 5e-2:
      raise SystemExit(f'{small.name} is wrong by {worst}.')


def rivals(results: Results, toy: bool) -> None:
  for case in gpu_cases.CASES:
    shape = case.toy() if toy else case
    if case.op == 'grouped_matmul':
      for which in ('mosaic', 'triton'):
        time_case(results, f'tokamax {which}', shape, case.name,
                  _tokamax(which))
      time_case(results, 'batched einsum, equal groups', shape, case.name,
                _einsum, check=False)
      if case.name == gpu_cases.SMALL:
        time_case(results, 'jax.lax.ragged_dot', shape, case.name,
                  jax.lax.ragged_dot)
    elif case.op == 'gathered_matmul':
      time_case(results, 'gathered before', shape, case.name,
                lambda x, w, sizes, row_index: pallas.grouped_matmul(
                    x[row_index], w, sizes))
    elif case.op == 'attention':
      cudnn = functools.partial(
          jax.nn.dot_product_attention, is_causal=True, implementation='cudnn')
      time_case(results, 'cuDNN, causal', shape, case.name, cudnn)


def _tokamax(which):
  def run(x, w, sizes):
    if 'xprof' not in sys.modules and not importlib.util.find_spec('xprof'):
      # It asks for this profiler at import and needs none.
      for name in ('xprof', 'xprof.cli', 'xprof.cli.tools'):
        sys.modules.setdefault(name, types.ModuleType(name))
    import tokamax
    return tokamax.ragged_dot(x, w, sizes, implementation=which)

  return run


def _einsum(x, w, sizes):
  """Multiply groups of equal size, for their cost; the result differs."""
  del sizes
  G = len(w)
  x_GRD = x[:len(x) // G * G].reshape(G, -1, x.shape[1])
  return jnp.einsum('grd,gdf->grf', x_GRD, w)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--out', required=True)
  parser.add_argument('--stage', required=True, choices=(
      'environment', 'smoke', 'ours', 'rivals'))
  parser.add_argument('--toy', action='store_true')
  args = parser.parse_args()
  results = Results(args.out)
  if not args.toy and jax.default_backend() != 'gpu':
    raise SystemExit('there is no NVIDIA GPU; --toy tries the script without.')
  if args.stage == 'environment':
    environment(results, args.toy)
  elif args.stage == 'smoke':
    smoke(results)
  elif args.stage == 'ours':
    for case in gpu_cases.CASES:
      shape = case.toy() if args.toy else case
      time_case(results, 'mom_jax', shape, case.name, ours(shape),
                check=case.op != 'attention')
  else:
    rivals(results, args.toy)


if __name__ == '__main__':
  main()
