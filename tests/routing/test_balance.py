"""Balance losses, z-loss and entropy of routers."""

import jax
import jax.numpy as jnp
import numpy as np
from routed import E, dense, random_inputs, route

from mom_jax import routing
from mom_jax.routing import balance


def _switch_loss(probs, selected, valid):
  return balance.switch_loss(
      *balance.load_and_mean_prob(probs, selected, valid))


def test_switch_loss_is_k_when_balanced_and_m_when_collapsed():
  """M = 4, K = 2: 2 for a balanced router, 4 for a collapsed one."""
  valid = jnp.asarray([[True] * 6, [True] * 2 + [False] * 4])
  balanced = jnp.asarray(np.arange(4) // 2 == (np.arange(6) % 2)[:, None])
  balanced = jnp.broadcast_to(balanced[None], (2, 6, 4))
  uniform = jnp.full((2, 6, 4), 0.25)
  np.testing.assert_allclose(
      _switch_loss(uniform, balanced, valid), 2, rtol=1e-6)
  picked = jnp.broadcast_to(jnp.asarray([True, True, False, False]), (2, 6, 4))
  probs = jnp.where(picked, 0.5, 0.0)
  np.testing.assert_allclose(
      _switch_loss(probs, picked, valid), 4, rtol=1e-6)


def test_switch_loss_is_the_sum_over_valid_tokens():
  inputs = random_inputs(19)
  valid = inputs.allowed_BTE.any(-1)
  got = route('softmax_topk', inputs)
  f = np.asarray(got.selected_BTE)[np.asarray(valid)].mean(0)
  p = np.asarray(got.probs_BTE)[np.asarray(valid)].mean(0)
  loss = _switch_loss(got.probs_BTE, got.selected_BTE, valid)
  np.testing.assert_allclose(loss, E * (f * p).sum(), rtol=1e-5)


def test_switch_loss_pushes_towards_balance():
  """A step against its gradient lowers the load of the fullest expert."""
  logits = random_inputs(20, B=1, T=200).logits_BTE
  logits += jnp.asarray([1.0, 0, 0, 0, 0])[None, None]
  mask = jnp.ones(logits.shape, bool)

  def loss(bias_E):
    got = route('softmax_topk', routing.RouterInputs(
        logits + bias_E[None, None], mask), experts=None)
    return _switch_loss(
        got.probs_BTE, got.selected_BTE, mask[..., 0])

  grad = jax.grad(loss)(jnp.zeros(E))
  assert grad[0] > 0 and (grad[1:] < 0).all()


def test_balance_over_layers_or_samples():
  """K = 1 of two: 1 when balanced, 2 when collapsed.

  Two layers that collapse to different sides are balanced when pooled, two
  samples that do within one layer are when taken together.
  """
  one, other = jnp.asarray([1.0, 0]), jnp.asarray([0, 1.0])
  part = lambda layers: balance.RouterStats(
      None, None, jnp.stack(layers), jnp.stack(layers), jnp.asarray([2.0, 1.0]))
  for parts in ([part([one, other])], [part([one]), part([other])]):
    assert balance.over_layers(parts, 'layer') == 2
    assert balance.over_layers(parts, 'model') == 1
  assert balance.over_layers([part([one, other])], 'sample') == 1.5
  assert balance.over_layers([], 'model') == 0
  took = jnp.stack([jnp.broadcast_to(x, (5, 2)) for x in (one, other)])
  valid = jnp.ones((2, 5), bool)
  assert balance.sample_loss(took, took > 0, valid) == 2
  assert _switch_loss(took, took > 0, valid) == 1
  half = jnp.full((2, 5, 2), 0.5)
  assert balance.sample_loss(half, took > 0, valid) == 1


def test_samples_of_padding_alone_do_not_count():
  took = jnp.stack([jnp.broadcast_to(jnp.asarray([1.0, 0]), (5, 2))] * 2)
  valid = jnp.asarray([[True] * 5, [False] * 5])
  assert balance.sample_loss(took, took > 0, valid) == 2
  assert balance.sample_loss(took, took > 0, ~(valid | True)) == 0


def test_z_loss_is_the_mean_squared_log_sum():
  scores = jnp.asarray([[[0.0, 0.0], [1.0, 3.0], [9.0, 9.0]]])
  valid = jnp.asarray([[True, True, False]])
  want = (np.log(2) ** 2 + np.log(np.e + np.e**3) ** 2) / 2
  np.testing.assert_allclose(balance.z_loss(scores, valid), want, rtol=1e-6)


def test_entropy_of_known_distributions():
  """ln 4 for four equal, 0 for one sure, sigmoid scores normalised first."""
  valid = jnp.asarray([[True, True, False]])
  probs = jnp.asarray([[[0.5] * 4, [0, 0.3, 0, 0], [0, 0, 0, 0]]])
  np.testing.assert_allclose(
      balance.entropy(probs, valid), np.log(4) / 2, rtol=1e-6)
  grad = jax.grad(lambda p: balance.entropy(p, valid))(probs)
  assert np.isfinite(grad).all()


def test_terms_without_a_valid_token_are_zero():
  probs, none = jnp.zeros((1, 2, 3)), jnp.zeros((1, 2), bool)
  assert _switch_loss(probs, probs > 0, none) == 0
  assert balance.entropy(probs, none) == 0


def test_loss_of_a_layer_is_the_weighted_sum_of_its_statistics():
  inputs = random_inputs(22)
  valid = inputs.allowed_BTE.any(-1)
  got = route('softmax_topk', inputs)
  stats = balance.router_stats(
      inputs.logits_BTE, got.probs_BTE, got.selected_BTE, dense(got), valid)
  loss = balance.router_loss(stats, 0.5, 0.25)
  want = 0.5 * _switch_loss(got.probs_BTE, got.selected_BTE, valid)
  want += 0.25 * balance.z_loss(inputs.logits_BTE, valid)
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  assert balance.router_loss(stats, 0.0, 0.0) == 0
