"""Laws of packing, mixing, splitting and resuming."""

from collections import Counter
import tracemalloc

import grain
import numpy as np
import pytest

from mom_jax import config
from mom_jax.data import Batch, encode, mix, pipeline, prepare, shards


def _segments(batches):
  """The tokens of every segment of every row, in order."""
  for batch in batches:
    for tokens, segment in zip(batch.tokens, batch.segment):
      for number in range(1, segment.max() + 1):
        yield tokens[segment == number]


def _take(iterator, count):
  return [next(iterator) for _ in range(count)]


def _equal(one, other):
  assert len(one) == len(other)
  for a, b in zip(one, other):
    for x, y in zip(a, b):
      np.testing.assert_array_equal(x, y)


def _documents(cfg, vocabulary):
  train, *_ = encode.open_documents(cfg.data.sources[0], cfg, vocabulary)
  return [train.part(i) for i in range(len(train.length_N))]


def _cut(documents, seq_len):
  return Counter(
      d[s:s + seq_len].tobytes() for d in documents
      for s in range(0, len(d), seq_len)
  )


def test_batches_obey_the_layout(cfg, vocabulary):
  """Segments are 1, 2, ... without gaps, padding is last, weights follow."""
  iterator = pipeline.train_iterator(cfg, vocabulary)
  for batch in _take(iterator, 20):
    assert isinstance(batch, Batch)
    assert all(x.shape == (8, 256) for x in batch)
    assert [x.dtype.name for x in batch] == ['int32'] * 3 + ['float32']
    step_BT = np.diff(batch.segment, axis=1)
    inside_BT = batch.segment[:, 1:] > 0
    assert (batch.segment[:, 0] == 1).all()
    assert np.isin(step_BT[inside_BT], (0, 1)).all()
    padding_BT = batch.segment == 0
    assert (np.diff(padding_BT.astype(int), axis=1) >= 0).all()
    assert (batch.tokens[padding_BT] == vocabulary.pad).all()
    assert (batch.tokens[~padding_BT] != vocabulary.pad).all()
    np.testing.assert_array_equal(
        batch.weight[:, 1:], (step_BT == 0) & inside_BT)
    assert (batch.weight[:, 0] == 0).all()
    np.testing.assert_array_equal(
        batch.modality, batch.tokens >= vocabulary.image_start)
    assert padding_BT.mean() < 0.25
  iterator.close()


def test_every_token_of_every_document_comes_once_an_epoch(
    text_file, of_file):
  """Also those of documents of many rows; order aside, nothing else comes."""
  cfg = of_file(f'jsonl:{text_file}')
  vocabulary = encode.build_vocabulary(cfg)
  documents = _documents(cfg, vocabulary)
  assert max(map(len, documents)) > 4 * cfg.data.seq_len
  wanted = _cut(documents, cfg.data.seq_len)
  assert set(wanted.values()) == {1}
  iterator = pipeline.train_iterator(cfg, vocabulary)
  epochs, seen = 20, Counter()
  while sum(seen.values()) < epochs * len(wanted):
    seen.update(s.tobytes() for s in _segments(_take(iterator, 1)))
  iterator.close()
  assert set(seen) == set(wanted)
  # The packer draws whole epochs in turn and holds less than one of them.
  assert max(seen.values()) - min(seen.values()) <= 2
  pieces = pipeline.Pieces(
      encode.open_documents(cfg.data.sources[0], cfg, vocabulary).train,
      vocabulary, cfg.data.seq_len, 0.5, seed=0)
  for epoch in range(3):
    once = Counter(
        pieces.shuffle(7).repeat()[epoch * len(pieces) + i]['tokens'].tobytes()
        for i in range(len(pieces)))
    assert once == wanted


def test_order_depends_on_the_seed_alone(cfg, vocabulary):
  def first(seed):
    iterator = pipeline.train_iterator(
        config.override(cfg, [f'train.seed={seed}']), vocabulary)
    batches = _take(iterator, 5)
    iterator.close()
    return batches

  one, other = first(3), first(4)
  _equal(one, first(3))
  assert (one[0].tokens != other[0].tokens).any()


