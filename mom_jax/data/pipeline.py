"""Documents to batches, with Grain.

  pieces, shuffled every epoch  ┐
  pieces, shuffled every epoch  ┴ mix by tokens -> pack -> batch -> prefetch

A document longer than a row is cut into pieces of a row each and a rest; what a
piece costs does not depend on the length of its document. The
iterator's `get_state` and `set_state` restore it exactly, also in the middle
of an epoch and with reader processes.
"""

from __future__ import annotations

from collections.abc import Sequence
import pathlib

from absl import flags
import grain
import numpy as np

from mom_jax import config
from mom_jax.data import (
    encode,
    mix,
    sharded_iterator,
    sources,
    tally,
    trained_on,
    workers,
)
from mom_jax.data.batch import Batch
from mom_jax.data.tokenizers import SPECIALS, Vocabulary

# Tokens up to which a document is read as a whole, so that its image may come
# first or last; longer ones stay as they are.
WHOLE = 2**16
BINS = 64  # sequences filled at a time; more of them need less padding
PREFETCH = 2  # batches prepared in advance


class Pieces(grain.MapDataset):
  """Pieces of at most `seq_len` tokens of every document of one source.

  Index i is piece i mod len(self) in epoch i // len(self). A coin that depends
  on seed, document and epoch decides the order of image and text in a pair.

  Args:
    documents: of one source and split.
    vocabulary: of their tokens.
    seq_len: maximum length of a piece.
    image_first: fraction of pairs with the image first.
    seed: of the coins.
    reader, num_readers: this reader takes every num_readers-th piece.
  """

  def __init__(
      self, documents: encode.Documents, vocabulary: Vocabulary, seq_len: int,
      image_first: float, seed: int, reader: int = 0,
      num_readers: int = 1,
  ):
    super().__init__()
    self._documents, self._seq_len = documents, seq_len
    self._boi, self._eoi = vocabulary.boi, vocabulary.eoi
    self._image_first, self._seed = image_first, seed
    count_N = -(-documents.length_N // seq_len)
    document_P = np.repeat(np.arange(len(count_N)), count_N)
    first_P = np.repeat(np.cumsum(count_N) - count_N, count_N)
    start_P = (np.arange(len(document_P)) - first_P) * seq_len
    of_reader = slice(reader, None, num_readers)
    self._document_P = document_P[of_reader]
    self._start_P = start_P[of_reader]
    length_P = np.minimum(
        documents.length_N[self._document_P] - self._start_P, seq_len
    )
    self.length_P = length_P

  def __len__(self) -> int:
    return len(self._document_P)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    epoch, piece = divmod(index, len(self))
    document = int(self._document_P[piece])
    start = int(self._start_P[piece])
    stop = start + self._seq_len
    documents = self._documents
    if documents.length_N[document] > WHOLE:
      tokens = documents.part(document, start, stop)
    else:
      image_first = coin(self._seed, document, epoch) < self._image_first
      tokens = order_pair(
          documents.part(document, 0, WHOLE), self._boi, self._eoi, image_first
      )[start:stop]
    return {'tokens': tokens, 'counts': documents.counts(document, start, stop)}


def coin(seed: int, document: int, epoch: int) -> float:
  """Draw a number in [0, 1) for a document and an epoch (SplitMix64)."""
  mask = 2**64 - 1
  state = 0
  for value in (seed, document, epoch):
    state = (state + value + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ state >> 27) * 0x94D049BB133111EB) & mask
    state ^= state >> 31
  return state / 2.0**64


def order_pair(
    tokens: np.ndarray, boi: int, eoi: int, image_first: bool
) -> np.ndarray:
  """Order the parts of a document of one text and one image.

  Other documents stay as they are.
  """
  begins, = np.nonzero(tokens == boi)
  if len(begins) != 1:
    return tokens
  begin, end = int(begins[0]), len(tokens) - 1
  if tokens[end - 1] == eoi and begin > 1:
    text, image = tokens[1:begin], tokens[begin:end]
  elif begin == 1:
    finish = int(np.argmax(tokens == eoi)) + 1
    text, image = tokens[finish:end], tokens[1:finish]
  else:
    return tokens
  pair = (image, text) if image_first else (text, image)
  return np.concatenate([tokens[:1], *pair, tokens[end:]])


def to_batch(
    rows: dict[str, np.ndarray], vocabulary: Vocabulary
) -> Batch:
  """Make a Batch of packed sequences [B, T].

  Args:
    rows: 'tokens', their 'tokens_segment_ids', and 'counts', which marks
      targets.
  """
  tokens_BT = rows['tokens'].astype(np.int32)
  segment_BT = rows['tokens_segment_ids'].astype(np.int32)
  before_BT = np.pad(segment_BT[:, :-1], ((0, 0), (1, 0)))
  counts_BT = rows['counts'].astype(bool) & (segment_BT > 0) & (
      segment_BT == before_BT)
  return Batch(tokens_BT, vocabulary.modality(tokens_BT), segment_BT,
               counts_BT.astype(np.float32))


