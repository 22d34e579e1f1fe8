"""Unigram entropy: the loss of a model that knows token frequencies only."""

from __future__ import annotations

from collections.abc import Iterable
import math
from typing import NamedTuple

from jaxtyping import Float
import numpy as np

from mom_jax import config
from mom_jax.data import encode, pipeline
from mom_jax.data.batch import Batch
from mom_jax.data.tokenizers import Vocabulary

COUNTED = 8_000_000  # maximum number of tokens counted per source


class Entropy(NamedTuple):
  """Mean cross-entropy of `targets` tokens."""

  nats: float
  bits: float
  targets: int


def counts(
    cfg: config.Config, vocabulary: Vocabulary
) -> Float[np.ndarray, ' W']:
  """Count each token as a target in the mix of training documents.

    c_w = sum_i N weight_i / sum(weight) * n_iw / n_i

  with n_iw the occurrences of token w as a target in source i (the leading eos
  of a document is none), n_i their sum, N the sum of all n_i.
  """
  fraction_N = np.array(cfg.data.weights) / sum(cfg.data.weights)
  found = np.stack([
      _count(splits.train, vocabulary)
      for splits in pipeline.open_all(cfg, vocabulary)
  ])
  frequency_NW = found / found.sum(1, keepdims=True)
  return found.sum() * (fraction_N @ frequency_NW)


def _count(
    documents: encode.Documents, vocabulary: Vocabulary
) -> Float[np.ndarray, ' W']:
  count_W = np.zeros(vocabulary.size)
  seen = 0
  order = np.random.default_rng(0).permutation(len(documents.length_N))
  for index in order.tolist():
    stop = min(int(documents.length_N[index]), 1 + COUNTED - seen)
    counts = documents.counts(index, 1, stop)
    targets = documents.part(index, 1, stop)[counts]
    count_W += np.bincount(targets, minlength=vocabulary.size)
    seen += len(targets)
    if seen >= COUNTED:
      break
  return count_W


def unigram_entropy(
    counts: Float[np.ndarray, ' W'],
    batches: Iterable[Batch],
    modalities: tuple[str, ...] = ('text', 'image'),
) -> dict[str, Entropy]:
  """Compute the cross-entropy of targets under the unigram distribution.

    H_m = - mean over targets y of modality m of  log p(y)
    p(w) = (c_w + 1) / (sum(c) + W)

  The distribution is over the joint vocabulary; it knows neither the modality
  nor any other token.

  Args:
    counts: c_w, from `counts`.
    batches: targets are the tokens of weight above 0.
    modalities: names of the modality ids.
  Returns:
    Entropies by modality of the target, and over 'all' targets; nan where
    there are no targets.
  """
  log_p_W = np.log(counts + 1) - np.log(counts.sum() + len(counts))
  total = np.zeros(len(modalities))
  targets = np.zeros(len(modalities), np.int64)
  for batch in batches:
    for m in range(len(modalities)):
      of_m_BT = (batch.weight > 0) & (batch.modality == m)
      total[m] -= log_p_W[batch.tokens[of_m_BT]].sum()
      targets[m] += of_m_BT.sum()
  named = {name: (total[m], targets[m]) for m, name in enumerate(modalities)}
  named['all'] = total.sum(), targets.sum()
  return {
      name: Entropy(*_mean(nats, int(n)), int(n))
      for name, (nats, n) in named.items()
  }


def _mean(nats: float, targets: int) -> tuple[float, float]:
  mean = float(nats / targets) if targets else float('nan')
  return mean, mean / math.log(2)