def test_epochs_differ_in_order(text_file, of_file):
  cfg = of_file(f'jsonl:{text_file}')
  vocabulary = encode.build_vocabulary(cfg)
  train, *_ = encode.open_documents(cfg.data.sources[0], cfg, vocabulary)
  pieces = pipeline.Pieces(train, vocabulary, 64, 0.5, seed=0)
  shuffled = pieces.shuffle(0).repeat()
  order = [[shuffled[e * len(pieces) + i]['tokens'].tobytes()
            for i in range(len(pieces))] for e in range(2)]
  assert sorted(order[0]) == sorted(order[1]) and order[0] != order[1]


def test_mix_keeps_each_source_in_order_and_in_its_share():
  """Nothing is skipped or repeated, also of a source that is rarely drawn."""
  weights = np.array([5.0, 1.0, 0.002, 2.0])
  chosen = mix.Mix(weights.tolist(), seed=3)
  count = 40 * mix.WINDOW
  drawn = [chosen[k] for k in range(count)]
  for source, share in enumerate(weights / weights.sum()):
    indices = [i for s, i in drawn if s == source]
    assert indices == list(range(len(indices)))
    assert abs(len(indices) - count * share) < 2
  halves = [sum(s == 0 for s, _ in drawn[i::2]) for i in range(2)]
  assert abs(halves[0] - halves[1]) < 0.05 * sum(halves)
  assert chosen[5] == drawn[5] and chosen[1000] == drawn[1000]


def _check_resume(cfg, vocabulary, counts):
  iterator = pipeline.train_iterator(cfg, vocabulary)
  batches, states = [], [iterator.get_state()]
  for _ in range(max(counts) + 12):
    batches.append(next(iterator))
    states.append(iterator.get_state())
  iterator.close()
  for count in counts:
    fresh = pipeline.train_iterator(cfg, vocabulary)
    fresh.set_state(states[count])
    _equal(_take(fresh, 12), batches[count:count + 12])
    fresh.close()


def test_resume_is_exact(cfg, vocabulary):
  """Also across the rows that the packer holds open (8 batches of 8)."""
  _check_resume(cfg, vocabulary, (0, 1, 7, 8, 13))


def test_resume_is_exact_across_epochs(text_file, of_file):
  cfg = of_file(f'jsonl:{text_file}')
  _check_resume(cfg, encode.build_vocabulary(cfg), (5, 40, 100))


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 2])
def test_resume_is_exact_with_reader_processes(cfg, vocabulary, workers):
  own = config.override(cfg, [f'data.workers={workers}'])
  _check_resume(own, vocabulary, (1, 10))


@pytest.mark.slow
def test_one_reader_process_reads_what_none_reads(cfg, vocabulary):
  batches = []
  for workers in (0, 1):
    iterator = pipeline.train_iterator(
        config.override(cfg, [f'data.workers={workers}']), vocabulary)
    batches.append(_take(iterator, 10))
    iterator.close()
  _equal(*batches)


def test_state_is_small_and_survives_a_grain_checkpoint(
    cfg, vocabulary, tmp_path):
  import orbax.checkpoint as ocp
  iterator = pipeline.train_iterator(cfg, vocabulary)
  _take(iterator, 3)
  assert len(str(iterator.get_state())) < 500
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(3, args=ocp.args.Composite(
        data=grain.checkpoint.CheckpointSave(iterator)))
    manager.wait_until_finished()
    wanted = _take(iterator, 3)
    fresh = pipeline.train_iterator(cfg, vocabulary)
    manager.restore(3, args=ocp.args.Composite(
        data=grain.checkpoint.CheckpointRestore(fresh)))
  _equal(_take(fresh, 3), wanted)


