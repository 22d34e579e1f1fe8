"""The command line: paths, output that is gone, errors of configurations."""

import os
import pathlib
import subprocess
import sys

import pytest

from mom_jax import cli, config

ROOT = pathlib.Path(__file__).parents[1]
# A command without jax that writes a lot and then a file.
TALKS = """
import pathlib, sys
from mom_jax import cli
def main(overrides):
  for i in range(20_000):
    print('caf\\u00e9', i)
  pathlib.Path(sys.argv[0]).write_text('done')
cli.run(main, ['talks'])
"""


def talk(tmp_path, shell='exec "$@"', **how):
  code = TALKS.replace('sys.argv[0]', repr(str(tmp_path / 'end')))
  how['env'] = os.environ | {'PYTHONPATH': str(ROOT)} | how.pop('env', {})
  return subprocess.Popen(
      ['sh', '-c', shell, 'sh', sys.executable, '-c', code],
      stderr=subprocess.PIPE, **how)


def test_a_command_outlives_the_reader_of_its_output(tmp_path):
  process = talk(tmp_path, stdout=subprocess.PIPE)
  process.stdout.readline()
  process.stdout.close()
  err = process.stderr.read().decode()
  assert process.wait(60) == 0
  assert err.splitlines() == [
      'the output cannot be written (its reader is gone); the command goes on'
      ' without it']
  assert (tmp_path / 'end').read_text() == 'done'


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
def test_a_command_outlives_a_full_disk_under_its_output(tmp_path):
  process = talk(tmp_path, shell='exec "$@" >/dev/full')
  err = process.stderr.read().decode()
  assert process.wait(60) == 0
  assert err.splitlines() == [
      'the output cannot be written (No space left on device); the command goes'
      ' on without it']
  assert (tmp_path / 'end').read_text() == 'done'


def test_an_interrupted_command_says_so_in_one_line():
  code = ('import signal\nfrom mom_jax import cli\n'
          'cli.run(lambda _: signal.raise_signal(signal.SIGINT), ["command"])')
  done = subprocess.run(
      [sys.executable, '-c', code], text=True, capture_output=True,
      env=os.environ | {'PYTHONPATH': str(ROOT)})
  assert (done.returncode, done.stderr) == (130, 'interrupted\n')


def test_a_command_needs_no_output(tmp_path):
  process = talk(tmp_path, shell='exec "$@" >&-')
  assert process.wait(60) == 0, process.stderr.read()
  assert (tmp_path / 'end').read_text() == 'done'


def test_characters_that_a_terminal_cannot_show_are_replaced(tmp_path):
  process = talk(
      tmp_path, stdout=subprocess.PIPE, env={'PYTHONIOENCODING': 'ascii'})
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  assert out.startswith(b'caf? 0')


def test_paths_of_flags_are_expanded_and_on_disk(monkeypatch):
  monkeypatch.setenv('HOME', '/home/somebody')
  assert cli.path('~/runs/x') == '/home/somebody/runs/x'
  assert cli.path('runs/~x') == 'runs/~x'
  for text, words in (
      ('gs://bucket/run', 'URL'), ('s3://bucket', 'URL'),
      ('~nobody-of-that-name/x', 'no such home')):
    with pytest.raises(ValueError, match=words):
      cli.path(text)
    with pytest.raises(config.UserError, match=f'--image=.*{words}'):
      cli.paths('image', ['a.png', text])
  assert cli.paths('image', ['~/a', 'b']) == ['/home/somebody/a', 'b']


@pytest.mark.parametrize(('name', 'text', 'words'), [
    ('x.json', '[]', 'holds a list'),
    ('x.json', '{"train": ' * 100_000, 'not valid JSON'),
    ('x.json', b'\xff\xfe', 'not valid JSON'),
    ('x.py', 'def get_config(:', r'x\.py, line 1: SyntaxError'),
    ('x.py', 'import nothing_of_that_name', 'line 1: ModuleNotFoundError'),
    ('x.py', 'def get_config():\n  return 1 / 0', 'line 2: ZeroDivision'),
    ('x.py', 'def get_config():\n  return 3', 'returns a int'),
    ('x.py', 'x = 1', 'defines no get_config'),
    ('x.py', 'from mom_jax import config\n'
     'def get_config():\n  c = config.to_config_dict(config.Config())\n'
     '  c.train.steps = "4"\n  return c', 'line 4: TypeError'),
    ('x.txt', '', 'must be a .py or .json'),
])
def test_errors_of_configurations_are_one_line(tmp_path, name, text, words):
  file = tmp_path / name
  file.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(config.UserError, match=words) as e:
    config.load(file)
  assert '\n' not in str(e.value) and name in str(e.value)


def test_errors_are_one_line_whatever_they_quote():
  with pytest.raises(config.UserError) as e:
    config.override(config.Config(), ['a\nb\x1b[31m\u2028=0'])
  assert str(e.value).startswith(r'config.a\nb\x1b[31m\u2028 is no setting')
  assert str(config.UserError('caf\u00e9 \u4e2d')) == 'caf\u00e9 \u4e2d'


def test_a_group_of_settings_must_be_one():
  for values in ({'model': None}, {'model': {'mixer': 3}}, {'data': []}):
    with pytest.raises(config.UserError, match='must be a group of settings'):
      config.from_mapping(values)


def test_arguments_that_a_recipe_does_not_take_are_one_line(tmp_path):
  file = tmp_path / 'x.py'
  file.write_text('def get_config(): pass')
  with pytest.raises(config.UserError, match='TypeError'):
    config.load(f'{file}:7')


def test_a_config_may_lie_in_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'x.json').write_text(config.to_json(config.Config()))
  assert config.load('~/x.json') == config.Config()


def test_folders_may_have_colons(tmp_path):
  folder = tmp_path / 'run 10:30'
  folder.mkdir()
  (folder / 'config.json').write_text(config.to_json(config.Config()))
  assert config.load(folder / 'config.json') == config.Config()


@pytest.mark.parametrize(('override', 'words'), [
    ('train.seed=4294967296', 'must be below'),
    ('train.seed=-1', 'must lie in'),
    ('train.seed=99999999999999999999', 'must be below'),
    ('train.steps=99999999999999999999', 'must be below'),
    ('model.vocab_size=4294967296', 'must be below'),
    ('optimizer.learning_rate=1e400', 'must be finite'),
    ('optimizer.weight_decay=1e999', 'must be finite'),
    ('loss.input_noise=0.0,-1e400', 'must be finite'),
])
def test_numbers_are_finite_and_seeds_distinct(override, words):
  with pytest.raises(config.UserError, match=words):
    config.override(config.Config(), [override])


def test_missing_flags_are_named(tmp_path):
  done = subprocess.run(
      [sys.executable, '-m', 'mom_jax.train'], cwd=tmp_path, text=True,
      capture_output=True, env=os.environ | {'PYTHONPATH': str(ROOT)},
      check=False)
  assert done.returncode == 2 and not done.stdout
  assert done.stderr == (
      'error: --config, --workdir missing; --help lists the flags.\n')
