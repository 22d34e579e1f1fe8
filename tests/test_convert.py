"""The command that reads and writes published checkpoints."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import published
from published import WORDS
import pytest

from mom_jax import convert
from mom_jax.data import tokenizers
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
  wrong = _command('train', f'--config={run}/config.json', f'--workdir={run}')
  assert wrong.returncode == 2
  assert f'--config.train.init_from={run}' in wrong.stderr


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
