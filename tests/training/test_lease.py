"""Two runs never write into one workdir."""

import dataclasses
import json
import subprocess
import sys
import threading
import time

import pytest

from mom_jax import config
from mom_jax.training import lease


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(lease, 'RENEW_SECONDS', 0.05)
  monkeypatch.setattr(lease, 'EXPIRE_SECONDS', 1.0)
  monkeypatch.setattr(lease, 'SETTLE_SECONDS', 0.05)


def _hold(workdir, say=print):
  return lease.hold(workdir, say)


def _write(workdir, renewals=1, **owner):
  """A lease of this process under another token, but for `owner`."""
  record = dataclasses.asdict(lease.Owner.here()) | owner
  workdir.mkdir(exist_ok=True)
  (workdir / lease.FILE).write_text(
      json.dumps(record | {'renewals': renewals}), encoding='utf-8')


def _dead_process() -> int:
  with subprocess.Popen([sys.executable, '-c', '']) as process:
    process.wait()
  return process.pid


def test_a_second_run_is_refused_with_the_name_of_the_first(tmp_path):
  with _hold(tmp_path) as first:
    first.confirm()
    with pytest.raises(config.UserError, match=(
        r'in use: process \d+ on .* trains in it\. Stop that run or choose'
    )), _hold(tmp_path):
      pytest.fail('two runs hold one workdir')
    first.check_now()
  with _hold(tmp_path) as second:
    second.confirm()


def test_nothing_is_left_of_a_run_that_ends_in_an_error(tmp_path):
  with pytest.raises(config.UserError, match='mine'), _hold(tmp_path / 'new'):
    raise config.UserError('mine')
  assert not (tmp_path / 'new').exists()
  with _hold(tmp_path):
    assert [p.name for p in tmp_path.iterdir()] == [lease.FILE]
  assert tmp_path.is_dir() and not list(tmp_path.iterdir())


def test_a_folder_in_which_something_is_stays(tmp_path):
  with _hold(tmp_path / 'new'):
    (tmp_path / 'new' / 'config.json').touch()
  assert [p.name for p in (tmp_path / 'new').iterdir()] == ['config.json']


@pytest.mark.parametrize('owner', [
    dict(pid=-1), dict(started='another process with this number')],
    ids=['killed', 'number in use again'])
def test_a_killed_run_of_this_machine_is_followed_at_once(tmp_path, owner):
  if 'pid' in owner:
    owner = dict(pid=_dead_process())
  elif not lease.Owner.here().started:
    pytest.skip('this system does not tell when a process started')
  _write(tmp_path, **owner)
  with _hold(tmp_path, pytest.fail) as held:
    held.confirm()


def test_a_silent_run_of_another_machine_is_followed_after_a_while(tmp_path):
  said = []
  _write(tmp_path, machine='other', host='node7', pid=12)
  start = time.monotonic()
  with _hold(tmp_path, said.append) as held:
    assert time.monotonic() - start >= lease.EXPIRE_SECONDS
    held.confirm()
  assert len(said) == 1 and 'process 12 on node7 still trains' in said[0]


def test_a_run_of_another_machine_that_lives_is_left_alone(tmp_path):
  _write(tmp_path, machine='other', host='node7', pid=12)

  def renew():
    time.sleep(0.5)
    _write(tmp_path, 2, machine='other', host='node7', pid=12)

  renewing = threading.Thread(target=renew)
  renewing.start()
  with pytest.raises(
      config.UserError, match='process 12 on node7 trains'), _hold(tmp_path):
    pytest.fail('two runs hold one workdir')
  renewing.join()


def test_a_run_of_another_machine_that_ends_is_followed_at_once(
    tmp_path, monkeypatch
):
  monkeypatch.setattr(lease, 'EXPIRE_SECONDS', 60.0)
  _write(tmp_path, machine='other')
  ending = threading.Timer(0.3, (tmp_path / lease.FILE).unlink)
  ending.start()
  with _hold(tmp_path) as held:
    held.confirm()
  ending.join()


@pytest.mark.parametrize('text', ['', '[]', '{"pid": 1}', '{', '7'])
def test_a_file_that_is_no_lease_holds_nothing(tmp_path, text):
  (tmp_path / lease.FILE).write_text(text)
  with _hold(tmp_path) as held:
    held.confirm()


def test_of_those_that_start_together_one_holds_it(tmp_path, monkeypatch):
  monkeypatch.setattr(lease, 'SETTLE_SECONDS', 0.5)
  together, holders = threading.Barrier(8), []

  def start():
    held = lease.Lease(tmp_path, print)
    together.wait()
    try:
      held.take()
      held.confirm()
    except config.UserError:
      return
    holders.append(held)

  threads = [threading.Thread(target=start) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(holders) == 1
  holders[0].check_now()
  holders[0].release()


def test_a_run_that_was_followed_meanwhile_ends(tmp_path):
  with _hold(tmp_path) as held:
    held.confirm()
    _write(tmp_path, machine='other', host='node7', pid=12, token='other')
    with pytest.raises(config.UserError, match='12 on node7 has taken it over'):
      held.check_now()
    with pytest.raises(config.UserError, match='12 on node7 has taken it over'):
      held.check()
  assert (tmp_path / lease.FILE).exists()  # the other's


def test_the_holder_renews_and_sees_a_follower_by_itself(tmp_path):
  with _hold(tmp_path) as held:
    held.confirm()
    path = tmp_path / lease.FILE
    end = time.monotonic() + 20
    while json.loads(path.read_text())['renewals'] < 3:
      assert time.monotonic() < end, 'not renewed'
      time.sleep(0.01)
    with pytest.raises(config.UserError, match='has taken it over'):
      while time.monotonic() < end:
        _write(tmp_path, machine='other', token='other')
        held.check()
        time.sleep(0.01)
