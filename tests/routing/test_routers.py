"""Laws of every router, over the table of routers."""

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest
from routed import E, allowed, dense, random_inputs, route, settings

from mom_jax import routing

ROUTERS = pytest.mark.parametrize('name', sorted(routing.ROUTERS))


@ROUTERS
@pytest.mark.parametrize('pool', ['sequence', 'device', 'global'])
@pytest.mark.parametrize('capacity', [0.4, 2.5])
def test_rows_say_what_selected_says(name, pool, capacity):
  """Every selected pair is one row, no other row names an expert."""
  inputs = random_inputs(0)
  got = route(name, inputs, pool=pool, capacity=capacity)
  token_R, group_R, weight_R = map(np.asarray, got[:3])
  selected_NE = np.asarray(got.selected_BTE).reshape(-1, E)
  allowed_NE = np.asarray(inputs.allowed_BTE).reshape(-1, E)
  assert selected_NE.any()
  real_R = group_R >= 0
  pairs = sorted(zip(token_R[real_R].tolist(), group_R[real_R].tolist()))
  assert pairs == [tuple(p) for p in np.argwhere(selected_NE).tolist()]
  assert (weight_R[~real_R] == 0).all() and (group_R[~real_R] == -1).all()
  assert not (selected_NE & ~allowed_NE).any()
  assert not np.asarray(got.probs_BTE)[~np.asarray(inputs.allowed_BTE)].any()
  if got.rows_per_token is not None:
    want = np.repeat(np.arange(len(selected_NE)), got.rows_per_token)
    np.testing.assert_array_equal(token_R, want)


@ROUTERS
@pytest.mark.parametrize('modality', [-1, 0, 1])
def test_one_modality_or_padding_alone(name, modality):
  inputs = random_inputs(1)
  inputs = inputs._replace(
      allowed_BTE=allowed(np.full(inputs.logits_BTE.shape[:2], modality)))
  got = route(name, inputs)
  assert np.isfinite(got.weight_R).all()
  selected = np.asarray(got.selected_BTE)
  assert selected.any() == (modality >= 0)
  assert not (selected & ~np.asarray(inputs.allowed_BTE)).any()


@ROUTERS
@pytest.mark.parametrize('B', [1, 3])
def test_causal_routers_never_see_the_future(name, B):
  """Logits after t leave rows up to t bit-equal; others are shown to fail."""
  inputs = random_inputs(2, B=B, T=16, padding=0.1)
  # Slices of numpy arrays are not compiled.
  logits, mask = map(np.asarray, inputs[:2])
  other, other_mask = map(
      np.asarray, random_inputs(3, B=B, T=16, padding=0.1)[:2])
  run = lambda logits, mask: np.asarray(dense(route(
      name, inputs._replace(logits_BTE=logits, allowed_BTE=mask))))
  before = run(logits, mask)
  same = []
  for t in range(1, 16):
    after = run(np.concatenate([logits[:, :t], other[:, t:]], 1),
                np.concatenate([mask[:, :t], other_mask[:, t:]], 1))
    same.append(bool((before[:, :t] == after[:, :t]).all()))
  if routing.get(name).causal:
    assert all(same)
  else:
    assert not all(same)


@ROUTERS
def test_a_sample_alone_is_the_sample_among_others(name):
  """Holds for sequence pools, expert choice too, and fails for its device pool.
  """
  inputs = random_inputs(4, B=3)
  logits, mask = map(np.asarray, inputs[:2])
  for pool in ('sequence', 'device'):
    run = lambda logits, mask, pool=pool: np.asarray(dense(route(
        name, inputs._replace(logits_BTE=logits, allowed_BTE=mask), pool=pool)))
    among = run(logits, mask)
    same = [np.array_equal(run(logits[b:b + 1], mask[b:b + 1])[0], among[b])
            for b in range(3)]
    assert all(same) == (pool == 'sequence' or routing.get(name).causal)


@ROUTERS
def test_text_never_changes_which_image_tokens_are_picked(name):
  inputs = random_inputs(5)
  image = np.asarray(inputs.allowed_BTE)[..., -1:]
  other = np.where(image, inputs.logits_BTE, random_inputs(6).logits_BTE)
  a, b = (np.asarray(dense(route(name, inputs._replace(logits_BTE=logits))))
          for logits in (inputs.logits_BTE, other))
  image = image[..., 0]
  np.testing.assert_array_equal(a[image], b[image])
  assert (a != b).any()


@ROUTERS
def test_gradients_are_those_of_the_weights(name):
  """Weights are smooth where the selection stays; checked by differences."""
  inputs = random_inputs(7, T=6)
  run = lambda logits: dense(route(name, inputs._replace(logits_BTE=logits)))
  check_grads(
      run, (inputs.logits_BTE,), 1, ['rev'], atol=2e-3, rtol=2e-3, eps=1e-3)


@pytest.mark.parametrize(
    'name', [n for n, r in routing.ROUTERS.items() if r.state])
