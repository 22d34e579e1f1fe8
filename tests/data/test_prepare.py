"""Shards: the round trip, the resume, and what makes them unusable."""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mom_jax import config, digest
from mom_jax.data import encode, images, pipeline, prepare, shards, text

ROOT = pathlib.Path(__file__).parents[2]


def _tokens(documents):
  count = len(documents.length_N)
  return sorted(documents.part(i).tobytes() for i in range(count))


def _of_shards(cfg, folder):
  return config.override(cfg, [f'data.sources=array_record:{folder}/*'])


def _splits(cfg, vocabulary):
  return encode.open_documents(cfg.data.sources[0], cfg, vocabulary)


@pytest.fixture
def prepared(pair_file, of_file, tmp_path):
  """(configuration of the shards, of their source, folder)."""
  cfg = of_file(f'jsonl:{pair_file}', 'data.validation=0.3')
  folder = tmp_path / 'shards'
  assert len(list(prepare.prepare(cfg, str(folder), 3, 1))) == 3
  return _of_shards(cfg, folder), cfg, folder


def test_shards_hold_what_the_source_holds(prepared):
  """Same documents, same split, same tokenizers, without the source."""
  cfg, source, _ = prepared
  vocabulary = encode.build_vocabulary(cfg)
  original = encode.build_vocabulary(source)
  assert vocabulary.fingerprint == original.fingerprint
  for one, other in zip(
      _splits(cfg, vocabulary)[:2], _splits(source, original)[:2]):
    assert len(one.length_N) > 3
    assert _tokens(one) == _tokens(other)
    for i, length in enumerate(one.length_N):
      assert len(one.part(i)) == length
  iterator = pipeline.train_iterator(cfg)
  state = iterator.get_state()
  batch = next(iterator)
  assert batch.modality.any() and batch.tokens.shape == (4, 64)
  iterator.set_state(state)
  np.testing.assert_array_equal(next(iterator).tokens, batch.tokens)
  iterator.close()
  assert pipeline.validation_batches(cfg)


@pytest.mark.slow
def test_reader_processes_open_shards(prepared):
  cfg, _, _ = prepared
  iterator = pipeline.train_iterator(
      config.override(cfg, ['data.workers=1']))
  assert next(iterator).tokens.shape == (4, 64)
  iterator.close()


def _command(source, folder, cache):
  return [sys.executable, 'scripts/prepare_data.py', f'--out={folder}',
          '--shards=40', '--workers=2', f'--config.data.sources=jsonl:{source}',
          '--config.data.weights=1', f'--config.data.cache={cache}']


def test_killed_preparation_goes_on_where_it_stopped(tmp_path, of_file):
  source = tmp_path / 'many.jsonl'
  with open(source, 'w', encoding='utf-8') as file:
    for i in range(20_000):
      file.write(json.dumps({'text': f'document {i} ' + 'word ' * 40}) + '\n')
  folder = tmp_path / 'out'
  command = _command(source, folder, tmp_path)
  env = {**os.environ, 'PYTHONPATH': str(ROOT)}
  with subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True,
                        stdout=subprocess.DEVNULL) as process:
    deadline = time.monotonic() + 60
    while len(list(folder.glob('shard-*.json'))) < 2:
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
  finished = len(list(folder.glob('shard-*.json')))
  assert 2 <= finished < 40
  cfg = of_file(f'jsonl:{source}')
  with pytest.raises(config.UserError, match='resumes where it stopped'):
    encode.build_vocabulary(_of_shards(cfg, folder))
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True,
                        text=True, timeout=60, check=True)
  assert f'{finished} of 40 shards were there already' in done.stdout
  vocabulary = encode.build_vocabulary(cfg)
  for one, other in zip(_splits(_of_shards(cfg, folder), vocabulary)[:2],
                        _splits(cfg, vocabulary)[:2]):
    assert _tokens(one) == _tokens(other)


def test_shards_carry_their_tokenizers(prepared, of_file, tmp_path):
  """Other settings are refused; the same content at another place is not."""
  cfg, _, folder = prepared
  vocabulary = encode.build_vocabulary(cfg)
  stored = f'data.tokenizer.image={folder}/vocabulary/codebook.npz'
  again = encode.build_vocabulary(config.override(cfg, [stored]))
  assert again.fingerprint == vocabulary.fingerprint
  for change, says in [
      ('text=bpe:2048', "text='bpe:2048' differs from 'bytes'"),
      ('codes=32', 'set --config.data.tokenizer.codes=64'),
      ('image=os:getcwd', "image='os:getcwd' differs from 'patch_vq'"),
      ('image_size=32', 'set --config.data.tokenizer.image_size=16')]:
    with pytest.raises(config.UserError) as error:
      encode.build_vocabulary(
          config.override(cfg, [f'data.tokenizer.{change}']))
    assert says in str(error.value) and str(folder) in str(error.value)


