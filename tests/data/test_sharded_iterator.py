"""Readers: the same batches for any number of processes that run them."""

import numpy as np
import pytest
import tiny_run

from mom_jax import config
from mom_jax.data import encode, pipeline, sharded_iterator


@pytest.fixture(scope='module')
def cfg(tmp_path_factory):
  return tiny_run.make_config(
      tmp_path_factory.mktemp('readers'), 'data.readers=4')


@pytest.fixture(scope='module')
def vocabulary(cfg):
  return encode.build_vocabulary(cfg)


def _open(cfg, vocabulary, count):
  return [pipeline.train_iterator(
      cfg, vocabulary, process_index=i, process_count=count)
      for i in range(count)]


def _next(iterators):
  """The global batch: process 0's rows first."""
  return [np.concatenate(x) for x in zip(*(next(i) for i in iterators))]


def _equal(one, other):
  for a, b in zip(one, other, strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_batch_does_not_depend_on_the_processes(cfg, vocabulary, tmp_path):
  """Nor do those after a checkpoint that another number of them wrote."""
  whole = _open(cfg, vocabulary, 1)
  batches = [_next(whole) for _ in range(9)]
  assert batches[0][0].shape == (8, 32)
  handler, folder, done = sharded_iterator.Handler(), tmp_path, 0
  for count in (4, 2, 1):
    iterators = _open(cfg, vocabulary, count)
    if done:
      for iterator in iterators:
        handler.restore(folder, sharded_iterator.Restore(iterator))
    for _ in range(3):
      _equal(_next(iterators), batches[done])
      done += 1
    for iterator in iterators:
      handler.save(folder, sharded_iterator.Save(iterator))
      iterator.close()
  assert len(list(folder.iterdir())) == 4
  whole[0].close()


def test_readers_deal_the_documents(cfg, vocabulary):
  """No two readers read the same piece."""
  rows = [set(map(bytes, next(i).tokens)) for i in _open(cfg, vocabulary, 4)]
  assert sum(map(len, rows)) == len(set.union(*rows))


def test_state_is_by_reader(cfg, vocabulary):
  one, other = (_open(cfg, vocabulary, 1)[0] for _ in range(2))
  next(one)
  other.set_state(one.get_state())
  _equal(next(one), next(other))
  assert set(one.get_state()) == {'0', '1', '2', '3'}


def test_readers_and_processes_must_fit(cfg, vocabulary):
  with pytest.raises(config.UserError, match=(
      'config.data.readers=4 must be a multiple of the 8 processes')):
    pipeline.train_iterator(cfg, vocabulary, process_count=8)
  with pytest.raises(config.UserError, match='readers=3 must divide'):
    config.override(cfg, ['data.readers=3'])


def test_a_missing_position_is_an_error(cfg, vocabulary, tmp_path):
  iterator = _open(cfg, vocabulary, 2)[1]
  with pytest.raises(ValueError, match='process_2-of-4.json does not exist'):
    sharded_iterator.Handler().restore(
        tmp_path, sharded_iterator.Restore(iterator))
