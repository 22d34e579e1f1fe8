"""Log-likelihoods of texts and greedy continuations, in batches.

Requests are sorted by length and padded to a few widths, so that few programs
are compiled; a result does not depend on the rest of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mom_jax import config, models
from mom_jax.inference import decode, sampling
from mom_jax.tasks.run import Run
from mom_jax.training import losses

MIN_WIDTH = 32  # rows are padded to this width or more
GREEDY = sampling.SamplingParams(0.0, top_k=0, top_p=1.0, min_p=0.0)
Tokens = Sequence[int]


def width(length: int) -> int:
  """Return the width that a row is padded to, a power of two."""
  return max(MIN_WIDTH, 1 << (length - 1).bit_length())


def buckets(lengths: Sequence[int], rows: int) -> list[list[int]]:
  """Split indices into batches of at most `rows` of one width, longest first.
  """
  found: dict[int, list[int]] = {}
  for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
    found.setdefault(width(lengths[index]), []).append(index)
  return [some[first:first + rows] for some in found.values()
          for first in range(0, len(some), rows)]


def loglikelihoods(
    run: Run, pairs: Sequence[tuple[Tokens, Tokens]], rows: int,
    max_length: int,
) -> list[tuple[float, bool]]:
  """Return log p(continuation | context) of each pair in nats, and if greedy.

  Args:
    pairs: tokens; a context has one or more.
    rows: per batch.
    max_length: maximum number of tokens read before the last target; the first
      tokens of longer pairs are dropped.
  Returns:
    For each pair the sum of log p, and True if every token of the continuation
    is the likeliest one. An empty continuation gives (0, True).
  Raises:
    ValueError: a context is empty, or a continuation longer than max_length.
  """
  inputs = []
  for context, continuation in pairs:
    if not len(context) or len(continuation) > max_length:
      raise ValueError(
          f'a context of {len(context)} tokens and a continuation of'
          f' {len(continuation)}: the first needs one, the second at most'
          f' max_length={max_length}.')
    inputs.append([*context, *continuation][-max_length - 1:])
  result: list[Any] = [None] * len(pairs)
  for some in buckets([len(tokens) for tokens in inputs], rows):
    wide = width(len(inputs[some[0]]))
    tokens_BT = np.zeros((rows, wide), np.int32)
    segment_BT = np.zeros_like(tokens_BT)
    requested_BT = np.zeros_like(tokens_BT)
    for row, index in enumerate(some):
      size = len(inputs[index])
      tokens_BT[row, :size], segment_BT[row, :size] = inputs[index], 1
      requested_BT[row, size - len(pairs[index][1]):size] = 1
    total_B, greedy_B = _sums(
        run.modes['causal'], run.params, tokens_BT,
        run.vocabulary.modality(tokens_BT), segment_BT, requested_BT)
    for row, index in enumerate(some):
      result[index] = float(total_B[row]), bool(greedy_B[row])
  return result


@functools.partial(jax.jit, static_argnums=0)
def _sums(
    cfg: config.Config, params: Any, tokens_BT, modality_BT, segment_BT,
    requested_BT,
):
  """Return (sum of log p, all greedy) over the requested tokens."""
  logits_BTW = models.LM(cfg).apply(
      {'params': params}, tokens_BT, modality_BT, segment_BT).logits[:, :-1]
  log_z_BT, target_logit_BT = losses.log_z_and_target_logit(
      logits_BTW, tokens_BT[:, 1:])
  requested_BT = requested_BT[:, 1:] > 0
  total_B = jnp.where(requested_BT, target_logit_BT - log_z_BT, 0).sum(1)
  best_BT = logits_BTW.argmax(-1) == tokens_BT[:, 1:]
  return total_B, (best_BT | ~requested_BT).all(1)


def windows(
    tokens: Tokens, prefix: int, max_length: int
) -> list[tuple[Tokens, Tokens]]:
  """Split tokens into (context, continuation) pairs, each predicted once.

  Every window predicts max_length tokens, the first after the prefix; the last
  one predicts the rest but still reads a full window.
  """
  tokens, found = list(tokens), []
  for first in range(0, len(tokens), max_length):
    end = min(first + max_length, len(tokens))
    if first:
      found.append((tokens[end - max_length - 1:first], tokens[first:end]))
    else:
      found.append(([prefix], tokens[:end]))
  return found


def continuations(
    run: Run, prompts: Sequence[Tokens], counts: Sequence[int], rows: int,
    max_length: int,
) -> list[str]:
  """Return greedy continuations as text, up to eos or a number of tokens.

  Args:
    prompts: tokens, one or more each; the first ones are dropped if a prompt
      and its count exceed max_length.
    counts: maximum number of new tokens of each.
  Raises:
    ValueError: a count leaves no tokens for a prompt.
  """
  if counts and max(counts) >= max_length:
    raise ValueError(
        f'max_gen_toks={max(counts)} leaves no tokens for a prompt in'
        f' max_length={max_length}.')
  read = [list(p)[-(max_length - n):] for p, n in zip(prompts, counts)]
  # An answer in text has no images.
  grammar = decode.grammar(run.vocabulary)._replace(codes=0)
  result = [''] * len(prompts)
  for some in buckets([len(p) for p in read], rows):
    filled = [read[i] for i in some]
    filled += [filled[-1]] * (rows - len(some))
    made = decode.generate(
        run.modes['causal'], run.params, filled, grammar, GREEDY,
        jax.random.key(0), max_new_tokens=max(counts[i] for i in some),
        max_len=decode.cache_length(max_length))
    for index, tokens in zip(some, made):
      parts = run.vocabulary.decode(tokens[:counts[index]])
      result[index] = ''.join(p for p in parts if isinstance(p, str))
  return result


def cut(text: str, until: Sequence[str]) -> str:
  """Cut a text before the first of the strings that end an answer."""
  for stop in until:
    if stop:
      text = text.split(stop)[0]
  return text
