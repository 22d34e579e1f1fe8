"""Synthetic tasks: laws of their samples, and oracles that solve them."""

import re

import numpy as np
import pytest

from mom_jax import config
from mom_jax.data import encode, pipeline, synthetic, tokenizers, unigram
from mom_jax.data.text import Symbols

SYMBOLS = 128
SPECS = ('mqar:pairs=5:length=48', 'mqar', 'needle',
         'needle:needles=3:values=2', 'phonebook', 'selective_copy',
         'state_tracking:group=parity',
         'state_tracking', 'state_tracking:group=s5:length=3')
each = pytest.mark.parametrize('text', SPECS)


def _documents(text, split='validation', symbols=SYMBOLS):
  vocabulary = tokenizers.Vocabulary(Symbols(str(symbols).encode()), None)
  return synthetic.open_documents(text, vocabulary, split)


# What solves each task: the symbols before an answer -> the answer.


def _after_first(prefix, size=1):
  """What came after the last `size` symbols where they stood before."""
  for end in range(size, len(prefix)):
    if (prefix[end - size:end] == prefix[-size:]).all():
      return prefix[end]
  raise AssertionError('nothing to look up')


def _needle(prefix, settings):
  """Answers follow the newest key, which is of the first quarter."""
  at = np.flatnonzero(prefix < SYMBOLS // 4)[-1]
  first = np.flatnonzero(prefix == prefix[at])[0]
  return prefix[first + len(prefix) - at]


def _phonebook(prefix, settings):
  size = settings['letters'] + settings['digits']
  book = prefix[:settings['entries'] * size].reshape(-1, size)
  asked = prefix[settings['entries'] * size:]
  row, = np.flatnonzero(
      (book[:, :settings['letters']] == asked[:settings['letters']]).all(1))
  return book[row, len(asked)]


def _selective_copy(prefix, settings):
  mark = np.flatnonzero(prefix == 1)[0]
  return prefix[:mark][prefix[:mark] > 0][len(prefix) - mark - 1]


def _state_tracking(prefix, settings):
  """The product of permutation matrices."""
  elements = synthetic.permutations(settings['group'])
  product = np.eye(elements.shape[1], dtype=int)
  for symbol in prefix[:-1]:
    product = product @ np.eye(elements.shape[1], dtype=int)[elements[symbol]]
  return int(np.flatnonzero((elements == product.argmax(1)).all(1))[0])


ORACLES = {
    'mqar': lambda prefix, settings: _after_first(prefix), 'needle': _needle,
    'phonebook': _phonebook, 'selective_copy': _selective_copy,
    'state_tracking': _state_tracking,
}


def test_every_task_has_an_oracle_and_a_load_that_it_bears():
  assert set(ORACLES) == set(synthetic.TASKS)
  for name, task in synthetic.TASKS.items():
    key, values = task.load
    spec = synthetic.parse(name)
    assert [spec.at(value).settings[key] for value in values] == list(values)
    assert len({task.length(spec.at(v).settings) for v in values}) > 1 or (
        name == 'selective_copy')


@each
def test_oracles_solve_it(text):
  """From what stands before the answer alone."""
  documents = _documents(text)
  oracle = ORACLES[documents.spec.name]
  for index in range(20):
    symbol_T, answer_T = documents.part(index)[1:], documents.counts(index)[1:]
    assert answer_T.any()
    for place in np.flatnonzero(answer_T):
      want = oracle(symbol_T[:place], documents.spec.settings)
      assert symbol_T[place] == want
      assert symbol_T[place] in documents.answers


@each
def test_samples_are_fixed_and_of_one_length(text):
  one, other = _documents(text), _documents(text)
  assert len(set(one.length_N.tolist())) == 1
  for index in (0, 7, 4095):
    np.testing.assert_array_equal(one.part(index), other.part(index))
    assert len(one.part(index)) == len(one.counts(index)) == one.length_N[index]
    assert one.part(index).max() < SYMBOLS + 4 and not one.counts(index)[0]
  train = _documents(text, 'train')
  assert len(train.length_N) == 1 << 16
  shown = {one.part(i).tobytes() for i in range(9)}
  if 'parity' not in text:
    assert len(shown) == 9
    assert not shown & {train.part(i).tobytes() for i in range(9)}


@pytest.mark.parametrize('text, least', [
    ('mqar:pairs=8', 16), ('needle:needles=3', 12), ('phonebook:entries=8', 6),
    ('selective_copy', 4), ('state_tracking:group=s5', 121)])
def test_fewest_symbols_suffice_and_one_less_does_not(text, least):
  """The generator runs with as many as the task says that it needs."""
  documents = _documents(f'{text}:symbols={least}')
  assert documents.part(0)[1:].max() < least and len(documents.answers)
  with pytest.raises(config.UserError, match=f'must be {least} or more'):
    _documents(f'{text}:symbols={least - 1}')


def test_answers_of_every_kind_come_up():
  """Each digit is an answer as often as another, to six standard errors."""
  documents = _documents('phonebook:symbols=8')
  found = np.concatenate([
      documents.part(i)[documents.counts(i)] for i in range(1000)])
  share = np.bincount(found, minlength=8)[4:] / len(found)
  assert np.abs(share - 0.25).max() < 6 * np.sqrt(0.25 * 0.75 / len(found))


def test_far_queries_are_as_rare_as_the_power_law_says():
  """The distance of the one query is d with p(d) ~ d^-0.99."""
  documents = _documents('mqar:pairs=1:length=34')
  slots = np.array([
      np.flatnonzero(documents.counts(i))[0] // 2 - 2 for i in range(2000)])
  p = np.arange(1.0, 17) ** -0.99
  p /= p.sum()
  share = np.bincount(slots, minlength=16) / len(slots)
  assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / len(slots))).all()


@pytest.mark.parametrize('text, words', [
    ('mqr', "unknown synthetic task 'mqr'; known: mqar, needle"),
    ('mqar:pair=3', "'pair' is no setting of mqar; known: pairs, length"),
    ('mqar:pairs=few', "pairs='few' must be a whole number"),
    ('mqar:samples=999999999', 'samples=999999999 must be at most 67108864'),
    ('mqar:pairs=0', 'pairs=0 must be above 0'),
    ('mqar:pairs=8:length=30', 'length=30 must be even and at least 4 pairs'),
    ('needle:length=9', 'length=9 must be at least 10'),
    ('selective_copy:length=16', 'must be at least 2 items + 1 = 17'),
    ('state_tracking:group=s4', "group='s4' must be one of parity, s3, s5"),
])
def test_mistakes_are_named(text, words):
  with pytest.raises(config.UserError, match=re.escape(words)):
    synthetic.parse(text)


@pytest.fixture(scope='module')
def cfg(tmp_path_factory):
  """Two loads of a task, one a row and three a row."""
  return config.override(config.Config(), [
      'data.sources=synthetic:mqar:pairs=4:samples=64,synthetic:mqar:pairs=14',
      'data.weights=1,1', 'data.tokenizer.text=symbols:32', 'data.seq_len=57',
      'data.batch_size=8', 'model.image_side=0', 'train.eval_batches=2',
      f'data.cache={tmp_path_factory.mktemp("cache")}'])


def test_as_a_source_only_answers_count(cfg):
  """Rows of packed samples, as the generator makes them."""
  vocabulary = encode.build_vocabulary(cfg)
  assert vocabulary.size == 32 + 4 and vocabulary.codes == 0
  iterator = pipeline.train_iterator(cfg, vocabulary)
  batch = next(iterator)
  iterator.close()
  known = {}
  for pairs in (4, 14):
    documents = _documents(f'mqar:pairs={pairs}:samples=64', 'train', 32)
    known |= {documents.part(i).tobytes(): documents.counts(i)
              for i in range(64 if pairs == 4 else 0)}
  seen = 0
  for row in range(8):
    for segment in range(1, batch.segment[row].max() + 1):
      mine = batch.segment[row] == segment
      weight, tokens = batch.weight[row, mine], batch.tokens[row, mine]
      assert weight.sum() == (4 if len(tokens) == 17 else 14)
      if tokens.tobytes() in known:
        np.testing.assert_array_equal(weight, known[tokens.tobytes()])
        seen += 1
  assert seen > 0 and 57 in (batch.segment > 0).sum(1)


def test_validation_is_of_other_samples_and_the_floor_of_answers(cfg):
  """No order of frequencies helps: the floor is log of the values there are."""
  vocabulary = encode.build_vocabulary(cfg)
  batches = pipeline.validation_batches(cfg, vocabulary)
  assert len(batches) == 2
  targets = sum(b.weight.sum() for b in batches)
  assert 0 < targets < 0.5 * sum((b.segment > 0).sum() for b in batches)
  small = config.override(cfg, [
      'data.sources=synthetic:mqar:samples=999', 'data.weights=1'])
  counts = unigram.counts(small, vocabulary)
  assert counts[:16].sum() == 0 and counts.sum() == pytest.approx(999 * 8)
  floor = unigram.unigram_entropy(counts, batches)['text'].nats
  assert floor == pytest.approx(np.log(16), abs=0.01)
  none = config.override(cfg, ['data.validation=0'])
  assert pipeline.validation_batches(none, vocabulary) == []


def test_symbols_are_written_as_numbers(tmp_path):
  vocabulary = tokenizers.Vocabulary(Symbols(b'40'), None)
  assert vocabulary.encode(['3 39 0']).tolist() == [41, 3, 39, 0, 41]
  assert vocabulary.decode([41, 3, 39, 0, 41]) == ['3 39 0']
  vocabulary.save(tmp_path)
  loaded = tokenizers.load(tmp_path)
  assert loaded.fingerprint == vocabulary.fingerprint
  assert loaded.text.size == 40
  with pytest.raises(config.UserError, match="'40' is no symbol"):
    vocabulary.encode(['40'])