def _pack(
    pieces: grain.IterDataset, seq_len: int, vocabulary: Vocabulary, seed: int,
    shuffle: bool,
) -> grain.IterDataset:
  return grain.experimental.FirstFitPackIterDataset(
      pieces, length_struct={'tokens': seq_len, 'counts': seq_len},
      num_packing_bins=BINS, seed=seed, shuffle_bins=shuffle,
      padding_struct={'tokens': vocabulary.pad, 'counts': False},
  )


def _rows_here(data: config.Data, process_count: int) -> int:
  if data.batch_size % process_count:
    raise config.UserError(
        f'config.data.batch_size={data.batch_size} must be a multiple of the'
        f' {process_count} processes of this run.'
    )
  return data.batch_size // process_count


def open_all(
    cfg: config.Config, vocabulary: Vocabulary
) -> list[encode.Splits]:
  """Open the documents of every source of a configuration, in order."""
  return [encode.open_documents(spec, cfg, vocabulary)
          for spec in cfg.data.sources]


def keep_documents(
    workdir: pathlib.Path, cfg: config.Config,
    documents: Sequence[encode.Splits], write: bool,
) -> list[str]:
  """Write what a run is trained on, or refuse others: see `trained_on`."""
  return trained_on.keep(workdir, cfg, documents, write)


def summary(
    cfg: config.Config, vocabulary: Vocabulary,
    documents: Sequence[encode.Splits],
) -> list[str]:
  """Say what was read, what was left out, and how often it will be seen."""
  data, settings = cfg.data, cfg.data.tokenizer
  codes = f', {vocabulary.codes:,} image codes' if vocabulary.codes else ''
  lines = [
      f'vocabulary: {vocabulary.text.size:,} text tokens ({settings.text}),'
      f' {len(SPECIALS)} special tokens{codes};'
      f' {vocabulary.size:,} of model.vocab_size={cfg.model.vocab_size:,} are'
      ' used']
  drawn = cfg.train.steps * data.batch_size * data.seq_len
  for spec, weight, splits in zip(data.sources, data.weights, documents):
    train, held_out = splits.train.length_N, splits.validation.length_N
    tokens = int(train.sum())
    images = splits.tally.used[tally.IMAGE]
    epochs = drawn * weight / sum(data.weights) / max(1, tokens)
    with_images = f' (with {images:,} images)' if images else ''
    lines.append(
        f'{spec}: {len(train) + len(held_out):,} documents{with_images}, of'
        f' which {len(held_out):,} are held out; {tokens:,} tokens to train on,'
        f' of which {cfg.train.steps:,} steps are {epochs:.3g} epochs or less')
    lines += [f'{spec}: left out or not known: {line}'
              for line in splits.tally.lines()]
  return lines