def test_no_modality_changes_the_state_of_another(name):
  inputs = random_inputs(8)
  inputs = inputs._replace(
      allowed_BTE=allowed(np.zeros(inputs.logits_BTE.shape[:2])))
  new = routing.get(name).state.update(
      inputs, route(name, inputs).selected_BTE, settings())
  state = inputs.state_E
  assert (np.asarray(new)[:3] != np.asarray(state)[:3]).any()
  np.testing.assert_array_equal(new[3:], state[3:])


@ROUTERS
def test_a_forced_selection_of_its_own_choices_changes_nothing(name):
  inputs = random_inputs(9)
  got = route(name, inputs)
  forced = routing.finalize_weights(
      routing.get(name), got.selected_BTE, got.probs_BTE, inputs)
  again = routing.from_mask(forced, inputs.allowed_BTE, settings().experts)
  np.testing.assert_array_equal(again.selected_BTE, got.selected_BTE)
  np.testing.assert_allclose(dense(again), dense(got), rtol=1e-6)


def test_unknown_router_lists_the_known():
  with pytest.raises(ValueError, match="'softmax-topk' must be one of aux_cau"):
    routing.get('softmax-topk')


def test_equal_logits_go_to_the_lowest_index():
  zeros = routing.RouterInputs(
      jnp.zeros((1, 4, 4)), jnp.ones((1, 4, 4), bool))
  for name in ('softmax_topk', 'token_choice'):
    group_R = route(name, zeros, experts=None).group_R
    np.testing.assert_array_equal(group_R, [0, 1] * 4)
  got = route('expert_choice', zeros, experts=None, capacity=2.0)
  for e in range(4):
    np.testing.assert_array_equal(
        np.sort(got.token_R[got.group_R == e]), [0, 1])


@pytest.mark.parametrize(
    'name', [n for n, r in routing.ROUTERS.items() if r.exact_k])
@pytest.mark.parametrize('state', [None, 0.0])
def test_logits_rank_where_probabilities_are_equal(name, state):
  """Probabilities of these logits are 1 and 1, or 0 and 0, in float32."""
  logits = jnp.asarray(
      [[[18, 20, 30, 25], [-95, -92, -90, -91], [-200, 0, 300, 150]]],
      jnp.float32)
  got = route(name, routing.RouterInputs(
      logits, jnp.ones(logits.shape, bool),
      state if state is None else jnp.full(4, state)), experts=None)
  np.testing.assert_array_equal(
      got.group_R.reshape(3, 2), [[2, 3], [2, 3], [2, 3]])
  if routing.get(name).renormalise:
    np.testing.assert_allclose(got.weight_R.reshape(3, 2).sum(-1), 1, rtol=1e-6)
    picked = np.take_along_axis(
        np.asarray(logits[0], np.float64), np.asarray([[2, 3]] * 3), -1)
    log = -np.logaddexp(0, -picked) if name == 'sigmoid_topk' else picked
    want = np.exp(log - log.max(-1, keepdims=True))
    np.testing.assert_allclose(
        got.weight_R.reshape(3, 2), want / want.sum(-1, keepdims=True),
        rtol=1e-5, atol=1e-30)


def test_experts_rank_tokens_by_logit():
  """Where probabilities are equal, with logits of either sign."""
  for values in ([18, 20, 30, 25], [-95, -92, -90, -91], [-1, 0, 2, 1]):
    logits = jnp.asarray(values, jnp.float32).reshape(1, 4, 1)
    got = route('expert_choice', routing.RouterInputs(
        logits, jnp.ones((1, 4, 1), bool)), experts=(1,), capacity=0.5)
    np.testing.assert_array_equal(
        got.selected_BTE[0, :, 0], [False, False, True, True])


def test_a_wrong_expert_of_no_probability_has_all_weight():
  """A forced selection is weighted by log-probabilities too."""
  inputs = routing.RouterInputs(
      jnp.asarray([[[0.0, -300.0]]]), jnp.ones((1, 1, 2), bool))
  forced = jnp.asarray([[[False, True]]])
  for name in ('softmax_topk', 'sigmoid_topk'):
    got = routing.finalize_weights(
        routing.get(name), forced, route(
            name, inputs, experts=None, top_k=1).probs_BTE, inputs)
    np.testing.assert_array_equal(got.weight_BTE, [[[0, 1]]])


def test_noise_is_standard_logistic():
  """Mean 0, variance pi^2 / 3, P(> 1) = sigmoid(-1)."""
  noise = np.asarray(routing.add_noise(jax.random.key(0), jnp.zeros(200_000)))
  assert abs(noise.mean()) < 0.02
  np.testing.assert_allclose(noise.var(), np.pi**2 / 3, rtol=0.02)
  np.testing.assert_allclose((noise > 1).mean(), 1 / (1 + np.e), atol=0.005)
  shifted = routing.add_noise(jax.random.key(0), jnp.full(200_000, 3.0))
  np.testing.assert_allclose(shifted - noise, 3, atol=1e-5)
