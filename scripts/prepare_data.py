r"""Tokenises documents into shards for the source array_record:GLOB.

  python scripts/prepare_data.py --config=RECIPE --out=DIR --shards=64 \
      --workers=8 --config.data.sources=jsonl:pages.jsonl \
      --config.data.weights=1
  python -m mom_jax.train --config=RECIPE \
      --config.data.sources='array_record:DIR/*.array_record' \
      --config.data.weights=1

Documents are JSON lines or Parquet (mom_jax/data/files.py says in which form)
or the embedded openmoji and kjv. Training and held-out documents go to
different shards, by data.validation. Tokenizers are those of data.tokenizer;
training on the shards with other ones is refused. Interrupted, the same command
goes on where it stopped.
"""

from __future__ import annotations

import json
import pathlib

from absl import flags

from mom_jax import cli, config

CONFIG = flags.DEFINE_string('config', '', 'recipe to start from, if any')
OUT = cli.define_path('out', None, 'folder for the shards')
SHARDS = flags.DEFINE_integer('shards', 16, 'shards of each split')
WORKERS = flags.DEFINE_integer('workers', 1, 'processes that tokenise')


def main(overrides: list[str]) -> None:
  if not OUT.value:
    raise config.UserError('--out is missing; give a folder for the shards.')
  cfg = (config.load(CONFIG.value, overrides) if CONFIG.value
         else config.override(config.Config(), overrides))
  from rich import progress

  from mom_jax.data import prepare, shards, tally
  kept = 0
  for done in progress.track(
      prepare.prepare(cfg, OUT.value, SHARDS.value, WORKERS.value),
      'shards', total=SHARDS.value):
    kept += done.existed
  folder = pathlib.Path(OUT.value)
  index = json.loads((folder / shards.INDEX).read_text())
  print(f'tokenizer: {cfg.data.tokenizer.text!r}, {index["size"]} ids with'
        ' special tokens and image codes; train with the same'
        ' config.data.tokenizer')
  for split in prepare.SPLITS:
    print(f'{split}: {index[split]["documents"]} documents,'
          f' {index[split]["tokens"]} tokens')
  if kept:
    print(f'{kept} of {SHARDS.value} shards were there already')
  for spec, read in index['read'].items():
    for line in tally.Tally(**read).lines():
      print(f'{spec}: left out: {line}')


if __name__ == '__main__':
  cli.run(main)
