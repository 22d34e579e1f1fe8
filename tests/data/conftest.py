"""The embedded data, drawn and fitted once for all tests of this folder."""

import json

import numpy as np
from PIL import Image
import pytest

from mom_jax import config
from mom_jax.data import encode


@pytest.fixture(scope='session')
def cache_folder(tmp_path_factory):
  return str(tmp_path_factory.mktemp('cache'))


@pytest.fixture(scope='session')
def cfg(cache_folder):
  """The quickstart's data with short rows."""
  return config.override(config.Config(), [
      f'data.cache={cache_folder}', 'data.seq_len=256', 'data.batch_size=8',
  ])


@pytest.fixture(scope='session')
def vocabulary(cfg):
  return encode.build_vocabulary(cfg)


@pytest.fixture
def text_file(tmp_path):
  """40 texts of 1 to 400 bytes, all different."""
  rng = np.random.default_rng(0)
  path = tmp_path / 'texts.jsonl'
  lines = []
  for i in range(40):
    body = ''.join(rng.choice(list('abcdefgh '), rng.integers(1, 400)))
    lines.append(json.dumps({'text': f'{i:03d}{body}', 'key': str(i)}))
  path.write_text('\n'.join(lines) + '\n')
  return path


@pytest.fixture
def pair_file(tmp_path):
  """30 captions with noise pictures, as JSON lines."""
  rng = np.random.default_rng(0)
  path = tmp_path / 'pairs.jsonl'
  lines = []
  for i in range(30):
    pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f'{i}.png')
    lines.append(json.dumps({'text': f'picture {i}', 'image': f'{i}.png'}))
  path.write_text('\n'.join(lines))
  return path


@pytest.fixture
def of_file(cfg):
  """A function: the configuration of one source."""
  def make(spec, *overrides):
    return config.override(cfg, [
        f'data.sources={spec}', 'data.weights=1', 'data.seq_len=64',
        'data.batch_size=4', 'data.tokenizer.codes=64', *overrides,
    ])
  return make
