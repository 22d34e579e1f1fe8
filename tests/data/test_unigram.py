"""The entropy of token frequencies."""

import numpy as np
import pytest

from mom_jax.data import Batch, encode, pipeline, unigram


def test_entropy_by_modality_of_the_target():
  counts = np.array([3.0, 1.0, 2.0, 0.0])  # plus one each: 4 2 3 1 of 10
  batch = Batch(
      tokens=np.array([[0, 0, 1, 2, 3]]), modality=np.array([[0, 0, 0, 1, 1]]),
      segment=np.array([[1, 1, 1, 1, 0]]),
      weight=np.array([[0, 1, 1, 1, 0]], np.float32))
  found = unigram.unigram_entropy(counts, [batch, batch])
  text = -(np.log(0.4) + np.log(0.2)) / 2
  image = -np.log(0.3)
  assert found['text'] == pytest.approx((text, text / np.log(2), 4))
  assert found['image'] == pytest.approx((image, image / np.log(2), 2))
  whole = (2 * text + image) / 3
  assert found['all'] == pytest.approx((whole, whole / np.log(2), 6))


def test_counts_follow_the_mix(cfg, vocabulary):
  """Counts agree with the targets that the train iterator draws."""
  counts = unigram.counts(cfg, vocabulary)
  iterator = pipeline.train_iterator(cfg, vocabulary)
  drawn = np.zeros(vocabulary.size)
  for _ in range(150):
    batch = next(iterator)
    drawn += np.bincount(
        batch.tokens[batch.weight > 0], minlength=vocabulary.size)
  iterator.close()
  difference = counts / counts.sum() - drawn / drawn.sum()
  assert np.abs(difference).sum() / 2 < 0.03  # total variation


def test_counts_leave_out_the_leading_eos(text_file, of_file):
  cfg = of_file(f'jsonl:{text_file}')
  vocabulary = encode.build_vocabulary(cfg)
  train, *_ = encode.open_documents(cfg.data.sources[0], cfg, vocabulary)
  counts = unigram.counts(cfg, vocabulary)
  assert counts[vocabulary.eos] == pytest.approx(len(train.length_N))
  assert counts.sum() == pytest.approx((train.length_N - 1).sum())


def test_frequencies_beat_the_uniform_distribution(cfg, vocabulary):
  found = unigram.unigram_entropy(
      unigram.counts(cfg, vocabulary),
      pipeline.validation_batches(cfg, vocabulary))
  for entropy in found.values():
    assert 2 < entropy.nats < np.log(vocabulary.size)
    assert entropy.targets > 1000
