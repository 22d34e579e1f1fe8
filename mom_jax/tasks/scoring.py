"""Log-likelihoods of texts and greedy continuations, many at a time.

Requests are sorted by length and padded to a few widths, so that few programs
are compiled; a result does not depend on what it is batched with.
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

SHORTEST = 32  # the least width that rows are padded to
GREEDY = sampling.SamplingParams(0.0, top_k=0, top_p=1.0, min_p=0.0)
Tokens = Sequence[int]


def width(length: int) -> int:
  """The width that a row of some tokens is padded to: a power of two."""
  return max(SHORTEST, 1 << (length - 1).bit_length())


def buckets(lengths: Sequence[int], rows: int) -> list[list[int]]:
  """Indices in batches of at most `rows`, the longest first.

  All of a batch are padded to the same width.
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
  """log p(continuation | context) of each pair, nats, and whether greedy.

  Args:
    pairs: tokens; a context holds one or more.
    rows: of a batch.
    max_length: tokens that are read before the last one that is predicted;
      of more, the first are left out.
  Returns:
    Of each pair the sum of log p, and whether every token of the continuation
    is the likeliest one. An empty continuation has (0, True).
  Raises:
    ValueError: a context is empty, or a continuation above max_length.
  """
  inputs = []
  for context, continuation in pairs:
    if not len(context) or len(continuation) > max_length:
      raise ValueError(
          f'a context of {len(context)} tokens and a continuation of'
          f' {len(continuation)}: the first needs one, the second no more than'
          f' max_length={max_length}.')
    inputs.append([*context, *continuation][-max_length - 1:])
  result: list[Any] = [None] * len(pairs)
  for some in buckets([len(tokens) for tokens in inputs], rows):
    wide = width(len(inputs[some[0]]))
    tokens_BT = np.zeros((rows, wide), np.int32)
    segment_BT, asked_BT = np.zeros_like(tokens_BT), np.zeros_like(tokens_BT)
    for row, index in enumerate(some):
      size = len(inputs[index])
      tokens_BT[row, :size], segment_BT[row, :size] = inputs[index], 1
      asked_BT[row, size - len(pairs[index][1]):size] = 1
    total_B, greedy_B = _sums(
        run.modes['causal'], run.params, tokens_BT,
        run.vocabulary.modality(tokens_BT), segment_BT, asked_BT)
    for row, index in enumerate(some):
      result[index] = float(total_B[row]), bool(greedy_B[row])
  return result


@functools.partial(jax.jit, static_argnums=0)
def _sums(
    cfg: config.Config, params: Any, tokens_BT, modality_BT, segment_BT,
    asked_BT,
):
  """(sum of log p, all greedy) over the tokens that are asked for."""
  logits_BTW = models.LM(cfg).apply(
      {'params': params}, tokens_BT, modality_BT, segment_BT).logits[:, :-1]
  log_z_BT, hit_BT = losses.log_z_and_target_logit(logits_BTW, tokens_BT[:, 1:])
  asked_BT = asked_BT[:, 1:] > 0
  total_B = jnp.where(asked_BT, hit_BT - log_z_BT, 0).sum(1)
  best_BT = logits_BTW.argmax(-1) == tokens_BT[:, 1:]
  return total_B, (best_BT | ~asked_BT).all(1)


def windows(
    tokens: Tokens, prefix: int, max_length: int
) -> list[tuple[Tokens, Tokens]]:
  """(context, continuation) pairs that predict every token once.

  The first window predicts max_length tokens after the prefix, later ones as
  many; the last, which predicts what is left, still reads a whole window.
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
  """Greedy continuations as text, each up to eos or its number of tokens.

  Args:
    prompts: tokens, one or more each; where a prompt and its count exceed
      max_length, the first tokens of the prompt are left out.
    counts: most tokens of each.
  Raises:
    ValueError: a count leaves no room for a prompt.
  """
  if counts and max(counts) >= max_length:
    raise ValueError(
        f'max_gen_toks={max(counts)} leaves no room for a prompt in'
        f' max_length={max_length}.')
  read = [list(p)[-(max_length - n):] for p, n in zip(prompts, counts)]
  # No images: they are no part of a text's answer.
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
  """What stands before the first of the strings that end an answer."""
  for stop in until:
    if stop:
      text = text.split(stop)[0]
  return text
