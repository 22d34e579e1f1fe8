"""Data workers end with their process, and not before it."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Prints the number of its worker and when that has started; ends with stdin.
_PARENT = """
import multiprocessing, sys, time
from mom_jax.data import workers

def work(started):
  workers.follow_parent(0, 1)
  started.set()
  time.sleep(100)

if __name__ == '__main__':
  context = multiprocessing.get_context('spawn')
  started = context.Event()
  worker = context.Process(target=work, args=(started,), daemon=True)
  workers.start(worker.start)
  print(worker.pid, flush=True)
  started.wait()
  print('started', flush=True)
  sys.stdin.read()
"""


@pytest.fixture
def parent(tmp_path):
  file = tmp_path / 'parent.py'
  file.write_text(_PARENT)
  processes = []

  def start():
    process = subprocess.Popen(
        [sys.executable, file], text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
    processes.append(process)
    return process, int(process.stdout.readline())

  yield start
  for process in processes:
    if _alive(process.pid):
      os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _alive(pid):
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z'
  except FileNotFoundError:
    return False


def _wait_for_end(pid):
  end = time.monotonic() + 20
  while _alive(pid):
    assert time.monotonic() < end, 'the worker has not ended'
    time.sleep(0.01)


pytestmark = pytest.mark.skipif(
    not pathlib.Path('/proc/self/stat').exists(), reason='needs /proc')


def test_a_worker_ends_with_a_process_that_is_killed(parent):
  process, worker = parent()
  assert process.stdout.readline() == 'started\n'
  process.kill()
  _wait_for_end(worker)


def test_a_worker_outlives_signals_to_all_but_ends_with_its_process(parent):
  process, worker = parent()
  for moment in ('while it starts', 'while it works'):
    for number in (signal.SIGINT, signal.SIGTERM):
      os.kill(worker, number)
    if moment == 'while it starts':
      assert process.stdout.readline() == 'started\n'
  time.sleep(0.2)
  assert _alive(worker)
  _, err = process.communicate(timeout=20)  # ends it as Python ends daemons
  assert process.returncode == 0 and not err
  _wait_for_end(worker)
