"""Whatever a disk does to a workdir: nothing older is lost, nothing is silent.

A disk that fills or turns read-only, a file that is lost, a byte that flips.
What a run reads then is what was written, or older and said to be, or an error
of one line.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import io
import os
import pathlib
import random
import shutil
import subprocess
from typing import Any

import grain
import jax
import numpy as np
import pytest
import tiny_run

from mom_jax import config, train
from mom_jax.data import encode, pipeline, prepare, tokenizers
from mom_jax.parallel import sharding
from mom_jax.training import checkpoint, metrics, step

SEED = 20261202
STEPS = 6
# Logs for people: a flipped digit in one cannot be seen.
LOGS = {'metrics.jsonl'}


class Position(grain.DatasetIterator):
  """An iterator that only knows where it was told to go on."""

  def __init__(self):
    super().__init__()
    self.state: Any = None

  def __next__(self) -> Any:
    raise StopIteration

  def get_state(self) -> Any:
    return self.state

  def set_state(self, state: Any) -> None:
    self.state = state

  def start_prefetch(self) -> None:
    pass


@dataclasses.dataclass
class Content:
  """What the readers of a workdir find in it.

  Attributes:
    config: the fingerprint of that which `checkpoint.read_config` gives.
    vocabulary: its fingerprint.
    step: of the checkpoint.
    trees: the state of a run.
    position: of its data.
    progress: of the checkpoint.
    loaded: parameters and their step, as `checkpoint.load_params` gives them.
  """

  config: str
  vocabulary: str
  step: int
  trees: Any
  position: Any
  progress: Any
  loaded: checkpoint.Loaded


@dataclasses.dataclass
class Whole:
  """A run that is done: its workdir, what is in it, and what reads it."""

  cfg: config.Config
  workdir: pathlib.Path
  abstract: Any
  documents: list[encode.Splits]
  contents: dict[int, Content]

  def read(self, workdir: pathlib.Path) -> Content:
    """Read all that a run or an evaluation would read."""
    checkpoint.check_trainable(workdir)
    checkpoint.check_same_run(workdir, self.cfg)
    vocabulary = tokenizers.load(workdir)
    pipeline.keep_documents(workdir, self.cfg, self.documents, True)
    loaded = checkpoint.load_params(workdir)
    data = Position()
    with contextlib.closing(checkpoint.Checkpoints(
        workdir, self.cfg.checkpoint)) as checkpoints:
      got = checkpoints.restore(self.abstract, data)
    for writer in metrics.open_writers(workdir, got.step, self.cfg):
      writer.close()
    return Content(
        checkpoint.fingerprint(checkpoint.read_config(workdir)),
        vocabulary.fingerprint, got.step,
        got.trees, data.state, got.progress, loaded)

  def compare(self, workdir: pathlib.Path) -> str:
    """Read a damaged workdir; return in a word what came of it."""
    said, saved = io.StringIO(), _saved(workdir)
    try:
      with contextlib.redirect_stderr(said):
        got = self.read(workdir)
    except config.UserError as e:
      assert '\n' not in str(e) and len(str(e)) > 20
      result = 'error'
    else:
      wanted = self.contents[got.step]
      jax.tree.map(np.testing.assert_array_equal, got.trees, wanted.trees)
      jax.tree.map(  # which needs no more than the parameters of a checkpoint
          np.testing.assert_array_equal, got.loaded.params,
          self.contents[got.loaded.step].loaded.params)
      for name in ('config', 'vocabulary', 'position', 'progress'):
        assert getattr(got, name) == getattr(wanted, name), name
      result = 'older' if got.step < max(saved) else 'same'
      older = min(got.step, got.loaded.step) < max(saved)
      assert ('warning' in said.getvalue()) == older, said.getvalue()
    for older in saved:
      folder = workdir / 'checkpoints' / f'{older}'
      assert folder.is_dir() or folder.with_suffix('.unreadable').is_dir()
    return result


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Whole:
  folder = tmp_path_factory.mktemp('disk')
  cfg = tiny_run.make_config(
      folder, 'model.pattern=attention/mlp', 'model.num_layers=1',
      'data.tokenizer.text=bpe:300', 'model.vocab_size=320',
      f'train.steps={STEPS}', 'checkpoint.every=3', 'checkpoint.keep=3')
  workdir = folder / 'whole'
  train.fit(cfg, workdir)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    _, state = step.init(cfg, mesh)
  abstract = {k: v for k, v in state._asdict().items() if v is not None}
  vocabulary = tokenizers.load(workdir)
  run = Whole(cfg, workdir, abstract, pipeline.open_all(cfg, vocabulary), {})
  for number in (STEPS, 3):
    copy = folder / f'copy{number}'
    shutil.copytree(workdir, copy)
    if number < STEPS:
      shutil.rmtree(copy / 'checkpoints' / f'{STEPS}')
    run.contents[number] = run.read(copy)
    assert run.contents[number].step == number
  return run


def _saved(workdir: pathlib.Path) -> list[int]:
  """Steps that have a checkpoint."""
  return [int(p.name) for p in (workdir / 'checkpoints').glob('*')
          if p.name.isdecimal()]


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Names of all files in a folder, relative to it."""
  return sorted(p.relative_to(folder) for p in folder.rglob('*')
                if p.is_file() and p.stat().st_size)


