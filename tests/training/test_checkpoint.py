"""What a workdir keeps survives kills, damage, full disks and new meshes."""

import contextlib
import errno
import os
import pathlib
import shutil
import subprocess

import grain
import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from mom_jax import config
from mom_jax.parallel import sharding
from mom_jax.training import checkpoint


def _trees(step=0.0):
  return {
      'params': {'a': {'kernel': jnp.arange(64.0).reshape(8, 8) + step}},
      'counters': {'step': jnp.array(int(step))},
      'optimizer': ({'low': jnp.ones((8,), jnp.bfloat16)}, ()),
  }


def _abstract(trees):
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      trees)


def _data():
  return iter(grain.MapDataset.range(100).to_iter_dataset())


def _save(workdir, *steps, **settings):
  """Checkpoints of `steps`; data stands at the step."""
  with contextlib.closing(checkpoint.Checkpoints(
      workdir, config.Checkpoint(**settings))) as checkpoints:
    for step in steps:
      data = _data()
      data.set_state({'next_index': step})
      checkpoints.save(step, _trees(step), data, {'evaluated': step})
    checkpoints.wait()
    return checkpoints.steps


def _restore(workdir):
  data = _data()
  with contextlib.closing(checkpoint.Checkpoints(
      workdir, config.Checkpoint())) as checkpoints:
    restored = checkpoints.restore(_abstract(_trees()), data)
  return restored, data


def _files(folder):
  return sorted(p for p in folder.rglob('*') if p.is_file())


def test_what_is_saved_comes_back(tmp_path):
  _save(tmp_path, 3, 5)
  restored, data = _restore(tmp_path)
  assert restored.step == 5 and restored.progress['evaluated'] == 5
  jax.tree.map(np.testing.assert_array_equal, restored.trees, _trees(5))
  assert next(data) == 5


def test_an_empty_workdir_restores_nothing(tmp_path):
  restored, data = _restore(tmp_path)
  assert restored is None and next(data) == 0


def test_newest_and_multiples_are_kept(tmp_path):
  got = _save(tmp_path, *range(1, 10), keep=2, keep_every=3)
  assert got == [3, 6, 8, 9]


@pytest.mark.parametrize('part', ['params', 'progress', 'data'])
@pytest.mark.parametrize('damage', ['truncate', 'remove'])
def test_a_corrupt_newest_checkpoint_falls_back(tmp_path, capfd, part, damage):
  """One line says so, the damaged one is kept aside, its number is free."""
  _save(tmp_path, 3, 5)
  for file in _files(tmp_path / 'checkpoints' / '5' / part):
    if damage == 'remove':
      file.unlink()
    else:
      os.truncate(file, file.stat().st_size // 2)
  restored, data = _restore(tmp_path)
  assert restored.step == 3 and next(data) == 3
  lines = capfd.readouterr().err.strip().split('\n')
  assert len(lines) == 1
  assert lines[0].startswith('warning: the checkpoint of step 5 in ')
  assert lines[0].endswith('resuming from step 3.')
  assert (tmp_path / 'checkpoints' / '5.unreadable').is_dir()
  assert _save(tmp_path, 5) == [3, 5]


def test_every_flipped_byte_is_noticed(tmp_path):
  """Also where the storage format itself has no checksum."""
  _save(tmp_path, 3, 5)
  source = tmp_path / 'checkpoints' / '5'
  tried = 0
  for file in _files(source / 'params'):
    if file.parent.name != 'd':
      continue
    whole = file.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 6)):
      file.write_bytes(
          whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1:])
      copy = tmp_path / f'copy_{tried}'
      shutil.copytree(tmp_path / 'checkpoints', copy / 'checkpoints')
      restored, _ = _restore(copy)
      if restored.step == 5:  # a byte that nothing reads
        jax.tree.map(np.testing.assert_array_equal, restored.trees, _trees(5))
      tried += restored.step == 3
      shutil.rmtree(copy)
    file.write_bytes(whole)
  assert tried > 3


def test_wrong_values_are_noticed(tmp_path, monkeypatch, capfd):
  """Storage that returns other numbers than it was given."""
  _save(tmp_path, 3, 5)
  real = checkpoint.checksum
  monkeypatch.setattr(
      checkpoint, 'checksum', lambda tree: real(tree).at[0].add(
          int(tree['a']['kernel'][0, 0] == 5) if 'a' in tree else 0))
  assert _restore(tmp_path)[0].step == 3
  assert 'params differ from what was saved' in capfd.readouterr().err


def _empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()


@pytest.mark.parametrize('spoil, step', [
    (lambda c: (c / '99').mkdir(), 5),
    (lambda c: (c / '7').write_text('x'), 5),
    (lambda c: (c / '9').symlink_to('/nowhere'), 5),
    (lambda c: shutil.copytree(c / '5', c / '007'), 5),
    (lambda c: (c / '²').mkdir(), 5),
    (lambda c: shutil.rmtree(c / '5' / 'data'), 3),
    (lambda c: _empty(c / '5' / 'data'), 3),
    (lambda c: shutil.rmtree(c / '5' / 'progress'), 3),
    (lambda c: _empty(c / '5'), 3),
], ids=['folder', 'file', 'link', 'other number', 'superscript', 'data lost',
        'data emptied', 'progress lost', 'all emptied'])