def test_shards_of_a_tokenizer_file_name_their_copy(
    text_file, of_file, tmp_path):
  path = tmp_path / 'tokenizer.json'
  path.write_bytes(text.fit(['some words', 'some more'] * 9, 270))
  cfg = of_file(f'jsonl:{text_file}', f'data.tokenizer.text={path}')
  list(prepare.prepare(cfg, str(tmp_path / 'out'), 1, 1))
  shards_cfg = _of_shards(cfg, tmp_path / 'out')
  wanted = encode.build_vocabulary(shards_cfg).fingerprint
  path.rename(tmp_path / 'moved.json')
  for name in (path, tmp_path / 'moved.json',
               tmp_path / 'out' / 'vocabulary' / 'text.json'):
    made = encode.build_vocabulary(config.override(
        shards_cfg, [f'data.tokenizer.text={name}', 'data.tokenizer.codes=9']))
    assert made.fingerprint == wanted
  path.write_bytes(text.fit(['other'] * 9, 260))
  for name in (path, 'bytes'):
    with pytest.raises(config.UserError, match='set .*/vocabulary/text.json'):
      encode.build_vocabulary(config.override(
          shards_cfg, [f'data.tokenizer.text={name}']))


def test_code_that_shards_name_is_not_run(prepared):
  """Unless the settings of the user name it too."""
  cfg, _, folder = prepared
  path = folder / 'vocabulary' / 'vocabulary.json'
  path.write_text(path.read_text().replace('codebook.npz', 'os:abort'))
  with pytest.raises(config.UserError, match="image tokenizer 'os:abort'"):
    encode.build_vocabulary(cfg)


def test_tallies_are_kept_over_a_resume(tmp_path, of_file):
  source = tmp_path / 'x.jsonl'
  source.write_text('{"text": "a"}\n{"text": ""}\n{"text": "b"}\n{"text": ""}')
  cfg = of_file(f'jsonl:{source}')
  folder = tmp_path / 'out'
  first = list(prepare.prepare(cfg, str(folder), 2, 1))
  again = list(prepare.prepare(cfg, str(folder), 2, 1))
  assert [d.existed for d in first + again] == [False, False, True, True]
  index = json.loads((folder / shards.INDEX).read_text())
  (read,) = index['read'].values()
  assert read['left_out'] == {
      'empty document': ['document', 2, f'{source} document 1']}
  assert index['train']['documents'] + index['validation']['documents'] == 2


def test_shards_of_next_to_nothing_are_not_written(tmp_path, of_file):
  """Else the next try, with the right folder of images, would keep them."""
  source = tmp_path / 'x.jsonl'
  source.write_text('\n'.join(
      json.dumps({'text': str(i), 'image': f'{i}.png'}) for i in range(200)))
  codebook = tmp_path / 'codebook.npz'
  images.PatchCodebook(np.zeros((64, 12)), 2, 16).save(codebook)
  cfg = of_file(f'jsonl:{source}', f'data.tokenizer.image={codebook}')
  with pytest.raises(config.UserError, match='100 of its 100 images cannot'):
    list(prepare.prepare(cfg, str(tmp_path / 'out'), 2, 1))
  assert not list((tmp_path / 'out').glob('train-*'))
  (tmp_path / 'images').mkdir()
  other = config.override(cfg, [f'data.image_folder={tmp_path}/images'])
  with pytest.raises(config.UserError, match='started with other settings'):
    list(prepare.prepare(other, str(tmp_path / 'out'), 2, 1))


def test_other_settings_and_foreign_folders_are_refused(
    prepared, tmp_path, of_file, text_file):
  _, source, folder = prepared
  with pytest.raises(config.UserError, match='started with other settings'):
    list(prepare.prepare(source, str(folder), 4, 1))
  other = config.override(source, ['data.validation=0.2'])
  with pytest.raises(config.UserError, match='held_out: 0.3 -> 0.2'):
    list(prepare.prepare(other, str(folder), 3, 1))
  with pytest.raises(config.UserError, match='holds other files'):
    list(prepare.prepare(source, str(tmp_path), 3, 1))
  with pytest.raises(config.UserError, match='--shards=0'):
    list(prepare.prepare(source, str(tmp_path / 'new'), 0, 1))
  with pytest.raises(config.UserError, match='already tokenised'):
    list(prepare.prepare(
        _of_shards(source, folder), str(tmp_path / 'new'), 1, 1))


def test_tokens_outside_the_vocabulary_are_named(prepared):
  cfg, _, folder = prepared
  vocabulary = encode.build_vocabulary(cfg)
  path = folder / 'train-00001-of-00003.array_record'
  wrong = np.array([vocabulary.eos, vocabulary.size, vocabulary.eos])
  index = json.loads((folder / 'index.json').read_text())
  index['digests']['train-00001-of-00003'] = shards.write(
      path, [np.array([vocabulary.eos] * 3), wrong], '<u2')
  (folder / 'index.json').write_text(json.dumps(digest.sealed(index)))
  iterator = pipeline.train_iterator(cfg)
  with pytest.raises(config.UserError) as error:
    for _ in range(50):
      next(iterator)
  iterator.close()
  assert f'{path} record 1 has the token {vocabulary.size}' in str(error.value)


