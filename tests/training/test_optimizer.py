"""Laws of AdamW, its mask and its schedules."""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from mom_jax import config, models, routing
from mom_jax.training import optimizer, step


def _params(scale=1.0):
  return {
      'embed': {'embedding': jnp.full((3, 2), scale)},
      'block': {'kernel': jnp.arange(4.0) - 1.5, 'balance_bias': jnp.ones(2),
                'A_log': jnp.ones(2), 'threshold': jnp.ones(2)},
  }


def _names(tree, value):
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {path[-1].key for path, x in flat if x is value}


def test_decay_spares_scales_rates_biases_and_router_state():
  """On the real parameters of every kind of block."""
  cfg = config.override(config.Config(), [
      'model.pattern=mom/moma attention/mlp', 'model.tie_embeddings=false'])
  shapes = jax.eval_shape(
      lambda: step.unbox(models.init_params(cfg, jax.random.key(0))))
  mask = optimizer.decayed(shapes, embeddings=False)
  assert _names(mask, False) == {
      'scale', 'A_log', 'dt_bias', 'balance_bias', 'embedding',
      'row_embedding', 'column_embedding'}
  assert {'kernel', 'query', 'key', 'value', 'gate_up', 'down', 'conv_key',
          } <= _names(mask, True)
  with_embeddings = optimizer.decayed(shapes, embeddings=True)
  assert 'embedding' in _names(with_embeddings, True)


def test_updates_are_those_of_optax_adamw():
  """Two steps, on leaves that decay."""
  cfg = config.Optimizer(weight_decay=0.1, clip_norm=0.0, decay_embeddings=True)
  params = {'embedding': jnp.arange(4.0), 'kernel': jnp.ones((2, 2))}
  ours, theirs = optimizer.make(cfg, params, 'main'), optax.adamw(
      0.01, cfg.b1, cfg.b2, cfg.eps, weight_decay=0.1)
  state, their_state = ours.init(params), theirs.init(params)
  for i in range(2):
    grads = jax.tree.map(lambda p, i=i: jnp.sin(p + i), params)
    updates, state = ours.update(grads, state, params)
    want, their_state = theirs.update(grads, their_state, params)
    jax.tree.map(
        lambda u, w: np.testing.assert_allclose(-0.01 * u, w, rtol=1e-6),
        updates, want)


def test_router_state_is_left_alone():
  """No update, no decay, no moments, no part in the clipped norm."""
  params = _params()
  tx = optimizer.make(
      config.Optimizer(weight_decay=0.5, clip_norm=1.0), params, 'main')
  state = tx.init(params)
  flat, _ = jax.tree_util.tree_flatten_with_path(state)
  assert not [p for p, _ in flat
              if getattr(p[-1], 'key', None) in routing.STATE_NAMES]
  grads = jax.tree.map(jnp.ones_like, params)
  huge = {**grads, 'block': grads['block'] | {'threshold': jnp.full(2, 1e9)}}
  updates, _ = tx.update(huge, state, params)
  plain, _ = tx.update(grads, state, params)
  for name in routing.STATE_NAMES:
    np.testing.assert_array_equal(updates['block'][name], [0, 0])
  np.testing.assert_array_equal(
      updates['block']['kernel'], plain['block']['kernel'])
  kept = optimizer.trainable(params, 'main')
  assert kept['block']['threshold'] is None
  assert kept['block']['kernel'] is params['block']['kernel']


def test_clipping_scales_the_whole_gradient():
  params = {'kernel': jnp.zeros(4)}
  cfg = config.Optimizer(clip_norm=1.0, weight_decay=0.0)
  grads = {'kernel': jnp.array([30.0, 40.0, 0, 0])}
  tx = optimizer.make(cfg, params, 'main')
  _, state = tx.update(grads, tx.init(params), params)
  mu = [x for x in jax.tree.leaves(state) if x.shape == (4,)][0]
  np.testing.assert_allclose(mu, (1 - cfg.b1) * grads['kernel'] / 50, rtol=1e-6)


def test_a_warmup_longer_than_the_training_is_remarked():
  cfg = config.Optimizer(warmup_steps=100, learning_rate=0.5)
  assert optimizer.remark(cfg, 100) is None
  assert 'never reaches optimizer.learning_rate=0.5' in optimizer.remark(
      cfg, 99)


@pytest.mark.parametrize('name', ['cosine', 'linear', 'wsd', 'constant'])
def test_schedules_start_peak_and_end_where_they_should(name):
  cfg = config.Optimizer(
      learning_rate=2.0, schedule=name, warmup_steps=10, end_ratio=0.1,
      decay_fraction=0.2)
  learning_rate = optimizer.lr_schedule(cfg, 100)
  got = np.array([learning_rate(i) for i in range(100)])
  np.testing.assert_allclose(got[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
  np.testing.assert_allclose(got[10], 2.0, rtol=1e-6)
  last = 2.0 if name == 'constant' else 0.2
  np.testing.assert_allclose(got[-1], last, rtol=1e-5)
  assert (np.diff(got[10:]) <= 1e-6).all()
  if name == 'wsd':
    np.testing.assert_array_equal(got[10:81], got[10])
    assert got[81] < got[80]
  if name == 'linear':
    np.testing.assert_allclose(np.diff(got[10:], 2), 0, atol=1e-5)
  if name == 'cosine':
    middle = 10 + 89 / 2
    np.testing.assert_allclose(learning_rate(middle), 1.1, rtol=1e-5)


@pytest.mark.parametrize('name', ['cosine', 'linear', 'wsd', 'constant'])
def test_runs_shorter_than_the_warm_up_only_warm_up(name):
  cfg = config.Optimizer(schedule=name, warmup_steps=50)
  learning_rate = optimizer.lr_schedule(cfg, 4)
  got = np.array([learning_rate(i) for i in range(4)])
  np.testing.assert_allclose(
      got, cfg.learning_rate * np.arange(1, 5) / 50, rtol=1e-6)


def test_average_follows_at_first_and_smooths_later():
  ema, params = {'a': jnp.zeros(2)}, {'a': jnp.ones(2)}
  early = optimizer.update_ema(ema, params, jnp.array(0), 0.99)
  np.testing.assert_allclose(early['a'], 0.9, rtol=1e-6)
  late = optimizer.update_ema(ema, params, jnp.array(10**6), 0.99)
  np.testing.assert_allclose(late['a'], 0.01, rtol=1e-4)
