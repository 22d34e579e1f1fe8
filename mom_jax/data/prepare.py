"""Tokenisation of sources into a folder of shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import multiprocessing
import pathlib
import signal
from typing import Any, NamedTuple

import numpy as np

from mom_jax import config, digest
from mom_jax.data import encode, shards, sources, tally, tokenizers

SPLITS = ('train', 'validation')
PLAN = 'plan.json'


class Job(NamedTuple):
  """A shard to write: of each source, neighbours that `part_of` chooses.

  Attributes:
    held_out: marks the held-out ones of these documents, by source.
  """

  cfg: config.Config
  folder: pathlib.Path
  shard: int
  num_shards: int
  held_out: tuple[np.ndarray, ...]


class FinishedShard(NamedTuple):
  """What a finished shard was made of, and True if it existed before."""

  tallies: dict[str, tally.Tally]  # by source
  digests: dict[str, shards.Digests]  # by file, without its ending
  existed: bool


def prepare(
    cfg: config.Config, out: str, shard_count: int, workers: int
) -> Iterator[FinishedShard]:
  """Write shards of all config.data.sources to `out`, in any order.

  Finished shards are kept, so an interrupted preparation resumes where it
  stopped. A folder that was started with other settings is refused.

  Yields:
    a `FinishedShard` per shard; the folder is complete after the last.
  Raises:
    UserError: a source or setting that cannot be used, or a full disk.
  """
  try:
    yield from _prepare(cfg, pathlib.Path(out), shard_count, workers)
  except OSError as e:
    reason = e.strerror or ' '.join(str(e).split())
    raise config.UserError(
        f'--out={out} cannot be written ({reason}); free some space or make it'
        ' writable, and run the same command again: finished shards are kept.'
    ) from e


def _prepare(
    cfg: config.Config, folder: pathlib.Path, shard_count: int, workers: int
) -> Iterator[FinishedShard]:
  encode.check(cfg)
  tokenised = [s for s in cfg.data.sources if sources.is_tokens(s)]
  if tokenised:
    raise config.UserError(
        f'config.data.sources has {tokenised[0]!r}, which is already tokenised;'
        ' leave it out.'
    )
  for name, value in (('shards', shard_count), ('workers', workers)):
    if value < 1:
      raise config.UserError(f'--{name}={value} must be above 0.')
  vocabulary = encode.make_vocabulary(cfg.data)
  opened = [sources.open_source(s, cfg.data) for s in cfg.data.sources]
  plan = _plan(cfg, vocabulary, shard_count) | {
      'content': [source.content() for source in opened]}
  _begin(folder, plan)
  vocabulary.save(folder / shards.FOLDER)
  held_out = [encode.source_split(source, cfg.data) for source in opened]
  jobs = [
      Job(cfg, folder, i, shard_count,
          tuple(h[part_of(len(h), i, shard_count)] for h in held_out))
      for i in range(shard_count)
  ]
  totals = {spec: tally.Tally() for spec in cfg.data.sources}
  digests: dict[str, shards.Digests] = {}
  for done in _written(jobs, workers):
    for spec, read in done.tallies.items():
      totals[spec].add(read)
      totals[spec].check(spec, early=True)
    digests |= done.digests
    yield done
  for spec, read in totals.items():
    read.check(spec)
  _finish(folder, cfg, vocabulary, totals, digests)


def _written(
    jobs: Sequence[Job], workers: int) -> Iterator[FinishedShard]:
  if workers == 1:
    yield from map(write_shard, jobs)
  else:
    # spawn: a fork of a process with JAX's threads may hang
    with multiprocessing.get_context('spawn').Pool(
        workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
      yield from pool.imap_unordered(write_shard, jobs)


def _plan(
    cfg: config.Config, vocabulary: tokenizers.Vocabulary, shard_count: int
) -> dict[str, Any]:
  return {
      'sources': list(cfg.data.sources), 'held_out': cfg.data.validation,
      'shards': shard_count, 'vocabulary': vocabulary.fingerprint,
      'format': shards.FORMAT, 'image_folder': cfg.data.image_folder,
  }


def _begin(folder: pathlib.Path, plan: dict[str, Any]) -> None:
  """Write the plan of a new folder, or check that of an existing one."""
  path = folder / PLAN
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
      if any(path.suffix != '.tmp' for path in folder.iterdir()):
        raise config.UserError(
            f'--out={folder} holds other files; give an empty or new folder.'
        )
      _write_json(path, plan)
    existing = json.loads(path.read_text())
  except config.UserError:
    raise
  except (OSError, ValueError) as e:
    raise config.UserError(
        f'--out={folder} cannot be used ({e}); give a new folder.'
    ) from e
  differ = [f'{k}: {existing.get(k)} -> {plan[k]}' for k in plan
            if existing.get(k) != plan[k]]
  if differ:
    raise config.UserError(
        f'--out={folder} was started with other settings or documents'
        f' ({"; ".join(differ)}); use those or give a new folder.'
    )


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(json.dumps(values, indent=2))
  temporary.replace(path)


def shard_path(job: Job, split: str) -> pathlib.Path:
  name = f'{split}-{job.shard:05d}-of-{job.num_shards:05d}{shards.RECORDS}'
  return job.folder / name


def part_of(documents: int, shard: int, num_shards: int) -> slice:
  """Return the documents of a shard; neighbours are read at little cost."""
  return slice(documents * shard // num_shards,
               documents * (shard + 1) // num_shards)


def finished_path(job: Job) -> pathlib.Path:
  """Name the file that is written after a shard of both splits."""
  return job.folder / f'shard-{job.shard:05d}-of-{job.num_shards:05d}.json'


def write_shard(job: Job) -> FinishedShard:
  """Tokenise one shard of both splits, unless it exists."""
  if finished_path(job).exists():
    existing = json.loads(finished_path(job).read_text())
    return FinishedShard(
        {s: tally.Tally(**read) for s, read in existing['read'].items()},
        {name: shards.Digests(*d) for name, d in existing['digests'].items()},
        True)
  vocabulary = tokenizers.load(
      job.folder / shards.FOLDER, job.cfg.data.tokenizer.image)
  tallies: dict[str, tally.Tally] = {}
  tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
  for spec, held_N in zip(job.cfg.data.sources, job.held_out):
    source = sources.open_source(spec, job.cfg.data)
    part = part_of(len(source), job.shard, job.num_shards)
    encoded = encode.encode_documents(
        source, range(part.start, part.stop), vocabulary)
    encoded.tally.check(spec, early=True)
    for one, index in zip(encoded.tokens, encoded.kept):
      tokens[SPLITS[int(held_N[index - part.start])]].append(one)
    tallies[spec] = encoded.tally
  digests = {}
  for split in SPLITS:
    path = shard_path(job, split)
    digests[path.name.removesuffix(shards.RECORDS)] = shards.write(
        path, _shuffled(tokens[split]), _dtype(vocabulary))
  _write_json(finished_path(job), {
      'read': {s: read.to_json() for s, read in tallies.items()},
      'digests': digests})
  return FinishedShard(tallies, digests, False)


def _shuffled(documents: Sequence[np.ndarray]) -> list[np.ndarray]:
  order = np.random.default_rng(0).permutation(len(documents))
  return [documents[i] for i in order]


def _dtype(vocabulary: tokenizers.Vocabulary) -> str:
  return '<u2' if vocabulary.size <= 2**16 else '<u4'


def _finish(
    folder: pathlib.Path, cfg: config.Config,
    vocabulary: tokenizers.Vocabulary, totals: Mapping[str, tally.Tally],
    digests: Mapping[str, shards.Digests],
) -> None:
  index = {'dtype': _dtype(vocabulary), 'size': vocabulary.size,
           'tokenizer': dataclasses.asdict(cfg.data.tokenizer),
           'digests': dict(sorted(digests.items())),
           'read': {spec: read.to_json() for spec, read in totals.items()}}
  files = sorted(folder.glob(f'*{shards.LENGTHS}'))
  plan = json.loads((folder / PLAN).read_text())
  for split in SPLITS:
    lengths = [np.load(f, allow_pickle=False) for f in files
               if f.name.startswith(f'{split}-')]
    index[split] = {'documents': sum(len(x) for x in lengths),
                    'tokens': int(sum(x.sum() for x in lengths))}
  _write_json(folder / shards.INDEX, digest.sealed(plan | index))
