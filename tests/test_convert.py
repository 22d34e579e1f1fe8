"""The command that reads and writes published checkpoints."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import published
from published import WORDS
import pytest

from mom_jax import config, convert, generate
from mom_jax.data import text, tokenizers
from mom_jax.hf import settings as hf_settings
from mom_jax.training import checkpoint


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with a tiny checkpoint and its tokenizer."""
  import tokenizers as library
  folder = tmp_path_factory.mktemp('published')
  cfg = hf_settings.config_from_hf(published.config_of('gated_deltanet'))
  convert.save_hf(folder, cfg, published.random(cfg))
  written = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(
      written | dict(bos_token_id=1, eos_token_id=2, pad_token_id=None)))
  words = ['<unk>', '<s>', '</s>', *(f'w{i}' for i in range(WORDS - 3))]
  tokenizer = library.Tokenizer(library.models.WordLevel(
      {w: i for i, w in enumerate(words)}, unk_token='<unk>'))
  tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
  tokenizer.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text('{"a": 1}')
  return folder


def _command(module, *flags):
  return subprocess.run(
      [sys.executable, '-m', f'mom_jax.{module}', *flags], timeout=300,
      capture_output=True, text=True, check=False)


def test_from_hf_and_back(folder, tmp_path):
  """The command makes a run that generates, trains on and is written back."""
  run, back = tmp_path / 'run', tmp_path / 'back'
  done = _command('convert', f'--from_hf={folder}', f'--workdir={run}')
  assert done.returncode == 0, done.stderr
  cfg, params, step = checkpoint.load_params(run)
  assert step == 0
  _, want = convert.load_hf(folder)
  jax.tree.map(np.testing.assert_array_equal, params, want)
  vocabulary = tokenizers.load(run)
  assert vocabulary.encode(['w0 w5']).tolist() == [1, 3, 8, 2]
  assert vocabulary.decode([1, 3, 8, 2]) == ['w0 w5']
  assert vocabulary.size == WORDS == cfg.model.vocab_size
  drawn = _command('generate', f'--workdir={run}', '--prompt=w1 w2',
                   '--max_new_tokens=5')
  assert drawn.returncode == 0, drawn.stderr
  assert 'w1 w2' in drawn.stdout
  done = _command('convert', f'--to_hf={back}', f'--workdir={run}')
  assert done.returncode == 0, done.stderr
  for name in ('model.safetensors', 'tokenizer.json', 'tokenizer_config.json'):
    assert (back / name).read_bytes() == (folder / name).read_bytes()


def test_training_goes_on_from_a_published_checkpoint(folder, tmp_path):
  """Its parameters and vocabulary; in its own workdir it has nothing to do."""
  run, text = tmp_path / 'run', tmp_path / 'text.jsonl'
  convert.from_hf(folder, run, [])
  text.write_text('\n'.join(
      json.dumps({'text': ' '.join(f'w{(i * j) % 30}' for j in range(40))})
      for i in range(60)))
  small = (f'--config={run}/config.json', f'--config.data.sources=jsonl:{text}',
           '--config.data.seq_len=32', '--config.data.batch_size=2',
           '--config.train.steps=0', '--config.train.eval_batches=1',
           f'--config.data.cache={tmp_path}/cache')
  done = _command('train', *small, f'--config.train.init_from={run}',
                  f'--workdir={tmp_path}/tuned')
  assert done.returncode == 0, done.stderr
  _, params, _ = checkpoint.load_params(tmp_path / 'tuned')
  _, want = convert.load_hf(folder)
  jax.tree.map(np.testing.assert_array_equal, params, want)
  assert tokenizers.load(tmp_path / 'tuned').fingerprint == tokenizers.load(
      run).fingerprint
  convert.to_hf(tmp_path / 'back', tmp_path / 'tuned')
  for name in ('tokenizer.json', 'tokenizer_config.json', 'model.safetensors'):
    assert (tmp_path / 'back' / name).read_bytes() == (
        folder / name).read_bytes()
  for changed in ((), small[1:]):
    wrong = _command(
        'train', f'--config={run}/config.json', f'--workdir={run}', *changed)
    assert wrong.returncode == 2
    assert f'--config.train.init_from={run}' in wrong.stderr


