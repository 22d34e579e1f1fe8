"""How fast a model reads and writes, and what memory a context takes."""

from __future__ import annotations

import time

import jax
import numpy as np

from mom_jax import config, figures, models
from mom_jax.inference import decode
from mom_jax.tasks import scoring
from mom_jax.tasks.run import Result, Run, say

FACTORS = (1, 2, 4, 8, 16)  # of the training length
ROWS = 4
NEW = 32  # tokens written after a context


def throughput(run: Run) -> Result:
  """Prefill and decoding at contexts of 1 to 16 training lengths.

  Each is timed once after a first time that compiles.

  Returns:
    'device', 'rows' read at once; by context length, tokens a second over all
    rows, 'prefill' and 'decode', and 'cache', bytes that a row's cache takes;
    a picture.
  """
  cfg, found = run.modes['causal'], {}
  for factor in FACTORS:
    context = factor * run.cfg.data.seq_len
    reading, writing = _seconds(run, cfg, context)
    found[str(context)] = {
        'prefill': ROWS * context / reading,
        'decode': ROWS * NEW / writing,
        'cache': cache_bytes(cfg, context + 2 * NEW),
    }
    say('context of {} tokens: reads {prefill:.0f} tokens/s, writes'
        ' {decode:.0f}, {cache} bytes of cache a row'.format(
            context, **found[str(context)]))
  figures.lines(
      run.workdir / 'throughput.png',
      {'tokens a second': {
          key: [(int(n), value[key]) for n, value in found.items()]
          for key in ('prefill', 'decode')},
       'MiB of the cache of a row': {
           'cache': [(int(n), value['cache'] / 2**20)
                     for n, value in found.items()]}},
      f'tokens of the context; trained on {run.cfg.data.seq_len}', '',
      log_y=True)
  return {'device': jax.devices()[0].device_kind, 'rows': ROWS,
          'contexts': found, 'picture': 'throughput.png'}


def _seconds(run: Run, cfg: config.Config, context: int) -> tuple[float, float]:
  """Of reading a context and of writing NEW tokens after it."""
  grammar = decode.grammar(run.vocabulary)
  prompts = np.random.default_rng(0).integers(
      0, run.vocabulary.text.size, (ROWS, context)).tolist()
  decode_cfg = decode.DecodeConfig(cfg, grammar, ())
  max_len = decode.cache_length(context + 2 * NEW)
  for _ in range(2):  # the first time compiles
    start = time.perf_counter()
    jax.block_until_ready(decode.prefill(
        decode_cfg, run.params, prompts, max_len))
    reading = time.perf_counter() - start
    parts = decode.stream(
        cfg, run.params, prompts, grammar, scoring.GREEDY, jax.random.key(0),
        max_new_tokens=2 * NEW, stop=(), max_len=max_len, every=NEW)
    next(parts)  # the context and the first tokens
    start = time.perf_counter()
    next(parts)
    writing = time.perf_counter() - start
  return reading, writing


def cache_bytes(cfg: config.Config, length: int) -> int:
  """Bytes that the cache of one row takes for a context of some length."""
  shapes = jax.eval_shape(lambda: models.init_cache(cfg, 1, length))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