def test_what_is_no_whole_checkpoint_is_set_aside(
    tmp_path, capfd, spoil, step
):
  _save(tmp_path, 3, 5)
  folder = tmp_path / 'checkpoints'
  spoil(folder)
  before = {p.name for p in folder.iterdir()}
  checkpoint.check_trainable(tmp_path)
  restored, data = _restore(tmp_path)
  assert restored.step == step and next(data) == step
  after = {p.name for p in folder.iterdir()}
  gone = before - after
  assert after - before == {f'{name}.unreadable' for name in gone}
  err = capfd.readouterr().err
  assert err.count('warning') == len(gone) and all(x in err for x in gone)
  _save(tmp_path, 7, 9)  # under names that had been taken
  assert _restore(tmp_path)[0].step == 9


def test_parameters_alone_are_not_trained_on(tmp_path):
  checkpoint.save_params(tmp_path, config.Config(), {'a': jnp.ones(3)})
  with pytest.raises(config.UserError, match='without training state; train'):
    checkpoint.check_trainable(tmp_path)
  (tmp_path / 'checkpoints' / '99').mkdir()
  with pytest.raises(config.UserError, match='without training state; train'):
    checkpoint.check_trainable(tmp_path)


def test_nothing_readable_is_an_error_not_a_fresh_start(tmp_path):
  _save(tmp_path, 3)
  for file in _files(tmp_path / 'checkpoints' / '3' / 'params'):
    file.unlink()
  with pytest.raises(config.UserError, match='no checkpoint in .* can be read'):
    _restore(tmp_path)
  assert (tmp_path / 'checkpoints' / '3').is_dir()


def test_a_killed_save_leaves_no_checkpoint(tmp_path):
  """A save appears whole or not at all; remains are cleaned up."""
  _save(tmp_path, 3)
  half = tmp_path / 'checkpoints' / '5.orbax-checkpoint-tmp'
  shutil.copytree(tmp_path / 'checkpoints' / '3', half)
  assert _restore(tmp_path)[0].step == 3
  assert not half.exists()


def test_arrays_come_back_on_another_mesh(tmp_path):
  mesh = sharding.make_mesh(4, 2)
  split = jax.sharding.NamedSharding(mesh, P('data', 'fsdp'))
  trees = {'params': {'a': jax.device_put(jnp.arange(64.0).reshape(8, 8),
                                          split)}}
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=jax.sharding.NamedSharding(
          sharding.make_mesh(1, 8), P(None, 'fsdp'))), trees)
  checkpoint.claim(tmp_path, config.Config())
  with contextlib.closing(checkpoint.Checkpoints(
      tmp_path, config.Checkpoint())) as checkpoints:
    checkpoints.save(
        1, trees, _data(), {'config': checkpoint.fingerprint(config.Config())})
    checkpoints.wait()
    restored = checkpoints.restore(abstract, _data())
  got = restored.trees['params']['a']
  np.testing.assert_array_equal(got, trees['params']['a'])
  assert got.sharding == abstract['params']['a'].sharding
  _, params, step = checkpoint.load_params(tmp_path)
  assert step == 1 and len(params['a'].devices()) == 1
  np.testing.assert_array_equal(params['a'], trees['params']['a'])


def test_parameters_are_not_read_with_another_config(tmp_path):
  cfg = config.override(
      config.Config(), ['data.sources=jsonl:/first', 'data.weights=1'])
  checkpoint.save_params(tmp_path, cfg, {'a': jnp.ones(3)})
  longer = config.override(cfg, ['train.steps=9', 'data.sources=jsonl:/moved'])
  (tmp_path / 'config.json').write_text(config.to_json(longer))
  assert checkpoint.load_params(tmp_path).config == longer
  other = config.override(cfg, ['model.mixer.num_memories=7'])
  (tmp_path / 'config.json').write_text(config.to_json(other))
  with pytest.raises(config.UserError, match=(
      r'config\.json is not the one that the checkpoint of step 0 was saved'
      ' with; restore it')):
    checkpoint.load_params(tmp_path)


def test_a_position_of_data_that_is_not_what_was_saved_is_noticed(tmp_path):
  _save(tmp_path, 3, 5)
  path = tmp_path / 'checkpoints' / '5' / 'data' / 'process_0-of-1.json'
  text = path.read_text()
  assert '5' in text
  path.write_text(text.replace('5', '7', 1))
  restored, data = _restore(tmp_path)
  assert restored.step == 3 and next(data) == 3


