"""Files of the cache."""

import os

import numpy as np
import pytest

from mom_jax.data import cache


def test_arrays_are_written_as_umask_says(tmp_path):
  old = os.umask(0o027)
  try:
    cache.write_arrays(tmp_path / 'a.npz', {'x': np.arange(3)})
  finally:
    os.umask(old)
  assert (tmp_path / 'a.npz').stat().st_mode & 0o777 == 0o640
  with np.load(tmp_path / 'a.npz') as read:
    np.testing.assert_array_equal(read['x'], np.arange(3))


def test_a_write_that_fails_leaves_nothing(tmp_path):
  with pytest.raises(IsADirectoryError):
    (tmp_path / 'a.npz').mkdir()
    cache.write_arrays(tmp_path / 'a.npz', {'x': np.arange(3)})
  assert [p.name for p in tmp_path.iterdir()] == ['a.npz']
