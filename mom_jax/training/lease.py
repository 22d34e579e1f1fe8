"""Exclusive claim on a workdir, so that two runs never write into one.

  workdir/lease.json    who trains there, and a count of renewals

The holder renews its lease every `RENEW_SECONDS` and removes it at the end. A
lease whose process is gone from this machine is free at once. Whether a holder
on another machine still lives is seen from its renewals alone, not from clocks:
without one for `EXPIRE_SECONDS` the lease is free. Of several processes of a
run the first one holds it.

Two that take a free lease at once both write it, wait until the other must have
written, and read it again: the last writer holds it (Fischer's algorithm). This
asks of the file system only that a file appears whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import threading
import time
from typing import Any, NamedTuple
import uuid

import jax

from mom_jax import config
from mom_jax.training import checkpoint, multihost

FILE = 'lease.json'
RENEW_SECONDS = 20.0
EXPIRE_SECONDS = 90.0
SETTLE_SECONDS = 0.5  # between the writing of a lease and its confirmation


@dataclasses.dataclass(frozen=True)
class Owner:
  """The process that holds a lease.

  Attributes:
    host: its name, for messages.
    machine: tells apart kernels since their start, and their containers.
    pid: process number on that machine.
    started: tells apart processes that got the same number, '' if unknown.
    token: of this claim alone.
  """

  host: str
  machine: str
  pid: int
  started: str
  token: str

  @classmethod
  def here(cls) -> Owner:
    return cls(
        platform.node(), _machine(), os.getpid(), _started(os.getpid()),
        uuid.uuid4().hex)

  @property
  def is_gone(self) -> bool:
    """True if it is known that the process does not run any more."""
    if self.machine != _machine():
      return False
    try:
      os.kill(self.pid, 0)
    except ProcessLookupError:
      return True
    except OSError:  # it belongs to somebody else
      pass
    return self.started != _started(self.pid)

  def __str__(self) -> str:
    return f'process {self.pid} on {self.host}'


class Lease:
  """The lease of this run on a workdir, which its first process holds.

  Every process makes the same calls, in the same order.

  Args:
    say: takes a line about what it waits for.
  """

  def __init__(self, workdir: pathlib.Path, say: Callable[[str], Any]):
    self._workdir, self._say = workdir, say
    self._path = workdir / FILE
    self._owner, self._renewals = Owner.here(), 0
    self._made_folder = False
    self._written = 0.0
    self._taken_by: Owner | None = None
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._renew, daemon=True)

  def take(self) -> None:
    """Write the lease once it is free; `confirm` it before all else is written.

    Raises:
      UserError: another process holds it, or the workdir cannot be written.
    """
    multihost.by_first(self._take)

  def _take(self) -> None:
    if (found := _read(self._path)) is not None:
      self._wait_for(found)
    with checkpoint.writing(f'{self._path}'):
      self._made_folder = not self._workdir.exists()
      self._workdir.mkdir(parents=True, exist_ok=True)
      self._write()
    self._written = time.monotonic()

  def confirm(self) -> None:
    """Make sure that nobody took the lease at the same time, and keep it.

    Raises:
      UserError: somebody did.
    """
    multihost.by_first(self._confirm)

  def _confirm(self) -> None:
    time.sleep(max(0.0, self._written + SETTLE_SECONDS - time.monotonic()))
    self.check_now()
    self._thread.start()  # on the first process alone

  def check(self) -> None:
    """Raise UserError if it is known that another process took the lease."""
    if self._taken_by is not None:
      raise config.UserError(
          f'--workdir={self._workdir} is in use: {self._taken_by} has taken it'
          ' over from this process. Stop one of the two and, if you stop that'
          ' one, start this one again.')

  def check_now(self) -> None:
    """Read the lease, and raise UserError if another process took it."""
    if jax.process_index() == 0:
      self._look()
    self.check()

  def release(self) -> None:
    """Remove the lease, and the workdir if it was made for nothing."""
    self._ended.set()
    if self._thread.ident is not None:
      self._thread.join()
    with contextlib.suppress(OSError):
      found = _read(self._path)
      # Other processes of this run have other tokens.
      if found is not None and found.owner.token == self._owner.token:
        for partial in self._workdir.glob(f'{FILE}.*'):  # of killed runs
          partial.unlink()
        self._path.unlink()
        if self._made_folder:
          self._workdir.rmdir()  # fails if anything is in it

  def _wait_for(self, first: _Record) -> None:
    """Return when a lease is free; raise if it is renewed."""
    if first.owner.is_gone:
      return
    if first.owner.machine == _machine():
      raise self._held(first.owner)
    self._say(
        f'waiting up to {EXPIRE_SECONDS:g} s to see whether {first.owner} still'
        f' trains in {self._workdir}')
    end = time.monotonic() + EXPIRE_SECONDS
    while time.monotonic() < end:
      time.sleep(0.2)
      found = _read(self._path)
      if found is None:
        return
      if found != first:
        raise self._held(found.owner)

  def _held(self, owner: Owner) -> config.UserError:
    return config.UserError(
        f'--workdir={self._workdir} is in use: {owner} trains in it. Stop that'
        ' run or choose another --workdir.')

  def _renew(self) -> None:
    while not self._ended.wait(RENEW_SECONDS):
      self._look()
      if self._taken_by is not None:
        return
      # A disk that is full now may not be when the next renewal is due.
      with contextlib.suppress(OSError):
        self._write()

  def _look(self) -> None:
    found = _read(self._path)
    if found is not None and found.owner.token != self._owner.token:
      self._taken_by = found.owner

  def _write(self) -> None:
    self._renewals += 1
    partial = self._path.with_name(f'{FILE}.{self._owner.token}.partial')
    record = dataclasses.asdict(self._owner) | {'renewals': self._renewals}
    try:
      partial.write_text(json.dumps(record), encoding='utf-8')
      partial.replace(self._path)
    except OSError:
      with contextlib.suppress(OSError):
        partial.unlink(missing_ok=True)
      raise


@contextlib.contextmanager
def hold(
    workdir: pathlib.Path, say: Callable[[str], Any]
) -> Iterator[Lease]:
  """Take the lease of a workdir, and release it at the end.

  Args:
    say: takes a line about what it waits for.
  """
  lease = Lease(workdir, say)
  lease.take()
  try:
    yield lease
  finally:
    lease.release()


class _Record(NamedTuple):
  """What the file says."""

  owner: Owner
  renewals: int


def _read(path: pathlib.Path) -> _Record | None:
  """Return the lease, or None if there is none that can be read."""
  try:
    record = json.loads(path.read_text(encoding='utf-8'))
    renewals = record.pop('renewals')
    return _Record(Owner(**record), renewals)
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return None


def _machine() -> str:
  """Name this kernel since its start and this container's processes."""
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:  # not Linux
    return platform.node()


def _started(pid: int) -> str:
  """Return when a process started, in ticks; '' where nobody knows."""
  try:
    text = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except OSError:
    return ''
  return text.rpartition(')')[2].split()[19]
