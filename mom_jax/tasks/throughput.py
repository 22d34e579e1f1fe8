"""Speed of prefill and decoding, and size of the cache."""

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
NEW = 32  # tokens decoded after a context


def throughput(run: Run) -> Result:
  """Time prefill and decoding at contexts of 1 to 16 training lengths.

  Each is timed once, after a first run that compiles.

  Returns:
    'device'; 'rows' per batch; by context length, tokens per second over all
    rows of 'prefill' and 'decode', and 'cache', bytes per row; a picture.
  """
  cfg, found = run.modes['causal'], {}
  for factor in FACTORS:
    context = factor * run.cfg.data.seq_len
    prefill, decoding = _seconds(run, cfg, context)
    found[str(context)] = {
        'prefill': ROWS * context / prefill,
        'decode': ROWS * NEW / decoding,
        'cache': cache_bytes(cfg, context + 2 * NEW),
    }
    say('context of {} tokens: prefill {prefill:.0f} tokens/s, decoding'
        ' {decode:.0f} tokens/s, {cache} bytes of cache per row'.format(
            context, **found[str(context)]))
  figures.lines(
      run.output / 'throughput.png',
      {'tokens per second': {
          key: [(int(n), value[key]) for n, value in found.items()]
          for key in ('prefill', 'decode')},
       'MiB of cache per row': {
           'cache': [(int(n), value['cache'] / 2**20)
                     for n, value in found.items()]}},
      f'tokens of context; trained on {run.cfg.data.seq_len}', '',
      log_y=True)
  return {'device': jax.devices()[0].device_kind, 'rows': ROWS,
          'contexts': found, 'picture': 'throughput.png'}


def _seconds(run: Run, cfg: config.Config, context: int) -> tuple[float, float]:
  """Return the seconds of a prefill and of decoding NEW tokens after it."""
  grammar = decode.grammar(run.vocabulary)
  prompts = np.random.default_rng(0).integers(
      0, run.vocabulary.text.size, (ROWS, context)).tolist()
  decode_cfg = decode.DecodeConfig(cfg, grammar, ())
  max_len = decode.cache_length(context + 2 * NEW)
  for _ in range(2):  # the first time compiles
    start = time.perf_counter()
    jax.block_until_ready(decode.prefill(
        decode_cfg, run.params, prompts, max_len))
    prefill = time.perf_counter() - start
    parts = decode.stream(
        cfg, run.params, prompts, grammar, scoring.GREEDY, jax.random.key(0),
        max_new_tokens=2 * NEW, stop=(), max_len=max_len, every=NEW)
    next(parts)  # the context and the first tokens
    start = time.perf_counter()
    next(parts)
    decoding = time.perf_counter() - start
  return prefill, decoding


def cache_bytes(cfg: config.Config, length: int) -> int:
  """Count the bytes of the cache of one row."""
  shapes = jax.eval_shape(lambda: models.init_cache(cfg, 1, length))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