def _flip(path: pathlib.Path, place: int, bits: int) -> None:
  data = bytearray(path.read_bytes())
  data[place] ^= bits
  path.write_bytes(bytes(data))


def test_a_flipped_byte_is_noticed_or_means_nothing(
    campaign, whole, tmp_path
):
  draw, results = random.Random(SEED), {'same': 0, 'older': 0, 'error': 0}
  each = campaign.size(1, 12)

  def inject() -> str:
    number = 0
    for name in _files(whole.workdir):
      size = (whole.workdir / name).stat().st_size
      for _ in range(each):
        number += 1
        place, bits = draw.randrange(size), 1 << draw.randrange(8)
        if name.name in LOGS:
          continue
        workdir = tmp_path / f'{number}'
        shutil.copytree(whole.workdir, workdir)
        _flip(workdir / name, place, bits)
        print(f'{name}: byte {place} of {size}, bits {bits:#x}')
        results[whole.compare(workdir)] += 1
        shutil.rmtree(workdir)
    assert results['older'] > 3 * each and results['error'] > each
    total = sum(results.values())
    return (
        f'{total} bytes in all files of a workdir: {results["older"]} times the'
        f' checkpoint before, {results["error"]} times an error,'
        f' {results["same"]} times a byte that nothing reads')

  campaign.run('disk', 'flipped bytes of a workdir', inject)


def test_a_lost_or_emptied_file_is_noticed_or_means_nothing(
    campaign, whole, tmp_path
):
  def inject() -> str:
    results = {'same': 0, 'older': 0, 'error': 0}
    files = [f for f in _files(whole.workdir) if f.name not in LOGS]
    for number, name in enumerate(files[::campaign.size(3, 1)]):
      for how in ('lost', 'emptied'):
        workdir = tmp_path / f'{number}{how}'
        shutil.copytree(whole.workdir, workdir)
        if how == 'lost':
          (workdir / name).unlink()
        else:
          os.truncate(workdir / name, 0)
        print(f'{name} {how}')
        results[whole.compare(workdir)] += 1
        shutil.rmtree(workdir)
    assert results['older'] > 3 and results['error'] > 1
    return (
        f'{sum(results.values())} times: {results["older"]} times the'
        f' checkpoint before, {results["error"]} times an error,'
        f' {results["same"]} times a file that nothing reads')

  campaign.run('disk', 'lost and emptied files of a workdir', inject)


