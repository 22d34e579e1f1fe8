"""Where arrays lie on a mesh, and what is said of meshes that cannot be."""

import dataclasses
import inspect
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from mom_jax import config
from mom_jax.parallel import sharding


def _mesh(**sizes):
  count = int(np.prod([*sizes.values()]))
  return sharding.make_mesh(
      **({'data': 1} | sizes), devices=jax.devices()[:count])


def test_settings_name_the_axes_of_the_mesh():
  assert set(config.Mesh().sizes) == set(sharding.AXES)


def test_one_size_may_be_what_is_left():
  mesh = sharding.make_mesh(2, expert=-1, context=2)
  assert dict(mesh.shape) == {
      'dcn_data': 1, 'dcn_expert': 1, 'data': 2, 'fsdp': 1, 'expert': 2,
      'tensor': 1, 'context': 2}
  assert sharding.batch_shards(mesh) == 4


@pytest.mark.parametrize('sizes, said', [
    (dict(data=3), 'config.mesh.data=3, config.mesh.fsdp=1 do not fit the 8'
     ' devices at hand; their product must be 8'),
    (dict(data=-1, tensor=3), 'config.mesh.tensor=3 do not fit the 8'),
    (dict(data=-1, context=-1), 'one of them may be -1'),
    (dict(data=-1, tensor=0), 'sizes must be above 0'),
])
def test_sizes_that_do_not_fit_are_named(sizes, said):
  with pytest.raises(ValueError, match=re.escape(said)):
    sharding.make_mesh(**sizes)


@dataclasses.dataclass(frozen=True)
class Device:
  """A device of a pod, as far as meshes look at it."""

  id: int
  slice_index: int
  platform: str = 'tpu'
  device_kind: str = 'of the test'

  @property
  def process_index(self):
    return self.slice_index

  @property
  def coords(self):
    return (self.id % 4 % 2, self.id % 4 // 2, 0)

  @property
  def core_on_chip(self):
    return 0


def test_slices_meet_along_their_axes_alone():
  """The DCN carries sums over the batch, and rows to their ranks."""
  pod = [Device(i, i // 4) for i in (5, 0, 7, 2, 1, 4, 3, 6)]
  sizes = dict.fromkeys(sharding.AXES, 1)
  # These are no devices of JAX.
  arrange = inspect.unwrap(sharding.arrange_devices)
  got = arrange(sizes | {'dcn_data': 2, 'fsdp': 2, 'tensor': 2}, pod)
  assert got.shape == (2, 1, 1, 2, 1, 2, 1)
  assert {d.id for d in got.flat} == set(range(8))
  for number, part in enumerate(got):
    assert {d.slice_index for d in part.flat} == {number}
  owned = arrange(sizes | {'dcn_expert': 2, 'expert': 4}, pod)
  assert owned.shape == (1, 2, 1, 1, 4, 1, 1)
  for number in range(2):
    assert {d.slice_index for d in owned[0, number].flat} == {number}
  with pytest.raises(ValueError, match=(
      'config.mesh.dcn_data=1, config.mesh.dcn_expert=1.*form 2 slices'
      '.*config.mesh.dcn_data=2 and config.mesh.dcn_expert=1')):
    arrange(sizes | {'data': 8}, pod)
  with pytest.raises(ValueError, match=(
      'set config.mesh.dcn_data=1 and config.mesh.dcn_expert=2')):
    arrange(sizes | {'dcn_expert': 4, 'data': 2}, pod)


def test_both_axes_of_slices_make_up_their_number():
  pod = [Device(i, i // 4) for i in range(16)]
  sizes = dict.fromkeys(sharding.AXES, 1)
  got = inspect.unwrap(sharding.arrange_devices)(
      sizes | {'dcn_data': 2, 'dcn_expert': 2, 'expert': 4}, pod)
  assert got.shape == (2, 2, 1, 1, 4, 1, 1)
  assert [{d.slice_index for d in part.flat} for half in got for part in half
          ] == [{0}, {1}, {2}, {3}]


def _specs(mesh, parameters):
  """PartitionSpec of each of the parameters (logical axes, shape)."""
  boxed = [nn.Partitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)
           for names, shape in parameters]
  return [s.spec for s in sharding.param_shardings(boxed, mesh, 'fsdp')]


def test_parameters_are_split_by_the_table():
  want = {
      # Experts by rank, width over all that FSDP shards, hidden width over
      # 'tensor'.
      (('expert', 'embed', None, 'mlp'), (4, 8, 2, 6)):
          P('expert', 'fsdp', None, 'tensor'),
      # Memories that the ranks do not divide: width is split instead.
      (('layers', 'memory', 'embed', 'heads', 'kv'), (3, 5, 8, 2, 4)):
          P(None, None, ('fsdp', 'expert'), 'tensor', None),
      (('vocab', 'embed'), (7, 8)): P(None, ('fsdp', 'expert')),
      (('embed', None), (2, 3)): P('fsdp', None),
      ((None,), (8,)): P(None),
  }
  mesh = _mesh(fsdp=2, expert=2, tensor=2)
  assert _specs(mesh, want) == [*want.values()]


def test_slices_split_memories_and_experts_alone():
  want = {
      (('expert', 'embed', None, 'mlp'), (4, 8, 2, 6)):
          P(('dcn_expert', 'expert'), 'fsdp', None, None),
      # Equal numbers per slice, which its ranks do not divide.
      (('expert', 'mlp', 'embed'), (6, 6, 8)):
          P('dcn_expert', None, ('fsdp', 'expert')),
      # Nothing of memories is whole in a slice.
      (('layers', 'memory', 'embed', 'heads', 'kv'), (3, 5, 8, 2, 4)):
          P(None, None, ('fsdp', 'expert', 'dcn_expert'), None, None),
      # What is dense is: it is not gathered over the DCN.
      (('embed', 'mlp'), (8, 6)): P(('fsdp', 'expert'), None),
  }
  mesh = _mesh(dcn_expert=2, fsdp=2, expert=2)
  assert _specs(mesh, want) == [*want.values()]


def test_a_size_that_does_not_divide_is_named():
  with jax.set_mesh(_mesh(tensor=4)):
    assert sharding.split_size('heads', 8, 'config.x') == 2
    with pytest.raises(ValueError, match=re.escape(
        'config.model.moma.hidden=6 cannot be split over config.mesh.tensor=4;'
        ' make it a multiple of 4, or config.mesh.tensor a divisor of 6.')):
      sharding.split_size('mlp', 6, 'config.model.moma.hidden')
