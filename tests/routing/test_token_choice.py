"""Token choice: definitions of its routers and of the balance bias."""

import jax
import jax.numpy as jnp
import numpy as np
from routed import E, allowed, dense, random_inputs, route, settings

from mom_jax import routing


def _one_token(*logits, state=None):
  logits = jnp.asarray([[logits]])
  return routing.RouterInputs(logits, jnp.ones(logits.shape, bool), state)


def test_softmax_topk_is_softmax_over_the_picked_logits():
  inputs = random_inputs(9)
  logits, mask = inputs.logits_BTE, inputs.allowed_BTE
  got = dense(route('softmax_topk', inputs))
  masked = np.where(mask, logits, -np.inf)
  order = np.argsort(-masked, -1, kind='stable')[..., :2]
  picked = np.zeros(masked.shape, bool)
  np.put_along_axis(picked, order, True, -1)
  picked &= np.asarray(mask)
  e = np.where(picked, np.exp(logits), 0)
  total = e.sum(-1, keepdims=True)
  want = e / np.where(total > 0, total, 1)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_weight_that_underflows_still_counts():
  got = route('softmax_topk', _one_token(0.0, -300.0, -400.0), experts=None)
  np.testing.assert_array_equal(got.group_R, [0, 1])
  np.testing.assert_array_equal(got.weight_R, [1, 0])
  np.testing.assert_array_equal(got.selected_BTE[0, 0], [True, True, False])


def test_a_group_smaller_than_top_k_is_taken_whole():
  inputs = random_inputs(10, padding=0)
  for name in ('softmax_topk', 'token_choice'):
    selected = route(name, inputs._replace(state_E=None), top_k=3).selected_BTE
    np.testing.assert_array_equal(selected, inputs.allowed_BTE)


def test_weights_of_the_memory_routers():
  """Renormalised or not; a bias picks but does not weigh."""
  inputs = random_inputs(21, padding=0)
  inputs = routing.RouterInputs(
      inputs.logits_BTE, jnp.ones_like(inputs.allowed_BTE))
  run = lambda name, bias=None: route(
      name, inputs._replace(state_E=bias), experts=None)
  for name in ('softmax_topk', 'softmax_topk_raw', 'sigmoid_topk',
               'softmax_topk_bias', 'token_choice'):
    got = run(name)
    want = jnp.where(got.selected_BTE, got.probs_BTE, 0)
    assert bool(routing.get(name).renormalise) == (
        name not in ('softmax_topk_raw', 'token_choice'))
    if routing.get(name).renormalise:
      want /= want.sum(-1, keepdims=True)
    np.testing.assert_allclose(dense(got), want, rtol=1e-6)
  np.testing.assert_array_equal(
      run('softmax_topk_bias').group_R, run('softmax_topk').group_R)
  got = run('softmax_topk_bias', jnp.asarray([0, 9.0, 0, 0, 0]))
  assert got.selected_BTE[..., 1].all()
  np.testing.assert_array_equal(got.probs_BTE, run('softmax_topk').probs_BTE)


# The balance bias.


def test_bias_picks_and_never_weighs():
  inputs = _one_token(2.0, 1.0, 0.0, state=jnp.asarray([0.0, 0.0, 5.0]))
  got = route('token_choice', inputs, top_k=1, experts=None)
  np.testing.assert_array_equal(got.group_R, [2])
  np.testing.assert_allclose(got.weight_R, [0.5])


def test_bias_balances_a_skewed_router():
  router = routing.get('token_choice')
  skew = jnp.asarray([2.0, 0.0, -2.0, 1.0, -1.0])[None, None]
  mask = allowed(np.arange(256).reshape(1, -1) % 2)
  how = settings(top_k=1, update_rate=0.01)

  @jax.jit
  def step(state, key):
    inputs = routing.RouterInputs(
        jax.random.normal(key, (1, 256, E)) + skew, mask, state)
    selected = router.route(inputs, how).selected_BTE
    return router.state.update(inputs, selected, how), selected.sum((0, 1))

  state, loads = jax.lax.scan(
      step, router.state.init(E), jax.random.split(jax.random.key(0), 200))
  first, last = np.asarray(loads[0]), np.asarray(loads[-50:]).mean(0)
  assert first[0] > 2 * 128 / 3 and first[3] > 1.3 * 64
  np.testing.assert_allclose(last, [128 / 3] * 3 + [64] * 2, rtol=0.15)
  np.testing.assert_allclose(state[:3].sum(), 0, atol=1e-4)
  np.testing.assert_allclose(state[3:].sum(), 0, atol=1e-4)


def test_bias_steps_by_the_sign_of_the_load_error():
  selected = jnp.asarray([[[1, 0, 0, 1, 0], [1, 0, 0, 0, 1], [0, 1, 0, 0, 0]]],
                         bool)
  inputs = routing.RouterInputs(
      jnp.zeros((1, 3, E)), jnp.ones((1, 3, E), bool), jnp.zeros(E))
  new = routing.get('token_choice').state.update(
      inputs, selected, settings(update_rate=0.3))
  # Loads 2, 1, 0 | 1, 1: signs -1, 0, 1 | 0, 0, already centred.
  np.testing.assert_allclose(new, [-0.3, 0, 0.3, 0, 0], atol=1e-7)
