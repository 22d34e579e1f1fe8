"""Stages of scripts/gpu_kit.sh that time whole models in JAX.

  python scripts/bench_gpu_models.py --out=DIR --stage=training --recipe=NAME
  python scripts/bench_gpu_models.py --out=DIR --stage=layer|decode

Each recipe beside the same model with softmax attention (cuDNN where it runs).
training: a step of TOKENS random tokens, one document a row, at several lengths
of rows, one process a recipe. decode: one more token for ROWS rows whose cache
has memory for a context of some length; attention looks at all of it, full or
not. Memory is what the compiled program needs: arguments, results and what is
between. Model FLOP are those of mom_jax/models/flops.py.

--toy takes the quickstart's recipe, made small, and any device.
"""

from __future__ import annotations

import argparse
import functools
import pathlib

import bench_gpu
import flax.linen as nn
import gpu_cases
import jax
import jax.numpy as jnp
import stepping

from mom_jax import chips, config, models
from mom_jax.inference import decode
from mom_jax.models import block, flops
from mom_jax.parallel import sharding
from mom_jax.tasks import throughput
from mom_jax.training import step

ROWS = 8
CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
TOY = ['model.num_layers=1', 'model.width=64']
TRANSFORMER = 'same with attention'


def recipes(name: str, toy: bool) -> dict[str, config.Config]:
  """Return the recipe, and the recipe with attention for memories, by name."""
  name = 'quickstart' if toy else name
  cfg = config.load(str(CONFIGS / f'{name}.py'), TOY if toy else [])
  return {'mom_jax': cfg, TRANSFORMER: stepping.with_attention(cfg)}


def memory(compiled) -> int | None:
  """Bytes of device memory that a program needs."""
  found = compiled.memory_analysis()
  return found and (
      found.argument_size_in_bytes + found.output_size_in_bytes
      + found.temp_size_in_bytes - found.alias_size_in_bytes)


def _attempt(results, row, measure):
  """Adds the row with what is measured, or why nothing was."""
  try:
    row = row | measure()
  except Exception as e:  # out of memory, mostly
    row = row | dict(absent=f'{type(e).__name__}: {str(e)[:200]}')
  results.add(**row)


def training(results, recipe: str, toy: bool) -> None:
  mesh = sharding.make_mesh()
  lengths = (64, 128) if toy else gpu_cases.LENGTHS
  tokens = 256 if toy else gpu_cases.TOKENS
  for length in lengths:
    for who, cfg in recipes(recipe, toy).items():
      cfg = config.override(cfg, [
          f'data.seq_len={length}', 'train.grad_accum_steps=1',
          f'data.batch_size={max(1, tokens // length)}'])
      row = {'case': f'training {recipe} T={length}', 'pass': 'step',
             'who': who}
      with jax.set_mesh(mesh):
        _attempt(results, row, functools.partial(_step, cfg, mesh))


def _step(cfg, mesh):
  make, abstract = step.init(cfg, mesh)
  batch = stepping.random_batch(cfg, mesh)
  compiled = step.make_step(cfg, abstract).lower(abstract, batch).compile()
  state = stepping.Training(make())
  ms, by = bench_gpu.clock(lambda batch: state.step(compiled, batch), [
      (batch,)])
  tokens = cfg.data.seq_len * cfg.data.batch_size
  return _rates(cfg, ms, by, tokens, 3, compiled)


def _rates(cfg, ms, by, tokens, times, compiled):
  flop = times * flops.forward_flops_per_token(cfg) * tokens
  peak = chips.peak_flops(jax.devices()[0].device_kind, 1)
  return {
      'ms': ms, 'clock': by, 'tokens/s': 1e3 * tokens / ms,
      'bytes': memory(compiled),
      'of peak': peak and 1e3 * flop / ms / peak}


def decoding(results, toy: bool) -> None:
  for recipe in gpu_cases.RECIPES:
    for who, cfg in recipes(recipe, toy).items():
      cfg = decode.causal_mode(cfg)
      params = jax.jit(lambda cfg=cfg: step.unbox(
          models.init_params(cfg, jax.random.key(0))))()
      for context in (64, 256) if toy else gpu_cases.CONTEXTS:
        row = {'case': f'decode {recipe} context={context}', 'pass': 'token',
               'who': who, 'cache bytes a row': throughput.cache_bytes(
                   cfg, context)}
        _attempt(results, row, functools.partial(
            _token, cfg, params, context))


def _token(cfg, params, context):
  tokens_B1 = jnp.ones((ROWS, 1), jnp.int32)

  def run(params, cache):
    out = models.LM(cfg).apply(
        {'params': params}, tokens_B1, jnp.zeros_like(tokens_B1), cache=cache)
    return out.logits, out.cache

  empty = jax.jit(lambda: models.init_cache(cfg, ROWS, context))()
  compiled = jax.jit(run, donate_argnums=1).lower(params, empty).compile()
  held = [empty]

  def token():
    logits, held[0] = compiled(params, held[0])
    return logits

  ms, by = bench_gpu.clock(token, [()])
  return _rates(cfg, ms, by, ROWS, 1, compiled)


def layer(results, toy: bool) -> None:
  """Forward and backward of one MoM layer, a row of tokens."""
  cfg = recipes('mom_380m', toy)['mom_jax'].model
  tokens = 256 if toy else gpu_cases.TOKENS
  shape = gpu_cases.LAYER
  found = dict(
      D=cfg.width, H=cfg.mixer.num_heads, K=cfg.mixer.key_dim,
      M=cfg.mixer.num_memories, A=cfg.mixer.top_k)
  assert toy or found == shape, (found, shape)
  module = block.MIXERS['mom'].make(cfg)
  segment_BT = jnp.ones((1, tokens), jnp.int32)

  def measure():
    x, weight = (jax.random.normal(
        jax.random.key(i), (1, tokens, cfg.width), cfg.dtype)
        for i in range(2))
    params = nn.meta.unbox(jax.jit(module.init)(
        jax.random.key(2), x[:, :64], None, segment_BT[:, :64]))
    loss = lambda params, x: (
        module.apply(params, x, None, segment_BT)[0] * weight).sum()
    ms, by = bench_gpu.clock(jax.jit(jax.grad(loss, (0, 1))), [(params, x)])
    return {'ms': ms, 'clock': by}

  _attempt(results, {'case': gpu_cases.LAYER_NAME, 'pass': gpu_cases.BOTH,
                     'who': 'mom_jax'}, measure)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--out', required=True)
  parser.add_argument(
      '--stage', required=True, choices=('training', 'layer', 'decode'))
  parser.add_argument('--recipe', choices=gpu_cases.RECIPES)
  parser.add_argument('--toy', action='store_true')
  args = parser.parse_args()
  if not args.toy and jax.default_backend() != 'gpu':
    raise SystemExit('there is no NVIDIA GPU; --toy tries the script without.')
  results = bench_gpu.Results(args.out)
  if args.stage == 'training':
    if args.recipe is None:
      parser.error('--stage=training takes a --recipe.')
    training(results, args.recipe, args.toy)
  elif args.stage == 'layer':
    layer(results, args.toy)
  else:
    decoding(results, args.toy)


if __name__ == '__main__':
  main()