@pytest.mark.parametrize('weights, share', [((3, 1), 0.75), ((1, 4), 0.2)])
def test_sources_are_mixed_by_tokens(cfg, vocabulary, weights, share):
  """Picture documents are shorter; their share of tokens is as asked for."""
  own = config.override(
      cfg, [f'data.weights={weights[0]},{weights[1]}'])
  iterator = pipeline.train_iterator(own, vocabulary)
  pictures = total = 0
  for segment in _segments(_take(iterator, 150)):
    total += len(segment)
    pictures += len(segment) * (vocabulary.boi in segment)
  iterator.close()
  assert abs(pictures / total - share) < 0.02


@pytest.mark.parametrize('share', [0.0, 0.3, 0.5, 1.0])
def test_share_of_pairs_with_the_image_first(cfg, vocabulary, share):
  train, *_ = encode.open_documents('openmoji', cfg, vocabulary)
  pieces = pipeline.Pieces(train, vocabulary, 256, share, seed=1)
  first = np.array([pieces[i]['tokens'][1] == vocabulary.boi
                    for i in range(len(pieces))])
  again = np.array([pieces[len(pieces) + i]['tokens'][1] == vocabulary.boi
                    for i in range(len(pieces))])
  assert abs(first.mean() - share) < 0.03 * (0 < share < 1) + 1e-9
  if 0 < share < 1:  # another epoch tosses other coins
    assert abs((first & again).mean() - share**2) < 0.04


def test_turning_a_pair_keeps_its_parts(vocabulary):
  image = vocabulary.image.decode(np.arange(64, dtype=np.int32)[None])[0]
  v = vocabulary
  text_first, image_first = v.encode(['ab', image]), v.encode([image, 'ab'])
  turn = lambda tokens, first: pipeline.order_pair(tokens, v.boi, v.eoi, first)
  for tokens in (text_first, image_first):
    np.testing.assert_array_equal(turn(tokens, True), image_first)
    np.testing.assert_array_equal(turn(tokens, False), text_first)
  for parts in (['ab'], [image], ['a', image, 'b'], [image, image, 'a']):
    for first in (True, False):
      tokens = v.encode(parts)
      np.testing.assert_array_equal(turn(tokens, first), tokens)


def test_processes_share_out_the_documents(text_file, of_file):
  """Two processes read disjoint pieces that are all pieces together."""
  cfg = of_file(f'jsonl:{text_file}')
  vocabulary = encode.build_vocabulary(cfg)
  wanted = set(_cut(_documents(cfg, vocabulary), 64))
  seen = []
  cfg = config.override(cfg, ['data.readers=2'])
  for index in range(2):
    iterator = pipeline.train_iterator(
        cfg, vocabulary, process_index=index, process_count=2)
    batches = _take(iterator, 96)  # 192 rows, 3 times the packer
    iterator.close()
    assert batches[0].tokens.shape == (2, 64)
    seen.append({s.tobytes() for s in _segments(batches)})
  assert not seen[0] & seen[1]
  assert seen[0] | seen[1] == wanted
  with pytest.raises(config.UserError, match='readers=2'):
    pipeline.train_iterator(cfg, vocabulary, process_count=3)


def test_training_and_validation_share_no_document(text_file, of_file):
  cfg = of_file(f'jsonl:{text_file}', 'data.validation=0.3')
  vocabulary = encode.build_vocabulary(cfg)
  batches = pipeline.validation_batches(cfg, vocabulary)
  held = {s.tobytes() for s in _segments(batches)}
  validation = encode.open_documents(
      cfg.data.sources[0], cfg, vocabulary).validation
  lengths = validation.length_N
  assert Counter(s.tobytes() for s in _segments(batches)) == _cut(
      [validation.part(i) for i in range(len(lengths))], 64)
  iterator = pipeline.train_iterator(cfg, vocabulary)
  trained = {s.tobytes() for s in _segments(_take(iterator, 60))}
  iterator.close()
  assert held and trained and not held & trained


