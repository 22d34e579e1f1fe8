"""Loss on texts longer than in training."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mom_jax import config, figures, models
from mom_jax.data import pipeline
from mom_jax.tasks.run import Result, Run, say
from mom_jax.training import losses

FACTORS = (1, 2, 4, 8, 16)  # of the training length
ROWS = 4


def length(run: Run) -> Result:
  """Perplexity of the first 1 to 16 training lengths of long sequences.

  A sequence is several held-out documents, read as one, so that a model that
  uses the distant past gains and one that fails at length loses. It is read in
  pieces of a training length, each with the cache of those before. If fewer
  tokens are held out than four sequences of 16 lengths, there are fewer
  sequences first, then shorter ones.

  Returns:
    'rows'; 'lengths', by tokens read: 'loss', nats, and 'perplexity' of all
    targets up to there, and 'last', the loss of the newest half of them (at
    one length, of all); a picture.
  Raises:
    UserError: fewer tokens are held out than two training lengths.
  """
  T = run.cfg.data.seq_len
  tokens_BS = cut_rows(run, T)
  loss_BS = _losses(run, tokens_BS, T)
  found: Result = {}
  for factor in FACTORS:
    if factor * T > tokens_BS.shape[1]:
      break
    mean = float(loss_BS[:, :factor * T - 1].mean())
    newest = 0 if factor == 1 else factor * T // 2
    found[str(factor * T)] = {
        'loss': mean, 'perplexity': math.exp(mean),
        'last': float(loss_BS[:, newest:factor * T - 1].mean()),
    }
    say(f'{factor * T} tokens, {factor} times the training length:'
        f' perplexity {math.exp(mean):.2f}')
  figures.lines(
      run.output / 'length.png',
      {'loss on long rows': {
          name: [(int(n), value[key]) for n, value in found.items()]
          for name, key in (('all tokens', 'loss'), ('newest half', 'last'))}},
      f'tokens read; trained on {T}', 'nats per token')
  return {'rows': len(tokens_BS), 'lengths': found, 'picture': 'length.png'}


def cut_rows(run: Run, T: int) -> np.ndarray:
  """Concatenate held-out documents, [B, a factor of FACTORS times T]."""
  parts, total = [], 0
  for splits in pipeline.open_all(run.cfg, run.vocabulary):
    documents, here = splits.validation, 0
    limit = ROWS * FACTORS[-1] * T // len(run.cfg.data.sources) + 1
    for index in range(len(documents.length_N)):
      if here >= limit:
        break
      tokens_T = documents.part(index, 0, limit)
      if tokens_T[-1] == run.vocabulary.eos == run.vocabulary.bos:
        tokens_T = tokens_T[:-1]  # the next document begins with one
      parts.append(tokens_T)
      here += len(tokens_T)
    total += here
  fits = [(rows, f) for f in reversed(FACTORS[1:])
          for rows in range(ROWS, 0, -1) if rows * f * T <= total]
  if not fits:
    raise config.UserError(
        f'--task=length needs {2 * T} held-out tokens, two sequences of'
        f' config.data.seq_len={T}, and there are {total}; train with more in'
        ' config.data.validation.'
    )
  rows, factor = fits[0]
  return np.concatenate(parts)[:rows * factor * T].reshape(rows, -1)


def _losses(run: Run, tokens_BS: np.ndarray, T: int) -> np.ndarray:
  """Compute the loss of tokens 1, 2, ... of sequences, float64 [B, S - 1]."""
  cfg = run.modes['causal']
  modality_BS = run.vocabulary.modality(tokens_BS)
  cache = models.init_cache(cfg, *tokens_BS.shape)
  target_BS = np.roll(tokens_BS, -1, 1)
  found = []
  for first in range(0, tokens_BS.shape[1], T):
    piece = slice(first, first + T)
    cache, loss_BT = _piece(
        cfg, run.params, cache, *(jnp.asarray(x[:, piece]) for x in (
            tokens_BS, modality_BS, target_BS)))
    found.append(np.asarray(loss_BT, np.float64))
  return np.concatenate(found, 1)[:, :-1]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _piece(
    cfg: config.Config, params: Any, cache: Any, tokens_BT, modality_BT,
    target_BT,
):
  output = models.LM(cfg).apply(
      {'params': params}, tokens_BT, modality_BT, None, cache)
  log_z_BT, target_logit_BT = losses.log_z_and_target_logit(
      output.logits, target_BT)
  return output.cache, log_z_BT - target_logit_BT
