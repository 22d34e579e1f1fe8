"""Records survive a resume, values are named, speed is measured."""

import io
import json
import math
import struct
import sys
import time

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from mom_jax import chips, config
from mom_jax.models import outputs
from mom_jax.training import metrics, step


def _events(folder):
  """Events of TensorBoard files."""
  for path in sorted(folder.glob('events*')):
    data = io.BytesIO(path.read_bytes())
    while header := data.read(12):
      size, = struct.unpack('<Q', header[:8])
      yield event_pb2.Event.FromString(data.read(size))
      data.read(4)


def test_lines_after_the_restored_step_are_removed(tmp_path):
  """And one that a kill cut off; the file goes on as if nothing happened."""
  first = metrics.Jsonl(tmp_path, 0)
  for n in range(1, 6):
    first.write({'step': n, 'loss': 1.0 / n})
  first.close()
  path = tmp_path / 'metrics.jsonl'
  whole = path.read_text()
  path.write_text(whole[:-7])
  second = metrics.Jsonl(tmp_path, 3)
  for n in range(4, 6):
    second.write({'step': n, 'loss': 1.0 / n})
  second.close()
  assert path.read_text() == whole


def test_a_run_from_step_zero_starts_a_new_file(tmp_path):
  metrics.Jsonl(tmp_path, 0).write({'step': 1})
  metrics.Jsonl(tmp_path, 0).close()
  assert metrics.read_jsonl(tmp_path) == []


def test_not_finite_values_are_null_in_json(tmp_path):
  writer = metrics.Jsonl(tmp_path, 0)
  writer.write({'step': 1, 'loss': math.nan, 'grad_norm': math.inf, 'ok': 2.0})
  line = (tmp_path / 'metrics.jsonl').read_text()
  assert json.loads(line, parse_constant=pytest.fail) == {
      'step': 1, 'loss': None, 'grad_norm': None, 'ok': 2.0}


def test_tensorboard_gets_every_value(tmp_path):
  writer = metrics.TensorBoard(tmp_path, 0)
  writer.write({'step': 7, 'loss': 0.5, 'load/layer_00/mixer': [0.25, 0.75]})
  writer.close()
  found = [(event.step, value.tag, value.simple_value)
           for event in _events(tmp_path / 'tensorboard')
           for value in event.summary.value]
  assert sorted(found) == [
      (7, 'load/layer_00/mixer/0', 0.25), (7, 'load/layer_00/mixer/1', 0.75),
      (7, 'loss', 0.5)]


def test_tensorboard_purges_the_steps_of_a_dead_run(tmp_path):
  metrics.TensorBoard(tmp_path, 0).close()
  metrics.TensorBoard(tmp_path, 4).close()
  start = event_pb2.SessionLog.START
  assert [event.step for event in _events(tmp_path / 'tensorboard')
          if event.session_log.status == start] == [5]


def test_wandb_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  cfg = config.override(config.Config(), ['train.writers=wandb'])
  with pytest.raises(config.UserError) as e:
    metrics.open_writers(tmp_path, 0, cfg)
  assert str(e.value) == (
      "config.train.writers has 'wandb', which is not installed; pip install"
      ' wandb or leave it out.')


class FakeWandb:
  """What `metrics.Wandb` needs of the package."""

  class util:  # noqa: N801
    @staticmethod
    def generate_id():
      return 'abc'

  def __init__(self):
    self.started, self.logged = [], []

  def init(self, **arguments):
    self.started.append(arguments)
    return self

  def log(self, values, step):
    self.logged.append((step, values))

  def finish(self):
    pass


def test_wandb_goes_on_with_the_run_of_the_workdir(tmp_path, monkeypatch):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  cfg = config.override(config.Config(), ['train.writers=wandb'])
  writer, = metrics.open_writers(tmp_path, 0, cfg)
  writer.write({'step': 2, 'loss': 1.5})
  writer.close()
  metrics.open_writers(tmp_path, 2, cfg)
  assert fake.logged == [(2, {'loss': 1.5})]
  assert fake.started[0]['id'] == 'abc'
  assert fake.started[1]['resume_from'] == 'abc?_step=2'


