"""Several processes are one run: they stop together and notice a loss."""

import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tiny_run

from mom_jax import config
from mom_jax.parallel import sharding
from mom_jax.training import metrics, multihost

ROOT = pathlib.Path(__file__).parents[2]


class Store:
  """The coordinator's store, of one process."""

  def __init__(self):
    self._values, self._lock, self.down = {}, threading.Lock(), False

  def key_value_set(self, key, value, allow_overwrite=False):
    assert allow_overwrite
    with self._lock:
      if self.down:
        raise RuntimeError('UNAVAILABLE')
      self._values[key] = value

  def key_value_dir_get(self, prefix):
    with self._lock:
      if self.down:
        raise RuntimeError('UNAVAILABLE')
      return [(k, v) for k, v in self._values.items() if k.startswith(prefix)]


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(multihost, 'HEARTBEAT_SECONDS', 0.01)


@pytest.mark.parametrize('seed', range(5))
def test_all_processes_stop_after_the_same_step(quick, seed):
  """Whoever gets the signal, and however far each has come.

  As devices do, a step ends once every process has started it, and no process
  is more than two steps ahead of what it has seen end.
  """
  rng, count, store = random.Random(seed), 4, Store()
  started, ended = [0] * count, [None] * count
  signalled = rng.randrange(count)

  def run(i):
    with multihost.CoordinatedStop(60.0, store, i, count) as stop:
      step = 0
      while True:
        if step == 5 and i == signalled:
          stop.signal = 'SIGTERM'
        if stop.after(step):
          break
        step += 1
        started[i] = step
        time.sleep(random.random() * 0.01)
        while min(started) < step - 1:
          time.sleep(0.001)
      ended[i] = step, stop.signal

  threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
    assert not thread.is_alive()
  assert len(set(ended)) == 1
  assert ended[0][0] >= 5 and ended[0][1] == 'SIGTERM'


def _lost(store, index=0, count=2, timeout=0.2):
  """What a process that watches for a while says of the others."""
  said = []
  stop = multihost.CoordinatedStop(timeout, store, index, count, said.append)
  until = time.monotonic() + 2.0
  with stop:
    while not said and time.monotonic() < until:
      time.sleep(0.01)
  return said


def test_a_silent_process_is_named_within_its_time(quick):
  store = Store()
  store.key_value_set('mom_jax/heartbeat/1', '7', allow_overwrite=True)
  said = _lost(store)
  assert len(said) == 1
  assert 'process 1 has been silent for 0.2 s' in said[0]
  assert 'Start all processes again with the same command' in said[0]


def test_a_process_that_failed_is_named_at_once(quick):
  store = Store()
  store.key_value_set(
      'mom_jax/heartbeat/1', multihost.FAILED, allow_overwrite=True)
  assert 'process 1 has failed' in _lost(store, timeout=60.0)[0]


def test_a_process_that_is_done_is_not_lost(quick):
  """Others may save for longer than that."""
  store = Store()
  store.key_value_set(
      'mom_jax/heartbeat/1', multihost.DONE, allow_overwrite=True)
  said = []
  with multihost.CoordinatedStop(0.05, store, 0, 2, said.append):
    time.sleep(0.3)
  assert not said


def test_a_signal_after_the_last_step_keeps_nobody_waiting(quick):
  """One has reached the end and left when another one hears of it."""
  store = Store()
  with multihost.CoordinatedStop(60.0, store, 1, 2) as one:
    assert one.after(7) is None  # the last step: it is done
  with multihost.CoordinatedStop(60.0, store, 0, 2) as other:
    other.signal = 'SIGTERM'
    time.sleep(0.2)
    assert other.after(6) is None
    assert other.after(7) is None


def test_a_coordinator_that_does_not_answer_is_lost(quick):
  store = Store()
  store.down = True
  assert 'process 0, the coordinator, does not answer' in _lost(store, 1)[0]


@pytest.mark.parametrize('given, message', [
    (('host:1', None, None), '--coordinator needs --processes, --process too'),
    (('host:1', 2, None), '--coordinator needs --process too'),
    (('host:1', 2, 2), '--process=2 must lie between 0 and --processes=2 - 1'),
])
def test_half_an_address_is_one_line(given, message):
  with pytest.raises(config.UserError, match=message), multihost.distributed(
      *given, False, 60.0):
    pass


def test_launchers_are_recognised():
  assert not multihost.is_launched({'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'})
  assert not multihost.is_launched({'SLURM_NTASKS': '2'})  # sbatch, no srun
  assert multihost.is_launched({'SLURM_NTASKS': '2', 'SLURM_PROCID': '1'})
  assert multihost.is_launched({'JOB_COMPLETION_INDEX': '0'})
  assert multihost.is_launched({'JAX_COORDINATOR_ADDRESS': 'a:1'})


