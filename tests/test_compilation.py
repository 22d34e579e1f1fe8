"""Compiled programs on disk, and words while compiling."""

import io
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from mom_jax import compilation, config

ROOT = pathlib.Path(__file__).parents[1]
# A command that tells how many programs it had to compile.
COUNTED = """
import atexit, runpy, sys
import jax
missed = []
jax.monitoring.register_event_listener(
    lambda event, **_: event.endswith('/cache_misses') and missed.append(event))
atexit.register(lambda: print('compiled', len(missed), file=sys.stderr))
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
"""


def start(command, *flags):
  free = {k: v for k, v in os.environ.items()
          if not k.startswith('JAX_COMPILATION')}
  return subprocess.Popen(
      [sys.executable, '-c', COUNTED, f'mom_jax.{command}', *flags], text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      env=free | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'})


def compiled(process):
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, out + err
  return int(err.split('compiled ')[-1])


@pytest.fixture
def recipe(tmp_path):
  cfg = tiny_run.make_config(
      tmp_path, 'train.steps=4', 'train.eval_every=0', 'model.num_layers=1')
  path = tmp_path / 'recipe.json'
  path.write_text(config.to_json(cfg))
  return path


@pytest.mark.slow_law
def test_no_command_compiles_again_what_one_has_compiled(recipe, tmp_path):
  """Nor do two that run at the same time harm each other's programs."""
  train = [f'--config={recipe}', f'--workdir={tmp_path / "a"}']
  other = [f'--config={recipe}', f'--workdir={tmp_path / "b"}']
  both = start('train', *train), start('train', *other)
  assert all(map(compiled, both))
  folder = tmp_path / 'cache' / compilation.FOLDER / compilation.machine()
  assert list(folder.glob('*-cache'))
  assert compiled(start(
      'train', f'--config={recipe}', f'--workdir={tmp_path / "c"}')) == 0
  last = tmp_path / 'a/checkpoints/4'
  last.rename(tmp_path / 'gone')  # the same command resumes from step 2
  assert compiled(start('train', *train)) == 0
  assert last.exists()
  for command, *flags in (
      ('generate', '--prompt=a', '--max_new_tokens=3'),
      ('evaluate', '--task=loss')):
    flags.append(f'--workdir={tmp_path / "a"}')
    first = compiled(start(command, *flags))
    assert first > 0 == compiled(start(command, *flags))


@pytest.fixture
def own_settings(monkeypatch):
  """Settings of jax's cache as in a process of its own."""
  names = ('jax_enable_compilation_cache', 'jax_compilation_cache_dir',
           'jax_compilation_cache_max_size',
           'jax_persistent_cache_min_compile_time_secs',
           'jax_persistent_cache_min_entry_size_bytes')
  old = {name: getattr(jax.config, name) for name in names}
  jax.config.update('jax_enable_compilation_cache', True)
  jax.config.update('jax_compilation_cache_dir', None)
  yield
  for name, value in old.items():
    jax.config.update(name, value)


def settings(folder, *overrides):
  return config.override(
      config.Config(), [f'data.cache={folder}', *overrides])


def test_folder_is_that_of_the_other_caches_unless_the_user_has_one(
    own_settings, tmp_path):
  off = settings(tmp_path, 'data.cache_compiled=False')
  assert compilation.keep(off) is None
  assert not list(tmp_path.iterdir())
  folder = compilation.keep(settings(tmp_path))
  assert folder == tmp_path / compilation.FOLDER / compilation.machine()
  assert jax.config.jax_compilation_cache_dir == str(folder)
  assert jax.config.jax_compilation_cache_max_size == compilation.MAX_BYTES
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'mine'))
  assert compilation.keep(settings(tmp_path)) == tmp_path / 'mine'


def test_a_folder_that_cannot_be_used_costs_a_warning_only(
    own_settings, tmp_path, caplog):
  (tmp_path / 'file').write_text('')
  assert compilation.keep(settings(tmp_path / 'file')) is None
  assert jax.config.jax_compilation_cache_dir is None
  assert 'config.data.cache=DIR' in caplog.text


def test_programs_that_were_not_written_to_their_end_are_dropped(
    own_settings, tmp_path):
  folder = compilation.keep(settings(tmp_path))
  for name in ('whole-cache', 'half-cache', 'empty-cache'):
    (folder / name).write_bytes(b'program')
  (folder / 'whole-atime').write_bytes(time.time_ns().to_bytes(8, 'little'))
  (folder / 'empty-atime').write_bytes(b'')
  jax.config.update('jax_compilation_cache_dir', None)
  compilation.keep(settings(tmp_path))
  assert [p.name for p in sorted(folder.glob('*-*'))] == [
      'whole-atime', 'whole-cache']


class Terminal(io.StringIO):

  def isatty(self):
    return True


@pytest.mark.parametrize('out', [io.StringIO(), Terminal()])
def test_a_command_says_what_it_waits_for_and_how_long(out, monkeypatch):
  monkeypatch.setattr(compilation, 'FIRST_WORD', 0.1)
  with pytest.raises(KeyError), compilation.waiting('compiling the step', out):
    time.sleep(1.3)
    raise KeyError
  said = out.getvalue().replace('\r', '\n').splitlines()
  assert said[0] == 'compiling the step'
  assert 'compiling the step, 1 s so far' in said
  assert said[-1].startswith('compiling the step: done after 1.')


def test_a_function_that_compiles_in_the_background_is_that_function():
  lowered = jax.jit(lambda x, y: x @ y + 1).lower(
      *[jax.ShapeDtypeStruct((4, 4), jnp.float32)] * 2)
  run, x = compilation.Background(lowered), jnp.arange(16.0).reshape(4, 4)
  for _ in range(2):
    np.testing.assert_array_equal(run(x, x), lowered.compile()(x, x))
  with pytest.raises(TypeError, match='float32'):
    run(x, x.astype(int))


def test_an_error_of_the_compiler_is_raised_where_the_function_is_called():
  class Broken(jax.stages.Lowered):

    def __init__(self):
      pass

    def compile(self):
      raise ValueError('too large')

  run = compilation.Background(Broken())
  with pytest.raises(ValueError, match='too large'):
    run()
