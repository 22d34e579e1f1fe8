"""Expert choice and what stands in for it: thresholds, auxiliary routers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routed import EXPERTS, E, allowed, dense, random_inputs, route, settings

from mom_jax import routing
from mom_jax.routing import expert_choice

# Expert choice.


@pytest.mark.parametrize('pool', ['sequence', 'device'])
@pytest.mark.parametrize('capacity', [0.1, 1.0, 1.5, 9.0])
def test_every_expert_takes_exactly_its_capacity(pool, capacity):
  """The k_e best valid tokens of its modality in each pool, padding never."""
  inputs = random_inputs(14, B=3, T=17)
  got = route(
      'expert_choice', inputs, capacity=capacity, pool=pool).selected_BTE
  shape = (3 if pool == 'sequence' else 1, -1, E)
  for logits_NE, allowed_NE, got_NE in zip(
      np.asarray(inputs.logits_BTE).reshape(shape),
      np.asarray(inputs.allowed_BTE).reshape(shape),
      np.asarray(got).reshape(shape)):
    for e, size in enumerate(np.repeat(EXPERTS, EXPERTS)):
      b = allowed_NE[:, e].sum()
      k = min(b, max(1, int(np.ceil(capacity * b / size))))
      best = np.argsort(-np.where(allowed_NE[:, e], logits_NE[:, e], -np.inf))
      np.testing.assert_array_equal(
          np.flatnonzero(got_NE[:, e]), np.sort(best[:k]))


def test_weights_are_the_bare_probabilities():
  inputs = random_inputs(15)
  got = route('expert_choice', inputs)
  want = np.where(got.selected_BTE, jax.nn.sigmoid(inputs.logits_BTE), 0)
  np.testing.assert_array_equal(dense(got), want)


@pytest.mark.parametrize('T', [1, 7, 64])
@pytest.mark.parametrize('capacity', [0.3, 1.1, 4.0])
def test_rows_hold_every_mixture(T, capacity):
  """No selected pair is dropped, from all text to all image."""
  for images in {0, 1, T // 3, T - 1, T}:
    inputs = random_inputs(16, B=1, T=T)._replace(
        allowed_BTE=allowed(np.arange(T)[None] < images))
    got = route('expert_choice', inputs, capacity=capacity)
    assert (np.asarray(got.group_R) >= 0).sum() == got.selected_BTE.sum()


def test_a_capacity_that_binary_cannot_hold_rounds_as_written():
  """1.1 tokens an expert of 10 are 11, not 12."""
  inputs = routing.RouterInputs(
      random_inputs(17, B=1, T=20).logits_BTE[..., :2],
      jnp.ones((1, 20, 2), bool))
  got = route('expert_choice', inputs, capacity=1.1, experts=None)
  assert got.selected_BTE.sum(1).tolist() == [[11, 11]]


@pytest.mark.parametrize('capacity', [0.3, 1.0, 1.1, 2.5])
def test_the_static_bound_is_what_an_expert_takes(capacity):
  """Of a pool without padding, and so of any; none to spare but in large ones.
  """
  how = settings(capacity=capacity, experts=None)
  count = jax.jit(lambda mask: expert_choice.tokens_per_expert(mask, how).max())
  for tokens in (1, 2, 7, 10, 64, 97):
    for experts in (1, 3, 8):
      want = int(count(jnp.ones((1, tokens, experts), bool)))
      assert routing.max_tokens_per_expert(tokens, capacity, experts) == want
  many = int(count(jnp.ones((1, 200001, 7), bool)))
  bound = routing.max_tokens_per_expert(200001, capacity, 7)
  assert many <= bound <= many + 1


def test_saturated_logits_are_no_ties():
  """Sigmoids of 40 and 50 are both 1: the larger logit wins."""
  inputs = routing.RouterInputs(
      jnp.asarray([[[40.0], [50.0], [-200.0], [45.0]]]),
      jnp.ones((1, 4, 1), bool))
  got = route('expert_choice', inputs, capacity=0.5, experts=None)
  assert got.selected_BTE[0, :, 0].tolist() == [False, True, False, True]


def test_unknown_pool_lists_the_known():
  with pytest.raises(ValueError, match="'batch'; known: device, glob"):
    route('expert_choice', random_inputs(18), pool='batch')


# Thresholds.


def test_threshold_needs_its_state():
  with pytest.raises(ValueError, match='softmax_topk'):
    route('threshold', random_inputs(11)._replace(state_E=None))


def test_threshold_takes_what_is_above():
  inputs = random_inputs(12)
  got = route('threshold', inputs).selected_BTE
  want = np.asarray(inputs.allowed_BTE) & (
      np.asarray(jax.nn.sigmoid(inputs.logits_BTE))
      > np.asarray(inputs.state_E))
  np.testing.assert_array_equal(got, want)
  assert set(want.sum(-1).ravel()) >= {0, 1, 2}


def test_threshold_moves_to_the_kth_largest_probability():
  inputs = random_inputs(13, T=20)
  new = routing.get('threshold').state.update(
      inputs, inputs.allowed_BTE, settings(update_rate=0.25))
  for e, size in enumerate(np.repeat(EXPERTS, EXPERTS)):
    mine = np.asarray(jax.nn.sigmoid(inputs.logits_BTE))[..., e]
    mine = mine[inputs.allowed_BTE[..., e]]
    kth = np.sort(mine)[-int(np.ceil(len(mine) / size))]
    np.testing.assert_allclose(
        new[e], 0.75 * inputs.state_E[e] + 0.25 * kth, rtol=1e-6)


@pytest.mark.parametrize('capacity', [0.5, 1.0])
def test_threshold_converges_to_capacity(capacity):
  router = routing.get('threshold')
  skew = jnp.asarray([2.0, 0.0, -2.0, 1.0, -1.0])[None, None]
  mask = allowed(np.arange(512).reshape(1, -1) % 2)
  how = settings(capacity=capacity)

  def step(state, key):
    inputs = routing.RouterInputs(
        jax.random.normal(key, (1, 512, E)) + skew, mask, state)
    selected = router.route(inputs, how).selected_BTE
    return router.state.update(inputs, selected, how), selected.sum((0, 1))

  _, loads = jax.lax.scan(
      step, router.state.init(E), jax.random.split(jax.random.key(1), 120))
  fraction = np.asarray(loads[-60:]).mean(0) / 256
  want = capacity / np.repeat(EXPERTS, EXPERTS)
  np.testing.assert_allclose(fraction, want, rtol=0.05)


# Auxiliary routers.


def test_auxiliary_routers_pick_and_never_weigh():
  """What their sigmoid puts above 1/2; the weight is the main router's."""
  inputs = random_inputs(21)._replace(
      state_E=None, aux_logits_BTE=random_inputs(22).logits_BTE)
  got = routing.get('aux_causal').route(inputs, settings())
  want = np.asarray(inputs.allowed_BTE) & (
      np.asarray(jax.nn.sigmoid(inputs.aux_logits_BTE)) > 0.5)
  np.testing.assert_array_equal(got.selected_BTE, want)
  np.testing.assert_array_equal(
      dense(got), np.where(want, jax.nn.sigmoid(inputs.logits_BTE), 0))
  assert set(want.sum(-1).ravel()) >= {0, 1, 2}
  with pytest.raises(ValueError, match='needs auxiliary routers'):
    routing.get('aux_causal').route(
        inputs._replace(aux_logits_BTE=None), settings())
