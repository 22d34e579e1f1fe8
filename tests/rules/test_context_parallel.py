"""States pass from device to device along time, in every form of the update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import rules
from mom_jax.parallel import per_device, sharding
from mom_jax.rules.rule import GroupedMemory

N, R, H, K, V, CHUNK = 4, 16, 1, 3, 2, 2
# A document ends inside a part and one where a part does; others go on.
SEGMENT = np.repeat([1, 2, 3], [3, 5, 8])
CONTINUES = np.array([False, True, False, True])
RNG = np.random.default_rng(0)


def _draw(*shape):
  return RNG.normal(size=(R, H, *shape)).astype(np.float32)


FORMS = {
    'additive': {},
    'decay': dict(log_decay=-np.exp(_draw())),
    'key_decay': dict(log_decay=-np.exp(_draw(K))),
    'value_decay': dict(value_decay_RHV=-np.exp(_draw(V))),
    'delta': dict(beta=1 / (1 + np.exp(_draw()))),
    'erase': dict(log_decay=-np.exp(_draw(K)), removal_key_RHK=_draw(K) / 3),
}


@pytest.mark.parametrize('form', FORMS)
def test_states_pass_from_part_to_part(form):
  q, k, v = _draw(K), _draw(K) / 2, _draw(V)
  exclusive = form == 'key_decay'

  def run(rows, _):
    q, k, v, segment, continues, more = jax.tree.map(lambda x: x[0], rows)
    continues = continues if len(segment) < R else None
    memory = GroupedMemory(
        jnp.ones(len(segment), bool),
        jnp.zeros(len(segment) // CHUNK, jnp.int32), segment, continues,
        dict(chunk=CHUNK, num_groups=1, backend='reference'))
    o, _ = memory(
        rules.Operands(q, k, v, **more), None, exclusive=exclusive)
    return o[None]

  rows = jax.tree.map(
      lambda x: jnp.asarray(x)[None],
      (q, k, v, SEGMENT.astype(np.int32), CONTINUES, FORMS[form]))
  want = run(rows, ())
  mesh = sharding.make_mesh(1, context=N, devices=jax.devices()[:N])
  with jax.set_mesh(mesh):
    got = jax.jit(per_device.batch_local(run))(rows, ())
  assert np.abs(want).max() > 0.1
  np.testing.assert_allclose(got, want, atol=1e-5)
