"""Compiled programs on disk, and words for the time that compiling takes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
import contextlib
import hashlib
import io
import pathlib
import platform
import sys
import threading
import time
from typing import Any

from absl import logging
import filelock
import jax

from mom_jax import config

FOLDER = 'compiled'  # below `data.cache`
MAX_BYTES = 4 << 30  # of the folder of one kind of machine
FIRST_WORD = 15.0  # seconds until the first "so far"; then twice as many
_ENTRY, _USED = '-cache', '-atime'  # file names of jax.


def keep(cfg: config.Config) -> pathlib.Path | None:
  """Keep compiled programs in `data.cache` for later starts of any command.

  jax writes and reads them by a hash of program, versions and options, and
  drops those longest unused where the folder grows beyond `MAX_BYTES`. A lock
  in the folder makes it safe for several processes and machines.

  Without effect where `data.cache_compiled` is False, and where the user has
  set jax's own cache (JAX_COMPILATION_CACHE_DIR) or turned it off
  (JAX_ENABLE_COMPILATION_CACHE).

  Returns:
    The folder, or None.
  """
  if not (cfg.data.cache_compiled and jax.config.jax_enable_compilation_cache):
    return None
  if jax.config.jax_compilation_cache_dir:
    return pathlib.Path(jax.config.jax_compilation_cache_dir)
  folder = pathlib.Path(cfg.data.cache, FOLDER, machine())
  try:
    folder = folder.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    _drop_partial(folder)
  except (OSError, NotImplementedError, RuntimeError) as e:
    logging.warning(
        'compiled programs are not kept, since %s cannot be used (%s); give'
        ' another folder with --config.data.cache=DIR', folder, e)
    return None
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_compilation_cache_max_size', MAX_BYTES)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)
  return folder


def machine() -> str:
  """Name what a program for the host's CPU depends on, apart from jax.

  Code for one CPU can hold instructions that another lacks.
  """
  features = platform.processor()
  with contextlib.suppress(OSError):
    for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
      if line.startswith(('flags', 'Features', 'model name')):
        features += line
      if not line:  # the first CPU is all
        break
  digest = hashlib.blake2b(features.encode(), digest_size=4).hexdigest()
  return f'{platform.machine()}-{digest}'


def _drop_partial(folder: pathlib.Path) -> None:
  """Delete what a process left that fell while it wrote.

  The time of last use is written after the program, both under the lock.

  Raises:
    OSError, NotImplementedError: the file system cannot lock.
  """
  try:
    with filelock.FileLock(folder / '.lockfile', timeout=10):
      for path in folder.glob(f'*{_ENTRY}'):
        used = path.with_name(path.name.removesuffix(_ENTRY) + _USED)
        if not used.is_file() or used.stat().st_size != 8:
          path.unlink(missing_ok=True)
          used.unlink(missing_ok=True)
  except filelock.Timeout:  # another process holds it and is at work
    return


class Background:
  """A function that compiles while the program goes on.

  The first call waits for it. If the program ends before, the process waits
  too: XLA cannot be interrupted.
  """

  def __init__(self, lowered: jax.stages.Lowered):
    executor = futures.ThreadPoolExecutor(1)
    self._compiled = executor.submit(lowered.compile)
    executor.shutdown(wait=False)

  def __call__(self, *args: Any) -> Any:
    return self._compiled.result()(*args)


@contextlib.contextmanager
def waiting(text: str, out: io.TextIOBase | None = None) -> Iterator[None]:
  """Say that a command waits for `text`, and how long, until the block ends.

  On a terminal one line counts the seconds; elsewhere lines follow after 15,
  30, 60, ... seconds.

  Args:
    out: where to; None is stderr.
  """
  out = sys.stderr if out is None else out
  live, start, done = out.isatty(), time.perf_counter(), threading.Event()

  def so_far() -> str:
    return f'{text}, {time.perf_counter() - start:.0f} s so far'

  def speak() -> None:
    wait = 1.0 if live else FIRST_WORD
    while not done.wait(wait):
      print(f'\r{so_far()}' if live else so_far(), end='' if live else '\n',
            file=out, flush=True)
      if not live:
        wait = time.perf_counter() - start

  print(text, end='' if live else '\n', file=out, flush=True)
  thread = threading.Thread(target=speak, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
    took = f'{text}: done after {time.perf_counter() - start:.1f} s'
    print(f'\r{took}' if live else took, file=out, flush=True)
