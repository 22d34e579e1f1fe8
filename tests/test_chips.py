"""Topologies by the names that vendors give them."""

import pytest

from mom_jax import chips


@pytest.mark.parametrize('name, count, devices, libtpu, slices', [
    ('v5e-16', 16, 16, 'v5e:4x4', 1),
    ('v5p-256', 128, 128, 'v5p:4x4x8', 1),
    ('v6e-256', 256, 256, 'v6e:16x16', 1),
    ('tpu7x-128', 64, 128, 'tpu7x:4x4x4', 1),
    ('2xv5e-256', 512, 512, 'v5e:16x16', 2),
    ('v5p:2x2x1', 4, 4, 'v5p:2x2x1', 1),
])
def test_names_of_topologies_are_those_of_cloud_tpu(
    name, count, devices, libtpu, slices):
  t = chips.topology(name)
  assert (t.chips, t.devices, t.libtpu, t.slices) == (
      count, devices, libtpu, slices)


def test_gpus_come_in_nodes():
  assert chips.topology('h100-64').slices == 8
  assert chips.topology('b200-4').slices == 1


@pytest.mark.parametrize('name, message', [
    ('v5p', 'is unknown; write CHIP-NUMBER'),
    ('v9-8', 'with a chip of v4, v5e'),
    ('v5p-255', 'is not offered; known: v5p-8, v5p-16'),
    ('v5p:4x4', 'must have 3 sides'),
    ('h100-12', 'whole nodes of 8'),
])
def test_unknown_topologies_are_named(name, message):
  with pytest.raises(ValueError, match=message):
    chips.topology(name)


def test_peak_is_of_a_device():
  assert chips.peak_flops('TPU v5p', 2) == 2 * 459e12
  assert chips.peak_flops('TPU7x', 1) == 2307e12 / 2
  assert chips.peak_flops('cpu', 1) is None