def test_routing_values_are_shares_by_layer():
  """Two repeats of a two-block pattern: layers 0, 2 and 1, 3."""
  counts = (
      outputs.BlockAux(step.RoutingCounts(
          np.array([[3, 1], [2, 2]]), np.array([0.5, 0.7]),
          np.array([[0, 4, 0], [0, 4, 0]]))),
      outputs.BlockAux(None, step.RoutingCounts(
          np.array([[0, 4, 4], [1, 1, 2]]), np.array([0.1, 0.3]),
          np.array([[1, 2, 1], [0, 4, 0]]))),
  )
  got = metrics.routing(counts)
  assert got['load/layer_00/mixer'] == [0.75, 0.25]
  assert got['load/layer_02/mixer'] == [0.5, 0.5]
  assert got['load/layer_01/channel'] == [0, 0.5, 0.5]
  assert got['load/layer_03/channel'] == [0.25, 0.25, 0.5]
  assert got['load_min/channel'] == 0 and got['load_max/channel'] == 0.5
  assert got['load_min/mixer'] == 0.25 and got['load_max/mixer'] == 0.75
  assert got['entropy/mixer'] == pytest.approx(0.6)
  assert got['tokens_without_expert'] == pytest.approx(0.125)
  assert got['tokens_with_1_expert'] == pytest.approx(0.75)
  assert got['tokens_with_2plus_experts'] == pytest.approx(0.125)


def test_a_model_without_routers_has_no_routing_values():
  assert metrics.routing((outputs.BlockAux(None),)) == {}


def test_clock_measures_steps_and_names_only_timing_keys(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
  clock = metrics.Clock(flops_per_token=10.0, peak=1e4)
  assert set(clock.record()) == {'time'} and clock.step_time is None
  for duration in (9.0, 1.0, 2.0, 3.0):  # the first is compilation
    now[0] += duration
    clock.step(0.1, 50)
  got = clock.record()
  assert set(got) <= set(metrics.TIMING_KEYS)
  assert got['tokens_per_s'] == pytest.approx(25)
  assert got['step_time_p50'] == pytest.approx(2)
  assert got['step_time_p90'] == pytest.approx(2.8)
  assert got['step_time_max'] == pytest.approx(3)
  assert got['data_time_p50'] == pytest.approx(0.1)
  assert got['mfu'] == pytest.approx(25 * 10 / 1e4)


def test_time_spent_elsewhere_is_no_step_time(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
  clock = metrics.Clock(1.0, None)
  clock.step(0.0, 1)
  now[0] = 100.0  # a validation
  clock.restart()
  now[0] = 101.0
  clock.step(0.0, 1)
  assert clock.step_time == 1
  assert 'mfu' not in clock.record()


def test_peaks_are_known_or_absent():
  assert chips.peak_flops('cpu', 8) is None
  assert chips.peak_flops('NVIDIA H100 80GB HBM3', 2) == 2 * 989e12


RECORD = {
    'step': 10, 'loss': 2.0, 'loss_text': 1.0, 'loss_image_noncausal': 3.0,
    'learning_rate': 1e-3, 'tokens_per_s': 1234.5, 'log_z2': 7.0,
}


def test_the_progress_line_says_all_a_person_asks():
  assert metrics.summary(RECORD, 110, 36.5) == (
      'step 10/110  loss 2.000  loss_text 1.000  loss_image_noncausal 3.000'
      '  1,234 tokens/s  lr 1.00e-03  ETA 1:00:50')


@pytest.mark.parametrize('live', [True, False])
def test_a_terminal_gets_one_live_line_a_file_gets_lines(monkeypatch, live):
  out = io.StringIO()
  monkeypatch.setattr(out, 'isatty', lambda: live)
  monkeypatch.setattr(sys, 'stdout', out)
  progress = metrics.Progress(20)
  for number in (1, 2):
    progress.show(RECORD | {'step': number}, 1.0)
  progress.say('validation')
  text = out.getvalue()
  assert text.count('\n') == (1 if live else 3)
  assert text.endswith('validation\n')
  assert ('\r' in text) == live


@pytest.mark.parametrize('foreign', [
    b'', b'# a note', b'{"step": "x"}', b'[1]', b'\xff\xfe', b'{"loss": 1}'])
def test_foreign_lines_cost_no_others(tmp_path, foreign):
  """Only later steps and the torn tail go."""
  path = tmp_path / 'metrics.jsonl'
  good = [b'{"step": 1}', b'{"step": 2, "loss": NaN}']
  path.write_bytes(b'\n'.join(
      [good[0], foreign, good[1], b'{"step": 3}', b'{"step": 2, "lo']))
  assert [r['step'] for r in metrics.read_jsonl(tmp_path)] == [1, 2, 3]
  metrics.Jsonl(tmp_path, 2).close()
  assert path.read_bytes().split(b'\n') == [good[0], foreign, good[1], b'']


def test_a_last_line_without_its_end_is_kept(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1}\n{"step": 2}')
  writer = metrics.Jsonl(tmp_path, 2)
  writer.write({'step': 3})
  writer.close()
  assert path.read_bytes().split(b'\n') == [
      b'{"step": 1}', b'{"step": 2}', b'{"step": 3}', b'']
