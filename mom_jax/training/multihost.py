"""One run of several processes: start, coordinated stop, loss of a process.

  coordinator's key-value store
    mom_jax/heartbeat/I   a count that process I raises while it lives
    mom_jax/stop          the signal that some process got
    mom_jax/promise/I     the step up to which process I will go
    mom_jax/lost          which process was found lost
    mom_jax/first/N       what came of the N-th call of `by_first`

After a signal every process promises the last step that it may have started;
the run stops after the greatest promise, which all processes then reach. A
thread publishes these, since its process may be waiting for other devices. The
thread also ends the process if another one has been silent for too long, even
if a collective never returns. JAX may notice the loss of process 0 first: it
aborts the others at once and says that the leader task died.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import itertools
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from typing import Any, NamedTuple

import jax
from jax._src import distributed as jax_distributed
import numpy as np

from mom_jax import config
from mom_jax.parallel import sharding

PREFIX = 'mom_jax/'
HEARTBEAT_SECONDS = 1.0  # between heartbeats
DONE, FAILED = 'done', 'failed'  # in place of the last heartbeat
# Exit code: another process is lost; the same command resumes the run.
EXIT_LOST = 3
# Variables of launchers that start one of several processes.
LAUNCHERS = ('JOB_COMPLETION_INDEX', 'JAX_COORDINATOR_ADDRESS')


@contextlib.contextmanager
def distributed(
    coordinator: str | None, count: int | None, index: int | None,
    detect: bool, timeout: float,
) -> Iterator[None]:
  """Initialise `jax.distributed` if this is one of several processes.

  Before all use of jax: by address, count and index, or else by the environment
  if `detect` is true or `is_launched`.

  Args:
    timeout: seconds after which a silent process counts as lost.
  Raises:
    UserError: some of address, count and index are missing, or nobody answers.
  """
  values = dict(coordinator=coordinator, processes=count, process=index)
  given = [k for k, v in values.items() if v is not None]
  if given and len(given) < 3:
    missing = ', '.join(f'--{k}' for k in values if k not in given)
    raise config.UserError(
        f'--{given[0]} needs {missing} too: the address of process 0 as'
        ' HOST:PORT, how many processes there are, and which one this is.')
  if index is not None and not 0 <= index < count:
    raise config.UserError(
        f'--process={index} must lie between 0 and --processes={count} - 1.')
  if not given and not detect and not is_launched(os.environ):
    yield
    return
  # `CoordinatedStop` takes its place.
  jax.config.update('jax_enable_preemption_service', False)
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
        f' ({" ".join(str(e).split())[:200]}); {_remedy(os.environ)}.') from e
  try:
    yield
  except config.UserError as e:
    _exit(f'error: {e}', 2)
  except BaseException:
    # The others wait for this process in a collective: do not wait for them.
    _exit(traceback.format_exc(), 1)
  jax.distributed.shutdown()


def _remedy(environment: Mapping[str, str]) -> str:
  """What to do when processes do not find each other."""
  found = [name for name in (*LAUNCHERS, 'SLURM_NTASKS') if name in environment]
  if not found:
    return 'check --coordinator, --processes and --process'
  return (
      f'{" and ".join(found)} in the environment says that there are several:'
      ' check the launcher, give --coordinator, --processes and --process, or,'
      f' for a run of one process, unset {" and ".join(found)}')


def is_launched(environment: Mapping[str, str]) -> bool:
  """True if Slurm, a JobSet or JAX_COORDINATOR_ADDRESS starts several.

  Raises:
    UserError: Slurm's number of tasks is no number.
  """
  if any(name in environment for name in LAUNCHERS):
    return True
  if 'SLURM_PROCID' not in environment:
    return False
  tasks = environment.get('SLURM_NTASKS', '1')
  if not re.fullmatch(r'[1-9][0-9]*', tasks):
    raise config.UserError(
        f'the variable SLURM_NTASKS={tasks!r} must be a whole number above 0;'
        ' start the run with srun, or unset SLURM_PROCID for a run of one'
        ' process.')
  return int(tasks) > 1


_firsts = itertools.count()


def by_first(act: Callable[[], None], timeout: float = 600.0) -> None:
  """Call `act` on the first process of a run; the others wait for it.

  Every process is to call this in the same order.

  Args:
    timeout: seconds that the others wait.
  Raises:
    UserError: on all of them, if `act` raised it.
  """
  if jax.process_count() == 1:
    act()
    return
  store = jax_distributed.global_state.client
  key = f'{PREFIX}first/{next(_firsts)}'
  if jax.process_index() > 0:
    if text := store.blocking_key_value_get(key, int(1000 * timeout)):
      raise config.UserError(text)
    return
  try:
    act()
  except config.UserError as e:
    store.key_value_set(key, str(e))
    time.sleep(HEARTBEAT_SECONDS)  # the others read it before the store ends
    raise
  store.key_value_set(key, '')


class DataProcess(NamedTuple):
  """A process among those that read different sequences of a batch."""

  index: int
  count: int


def data_process(devices: np.ndarray, process_index: int) -> DataProcess:
  """The part of a batch that a process is to read: `index` of `count`.

  Processes whose devices hold the same sequences, as where an axis that does
  not split the batch spans them, have one index and are to read the same; the
  others follow in the order of their sequences.

  Args:
    devices: of a mesh.
  Raises:
    ValueError: processes have some sequences in common, but not all.
  """
  axes = list(sharding.AXES)
  parts = math.prod(
      devices.shape[axes.index(axis)] for axis in sharding.BATCH_AXES)
  rows_of: dict[int, set[int]] = {}
  for row, row_devices in enumerate(devices.reshape(parts, -1)):
    for device in row_devices:
      rows_of.setdefault(device.process_index, set()).add(row)
  groups = sorted(set(map(tuple, map(sorted, rows_of.values()))))
  if sum(map(len, groups)) > parts or len(set(map(len, groups))) > 1:
    shown = ', '.join(
        f'config.mesh.{axis}={size}' for axis, size in zip(axes, devices.shape)
        if size > 1 and axis not in sharding.BATCH_AXES)
    raise ValueError(
        f'{shown} spans processes so that two of them share some sequences of a'
        ' batch but not all, and they cannot read as one; make it a'
        f' divisor or a multiple of the {devices.size // len(rows_of)} devices'
        ' of a process.'
    )
  return DataProcess(
      groups.index(tuple(sorted(rows_of[process_index]))), len(groups))


class Stop:
  """Catches SIGTERM and SIGINT while entered; a second one acts at once.

  Attributes:
    signal: name of the signal, or None.
  """

  def __init__(self) -> None:
    self.signal: str | None = None
    self._handlers: dict[int, Any] = {}

  def __enter__(self) -> Stop:
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._handlers[number] = signal.signal(number, self._on_signal)
    return self

  def _on_signal(self, number: int, frame: Any) -> None:
    del frame
    self.signal = signal.Signals(number).name
    signal.signal(number, self._handlers[number])

  def __exit__(self, *error: object) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  @property
  def interrupts(self) -> bool:
    """True to leave an evaluation under way; never if others take part in it.
    """
    return self.signal is not None

  def after(self, step: int) -> str | None:
    """The signal, if the run is to stop after `step` steps."""
    del step
    return self.signal


class CoordinatedStop(Stop):
  """A stop of all processes after the same step.

  Args:
    timeout: seconds of silence after which a process counts as lost.
    store: the coordinator's key-value store; jax's own by default.
    on_lost: called with a message; by default prints it and ends this process.
  """

  def __init__(
      self, timeout: float, store: Any = None, index: int | None = None,
      count: int | None = None, on_lost: Callable[[str], None] | None = None,
  ) -> None:
    super().__init__()
    self._timeout, self._on_lost = timeout, on_lost or _exit
    self._store = store or jax_distributed.global_state.client
    self._index = jax.process_index() if index is None else index
    self._count = count or jax.process_count()
    self._lock = threading.Lock()
    self._promise: int | None = None  # the step that this process goes to
    self._published = False  # the promise, which then must be kept
    self._last_step: int | None = None
    self._agreed = threading.Event()
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self) -> CoordinatedStop:
    super().__enter__()
    self._thread.start()
    return self

  def __exit__(self, *error: object) -> None:
    super().__exit__(*error)
    if _is_runtime_error(error[1]):
      # A collective failed: if a process is lost, the thread says so.
      self._thread.join(2 * self._timeout)
    self._ended.set()
    self._thread.join()
    with contextlib.suppress(Exception):  # the coordinator may be gone
      if self._promise is not None:  # so that nobody waits for it
        self._set(f'promise/{self._index}', str(self._promise))
      self._set(
          f'heartbeat/{self._index}', DONE if error[0] is None else FAILED)

  @property
  def interrupts(self) -> bool:
    return False

  def after(self, step: int) -> str | None:
    with self._lock:
      if not self._published:
        self._promise = step + 1
        return None
    self._agreed.wait()  # the thread ends the process if others are lost
    return self.signal if step >= self._last_step else None

  def _watch(self) -> None:
    """Exchange heartbeats, signals and promises until the run has ended."""
    heartbeat, seen, last_answer = 0, {}, time.monotonic()
    requested = False
    while not self._ended.wait(HEARTBEAT_SECONDS):
      try:
        heartbeat += 1
        self._set(f'heartbeat/{self._index}', str(heartbeat))
        if self.signal and not requested:
          self._set('stop', self.signal)
          requested = True
        known = {key.removeprefix(PREFIX): value for key, value in
                 self._store.key_value_dir_get(PREFIX)}
        if 'stop' in known:
          self._agree(known)
        last_answer = time.monotonic()
      except Exception as e:  # whatever the store raises
        if time.monotonic() - last_answer > self._timeout:
          self._give_up(f'process 0, the coordinator, does not answer ({e})')
          return
        continue
      reason = known.get('lost') or self._find_lost(known, seen, last_answer)
      if reason:
        self._give_up(reason)
        return

  def _set(self, key: str, value: str) -> None:
    self._store.key_value_set(PREFIX + key, value, allow_overwrite=True)

  def _find_lost(self, known, seen, now) -> str | None:
    """The process that failed or whose heartbeat has stopped for too long."""
    for i in range(self._count):
      heartbeat = known.get(f'heartbeat/{i}')
      if heartbeat == FAILED:
        return f'process {i} has failed'
      if i not in seen or seen[i][0] != heartbeat or heartbeat == DONE:
        seen[i] = (heartbeat, now)
      elif now - seen[i][1] > self._timeout:
        return f'process {i} has been silent for {self._timeout:g} s'
    return None

  def _agree(self, known: dict[str, str]) -> None:
    """Publish the promise; with all promises, the step to stop at."""
    self.signal = self.signal or known['stop']
    with self._lock:
      if self._promise is not None and not self._published:
        self._set(f'promise/{self._index}', str(self._promise))
        self._published = True
    promises = [known.get(f'promise/{i}') for i in range(self._count)]
    if None not in promises and not self._agreed.is_set():
      self._last_step = max(map(int, promises))
      self._agreed.set()

  def _give_up(self, reason: str) -> None:
    if not self._ended.is_set():
      with contextlib.suppress(Exception):
        self._set('lost', reason)
      if self._index == 0:  # which serves the store: the others read it first
        time.sleep(3 * HEARTBEAT_SECONDS)
      self._on_lost(
          f'error: lost another process of this run: {reason}. Start all'
          ' processes again with the same command; the run goes on from its'
          ' last checkpoint.')


def _is_runtime_error(error: BaseException | None) -> bool:
  """True if XLA raised it; a ValueError, too, may hold its status."""
  return isinstance(error, jax.errors.JaxRuntimeError) or (
      isinstance(error, ValueError) and re.match('[A-Z_]+: ', str(error))
      is not None)


def _exit(message: str, code: int = EXIT_LOST) -> None:
  """End the process now: its threads may wait for devices for ever."""
  print(message, file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(code)


def make_stop(timeout: float) -> Stop:
  """A stop of this process, or of all of several."""
  return CoordinatedStop(timeout) if jax.process_count() > 1 else Stop()