def test_a_flipped_byte_in_shards_is_noticed_or_means_nothing(
    campaign, tmp_path
):
  cfg = tiny_run.make_config(
      tmp_path, 'data.tokenizer.text=bpe:300', 'model.vocab_size=320')
  source = tmp_path / 'shards'
  for _ in prepare.prepare(cfg, str(source), 2, 1):
    pass
  spec = f'array_record:{source}/*.array_record'
  cfg = config.override(cfg, [f'data.sources={spec}'])

  def read() -> list[np.ndarray]:
    vocabulary = encode.build_vocabulary(cfg)
    documents = pipeline.open_all(cfg, vocabulary)
    return [np.frombuffer(vocabulary.fingerprint.encode(), np.uint8), *(
        side.part(i) for splits in documents
        for side in (splits.train, splits.validation)
        for i in range(len(side.length_N)))]

  wanted, draw = read(), random.Random(SEED)

  def inject() -> str:
    results = {'same': 0, 'error': 0}
    for name in _files(source):
      data = (source / name).read_bytes()
      for _ in range(campaign.size(3, 60)):
        place, bits = draw.randrange(len(data)), 1 << draw.randrange(8)
        print(f'{name}: byte {place} of {len(data)}, bits {bits:#x}')
        _flip(source / name, place, bits)
        try:
          jax.tree.map(np.testing.assert_array_equal, read(), wanted)
          results['same'] += 1
        except config.UserError as e:
          assert '\n' not in str(e)
          results['error'] += 1
        (source / name).write_bytes(data)
    # Much of a shard of few documents is padding.
    assert results['error'] > sum(results.values()) / 4
    return (f'{sum(results.values())} bytes in all files of two shards:'
            f' {results["error"]} times an error, {results["same"]} times a'
            ' byte that nothing reads')

  campaign.run('disk', 'flipped bytes of shards', inject)


@contextlib.contextmanager
def _disk(folder: pathlib.Path, kib: int) -> Iterator[pathlib.Path]:
  """A disk of some KiB."""
  folder.mkdir()
  if subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', f'size={kib}k', 'tmpfs', str(folder)],
      capture_output=True).returncode:
    pytest.skip('mounting a small disk needs root')
  try:
    yield folder
  finally:
    subprocess.run(['umount', '-l', str(folder)], check=True)


@pytest.mark.parametrize('kind', ['Jsonl', 'TensorBoard'])
def test_a_log_on_a_full_disk_is_one_line_and_no_hang(tmp_path, kind):
  with _disk(tmp_path / 'disk', 40) as disk:
    writer = getattr(metrics, kind)(disk, 0)
    with pytest.raises(config.UserError, match='No space left on device; free'):
      for number in range(1, 10_000):
        writer.write({'step': number, 'loss': 1.0})
    with contextlib.suppress(config.UserError):
      writer.close()


def _used(folder: pathlib.Path) -> int:
  """KiB of its files, in pages."""
  return sum(-(-p.stat().st_size // 4096) * 4 for p in folder.rglob('*'))


def _write(disk: pathlib.Path, whole: Whole) -> Iterator[int]:
  """Write what a run does; yield the step of each checkpoint once it is safe.
  """
  workdir = disk / 'run'
  checkpoint.claim(workdir, whole.cfg)
  with checkpoint.writing(str(workdir)):
    tokenizers.load(whole.workdir).save(workdir)
    pipeline.keep_documents(workdir, whole.cfg, whole.documents, True)
  with contextlib.closing(checkpoint.Checkpoints(
      workdir, whole.cfg.checkpoint)) as checkpoints:
    for number, content in sorted(whole.contents.items()):
      data = Position()
      data.set_state(content.position)
      checkpoints.save(number, content.trees, data, {
          k: v for k, v in content.progress.items() if k != 'checksum'})
      checkpoints.wait()
      yield number


def test_a_disk_that_fills_loses_nothing_that_was_safe(
    campaign, whole, tmp_path
):
  with _disk(tmp_path / 'large', 100_000) as disk:
    assert list(_write(disk, whole)) == [3, STEPS]
    needed = _used(disk)

  def inject() -> str:
    results, count = [0, 0, 0], campaign.size(6, 60)
    for number in range(count):
      size = 4 * (1 + round((needed / 4 + 8) * number / (count - 1)))
      print(f'{size} KiB of {needed}')
      safe = []
      with _disk(tmp_path / f'disk{number}', size) as disk:
        try:
          safe.extend(_write(disk, whole))
        except config.UserError as e:
          assert 'No space left on device; free some space' in str(e), e
          assert '\n' not in str(e)
        results[len(safe)] += 1
        if safe:
          copy = tmp_path / f'copy{number}'
          shutil.copytree(disk / 'run', copy)
          assert max(_saved(copy)) == max(safe)
          assert whole.compare(copy) == 'same'
    assert all(results), results
    return (
        f'{count} sizes: {results[0]} too small for any checkpoint,'
        f' {results[1]} for the second one, each an error of one line;'
        f' {results[2]} large enough')

  campaign.run('disk', 'disks that fill', inject)
