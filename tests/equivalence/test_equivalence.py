"""The new code gives the numbers of the old one, to the bit; see README.md."""

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

import cases  # noqa: E402


def _run(side, package, folder, name):
  environment = os.environ | {'PYTHONPATH': str(package)}
  return subprocess.run(
      [sys.executable, str(HERE / 'program.py'), side, str(folder), name],
      env=environment, capture_output=True, text=True)


@pytest.fixture(scope='module')
def old_package(tmp_path_factory):
  """The package and the recipes of tag `base`."""
  folder = tmp_path_factory.mktemp('old')
  archive = subprocess.run(
      ['git', 'archive', 'base', 'mom_jax', 'configs'], cwd=ROOT,
      capture_output=True)
  if archive.returncode:
    pytest.skip('tag `base` of git is not at hand')
  subprocess.run(['tar', '-x', '-C', str(folder)], input=archive.stdout,
                 check=True)
  return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Where the old numbers are."""
  known = os.environ.get('MOM_JAX_EQUIVALENCE')
  path = pathlib.Path(known) if known else tmp_path_factory.mktemp('numbers')
  path.mkdir(parents=True, exist_ok=True)
  return path


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=() if case.quick else pytest.mark.slow)
    for name, case in cases.CASES.items()])
def test_numbers_are_the_old_ones_to_the_bit(name, old_package, folder):
  old = _run('old', old_package, folder, name)
  assert old.returncode == 0, old.stdout + old.stderr
  new = _run('new', ROOT, folder, name)
  assert new.returncode == 0, new.stdout + new.stderr