def train_iterator(
    cfg: config.Config,
    vocabulary: Vocabulary | None = None,
    *,
    documents: Sequence[encode.Splits] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
  """Make an endless iterator of `Batch` whose position can be saved.

  Source i gives data.weights[i] / sum(data.weights) of all tokens. The order
  depends on train.seed and data.readers, and on data.workers if above one, but
  not on the number of processes.

  Args:
    cfg: data and train.seed are read.
    vocabulary: by default `encode.build_vocabulary(cfg)`.
    documents: by default `open_all(cfg, vocabulary)`.
    process_index: this process, which runs an equal number of readers.
    process_count: processes, each with batch_size / process_count
      sequences.
  Returns:
    A Grain iterator: `next`, `get_state() -> dict`, `set_state(dict)`, and
    usable in sharded_iterator.Save; `close()` ends its readers.
  Raises:
    UserError: a source or setting that cannot be used.
  """
  data = cfg.data
  if data.readers % process_count:
    raise config.UserError(
        f'config.data.readers={data.readers} must be a multiple of the'
        f' {process_count} processes of this run; set it at the start of a run'
        ' to the maximum number of processes.'
    )
  _rows_here(data, process_count)
  vocabulary = vocabulary or encode.build_vocabulary(cfg)
  documents = documents or open_all(cfg, vocabulary)
  iterators = {
      reader: _reader(cfg, vocabulary, documents, reader)
      for reader in sharded_iterator.readers_of_process(
          data.readers, process_index, process_count)
  }
  if data.readers == 1:
    return iterators[0]
  return sharded_iterator.ShardedIterator(iterators, data.readers)


def _reader(
    cfg: config.Config, vocabulary: Vocabulary,
    documents: Sequence[encode.Splits], reader: int,
) -> grain.DatasetIterator:
  """Make the iterator of one of data.readers readers over its batches."""
  data, seed = cfg.data, cfg.train.seed % 2**31
  parts, weights = [], []
  for source, splits in enumerate(documents):
    pieces = Pieces(splits.train, vocabulary, data.seq_len, data.image_first,
                    seed, reader, data.readers)
    if not len(pieces):
      raise config.UserError(
          f'config.data.sources has {splits.train.name!r}, which has too few'
          f' training documents for data.readers={data.readers}; lower'
          f' data.validation={data.validation} or leave the source out.'
      )
    parts.append(pieces.shuffle(seed + source * 1_000_003).repeat())
    weights.append(data.weights[source] / pieces.length_P.mean())
  mixed = grain.MapDataset.select_from_datasets(parts, mix.Mix(weights, seed))
  threads = 4 if any(
      s.startswith(sources.TOKENIZED + ':') for s in data.sources) else 0
  packed = _pack(
      mixed.to_iter_dataset(grain.ReadOptions(threads, 16 * threads)),
      data.seq_len, vocabulary, seed, shuffle=True,
  )
  rows = data.batch_size // data.readers
  batches = packed.batch(rows, drop_remainder=True).map(
      lambda batch: to_batch(batch, vocabulary)
  )
  return _prefetch(batches, data.workers)


def _prefetch(
    batches: grain.IterDataset, num_workers: int
) -> grain.DatasetIterator:
  if not num_workers:
    return iter(grain.experimental.ThreadPrefetchIterDataset(
        batches, prefetch_buffer_size=PREFETCH
    ))
  if not flags.FLAGS.is_parsed():  # in a notebook; Grain reads its own flags
    flags.FLAGS.mark_as_parsed()
  return workers.Reader(iter(batches.mp_prefetch(
      grain.MultiprocessingOptions(
          num_workers, per_worker_buffer_size=PREFETCH),
      workers.follow_parent,
  )))


def validation_batches(
    cfg: config.Config,
    vocabulary: Vocabulary | None = None,
    *,
    documents: Sequence[encode.Splits] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> list[Batch]:
  """Make batches of held-out documents of every source, always the same.

  Each source gives its fraction, by data.weights, of train.eval_batches
  batches, or all it has. They do not depend on train.seed. The last batch is
  completed with empty sequences. Without held-out documents the list is empty.

  Args: as in `train_iterator`; each process gets its part of the same batches.
  """
  data = cfg.data
  local = _rows_here(data, process_count)
  vocabulary = vocabulary or encode.build_vocabulary(cfg)
  rows_wanted = cfg.train.eval_batches * data.batch_size
  chosen: list[dict[str, np.ndarray]] = []
  documents = documents or open_all(cfg, vocabulary)
  for weight, splits in zip(data.weights, documents):
    pieces = Pieces(splits.validation, vocabulary, data.seq_len,
                    data.image_first, seed=0)
    budget = rows_wanted * data.seq_len * weight / sum(data.weights)
    order_P = np.random.default_rng(0).permutation(len(pieces))
    total_P = np.cumsum(pieces.length_P[order_P])
    chosen += [pieces[int(i)] for i in order_P[total_P <= budget]]
  rows = _pack_all(chosen, data.seq_len, vocabulary)[:rows_wanted]
  empty = {'tokens': np.full(data.seq_len, vocabulary.pad, np.int32),
           'counts': np.zeros(data.seq_len, bool),
           'tokens_segment_ids': np.zeros(data.seq_len, np.int32)}
  rows += [empty] * (-len(rows) % data.batch_size)
  batches = []
  for first in range(process_index * local, len(rows), data.batch_size):
    of_batch = rows[first:first + local]
    batches.append(to_batch(
        {key: np.stack([r[key] for r in of_batch]) for key in empty}, vocabulary
    ))
  return batches


def _pack_all(
    pieces: Sequence[dict[str, np.ndarray]], seq_len: int,
    vocabulary: Vocabulary,
) -> list[dict[str, np.ndarray]]:
  """Pack pieces into sequences, first fit."""
  if not pieces:
    return []
  order = np.random.default_rng(0).permutation(len(pieces))
  dataset = grain.MapDataset.source([pieces[i] for i in order])
  return list(_pack(
      dataset.to_iter_dataset(grain.ReadOptions(0, 0)), seq_len, vocabulary,
      seed=0, shuffle=False,
  ))


def pairs(
    cfg: config.Config, limit: int | None = None
) -> tuple[list[tuple[str, np.ndarray]], list[tuple[str, np.ndarray]]]:
  """Return (caption, image) pairs of the training and of held-out documents.

  A pair is a document of one text and one image. Images are uint8 [size, size,
  3] as the source gives them, before any image tokenizer.

  Args:
    limit: maximum number of pairs of each split.
  """
  train, held = [], []
  for spec in cfg.data.sources:
    if sources.is_tokens(spec):
      continue
    source = sources.open_source(spec, cfg.data)
    held_N = encode.source_split(source, cfg.data)
    for side, chosen_N in ((train, ~held_N), (held, held_N)):
      for index in np.flatnonzero(chosen_N).tolist():
        if limit is not None and len(side) >= limit:
          break
        parts = source[index].parts
        if sorted(isinstance(p, str) for p in parts) == [False, True]:
          image, text = sorted(parts, key=lambda p: isinstance(p, str))
          side.append((text, image))
  return train, held
