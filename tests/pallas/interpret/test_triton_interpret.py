"""Runs each file `interpret_*.py` where Triton interprets its kernels."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
FILES = sorted(HERE.glob('interpret_*.py'))

pytestmark = pytest.mark.triton_interpret


@pytest.mark.parametrize('file', FILES, ids=[f.stem for f in FILES])
def test_interpreted(file):
  if importlib.util.find_spec('triton') is None:
    pytest.skip("triton is absent: pip install '.[gpu]'")
  done = subprocess.run(
      [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider',
       '-p', 'no:xdist', '-m', 'not gpu', file],
      cwd=HERE.parents[2], text=True, capture_output=True, timeout=500,
      env=os.environ | {'TRITON_INTERPRET': '1', 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
