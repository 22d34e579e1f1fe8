"""Code per device gets its part of each array and gives its part back."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from mom_jax.parallel import per_device, sharding
from mom_jax.planning import hlo, traffic


def _mesh(**sizes):
  count = int(np.prod([*sizes.values()]))
  return sharding.make_mesh(
      **({'data': 1} | sizes), devices=jax.devices()[:count])


def _collectives(text):
  """Sizes of the results of a program's collectives, by kind."""
  found = {kind: [] for kind in traffic.KINDS}
  for computation in hlo.parse(text).computations.values():
    for i in computation.instructions:
      if traffic.collective_kind(i):
        found[traffic.collective_kind(i)] += [a.size for a in i.shape]
  return found


def test_a_batch_or_sequence_that_does_not_divide_is_named():
  run = per_device.batch_local(lambda x, _: x)
  for mesh, said, shape in (
      (_mesh(context=4), 'config.data.seq_len', (2, 6)),
      (_mesh(expert=4), 'config.data.batch_size', (2, 8))):
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=said):
      run(jnp.ones(shape), ())


def test_local_code_gets_its_part_and_gives_it_back():
  """By name: rows of the batch and time, heads; sums over parts of a width."""
  x, w = jnp.arange(32.0).reshape(4, 8), jnp.arange(6.0)

  def fn(x, w):
    assert (x.shape, w.shape) == ((2, 4), (3,))
    return per_device.psum(x * w.sum(), 'mlp')

  run = per_device.batch_local(fn, shared=P('mlp'))
  loss = lambda x, w: jnp.sin(run(x, w)).sum()
  with jax.set_mesh(_mesh(data=2, tensor=2, context=2)):
    got = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w)
  want = jax.value_and_grad(
      lambda x, w: jnp.sin(x * w.sum()).sum(), (0, 1))(x, w)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=1e-4), got, want)


def test_gradients_of_fsdp_sharded_weights_are_scattered():
  """Each device gets its part of the sum over devices that shard; the rest of
  the sum is of parts.
  """
  x, w = jnp.arange(32.0).reshape(4, 8), jnp.arange(48.0).reshape(2, 8, 3)
  mesh = _mesh(data=2, fsdp=2, context=2)

  def fn(x, w):
    assert (x.shape, w.shape) == ((1, 4), (2, 8, 3))
    return x * jnp.sin(w).sum()

  run = per_device.batch_local(fn, shared=P(None, 'embed'))
  grad = jax.grad(lambda w: jnp.sin(run(x, w)).sum())
  place = NamedSharding(mesh, P(None, ('fsdp', 'context')))
  with jax.set_mesh(mesh):
    step = jax.jit(grad, in_shardings=place, out_shardings=place).lower(
        w).compile()
    got = step(jax.device_put(w, place))
  want = jax.grad(lambda w: jnp.sin(x * jnp.sin(w).sum()).sum())(w)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  sums = _collectives(step.as_text())
  assert sums['reduce-scatter'] and max(sums['reduce-scatter']) == 2 * 2 * 3
  assert max(sums['all-reduce']) == 2 * 2 * 3