@pytest.mark.parametrize('damage, says', [
    (lambda f: (f / 'index.json').unlink(), 'index.json is missing'),
    (lambda f: (f / 'index.json').write_text('{'), 'index.json is damaged'),
    (lambda f: (f / 'index.json').write_text('{"format": 9}'), 'has format 9'),
    (lambda f: _replace(f / 'index.json', '"text"', '"texT"'),
     'index.json is damaged'),
    (lambda f: _replace(f / 'index.json', '<u2', '<u4'),
     'index.json is damaged'),
    (lambda f: (f / 'vocabulary' / 'vocabulary.json').unlink(), 'vocabulary'),
    (lambda f: _cut(f / 'train-00000-of-00003.array_record'),
     'must be a whole ArrayRecord file'),
    (lambda f: _cut(f / 'train-00000-of-00003.lengths.npy'),
     'must hold the lengths'),
    (lambda f: np.save(f / 'train-00000-of-00003.lengths.npy', np.ones(99)),
     'they are not those that were written'),
    (lambda f: [p.unlink() for p in f.glob('train-*.array_record')],
     'matches no train-'),
])
def test_damaged_shards_are_named(prepared, damage, says):
  cfg, _, folder = prepared
  damage(folder)
  with pytest.raises(config.UserError, match=says) as error:
    pipeline.train_iterator(cfg)
  assert str(folder) in str(error.value)


def _replace(path, old, new):
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new, 1))


def _cut(path):
  path.write_bytes(path.read_bytes()[:-50])


def test_a_flipped_byte_never_gives_other_tokens(prepared):
  """In any file of the shards: it is named, or changes nothing."""
  cfg, _, folder = prepared
  vocabulary = encode.build_vocabulary(cfg)

  def read():
    again = encode.build_vocabulary(cfg)
    assert again.fingerprint == vocabulary.fingerprint
    train, validation, _ = _splits(cfg, again)
    return _tokens(train), _tokens(validation)

  wanted = read()
  rng = np.random.default_rng(0)
  files = [p for p in sorted(folder.rglob('*')) if p.is_file()
           and p.name[:5] not in ('plan.', 'shard')]
  refused = 0
  for path in files:
    whole = path.read_bytes()
    for at in rng.integers(0, len(whole), 12).tolist():
      flipped = bytearray(whole)
      flipped[at] ^= 1 << int(rng.integers(8))
      path.write_bytes(flipped)
      try:
        assert read() == wanted, (path, at)
      except config.UserError as e:
        assert '\n' not in str(e)
        refused += 1
    path.write_bytes(whole)
  assert refused > 3 * len(files)


@pytest.mark.parametrize('limit', [100, 1000, 2**18])
def test_a_full_disk_is_named_and_costs_no_finished_shard(
    tmp_path, of_file, limit):
  """A limit on the size of files stands for a full disk."""
  source, folder = tmp_path / 'x.jsonl', tmp_path / 'out'
  rng = np.random.default_rng(0)
  rows = [{'text': rng.bytes(300 if i < 50 else 15_000).hex(), 'key': i}
          for i in range(100)]
  source.write_text('\n'.join(map(json.dumps, rows)))
  cfg = of_file(f'jsonl:{source}')
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
  try:
    with pytest.raises(config.UserError, match='cannot be [wu]') as error:
      list(prepare.prepare(cfg, str(folder), 4, 1))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert str(folder) in str(error.value) and '\n' not in str(error.value)
  finished = len(list(folder.glob('shard-*.json')))
  done = list(prepare.prepare(cfg, str(folder), 4, 1))
  assert sum(d.existed for d in done) == finished == 2 * (limit == 2**18)


def test_a_source_that_changes_during_preparation_is_refused(
    tmp_path, of_file):
  source = tmp_path / 'x.jsonl'
  source.write_text('{"text": "a", "key": 1}\n{"text": "b", "key": 2}')
  cfg = of_file(f'jsonl:{source}')
  next(prepare.prepare(cfg, str(tmp_path / 'out'), 2, 1))
  source.write_text('{"text": "a", "key": 1}\n{"text": "c", "key": 2}')
  with pytest.raises(config.UserError, match='other settings or documents'):
    list(prepare.prepare(cfg, str(tmp_path / 'out'), 2, 1))


def test_shards_of_different_tokenizers_are_not_mixed(
    prepared, of_file, text_file, tmp_path):
  cfg, _, _ = prepared
  other = of_file(f'jsonl:{text_file}')
  list(prepare.prepare(other, str(tmp_path / 'texts'), 1, 1))
  both = config.override(cfg, [
      f'data.sources={cfg.data.sources[0]},array_record:{tmp_path}/texts/*',
      'data.weights=1,1'])
  with pytest.raises(config.UserError, match='different tokenizers'):
    encode.build_vocabulary(both)