def test_progress_that_is_not_what_was_saved_is_noticed(tmp_path):
  _save(tmp_path, 3, 5)
  path = tmp_path / 'checkpoints' / '5' / 'progress' / 'metadata'
  path.write_text(path.read_text().replace('"evaluated": 5', '"evaluated": 7'))
  assert _restore(tmp_path)[0].step == 3


def test_load_params_says_what_is_missing(tmp_path):
  with pytest.raises(config.UserError, match='holds no run'):
    checkpoint.load_params(tmp_path)
  checkpoint.claim(tmp_path, config.Config())
  with pytest.raises(config.UserError, match='holds no checkpoint yet'):
    checkpoint.load_params(tmp_path)


def test_checksum_sees_bits_not_layout():
  tree = {'a': jnp.arange(64.0), 'b': jnp.ones((8,), jnp.bfloat16),
          'c': jnp.array([True, False])}
  mesh = sharding.make_mesh(8, 1)
  split = jax.device_put(tree['a'], sharding.batch_sharding(mesh))
  one = checkpoint.checksum(tree)
  np.testing.assert_array_equal(one, checkpoint.checksum(tree | {'a': split}))
  other = checkpoint.checksum(tree | {'a': tree['a'].at[3].set(3.0000002)})
  assert (one != other).tolist() == [True, False, False]


# Configs.


def test_a_workdir_of_another_config_lists_what_differs(tmp_path):
  first = config.Config()
  checkpoint.claim(tmp_path, first)
  other = config.override(
      first, ['model.width=64', 'data.batch_size=8', 'train.steps=9'])
  with pytest.raises(config.UserError) as e:
    checkpoint.claim(tmp_path, other)
  text = str(e.value)
  assert ('config.model.width: 128 -> 64;'
          ' config.data.batch_size: 4 -> 8.') in text
  assert 'train.steps' not in text
  assert checkpoint.read_config(tmp_path) == first


def test_settings_that_may_change_are_taken_over(tmp_path):
  checkpoint.claim(tmp_path, config.Config())
  other = config.override(config.Config(), [
      'train.steps=9', 'train.writers=jsonl', 'mesh.data=2', 'checkpoint.keep=5'
  ])
  checkpoint.claim(tmp_path, other)
  assert checkpoint.read_config(tmp_path) == other


def test_settings_that_may_change_exist():
  known = {key for key, _, _ in config.settings(config.Config())}
  assert set(checkpoint.MAY_CHANGE) <= known


def test_a_damaged_config_is_one_clear_line(tmp_path):
  checkpoint.claim(tmp_path, config.Config())
  os.truncate(tmp_path / 'config.json', 40)
  with pytest.raises(config.UserError, match='config.json is not valid JSON'):
    checkpoint.claim(tmp_path, config.Config())


# Disks.


@pytest.fixture
def small_disk(tmp_path):
  """A disk of 600 KiB."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mounted = subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', 'size=600k', 'tmpfs', str(folder)],
      capture_output=True)
  if mounted.returncode:
    pytest.skip('mounting a small disk needs root')
  yield folder
  subprocess.run(['umount', '-l', str(folder)], check=True)


def test_a_full_disk_is_one_line_and_loses_nothing(small_disk, capfd):
  checkpoint.claim(small_disk, config.Config())
  _save(small_disk, 1, 2)
  noise = np.random.default_rng(0).standard_normal(2**18).astype(np.float32)
  checkpoints = checkpoint.Checkpoints(small_disk, config.Checkpoint())
  with pytest.raises(config.UserError) as e:
    checkpoints.save(3, {'params': {'a': jnp.asarray(noise)}}, _data(), {})
    checkpoints.wait()
  assert str(e.value) == (
      f'cannot write a checkpoint to {small_disk}/checkpoints: No space left'
      ' on device; free some space or choose another --workdir. The last good'
      ' checkpoint is step 2.')
  assert capfd.readouterr().err == ''
  assert _restore(small_disk)[0].step == 2


def test_a_read_only_disk_is_one_line(small_disk):
  checkpoint.claim(small_disk, config.Config())
  subprocess.run(
      ['mount', '-o', 'remount,ro', str(small_disk)], check=True)
  other = config.override(config.Config(), ['train.steps=1'])
  for act in (lambda: checkpoint.claim(small_disk, other),
              lambda: checkpoint.Checkpoints(small_disk, config.Checkpoint())):
    with pytest.raises(config.UserError, match=(
        'cannot write .*: Read-only file system; choose a --workdir that can'
        ' be written.')):
      act()


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_refused_writes_become_one_line(tmp_path, monkeypatch, code):
  """Where no disk can be mounted."""

  def refuse(*args, **kwargs):
    raise OSError(code, os.strerror(code))

  monkeypatch.setattr(pathlib.Path, 'write_text', refuse)
  with pytest.raises(config.UserError, match=os.strerror(code)):
    checkpoint.claim(tmp_path, config.Config())


def test_other_errors_keep_their_traceback():
  with pytest.raises(ZeroDivisionError), checkpoint.writing('a file'):
    1 / 0  # noqa: B018
