"""Contents of a workdir: the config of its run and its checkpoints.

  workdir/config.json          settings, written before the first step
  workdir/checkpoints/STEP/    arrays, data position, progress after STEP steps

A checkpoint appears under its step once it is complete. Its arrays, progress
and data position carry checksums; a checkpoint that does not read back as
written is renamed to STEP.unreadable, and the one before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import errno
import json
import logging
import os
import pathlib
import re
import sys
from typing import Any, NamedTuple

from etils import epath
import grain
import jax
from jax import numpy as jnp
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from mom_jax import config, digest
from mom_jax.data import sharded_iterator

# Settings in which runs that share a workdir may differ: how long, how often
# and on which machine, not what is computed. `train.steps` moves the end of the
# learning-rate schedule.
MAY_CHANGE = (
    'train.steps', 'train.log_every', 'train.eval_every', 'train.eval_batches',
    'train.max_nonfinite_steps', 'train.profile', 'train.writers',
    'checkpoint.every', 'checkpoint.keep', 'checkpoint.keep_every',
    *(f'mesh.{axis}' for axis in config.Mesh().sizes), 'mesh.strategy',
    'data.cache', 'data.cache_compiled', 'data.image_folder',
    'data.allow_changed', 'model.remat', 'model.mixer.backend',
    'model.attention.backend', 'model.moma.backend',
)
# Settings that say where something lies. They may differ as long as the content
# is the same, which the documents' and the vocabulary's fingerprints tell.
BY_CONTENT = ('data.sources', 'data.tokenizer.text', 'data.tokenizer.image')
_STEP = re.compile('0|[1-9][0-9]*').fullmatch  # the name of a step's folder
_DISK = (
    errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT,
    errno.ENOTDIR, errno.EEXIST, errno.EFBIG,
)


class Loaded(NamedTuple):
  """Config and parameters of a run, and the step that they were saved after."""

  config: config.Config
  params: Any
  step: int


class Restored(NamedTuple):
  """A checkpoint: its step, its trees by name, its progress (JSON values)."""

  step: int
  trees: dict[str, Any]
  progress: dict[str, Any]


@contextlib.contextmanager
def writing(what: str, suggestion: str = ''):
  """Turn an error of the disk into a `UserError` about `what`.

  Storage libraries report the cause as text alone, so the text is read too.
  """
  try:
    yield
  except config.UserError:
    raise
  except Exception as e:
    reason = _disk_reason(e)
    if reason is None:
      raise
    advice = 'free some space or choose another --workdir'
    if reason != os.strerror(errno.ENOSPC):
      advice = 'choose a --workdir that can be written'
    raise config.UserError(
        f'cannot write {what}: {reason}; {advice}.{suggestion}'
    ) from e


def _disk_reason(error: BaseException) -> str | None:
  if isinstance(error, OSError) and error.errno in _DISK:
    return os.strerror(error.errno)
  for code in _DISK:
    if os.strerror(code) in str(error):
      return os.strerror(code)
  cause = error.__cause__ or error.__context__
  return None if cause is None else _disk_reason(cause)


def fingerprint(cfg: config.Config) -> str:
  """Return a text that differs between configs of different runs."""
  return digest.of(*(
      f'{key}={value}' for key, value, _ in config.settings(cfg)
      if key not in (*MAY_CHANGE, *BY_CONTENT)))


def check_same_run(
    workdir: str | os.PathLike[str], cfg: config.Config
) -> None:
  """Raise UserError if `workdir` holds a run of another config."""
  if not (pathlib.Path(workdir) / 'config.json').is_file():
    return
  changed = [
      line for line in config.differing(read_config(workdir), cfg)
      if line.split(':')[0].removeprefix('config.') not in (
          *MAY_CHANGE, *BY_CONTENT)
  ]
  if changed:
    raise config.UserError(
        f'--workdir={workdir} holds a run of another config; it differs in'
        f' {"; ".join(changed)}. Choose another --workdir or undo the change.'
    )


def check_trainable(workdir: str | os.PathLike[str]) -> None:
  """Raise UserError if `workdir` holds parameters without training state."""
  folder = pathlib.Path(workdir) / 'checkpoints'
  saved = [x for step in _steps(folder) if (x := _items(folder / str(step)))]
  if saved and not any('data' in items for items in saved):
    raise config.UserError(
        f'--workdir={workdir} holds parameters without training state; train'
        f' another run with --config.train.init_from={workdir}.'
    )


def _steps(folder: pathlib.Path) -> list[int]:
  """Steps that have a folder, whole or not, ascending."""
  return sorted(
      int(p.name) for p in folder.glob('*') if _STEP(p.name) and p.is_dir())


def _items(folder: pathlib.Path) -> set[str]:
  """Names of what a checkpoint was saved with; none if nobody knows."""
  try:
    text = (folder / '_CHECKPOINT_METADATA').read_text(encoding='utf-8')
    return set(json.loads(text)['item_handlers'])
  except (OSError, ValueError, KeyError, TypeError):
    return set()


def claim(workdir: str | os.PathLike[str], cfg: config.Config) -> None:
  """Make `workdir` the folder of a run of `cfg`, or resume its run.

  Raises:
    UserError: it holds a run of another config, or cannot be written.
  """
  check_same_run(workdir, cfg)
  path = pathlib.Path(workdir) / 'config.json'
  if path.is_file() and read_config(workdir) == cfg:
    return
  if jax.process_index() == 0:
    with writing(f'{path}'):
      path.parent.mkdir(parents=True, exist_ok=True)
      partial = path.with_suffix('.json.partial')
      partial.write_text(config.to_json(cfg), encoding='utf-8')
      partial.replace(path)


def read_config(workdir: str | os.PathLike[str]) -> config.Config:
  """Read the config of the run in `workdir`."""
  path = pathlib.Path(workdir) / 'config.json'
  if not path.is_file():
    raise config.UserError(
        f'--workdir={workdir} holds no run: {path} does not exist; train one'
        ' with python -m mom_jax.train.'
    )
  try:
    return config.from_mapping(config.read_json(path))
  except config.UserError as e:
    raise config.UserError(
        f'{path} is no config of this version: {e} A run of another version of'
        ' mom_jax cannot be read; train it again.'
    ) from e


class Checkpoints:
  """Checkpoints of a workdir, saved in the background."""

  def __init__(self, workdir: str | os.PathLike[str], cfg: config.Checkpoint):
    self._folder = pathlib.Path(workdir).absolute() / 'checkpoints'
    options = ocp.CheckpointManagerOptions(
        max_to_keep=cfg.keep,
        keep_period=cfg.keep_every or None,
        cleanup_tmp_directories=True,
    )
    _quiet()
    with writing(f'{self._folder}'):
      self._manager = ocp.CheckpointManager(self._folder, options=options)

  @property
  def steps(self) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    self._manager.reload()
    return sorted(self._manager.all_steps())

  def save(
      self, step: int, trees: dict[str, Any], data: grain.DatasetIterator,
      progress: dict[str, Any],
  ) -> None:
    """Start saving; arrays and position are copied before this returns.

    Args:
      step: optimizer steps done.
      trees: pytrees of arrays, by name.
      data: iterator of this process, whose position is saved.
      progress: JSON values, the same on every process; `config` is the
        `fingerprint` of the run's.
    """
    sums = {k: checksum(v).tolist() for k, v in trees.items()}
    with self._writing(step):
      self._manager.save(
          step,
          args=ocp.args.Composite(
              data=sharded_iterator.Save(data),
              progress=ocp.args.JsonSave(
                  digest.sealed(progress | {'checksum': sums})),
              **{k: ocp.args.StandardSave(v) for k, v in trees.items()},
          ),
      )

  def check(self) -> None:
    """Raise the error of a save in the background, if any."""
    with self._writing():
      self._manager.check_for_errors()

  def wait(self) -> None:
    """Wait until all saves are on disk."""
    with self._writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    with self._writing():
      self._manager.close()

  @contextlib.contextmanager
  def _writing(self, step: int | None = None):
    name = 'a checkpoint' if step is None else f'the checkpoint of step {step}'
    kept = self.kept()
    with writing(f'{name} to {self._folder}', kept and f' {kept}'):
      yield

  def kept(self) -> str:
    """Return a sentence that names the last good checkpoint."""
    steps = _steps(self._folder)
    if not steps:
      return 'There is no checkpoint yet.'
    return f'The last good checkpoint is step {steps[-1]}.'

  def restore(
      self, abstract: dict[str, Any], data: grain.DatasetIterator
  ) -> Restored | None:
    """Restore the newest readable checkpoint; None if there is no checkpoint.

    Args:
      abstract: ShapeDtypeStructs of each tree, with the shardings to restore.
      data: iterator that is set to the saved position.
    Raises:
      UserError: there are checkpoints and none is readable.
    """
    self._clear_names()
    if not self.steps:
      return None

    def read(step):
      restored = _read(self._manager, step, abstract)
      position = sharded_iterator.Restore(data)
      self._manager.restore(step, args=ocp.args.Composite(data=position))
      return restored

    return _newest(self._folder, self.steps, read, self._set_aside)

  def _clear_names(self) -> None:
    """Set aside files that are named like the folder of a step."""
    for path in self._folder.glob('*'):
      if _STEP(path.name) and not path.is_dir() and jax.process_index() == 0:
        print(f'warning: {path} is no checkpoint; it becomes'
              f' {path.name}.unreadable.', file=sys.stderr)
        self._rename(path)

  def _set_aside(self, step: int) -> None:
    if jax.process_index() == 0:
      self._rename(self._folder / str(step))
    _agree(None)
    self._manager.reload()

  def _rename(self, path: pathlib.Path) -> None:
    with writing(f'{path}.unreadable'):
      path.rename(_free(path.with_name(f'{path.name}.unreadable')))


def save_params(
    workdir: str | os.PathLike[str], cfg: config.Config, params: Any
) -> None:
  """Make `workdir` a run with these parameters, without training state.

  Raises:
    UserError: it already holds a run, or cannot be written.
  """
  if (pathlib.Path(workdir) / 'config.json').exists():
    raise config.UserError(
        f'--workdir={workdir} already holds a run; choose another one.')
  claim(workdir, cfg)
  folder = pathlib.Path(workdir).absolute() / 'checkpoints'
  _quiet()
  with writing(str(folder)), ocp.CheckpointManager(folder) as manager:
    manager.save(0, args=ocp.args.Composite(
        progress=ocp.args.JsonSave(digest.sealed({
            'config': fingerprint(cfg),
            'checksum': {'params': checksum(params).tolist()}})),
        params=ocp.args.StandardSave(params),
    ))


def load_params(
    workdir: str | os.PathLike[str],
) -> Loaded:
  """Load the parameters of the newest readable checkpoint, onto one device.

  They are the averaged parameters if the run keeps such.

  Raises:
    UserError: there is no run, no checkpoint, none is readable, or config.json
      is not that of the run.
  """
  cfg = read_config(workdir)
  item = 'ema' if cfg.optimizer.ema else 'params'
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  with _saved(workdir) as (folder, steps, manager):

    def read(step):
      shapes = ocp.StandardCheckpointHandler().metadata(
          epath.Path(folder / str(step) / item))
      abstract = jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
          shapes.tree,
      )
      return _read(manager, step, {item: abstract})

    restored = _newest(folder, steps, read, lambda step: None)
  _check_config(workdir, cfg, restored)
  return Loaded(cfg, restored.trees[item], restored.step)


def load_trees(
    workdir: str | os.PathLike[str],
    abstract: dict[str, Any],
    data: grain.DatasetIterator,
) -> Restored:
  """Read the newest readable checkpoint; nothing in `workdir` changes.

  Args:
    abstract, data: as `Checkpoints.restore` takes them.
  Raises:
    UserError: there is no checkpoint, or none is readable.
  """
  with _saved(workdir) as (folder, steps, manager):

    def read(step):
      restored = _read(manager, step, abstract)
      position = sharded_iterator.Restore(data)
      manager.restore(step, args=ocp.args.Composite(data=position))
      return restored

    restored = _newest(folder, steps, read, lambda step: None)
  _check_config(workdir, read_config(workdir), restored)
  return restored


def _check_config(
    workdir: str | os.PathLike[str], cfg: config.Config, restored: Restored
) -> None:
  if restored.progress.get('config') != fingerprint(cfg):
    raise config.UserError(
        f'{workdir}/config.json is not the one that the checkpoint of step'
        f' {restored.step} was saved with; restore it from a copy of the run.')


@contextlib.contextmanager
def _saved(workdir: str | os.PathLike[str]):
  """Yield (folder, steps, manager) of the checkpoints in `workdir`."""
  _quiet()
  folder = pathlib.Path(workdir).absolute() / 'checkpoints'
  none = config.UserError(
      f'--workdir={workdir} holds no checkpoint yet; wait for the first one of'
      ' its run or start it again.'
  )
  if not folder.is_dir():
    raise none
  options = ocp.CheckpointManagerOptions(create=False, read_only=True)
  with ocp.CheckpointManager(folder, options=options) as manager:
    steps = sorted(manager.all_steps())
    if not steps:
      raise none
    yield folder, steps, manager


def _read(manager: Any, step: int, abstract: dict[str, Any]) -> Restored:
  got = manager.restore(
      step,
      args=ocp.args.Composite(
          progress=ocp.args.JsonRestore(),
          **{k: ocp.args.StandardRestore(v) for k, v in abstract.items()},
      ),
  )
  trees, progress = {k: got[k] for k in abstract}, digest.unsealed(got.progress)
  for name, tree in trees.items():
    if checksum(tree).tolist() != progress['checksum'][name]:
      raise ValueError(f'{name} differ from what was saved')
  return Restored(step, trees, progress)


def _newest(
    folder: pathlib.Path,
    steps: list[int],
    read: Callable[[int], Restored],
    set_aside: Callable[[int], None],
) -> Restored:
  """Read the newest readable step, and warn of those that are skipped."""

  def read_by_all(step):
    try:
      restored, error = read(step), None
    except Exception as e:
      restored, error = None, e
    _agree(error)
    return restored

  for i in reversed(range(len(steps))):
    try:
      return read_by_all(steps[i])
    except Exception as e:
      if i == 0:
        raise config.UserError(
            f'no checkpoint in {folder} can be read (step {steps[i]}:'
            f' {_line(e)}); choose another --workdir to start again.'
        ) from e
      print(
          f'warning: the checkpoint of step {steps[i]} in {folder} cannot be'
          f' read ({_line(e)}); resuming from step {steps[i - 1]}.',
          file=sys.stderr,
      )
      set_aside(steps[i])
  raise AssertionError('there is at least one step')


def _agree(error: Exception | None) -> None:
  """Wait for all processes; raise if one of them has an error."""
  if jax.process_count() > 1:
    fine_P = multihost_utils.process_allgather(np.array(error is None))
    if error is None and not fine_P.all():
      error = ValueError(f'process {int(fine_P.argmin())} cannot read it')
  if error is not None:
    raise error


def _free(path: pathlib.Path) -> pathlib.Path:
  """Return the first of path, path-2, path-3, ... that does not exist."""
  number, name = 1, path
  while name.exists():
    number += 1
    name = path.with_name(f'{path.name}-{number}')
  return name


def _quiet() -> None:
  """Silence orbax, which logs every error before it raises it."""
  logging.getLogger('absl').addFilter(_not_orbax)
  sys.unraisablehook = _unraisable


def _not_orbax(record: logging.LogRecord) -> bool:
  return 'orbax' not in record.pathname


def _unraisable(event: Any) -> None:
  """Report an unraisable error unless a failed read left it behind."""
  if str(event.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(event)


def _line(error: Exception) -> str:
  text = ' '.join(str(error).split())
  return text if len(text) <= 200 else text[:200] + '...'


@jax.jit
def checksum(tree: Any) -> jax.Array:
  """Sum the bits of each leaf into a uint32, whatever its sharding."""

  def one(x):
    if x.dtype.itemsize == 4:
      x = jax.lax.bitcast_convert_type(x, jnp.uint32)
    elif jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2:
      x = jax.lax.bitcast_convert_type(x, jnp.uint16)
    return x.sum(dtype=jnp.uint32)

  return jnp.stack([one(x) for x in jax.tree.leaves(tree)])
