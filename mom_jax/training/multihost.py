"""Several processes, one run: joining them, stopping together, losing one.

  coordinator's key-value store
    mom_jax/alive/I   a count that process I raises, so that others see it lives
    mom_jax/stop      the signal that any process got
    mom_jax/lost      who was found lost, by whoever found it first
    mom_jax/at/I      the step up to which process I will go once it knows

After a signal every process promises the step that it has started at most; the
run stops at the greatest promise, which all of them then reach. A thread speaks
for the process, since the process itself may wait for the others' devices. The
same thread ends the process when another one has been silent for too long, also
if the devices never return from a collective. The loss of process 0 JAX may
notice first: it aborts the others at once and says that the leader task died.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from typing import Any

import jax
from jax._src import distributed
import numpy as np

from mom_jax import config
from mom_jax.parallel import sharding

PREFIX = 'mom_jax/'
PERIOD = 1.0  # seconds between signs of life
DONE, FAILED = 'done', 'failed'  # in place of the count, at the end
LOST = 3  # exit code: another process is gone; the same command goes on
# Variables by which a launcher says that this is one of several processes.
LAUNCHERS = ('JOB_COMPLETION_INDEX', 'JAX_COORDINATOR_ADDRESS')


@contextlib.contextmanager
def joined(
    coordinator: str | None, count: int | None, index: int | None,
    detect: bool, timeout: float,
) -> Iterator[None]:
  """Makes this process one of a run's, if it is to be; before all use of jax.

  By address, count and index; or by what the environment says, with `detect`
  or where Slurm, a JobSet or JAX_COORDINATOR_ADDRESS says that there are more.

  Args:
    timeout: seconds until a silent process is given up.
  Raises:
    UserError: some of address, count and index are missing, or nobody answers.
  """
  given = dict(coordinator=coordinator, processes=count, process=index)
  named = [k for k, v in given.items() if v is not None]
  if named and len(named) < 3:
    missing = ', '.join(f'--{k}' for k in given if k not in named)
    raise config.UserError(
        f'--{named[0]} needs {missing} too: the address of process 0 as'
        ' HOST:PORT, how many processes there are, and which one this is.')
  if index is not None and not 0 <= index < count:
    raise config.UserError(
        f'--process={index} must lie between 0 and --processes={count} - 1.')
  if not named and not detect and not _launched(os.environ):
    yield
    return
  jax.config.update('jax_enable_preemption_service', False)  # see Together
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(
        coordinator, count, index,
        initialization_timeout=int(max(timeout, 60)),
        heartbeat_timeout_seconds=int(max(3 * timeout, 30)),
        shutdown_timeout_seconds=int(max(timeout, 10)))
  except (RuntimeError, ValueError) as e:
    raise config.UserError(
        'the processes of this run did not find each other'
        f' ({" ".join(str(e).split())[:200]}); check --coordinator,'
        ' --processes and --process, or the launcher.') from e
  try:
    yield
  except config.UserError as e:
    _leave(f'error: {e}', 2)
  except BaseException:
    # The others wait for this process in a collective: leave without them.
    _leave(traceback.format_exc(), 1)
  jax.distributed.shutdown()


def _launched(environment) -> bool:
  if any(name in environment for name in LAUNCHERS):
    return True
  return int(environment.get('SLURM_NTASKS', 1)) > 1 and (
      'SLURM_PROCID' in environment)


def reader(mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """(number of this process among those that read, how many of them there are).

  Processes whose devices hold the same rows of a batch, as where an axis that
  does not split the batch lies across them, have one number and are to read the
  same; the others follow in the order of their rows.

  Raises:
    ValueError: processes have some rows in common, but not all.
  """
  return _reader(mesh.devices, jax.process_index())


def _reader(devices: np.ndarray, me: int) -> tuple[int, int]:
  axes = list(sharding.AXES)
  parts = math.prod(
      devices.shape[axes.index(axis)] for axis in sharding.BATCH_AXES)
  rows: dict[int, set[int]] = {}
  for row, devices_ in enumerate(devices.reshape(parts, -1)):
    for device in devices_:
      rows.setdefault(device.process_index, set()).add(row)
  groups = sorted(set(map(tuple, map(sorted, rows.values()))))
  if sum(map(len, groups)) > parts or len(set(map(len, groups))) > 1:
    shown = ', '.join(
        f'config.mesh.{axis}={size}' for axis, size in zip(axes, devices.shape)
        if size > 1 and axis not in sharding.BATCH_AXES)
    raise ValueError(
        f'{shown} lies across processes so that two of them have some rows of a'
        ' batch in common but not all, and they cannot read as one; make it a'
        f' divisor or a multiple of the {devices.size // len(rows)} devices of'
        ' a process.'
    )
  return groups.index(tuple(sorted(rows[me]))), len(groups)


class Stop:
  """Notes SIGTERM and SIGINT while it is entered; a second one acts at once."""

  def __init__(self) -> None:
    self.name: str | None = None
    self._before: dict[int, Any] = {}

  def __enter__(self) -> Stop:
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._note)
    return self

  def _note(self, number: int, frame: Any) -> None:
    del frame
    self.name = signal.Signals(number).name
    signal.signal(number, self._before[number])

  def __exit__(self, *error: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  @property
  def at_once(self) -> bool:
    """Whether to leave what is under way; never where others take part."""
    return self.name is not None

  def before(self, step: int) -> str | None:
    """The signal, if the run is to stop after `step` steps."""
    del step
    return self.name


class Together(Stop):
  """The same for all processes: they stop after the same step.

  Args:
    timeout: seconds of silence after which a process counts as lost.
    store: the coordinator's key-value store; jax's own by default.
    lost: called with a message; by default prints it and ends this process.
  """

  def __init__(
      self, timeout: float, store: Any = None, index: int | None = None,
      count: int | None = None, lost: Callable[[str], None] | None = None,
  ) -> None:
    super().__init__()
    self._timeout, self._lost = timeout, lost or _leave
    self._store = store or distributed.global_state.client
    self._index = jax.process_index() if index is None else index
    self._count = count or jax.process_count()
    self._lock = threading.Lock()
    self._promise: int | None = None  # the step that this process goes to
    self._given = False  # the promise is published and must be kept
    self._target: int | None = None
    self._agreed = threading.Event()
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self) -> Together:
    super().__enter__()
    self._thread.start()
    return self

  def __exit__(self, *error: object) -> None:
    super().__exit__(*error)
    if _of_runtime(error[1]):
      # A collective failed: if that is for a lost process, the watch says so.
      self._thread.join(2 * self._timeout)
    self._ended.set()
    self._thread.join()
    with contextlib.suppress(Exception):  # the coordinator may be gone
      if self._promise is not None:  # nobody waits for what is not to come
        self._set(f'at/{self._index}', str(self._promise))
      self._set(f'alive/{self._index}', DONE if error[0] is None else FAILED)

  @property
  def at_once(self) -> bool:
    return False

  def before(self, step: int) -> str | None:
    with self._lock:
      if not self._given:
        self._promise = step + 1
        return None
    self._agreed.wait()  # the thread ends the process if others are lost
    return self.name if step >= self._target else None

  def _watch(self) -> None:
    """Signs of life, stop requests and promises, until the run has ended."""
    beat, seen, heard = 0, {}, time.monotonic()
    asked = False
    while not self._ended.wait(PERIOD):
      try:
        beat += 1
        self._set(f'alive/{self._index}', str(beat))
        if self.name and not asked:
          self._set('stop', self.name)
          asked = True
        known = {key.removeprefix(PREFIX): value for key, value in
                 self._store.key_value_dir_get(PREFIX)}
        if 'stop' in known:
          self._stopping(known)
        heard = time.monotonic()
      except Exception as e:  # whatever the store raises
        if time.monotonic() - heard > self._timeout:
          self._give_up(f'process 0, the coordinator, does not answer ({e})')
          return
        continue
      why = known.get('lost') or self._silent(known, seen, heard)
      if why:
        self._give_up(why)
        return

  def _set(self, key: str, value: str) -> None:
    self._store.key_value_set(PREFIX + key, value, allow_overwrite=True)

  def _silent(self, known, seen, now) -> str | None:
    """Who is lost: it failed, or its count has not moved for too long."""
    for i in range(self._count):
      beat = known.get(f'alive/{i}')
      if beat == FAILED:
        return f'process {i} has failed'
      if i not in seen or seen[i][0] != beat or beat == DONE:
        seen[i] = (beat, now)
      elif now - seen[i][1] > self._timeout:
        return f'process {i} has been silent for {self._timeout:g} s'
    return None

  def _stopping(self, known: dict[str, str]) -> None:
    """Publishes the promise; with all promises, the step to stop at."""
    self.name = self.name or known['stop']
    with self._lock:
      if self._promise is not None and not self._given:
        self._set(f'at/{self._index}', str(self._promise))
        self._given = True
    promises = [known.get(f'at/{i}') for i in range(self._count)]
    if None not in promises and not self._agreed.is_set():
      self._target = max(map(int, promises))
      self._agreed.set()

  def _give_up(self, why: str) -> None:
    if not self._ended.is_set():
      with contextlib.suppress(Exception):
        self._set('lost', why)
      if self._index == 0:  # the store goes with it: the others read it first
        time.sleep(3 * PERIOD)
      self._lost(
          f'error: lost another process of this run: {why}. Start all processes'
          ' again with the same command; the run goes on from its last'
          ' checkpoint.')


def _of_runtime(error: BaseException | None) -> bool:
  """Whether XLA raised it: a ValueError, too, may hold its status."""
  return isinstance(error, jax.errors.JaxRuntimeError) or (
      isinstance(error, ValueError) and re.match('[A-Z_]+: ', str(error))
      is not None)


def _leave(message: str, code: int = LOST) -> None:
  """Ends the process now: its threads may wait for devices for ever."""
  print(message, file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(code)


def watch(timeout: float) -> Stop:
  """How this process learns that it is to stop."""
  return Together(timeout) if jax.process_count() > 1 else Stop()
