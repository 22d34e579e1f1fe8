"""A run small enough for a test: captions, coloured squares, two layers."""

import json
import pathlib

import numpy as np
from PIL import Image

from mom_jax import config

COLOURS = ('red', 'green', 'blue', 'white', 'grey', 'navy', 'pink', 'gold')


def write_data(folder: pathlib.Path) -> pathlib.Path:
  """24 captioned 4x4 pictures and 24 sentences as documents.jsonl."""
  folder.mkdir(parents=True, exist_ok=True)
  random = np.random.default_rng(0)
  lines = []
  for i in range(24):
    colour = COLOURS[i % len(COLOURS)]
    picture = Image.new('RGB', (4, 4), colour)
    picture.putpixel((i % 4, i // 4 % 4), (0, i, 255))
    picture.save(folder / f'{i}.png')
    lines.append({'text': f'a {colour} square', 'image': f'{i}.png'})
    words = random.choice(COLOURS, 6).tolist()
    lines.append({'text': f'{i}: ' + ' and '.join(words)})
  path = folder / 'documents.jsonl'
  path.write_text(''.join(json.dumps(x) + '\n' for x in lines))
  return path


def make_config(folder: pathlib.Path, *overrides: str) -> config.Config:
  """Its config; data and cache lie in `folder`."""
  path = folder / 'documents.jsonl'
  if not path.is_file():
    write_data(folder)
  return config.override(config.Config(), [
      'model.width=32', 'model.image_side=2', 'model.num_layers=2',
      'model.remat=none', 'model.moma.balance_rate=0.01',
      'model.mixer.num_heads=2',
      'model.mixer.num_memories=3', 'model.mixer.key_dim=8',
      'model.mixer.value_dim=8', 'model.mixer.chunk=16',
      'model.moma.experts=2,2', 'model.moma.hidden=32',
      'model.mlp.hidden=32', 'model.attention.num_heads=2',
      'model.attention.num_kv_heads=2', 'model.attention.head_dim=8',
      'model.vocab_size=276', f'data.sources=jsonl:{path}', 'data.weights=1',
      'data.tokenizer.image_size=4', 'data.tokenizer.codes=16',
      'data.seq_len=32', 'data.batch_size=8', 'data.validation=0.25',
      f'data.cache={folder / "cache"}', 'optimizer.warmup_steps=2',
      'train.steps=6', 'train.log_every=1', 'train.eval_every=4',
      'train.eval_batches=1', 'train.writers=jsonl', 'checkpoint.every=2',
      *overrides,
  ])
