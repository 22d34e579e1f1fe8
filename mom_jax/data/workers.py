"""Processes that read data for a training process, and end with it.

Ctrl-C in a terminal, and Slurm's signal before a job's end, reach every process
of a run. The training process then stops in order, for which it still needs its
workers: they are deaf to both signals from their first moment on. And a
training process that is killed cannot end its workers: they see it themselves.
"""

from __future__ import annotations

from collections.abc import Callable
import multiprocessing
from multiprocessing import resource_tracker
import os
import queue
import signal
import threading
from typing import Any, TypeVar

import grain

T = TypeVar('T')
_SIGNALS = {signal.SIGINT, signal.SIGTERM}


class Reader(grain.DatasetIterator):
  """An iterator whose worker processes hear no signal but their process's."""

  def __init__(self, iterator: grain.DatasetIterator):
    super().__init__()
    self._iterator = iterator
    self._started = False

  def __next__(self) -> Any:
    if self._started:
      return next(self._iterator)
    self._started = True
    return start(lambda: next(self._iterator))  # Grain starts them for it

  def get_state(self) -> dict[str, Any]:
    return self._iterator.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    self._iterator.set_state(state)
    self._started = False  # there may be new ones

  def start_prefetch(self) -> None:
    start(self._iterator.start_prefetch)

  def close(self) -> None:
    self._iterator.close()


def start(act: Callable[[], T]) -> T:
  """Call a function that starts processes, so that they are deaf to signals.

  A process inherits which signals are blocked from the thread that starts it.
  The thread is not this one, which stays open to them.
  """
  resource_tracker.ensure_running()  # it unblocks them when it starts
  done: queue.SimpleQueue[tuple[Any, BaseException | None]] = (
      queue.SimpleQueue())

  def work() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
      done.put((act(), None))
    except BaseException as e:
      done.put((None, e))

  threading.Thread(target=work, daemon=True).start()
  result, error = done.get()
  if error is not None:
    raise error
  return result


def follow_parent(index: int, count: int) -> None:
  """Make this worker end with the process that started it, and by it alone.

  Args:
    index, count: of the worker and of all of them, as Grain gives them.
  """
  del index, count
  parent = multiprocessing.parent_process()

  def outlive() -> None:
    parent.join()
    os._exit(1)

  def obey() -> None:
    while _sender(signal.SIGTERM) not in (parent.pid, None):
      pass
    os._exit(0)

  for act in (outlive, obey):
    threading.Thread(target=act, daemon=True).start()


def _sender(number: int) -> int | None:
  """Wait for a blocked signal; return who sent it, None if nobody knows."""
  if hasattr(signal, 'sigwaitinfo'):
    return signal.sigwaitinfo({number}).si_pid
  signal.sigwait({number})  # macOS
  return None