@pytest.mark.parametrize(
    ('said', 'generation', 'ids'),
    [
        (dict(bos_token_id=7, eos_token_id=5, pad_token_id=9), None,
         dict(bos=7, eos=5, pad=9)),
        (dict(bos_token_id=7, eos_token_id=[5, 6]), None,
         dict(bos=7, eos=5, pad=5, stop=[5, 6])),
        ({}, dict(bos_token_id=7, eos_token_id=[5, 6]),
         dict(bos=7, eos=5, pad=5, stop=[5, 6])),
        (dict(eos_token_id=5), dict(eos_token_id=[8, 5], temperature=0.5),
         dict(bos=5, eos=5, pad=5, stop=[5, 8])),
        (dict(bos_token_id=None, eos_token_id=None), dict(eos_token_id=4),
         dict(bos=4, eos=4, pad=4)),
    ],
)
def test_special_ids_survive_a_round_trip(
    said, generation, ids, folder, tmp_path):
  first, back, again = (tmp_path / x for x in ('first', 'back', 'again'))
  _published(folder, first, said, generation)
  convert.from_hf(first, tmp_path / 'run', [])
  vocabulary = tokenizers.load(tmp_path / 'run')
  assert vocabulary.special_ids == ids
  assert generate.stop_tokens((), vocabulary) == tuple(
      ids.get('stop', [ids['eos']]))
  convert.to_hf(back, tmp_path / 'run')
  written = json.loads((back / 'config.json').read_text())
  for key in ('bos', 'eos', 'pad'):
    if said.get(f'{key}_token_id') is not None and not generation:
      assert written[f'{key}_token_id'] == said[f'{key}_token_id']
  if generation:
    assert json.loads(
        (back / 'generation_config.json').read_text()) == generation
  assert (back / 'tokenizer.json').read_bytes() == (
      folder / 'tokenizer.json').read_bytes()
  convert.from_hf(back, again, [])
  assert tokenizers.load(again).fingerprint == vocabulary.fingerprint
  # Without the files of this program too.
  (back / 'vocabulary.json').unlink()
  convert.from_hf(back, tmp_path / 'third', [])
  assert tokenizers.load(
      tmp_path / 'third').fingerprint == vocabulary.fingerprint


def _published(folder, target, said, generation):
  """Copy the folder, with other ids in its files."""
  shutil.copytree(folder, target)
  hf = json.loads((target / 'config.json').read_text())
  hf = {k: v for k, v in hf.items() if not k.endswith('_token_id')}
  (target / 'config.json').write_text(json.dumps(hf | said))
  (target / 'tokenizer_config.json').unlink()
  if generation:
    (target / 'generation_config.json').write_text(json.dumps(generation))


def test_special_ids_are_found_by_name_or_asked_for(folder, tmp_path):
  _published(folder, tmp_path / 'a', {}, None)
  with pytest.raises(config.UserError, match='add "eos_token_id" to its conf'):
    convert.from_hf(tmp_path / 'a', tmp_path / 'run', [])
  (tmp_path / 'a/special_tokens_map.json').write_text(
      json.dumps({'eos_token': {'content': 'w5'}, 'bos_token': 'w7'}))
  convert.from_hf(tmp_path / 'a', tmp_path / 'run', [])
  vocabulary = tokenizers.load(tmp_path / 'run')
  assert vocabulary.special_ids == dict(bos=10, eos=8, pad=8)
  for value in (WORDS, 'x', 1.5, [3, None, True]):
    _published(folder, tmp_path / f'b{value}', dict(eos_token_id=value), None)
    with pytest.raises(config.UserError, match=r'eos_token_id='):
      convert.from_hf(tmp_path / f'b{value}', tmp_path / 'run2', [])


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
def test_a_run_with_its_own_tokenizer_survives_a_round_trip(kind, tmp_path):
  """Published, others read its tokens; read back, it is the same run."""
  import tokenizers as library
  cfg = hf_settings.config_from_hf(
      published.config_of('gated_deltanet', vocab_size=304))
  texts = ['the cat sat on the mat, the other cat did not',
           'caf\u00e9 \U0001f600']
  tokenizer = text.Bytes()
  if kind == 'bpe':
    tokenizer = text.HuggingFace(text.fit(texts, 300))
  vocabulary = tokenizers.Vocabulary(tokenizer, None)
  run, back, again = (tmp_path / x for x in ('run', 'back', 'again'))
  checkpoint.save_params(run, cfg, published.random(cfg))
  vocabulary.save(run)
  back.mkdir()
  (back / 'tokenizer_config.json').write_text('{"of": "an earlier model"}')
  (back / 'generation_config.json').write_text('{"eos_token_id": 1}')
  convert.to_hf(back, run)
  theirs = library.Tokenizer.from_file(str(back / 'tokenizer.json'))
  for one in texts:
    assert theirs.encode(one).ids == vocabulary.encode_text(one).tolist()
    assert theirs.decode(theirs.encode(one).ids) == one
  assert theirs.token_to_id('<eos>') == vocabulary.eos
  for name in ('config.json', 'generation_config.json'):
    said = json.loads((back / name).read_text())
    assert said['eos_token_id'] == said['bos_token_id'] == vocabulary.eos
    assert said['pad_token_id'] == vocabulary.pad
  named = json.loads((back / 'tokenizer_config.json').read_text())
  assert named['eos_token'] == '<eos>'
  convert.from_hf(back, again, [])
  assert tokenizers.load(again).fingerprint == vocabulary.fingerprint
  settings = checkpoint.read_config(again).data.tokenizer
  assert text.load(settings.text).size == tokenizer.size
  with pytest.raises(config.UserError, match='is the folder of a run'):
    convert.to_hf(run, run)


def test_the_command_asks_for_what_it_needs(tmp_path):
  for flags, message in (
      ((), '--workdir=DIR and one of'),
      (('--from_hf=a', '--to_hf=b', '--workdir=c'), 'one of --from_hf=DIR'),
      ((f'--from_hf={tmp_path}', '--workdir=c'), 'is no safetensors checkp'),
  ):
    done = _command('convert', *flags)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
  assert not pathlib.Path('c').exists()
