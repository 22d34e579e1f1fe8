"""A run that is killed at any moment goes on as if it had not been.

Moments are drawn from `SEED` over the life of a run, which reads with data
workers and finds its programs compiled. After each kill the same command is
given again, and everything that the run leaves is that of a run that was never
killed, to the bit.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
from orbax import checkpoint as ocp
import pytest
import tiny_run

from mom_jax import config
from mom_jax.training import lease, metrics

ROOT = pathlib.Path(__file__).parents[2]
SEED = 20261201
STEPS, EVERY, VALIDATION = 24, 5, 8
PATIENCE = 10  # seconds of silence after which a process counts as lost
# How often a moment of each phase is drawn.
PHASES = {'start': 2, 'compilation': 2, 'step': 3, 'save': 4, 'validation': 2,
          'close': 2}
SIGNALS = {'SIGKILL': 60, 'SIGTERM': 20, 'SIGINT': 20}
WHOLE, WHOLE_BY_TWO = 100, 30
# What a stopped command may exit with: it saved, or had nothing to save yet.
STOPPED = {
    'SIGKILL': {-signal.SIGKILL}, 'SIGTERM': {0, -signal.SIGTERM},
    'SIGINT': {0, 130, -signal.SIGINT}}
# And the other process of two: it stops too, finds the first lost, or is ended
# by JAX, whose coordinator is gone.
OTHERS = {0, 2, 3, -signal.SIGABRT}


@dataclasses.dataclass(frozen=True)
class Moment:
  """When a run is killed, and how.

  Attributes:
    number: of the moment, from 0.
    processes: that the run has.
    name: of the signal.
    phase: of the run's life.
    victim: index of the process that gets the signal.
    which: step, save or validation, as a fraction of all of them.
    delay: after the phase has begun, as a fraction of its time.
  """

  number: int
  processes: int
  name: str
  phase: str
  victim: int
  which: float
  delay: float

  @property
  def to_all(self) -> bool:
    """True if data workers get the signal too, as a terminal and Slurm do it.
    """
    return self.name == 'SIGINT' or (
        self.name == 'SIGTERM' and self.number % 2 == 0)

  def __str__(self) -> str:
    by = 'one process' if self.processes == 1 else (
        f'process {self.victim} of {self.processes}')
    return f'{self.number:03} {self.name} in {self.phase}, {by}'


def _moments() -> list[Moment]:
  """All of the whole campaign; the same whenever they are drawn."""
  draw = random.Random(SEED)
  names = [name for name, count in SIGNALS.items() for _ in range(count)]
  draw.shuffle(names)
  moments = []
  for number, name in enumerate(names):
    processes = 2 if number % 10 in (2, 5, 8) else 1
    phase = draw.choices(list(PHASES), list(PHASES.values()))[0]
    moments.append(Moment(number, processes, name, phase,
                          draw.randrange(processes), draw.random(),
                          draw.random()))
  return moments


MOMENTS = _moments()


def test_the_campaign_is_as_large_as_it_says():
  assert len(MOMENTS) == WHOLE
  assert sum(m.processes == 2 for m in MOMENTS) == WHOLE_BY_TWO
  for name, count in SIGNALS.items():
    assert sum(m.name == name for m in MOMENTS) == count
  for phase in PHASES:
    assert sum(m.phase == phase for m in MOMENTS) >= 5, phase


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
  if 'moment' in metafunc.fixturenames:
    short = [next(m for m in MOMENTS if (m.processes, m.name, m.phase) == case)
             for case in [(1, 'SIGKILL', 'save'), (1, 'SIGINT', 'step'),
                          (2, 'SIGKILL', 'step')]]
    whole = metafunc.config.getoption('--campaign') is not None
    metafunc.parametrize('moment', MOMENTS if whole else short, ids=str)


# Seconds that phases take which last but a moment.
SHORT = {'step': 0.05, 'save': 0.1, 'validation': 0.1}


class Lives:
  """Runs of one config, with one process and with two."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._seconds: dict[int, dict[str, float]] = {}
    self._started: list[subprocess.Popen] = []
    cfg = tiny_run.make_config(
        folder, 'model.num_layers=1', 'data.readers=2', 'data.workers=1',
        f'train.steps={STEPS}', f'train.eval_every={VALIDATION}',
        'train.eval_batches=8', f'checkpoint.every={EVERY}')
    self._config = folder / 'config.json'
    self._config.write_text(config.to_json(cfg))

  def start(
      self, workdir: pathlib.Path, count: int
  ) -> list[subprocess.Popen]:
    """The processes of a run; they write to workdir.INDEX.txt."""
    cluster: list[str] = []
    if count > 1:
      with socket.socket() as s:
        s.bind(('localhost', 0))
        address = f'localhost:{s.getsockname()[1]}'
      cluster = [f'--coordinator={address}', f'--processes={count}',
                 f'--patience={PATIENCE}']
    environment = os.environ | {
        'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': '1'}
    processes = []
    for i in range(count):
      index = [f'--process={i}'] if count > 1 else []
      with output(workdir, i).open('wb') as file:
        processes.append(subprocess.Popen(
            [sys.executable, '-m', 'mom_jax.train',
             f'--config={self._config}', f'--workdir={workdir}', *cluster,
             *index],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            env=environment, start_new_session=True))
    self._started += processes
    return processes

  def whole(self, count: int) -> pathlib.Path:
    """The workdir of a run that nobody killed; programs are compiled then."""
    workdir = self._folder / f'whole{count}'
    if not workdir.exists():
      self.finish(workdir, count)
    return workdir

  def seconds(self, phase: str, count: int) -> float:
    """How long a phase of a run takes that finds its programs compiled."""
    if phase in SHORT:
      return SHORT[phase]
    if count not in self._seconds:
      self.whole(count)
      workdir = self._folder / f'timed{count}'
      processes, times = self.start(workdir, count), [time.monotonic()]
      for begun in ('compilation', 'step', 'close'):
        wait_for(begun, 0.0, workdir, processes)
        times.append(time.monotonic())
      wait(processes)
      times.append(time.monotonic())
      self._seconds[count] = {
          'start': times[1] - times[0], 'compilation': times[2] - times[1],
          'close': times[4] - times[3]}
    return self._seconds[count][phase]

  def finish(self, workdir: pathlib.Path, count: int) -> None:
    """Start a run, or resume it, and wait until it is done."""
    processes = self.start(workdir, count)
    wait(processes)
    self._check(workdir, processes)

  def _check(self, workdir, processes) -> None:
    texts = [output(workdir, i).read_text() for i in range(len(processes))]
    assert [p.returncode for p in processes] == [0] * len(processes), texts
    assert re.search('done( before)?: ', texts[0])

  def end(self) -> None:
    for process in self._started:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()