@pytest.mark.parametrize('tasks', ['4(x2)', '', '-3', '0', '2.0'])
def test_values_of_launchers_are_checked(tasks):
  with pytest.raises(config.UserError, match='SLURM_NTASKS'):
    multihost.is_launched({'SLURM_NTASKS': tasks, 'SLURM_PROCID': '0'})


def test_what_says_that_there_are_several_is_named(monkeypatch):
  monkeypatch.setenv('JOB_COMPLETION_INDEX', '0')

  def fails(*args, **kwargs):
    raise ValueError('no cluster')

  monkeypatch.setattr('jax.distributed.initialize', fails)
  monkeypatch.setattr('jax.config.update', lambda *_: None)
  with pytest.raises(config.UserError, match=(
      'unset JOB_COMPLETION_INDEX')), multihost.distributed(
          None, None, None, False, 60.0):
    pass


@dataclasses.dataclass(frozen=True)
class Device:
  process_index: int


@pytest.mark.parametrize('sizes, each, wanted', [
    (dict(data=8), 4, [(0, 2), (1, 2)]),
    (dict(data=2, tensor=2, context=2), 4, [(0, 2), (1, 2)]),
    (dict(data=2, tensor=2, context=2), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    (dict(tensor=4, context=2), 4, [(0, 1), (0, 1)]),
    (dict(dcn_expert=2, expert=4), 4, [(0, 2), (1, 2)]),
])
def test_processes_with_the_same_rows_read_the_same(sizes, each, wanted):
  """Tensor and context may lie across processes."""
  shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
  devices = np.array([Device(i // each) for i in range(8)]).reshape(shape)
  got = [multihost.data_process(devices, i) for i in range(8 // each)]
  assert got == wanted


def test_processes_with_some_rows_in_common_are_named():
  devices = np.array([Device(i // 3) for i in range(6)]).reshape(
      1, 1, 3, 1, 1, 2, 1)
  with pytest.raises(ValueError, match=re.escape(
      'config.mesh.tensor=2 spans processes')) as error:
    multihost.data_process(devices, 0)
  assert 'a divisor or a multiple of the 3 devices' in str(error.value)


# Real processes.

_STARTED: list[subprocess.Popen] = []


def _port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


@pytest.fixture(autouse=True)
def no_process_is_left():
  yield
  for process in _STARTED:
    process.kill()
    process.wait()
  _STARTED.clear()


def _start(command, count, **environment):
  """`count` processes of a command that takes the flags of a cluster."""
  cluster = [f'--coordinator=localhost:{_port()}', f'--processes={count}']
  environment = os.environ | {
      'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': '1',
      'JAX_PLATFORMS': 'cpu'} | environment
  processes = [subprocess.Popen(
      [sys.executable, *command, *cluster, f'--process={i}'], text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
      for i in range(count)]
  _STARTED.extend(processes)
  return processes


_MINIMAL = """
import sys, time
from mom_jax.training import multihost
flags = dict(a.split('=') for a in sys.argv[1:])
with multihost.distributed(flags['--coordinator'], int(flags['--processes']),
                           int(flags['--process']), False, 10.0):
  import jax
  from jax.experimental import multihost_utils
  with multihost.make_stop(10.0) as stop:
    step = 0
    while not stop.after(step):
      step += 1
      multihost_utils.process_allgather(jax.numpy.ones(()))
      print('step', step, flush=True)
      time.sleep(0.02)
"""


def test_a_signal_to_one_of_two_processes_stops_both_at_one_step():
  processes = _start(['-c', _MINIMAL], 2)
  while processes[1].stdout.readline() != 'step 1\n':  # Gloo talks as well
    assert processes[1].poll() is None, processes[1].communicate()
  processes[1].send_signal(signal.SIGTERM)
  outs = [p.communicate(timeout=60) for p in processes]
  assert [p.returncode for p in processes] == [0, 0], outs
  last = {out.split()[-1] for out, _ in outs}
  assert len(last) == 1


_FIRST = """
import sys
from mom_jax import config
from mom_jax.training import multihost
flags = dict(a.split('=') for a in sys.argv[1:])
with multihost.distributed(flags['--coordinator'], int(flags['--processes']),
                           int(flags['--process']), False, 10.0):
  import jax
  def act():
    print('acts')
  def fail():
    raise config.UserError('no room')
  multihost.by_first(act)
  multihost.by_first(fail)
"""


def test_what_the_first_process_finds_wrong_ends_all_alike():
  processes = _start(['-c', _FIRST], 2)
  outs = [p.communicate(timeout=60) for p in processes]
  assert [p.returncode for p in processes] == [2, 2], outs
  assert ['acts' in out for out, _ in outs] == [True, False]
  assert [err.splitlines()[-1] for _, err in outs] == ['error: no room'] * 2


@pytest.mark.slow
def test_without_process_0_the_others_end_at_once_and_say_so():
  """JAX aborts them; where it does not, the coordinated stop gives up."""
  processes = _start(['-c', _MINIMAL], 3)
  while processes[1].stdout.readline() != 'step 1\n':
    assert processes[1].poll() is None, processes[1].communicate()
  processes[0].kill()
  killed = time.monotonic()
  outs = [p.communicate(timeout=60) for p in processes[1:]]
  assert time.monotonic() - killed < 60
  for process, (_, err) in zip(processes[1:], outs):
    assert process.returncode in (-signal.SIGABRT, multihost.EXIT_LOST), err
    assert re.search('[Ll]eader task|process 0, the coordinator', err), err


def _train(folder, workdir, count, *overrides):
  cfg = tiny_run.make_config(
      folder, 'model.pattern=attention/mlp', 'model.num_layers=1',
      'data.readers=4', 'train.steps=40', 'train.eval_every=20',
      'checkpoint.every=5', *overrides)
  path = folder / 'config.json'
  path.write_text(config.to_json(cfg))
  command = ['-m', 'mom_jax.train', f'--config={path}', '--patience=20',
             f'--workdir={workdir}']
  return _start(command, count,
                JAX_COMPILATION_CACHE_DIR=str(folder / f'compiled_{count}'))


def _finish(processes):
  outs = [p.communicate(timeout=300) for p in processes]
  assert [p.returncode for p in processes] == [0] * len(processes), outs


def _curve(workdir):
  return [{k: v for k, v in r.items() if k not in metrics.TIMING_KEYS}
          for r in metrics.read_jsonl(workdir)]


def _wait_for(workdir, processes, step):
  """Until that step is in the metrics."""
  path = workdir / 'metrics.jsonl'
  while not path.is_file() or f'"step": {step},' not in path.read_text():
    assert all(p.poll() is None for p in processes), [
        p.communicate() for p in processes]
    time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 4])
def test_a_killed_process_ends_the_run_and_a_restart_goes_on(tmp_path, count):
  """To the bit; the others leave in bounded time and say who was lost."""
  _finish(_train(tmp_path, tmp_path / 'whole', count))
  workdir = tmp_path / 'killed'
  processes = _train(tmp_path, workdir, count)
  _wait_for(workdir, processes, 12)
  processes[1].kill()
  killed = time.monotonic()
  outs = [p.communicate(timeout=150) for p in processes]
  assert time.monotonic() - killed < 120
  for i, process in enumerate(processes):
    if i != 1:
      assert process.returncode == multihost.EXIT_LOST, outs[i]
      assert 'process 1 has been silent' in outs[i][1]
  assert len(_curve(workdir)) < 42
  _finish(_train(tmp_path, workdir, count))
  assert _curve(workdir) == _curve(tmp_path / 'whole')


def _same_losses(one, other):
  for a, b in zip(_curve(one), _curve(other), strict=True):
    assert a['step'] == b['step']
    for key in a.keys() & {'loss', 'val_loss', 'grad_norm', 'log_z2'}:
      assert b[key] == pytest.approx(a[key], rel=2e-4), (key, a['step'])


@pytest.mark.slow
def test_heads_and_sequences_may_lie_across_processes(tmp_path):
  """Both processes read all rows; losses are those of one."""
  _finish(_train(tmp_path, tmp_path / 'one', 1))
  for axis in ('tensor', 'context'):
    workdir = tmp_path / axis
    _finish(_train(tmp_path, workdir, 2, f'mesh.{axis}=2'))
    _same_losses(tmp_path / 'one', workdir)


@pytest.mark.slow_law
def test_a_run_goes_on_with_fewer_processes_on_the_same_data(tmp_path):
  """Four, then two, then one: every loss as with one from the start."""
  _finish(_train(tmp_path, tmp_path / 'one', 1))
  workdir = tmp_path / 'fewer'
  for count, stop in ((4, 12), (2, 24)):
    processes = _train(tmp_path, workdir, count)
    _wait_for(workdir, processes, stop)
    processes[0].send_signal(signal.SIGTERM)
    _finish(processes)
    steps = [int(p.name) for p in (workdir / 'checkpoints').iterdir()]
    assert stop <= max(steps) < 40
  _finish(_train(tmp_path, workdir, 1))
  _same_losses(tmp_path / 'one', workdir)
  kept = json.loads((workdir / 'config.json').read_text())
  assert kept['data']['readers'] == 4
