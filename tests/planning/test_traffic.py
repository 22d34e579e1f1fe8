"""Bytes and seconds of collectives on the links of a topology."""

import itertools

import pytest

from mom_jax import chips
from mom_jax.planning import hlo, traffic

V5E = chips.topology('v5e-8')


def _locations(topology):
  return [traffic.Location(s, c, 100000 * (s + 1) + i)
          for s in range(topology.slices) for i, c in enumerate(
              itertools.product(*map(range, topology.shape)))]


def test_rings_are_twice_as_fast_as_lines():
  """A whole side of 16 is a ring; four chips of it, or a side of 4, are not."""
  v6e = chips.topology('v6e-256')
  line = lambda n: [traffic.Location(0, (0, y)) for y in range(n)]
  gather = lambda n, t: traffic.transfer('all-gather', 1e9, line(n), t)
  near, far, seconds, _ = gather(16, v6e)
  assert near == pytest.approx(1e9 * 15 / 16) and far == 0
  assert seconds == pytest.approx(near / 200e9)
  assert gather(4, v6e)[2] == pytest.approx(0.75e9 / 100e9)
  assert gather(4, chips.topology('v5e-16'))[2] == pytest.approx(0.75e9 / 50e9)
  both = traffic.transfer('all-gather', 1e9, _locations(v6e), v6e)
  assert both[2] == pytest.approx(1e9 * 255 / 256 / 400e9)


def test_an_all_reduce_is_a_scatter_and_a_gather():
  devices = _locations(V5E)
  move = lambda kind: traffic.transfer(kind, 8e6, devices, V5E)
  assert move('all-reduce') == pytest.approx(
      [a + b for a, b in zip(move('all-gather'), move('reduce-scatter'))])


def test_an_all_to_all_of_a_ring_takes_a_quarter_of_a_gather():
  v6e = chips.topology('v6e-256')
  ring = [traffic.Location(0, (x, 0)) for x in range(16)]
  gather = traffic.transfer('all-gather', 16e6, ring, v6e)[2]
  assert traffic.transfer('all-to-all', 1e6, ring, v6e)[2] == pytest.approx(
      gather / 4)


def test_chips_far_apart_share_links():
  v6e = chips.topology('v6e-256')
  every = lambda step: [traffic.Location(0, (0, step * y)) for y in range(4)]
  near, apart = (traffic.transfer('all-gather', 1e6, every(s), v6e)[2]
                 for s in (1, 2))
  assert apart == pytest.approx(2 * near)


def test_slices_talk_once_over_the_network():
  two = chips.topology('2xv5e-8')
  near, far, _, seconds = traffic.transfer(
      'all-reduce', 8e6, _locations(two), two)
  assert near == pytest.approx(2 * 8e6 * 7 / 8)
  assert far == pytest.approx(2 * 8e6 / 8 / 2)
  assert seconds == pytest.approx(far / 3.125e9)
  alone = [traffic.Location(s, (0, 0)) for s in range(2)]
  assert traffic.transfer('all-gather', 8e6, alone, two)[:2] == (0, 4e6)


def test_one_device_moves_nothing():
  one = _locations(V5E)[:1]
  assert traffic.transfer('all-reduce', 8e6, one, V5E) == (0,) * 4
  cores = [traffic.Location(0, (0, 0, 0))] * 2  # of one tpu7x chip
  tpu7x = chips.topology('tpu7x-8')
  assert traffic.transfer('all-gather', 8e6, cores, tpu7x) == (0,) * 4


@pytest.mark.parametrize('text, wanted', [
    ('{{0,2},{1,3}}', [0, 2]),
    ('[2,4]<=[8]', [0, 1, 2, 3]),
    ('[4,2]<=[2,4]T(1,0)', [0, 4]),
    ("mesh['a'=4,'b'=2] {'a'}", [0, 2, 4, 6]),
    ("mesh['a'=4,'b'=2] {'b'}", [0, 1]),
    ("mesh['a'=4,'b'=2] {'a':(1)2,'b'}", [0, 1, 4, 5]),
    ("mesh['a'=8] {'a':(4)2}", [0, 1]),
    ('{}', list(range(8))),
])
def test_groups_are_read_in_every_notation(text, wanted):
  line = (f'  %r = f32[8]{{0}} all-reduce(%p), replica_groups={text},'
          ' use_global_device_ids=true, to_apply=%add')
  assert traffic.replica_group(hlo.parse_instruction(line), 8) == wanted