@pytest.fixture(scope='module')
def lives(tmp_path_factory) -> Iterator[Lives]:
  lives = Lives(tmp_path_factory.mktemp('lives'))
  yield lives
  lives.end()


def output(workdir: pathlib.Path, index: int) -> pathlib.Path:
  return workdir.with_name(f'{workdir.name}.{index}.txt')


def wait(processes: list[subprocess.Popen]) -> None:
  """Until all have ended, their data workers too."""
  end = time.monotonic() + 240
  for process in processes:
    process.wait(max(1.0, end - time.monotonic()))
  end = time.monotonic() + 30
  for process in processes:
    with contextlib.suppress(ProcessLookupError):
      while True:
        os.killpg(process.pid, 0)
        assert time.monotonic() < end, 'data workers outlive their process'
        time.sleep(0.05)


def wait_for(
    phase: str, which: float, workdir: pathlib.Path,
    processes: list[subprocess.Popen],
) -> bool:
  """Until a phase begins; False if a process ended before.

  Args:
    which: of the steps, saves or validations, as a fraction of all of them.
  """

  def wrote(pattern: str) -> bool:
    path = workdir / 'metrics.jsonl'
    return path.is_file() and re.search(pattern, path.read_text()) is not None

  def begun() -> bool:
    match phase:
      case 'start':
        return True
      case 'compilation':
        return ' parameters, ' in output(workdir, 0).read_text()
      case 'step':
        return wrote(f'"step": {1 + int(which * (STEPS - 1))},')
      case 'save':
        number = EVERY * (1 + int(which * (STEPS // EVERY)))
        return any((workdir / 'checkpoints').glob(f'{number}[.]*')) or (
            workdir / 'checkpoints' / f'{number}').exists()
      case 'validation':
        number = VALIDATION * (1 + int(which * (STEPS // VALIDATION)))
        return wrote(f'"step": {number},')
      case 'close':
        return wrote(f'"step": {STEPS},.*val_loss')
    raise AssertionError(phase)

  while not begun():
    if any(p.poll() is not None for p in processes):
      return False
    time.sleep(0.001)
  return True


def kill(
    lives: Lives, moment: Moment, workdir: pathlib.Path
) -> list[subprocess.Popen]:
  """Start a run and kill it; its processes, which have ended."""
  lives.whole(moment.processes)
  seconds = lives.seconds(moment.phase, moment.processes)
  for attempt in range(8):  # a run may end before its moment has come
    shutil.rmtree(workdir, ignore_errors=True)
    processes = lives.start(workdir, moment.processes)
    assert wait_for(moment.phase, moment.which, workdir, processes), [
        output(workdir, i).read_text() for i in range(moment.processes)]
    time.sleep(moment.delay * seconds / 2**attempt)
    victim = processes[moment.victim]
    if victim.poll() is None:
      number = signal.Signals[moment.name]
      if moment.to_all:
        os.killpg(victim.pid, number)
      else:
        victim.send_signal(number)
      wait(processes)
      return processes
    wait(processes)
  raise AssertionError('the run ended eight times before its moment')


def check_end(
    moment: Moment, processes: list[subprocess.Popen], workdir: pathlib.Path
) -> None:
  """Codes are those of a stop, and nobody prints a traceback."""
  for i, process in enumerate(processes):
    text = output(workdir, i).read_text()
    victim = i == moment.victim
    codes = STOPPED[moment.name] if victim else OTHERS
    # A second signal comes to those whom a first one made end.
    assert process.returncode in codes, (i, process.returncode, text)
    if process.returncode != -signal.SIGABRT:  # JAX prints what it likes
      assert 'Traceback' not in text, text


def check_same(workdir: pathlib.Path, whole: pathlib.Path) -> None:
  """Everything that the run leaves is that of another, but for times."""
  assert _curve(workdir) == _curve(whole)
  names = {p.name for p in whole.iterdir()}
  assert {p.name for p in workdir.iterdir()} == names
  assert lease.FILE not in names
  saved = [_names(x / 'checkpoints') for x in (workdir, whole)]
  assert all(name.isdecimal() for name in saved[0]), saved
  assert saved[0][-1] == saved[1][-1] == str(STEPS)
  for name in ('config.json', 'data.json', 'vocabulary.json'):
    assert (workdir / name).read_bytes() == (whole / name).read_bytes()
  for step in set(saved[0]) & set(saved[1]):  # a stop saves one more
    one, other = (_saved(w / 'checkpoints' / step) for w in (workdir, whole))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    for file in sorted((whole / 'checkpoints' / step / 'data').glob('*.json')):
      got = workdir / 'checkpoints' / step / 'data' / file.name
      assert json.loads(got.read_text()) == json.loads(file.read_text())


def _curve(workdir: pathlib.Path) -> list[metrics.Record]:
  return [{k: v for k, v in r.items() if k not in metrics.TIMING_KEYS}
          for r in metrics.read_jsonl(workdir)]


def _names(folder: pathlib.Path) -> list[str]:
  return sorted(p.name for p in folder.iterdir())


def _saved(folder: pathlib.Path) -> dict[str, object]:
  """The arrays of a checkpoint."""
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  with ocp.StandardCheckpointer() as reader:
    return {
        item: reader.restore(folder / item, jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
            reader.metadata(folder / item).item_metadata.tree))
        for item in ('params', 'optimizer', 'counters')}


def test_a_killed_run_goes_on_to_the_bit(campaign, lives, tmp_path, moment):
  print(f'seed {SEED}, moment {moment}')

  def inject() -> str:
    workdir = tmp_path / 'run'
    processes = kill(lives, moment, workdir)
    check_end(moment, processes, workdir)
    whole = lives.whole(moment.processes)
    lost = STEPS - max(
        [int(p.name) for p in (workdir / 'checkpoints').glob('*')
         if p.name.isdecimal()], default=0)
    lives.finish(workdir, moment.processes)
    check_same(workdir, whole)
    codes = ', '.join(str(p.returncode) for p in processes)
    return f'same to the bit; exit {codes}; {lost} steps after the checkpoint'

  campaign.run('kills', str(moment), inject)