def test_validation_is_fixed_and_holds_both_modalities(cfg, vocabulary):
  one = pipeline.validation_batches(cfg, vocabulary)
  other = pipeline.validation_batches(
      config.override(cfg, ['train.seed=5']), vocabulary)
  _equal(one, other)
  assert 0 < len(one) <= cfg.train.eval_batches
  assert all(b.tokens.shape == (8, 256) for b in one)
  pictures = [vocabulary.boi in s for s in _segments(one)]
  assert 0 < sum(pictures) < len(pictures)
  halves = [pipeline.validation_batches(
      cfg, vocabulary, process_index=i, process_count=2) for i in range(2)]
  _equal(one, [Batch(*map(np.concatenate, zip(a, b)))
               for a, b in zip(*halves)])
  none = config.override(cfg, ['data.validation=0'])
  assert pipeline.validation_batches(none, vocabulary) == []


def test_pairs_are_captions_and_pictures(cfg):
  train, held = pipeline.pairs(cfg, limit=20)
  assert len(train) == len(held) == 20
  for caption, image in train + held:
    assert isinstance(caption, str) and image.shape == (16, 16, 3)
  assert not {c for c, _ in train} & {c for c, _ in held}


def test_all_documents_held_out_is_named(text_file, of_file):
  cfg = of_file(f'jsonl:{text_file}', 'data.validation=0.999999999')
  with pytest.raises(config.UserError, match='too few training documents'):
    pipeline.train_iterator(cfg)


def _long(cfg, path, length):
  """A source of documents of `length` characters, a million in all."""
  text = ''.join(np.random.default_rng(0).choice(list('abcdefgh '), length))
  with open(path, 'w') as file:
    for i in range(2**20 // length):
      file.write(f'{{"text": "{i} {text}", "key": "{i}"}}\n')
  return config.override(cfg, [
      f'data.sources=jsonl:{path}', 'data.weights=1', 'data.validation=0'])


@pytest.mark.parametrize('form', ['jsonl', 'array_record'])
def test_pieces_of_long_documents_cost_no_more(cfg, tmp_path, form):
  """Memory that a piece takes; it was several times that of its document."""
  own = _long(cfg, tmp_path / 'x.jsonl', 2**20)
  if form == 'array_record':
    list(prepare.prepare(own, str(tmp_path / 'shards'), 1, 1))
    own = config.override(
        own, [f'data.sources=array_record:{tmp_path}/shards/*'])
  vocabulary = encode.build_vocabulary(own)
  train = encode.open_documents(own.data.sources[0], own, vocabulary).train
  pieces = pipeline.Pieces(train, vocabulary, 512, 0.5, seed=0)
  whole = train.part(0)
  some = np.random.default_rng(0).integers(len(pieces), size=20)
  pieces[0]
  tracemalloc.start()
  for i in some.tolist():
    piece = pieces[i]['tokens']
    np.testing.assert_array_equal(piece, whole[512 * i:512 * (i + 1)])
  spent = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert spent < 2**18


def test_parts_of_documents_are_slices(cfg, tmp_path, monkeypatch):
  """Also across the records of shards."""
  monkeypatch.setattr(shards, 'RECORD', 100)
  own = _long(cfg, tmp_path / 'x.jsonl', 2**18)
  folder = tmp_path / 'shards'
  list(prepare.prepare(own, str(folder), 1, 1))
  vocabulary = encode.build_vocabulary(own)
  memory = encode.open_documents(own.data.sources[0], own, vocabulary).train
  stored = shards.open_shards(f'array_record:{folder}/*', 'train', vocabulary)
  by_bytes = {memory.part(i, 0, 9).tobytes(): i for i in range(4)}
  for index in range(4):
    document = memory.part(by_bytes[stored.part(index, 0, 9).tobytes()])
    for start, stop in [
        (0, 1), (99, 101), (100, 200), (150, 475), (2**18, None),
        (2**18 - 7, 2**30), (2**21, 2**22), (7, 7)]:
      part = stored.part(index, start, stop)
      assert part.dtype == np.int32
      np.testing.assert_array_equal(part, document[start:stop])
      assert len(stored.counts(index, start, stop)) == len(part)
