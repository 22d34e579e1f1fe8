"""Laws of the training loss."""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from mom_jax.training import losses


def _batch(seed=0, B=4, T=12, W=20):
  keys = jax.random.split(jax.random.key(seed), 4)
  tokens = jax.random.randint(keys[0], (B, T), 0, W)
  modality = jax.random.randint(keys[1], (B, T), 0, 2)
  segment = jnp.sort(jax.random.randint(keys[2], (B, T), 0, 4), 1)[:, ::-1]
  weight = jnp.ones((B, T))
  logits = 3 * jax.random.normal(keys[3], (B, T, W))
  return tokens, modality, segment, weight, logits


def test_positions_predict_the_next_token_of_their_document():
  tokens = jnp.array([[5, 6, 7, 8, 9, 0]])
  modality = jnp.array([[0, 1, 1, 0, 1, 0]])
  segment = jnp.array([[1, 1, 1, 2, 2, 0]])
  target, kind, weight = losses.targets(
      tokens, modality, segment, jnp.array([[1, 1, 0.5, 1, 1, 1]]))
  np.testing.assert_array_equal(weight, [[1, 0.5, 0, 1, 0, 0]])
  np.testing.assert_array_equal(target[0, [0, 1, 3]], [6, 7, 9])
  np.testing.assert_array_equal(kind[0, [0, 1, 3]], [1, 1, 1])


def test_sums_are_those_of_optax_and_split_by_the_targets_modality():
  *batch, logits = _batch()
  target, kind, weight = losses.targets(*batch)
  sums = losses.cross_entropy(logits, target, kind, weight, 2)
  each = optax.softmax_cross_entropy_with_integer_labels(logits, target)
  for m in range(2):
    of_m = weight * (kind == m)
    np.testing.assert_allclose(sums.loss_S[m], (each * of_m).sum(), rtol=1e-6)
    assert sums.count_S[m] == of_m.sum() > 0


def test_low_precision_logits_are_reduced_in_float32():
  *batch, logits = _batch()
  low = logits.astype(jnp.bfloat16)
  targets = losses.targets(*batch)
  got = losses.cross_entropy(low, *targets, 2)
  want = losses.cross_entropy(low.astype(jnp.float32), *targets, 2)
  np.testing.assert_array_equal(got.loss_S, want.loss_S)


def test_losses_of_micro_batches_add_up_to_the_batchs():
  """Gradients too: counts of the whole batch divide every piece."""
  *batch, logits = _batch()

  def loss(logits, rows):
    target, kind, weight = losses.targets(*[x[rows] for x in batch])
    whole = losses.targets(*batch)
    count = losses.count(whole[1], whole[2], 2)
    sums = losses.cross_entropy(logits[rows], target, kind, weight, 2)
    return losses.lm_loss(sums, count, (1.0, 0.3), 1e-2)

  gradient = jax.jit(jax.value_and_grad(loss))
  value, grad = gradient(logits, jnp.arange(4))
  parts = [gradient(logits, jnp.array([i])) for i in range(4)]
  np.testing.assert_allclose(sum(v for v, _ in parts), value, rtol=1e-6)
  np.testing.assert_allclose(sum(g for _, g in parts), grad, atol=1e-8)


def test_modality_weights_weigh_means():
  *batch, logits = _batch()
  sums = losses.cross_entropy(logits, *losses.targets(*batch), 2)
  only_image = losses.lm_loss(sums, sums.count_S, (0.0, 2.0), 0.0)
  np.testing.assert_allclose(
      only_image, sums.loss_S[1] / sums.count_S[1], rtol=1e-6)


def test_z_loss_is_the_mean_squared_log_partition():
  *batch, logits = _batch()
  _, _, weight = targets = losses.targets(*batch)
  sums = losses.cross_entropy(logits, *targets, 2)
  added = (losses.lm_loss(sums, sums.count_S, (1.0, 1.0), 1.0)
           - losses.lm_loss(sums, sums.count_S, (1.0, 1.0), 0.0))
  z = jax.nn.logsumexp(logits, -1) ** 2
  np.testing.assert_allclose(
      added, (weight * z).sum() / weight.sum(), rtol=1e-5)


def test_padding_of_any_value_changes_nothing():
  """Logits of positions without a target may be inf or nan."""
  *batch, logits = _batch()
  target, kind, weight = losses.targets(*batch)
  wild = jnp.where((weight > 0)[..., None], logits, jnp.nan)
  got = losses.cross_entropy(wild, target, kind, weight, 2)
  want = losses.cross_entropy(logits, target, kind, weight, 2)
  np.testing.assert_array_equal(got.loss_S, want.loss_S)
  np.testing.assert_array_equal(got.z, want.z)


def test_a_batch_without_targets_has_loss_and_gradient_zero():
  tokens, modality, segment, weight, logits = _batch()

  def loss(logits):
    targets = losses.targets(tokens, modality, 0 * segment, weight)
    sums = losses.cross_entropy(logits, *targets, 2)
    return losses.lm_loss(sums, sums.count_S, (1.0, 1.0), 1e-3)

  value, grad = jax.value_and_grad(loss)(logits)
  assert value == 0
  np.testing.assert_array_equal(grad, 0 * grad)


@pytest.mark.parametrize('counts, names', [
    ((2, 3), {'val_loss', 'val_loss_text', 'val_loss_image'}),
    ((2, 0), {'val_loss', 'val_loss_text'}),
    ((0, 0), set()),
])
def test_means_name_only_what_occurred(counts, names):
  sums = losses.Sums(jnp.array([4.0, 9.0]) * (jnp.array(counts) > 0),
                     jnp.array(counts, jnp.float32), jnp.array(1.0))
  got = losses.means(sums, ('text', 'image'), 'val_')
  assert set(got) == names
  if counts == (2, 3):
    assert got == pytest.approx(
        {'val_loss': 13 / 5, 'val_loss_text': 2, 'val_loss_image': 3})


def test_input_noise_replaces_its_share_by_tokens_of_the_modality():
  random = np.random.default_rng(0)
  segment = np.repeat([[1] * 900 + [0] * 100], 4, 0)
  modality = random.integers(0, 2, (4, 1000))
  # Text is 0 .. 9, images 100 .. 199, padding 5 but no token.
  tokens = np.where(modality == 1, random.integers(100, 200, (4, 1000)),
                    random.integers(0, 10, (4, 1000)))
  tokens[segment == 0], modality[segment == 0] = 500, 0
  args = [jnp.array(x) for x in (tokens, modality, segment)]
  noised = np.asarray(
      losses.noised_inputs(jax.random.key(0), *args, (0.0, 0.5)))
  changed = noised != tokens
  assert not changed[(modality == 0) | (segment == 0)].any()
  share = changed[(modality == 1) & (segment > 0)].mean()
  assert abs(share - 0.5 * 99 / 100) < 0.04
  assert (noised[modality == 1] >= 100).all() and noised.max() == 500
  assert noised[segment > 0].max() < 200
  both = losses.noised_inputs(jax.random.key(0), *args, (1.0, 0.0))
  np.testing.assert_array_equal(both[modality == 1], tokens[modality == 1])
  assert (np.asarray(both) != tokens)[:, :900][modality[:, :900] == 0].any()
  for rates in ((), (0.0, 0.0)):
    np.testing.assert_array_equal(
        losses.noised_inputs(jax.random.key(0), *args, rates), tokens)
