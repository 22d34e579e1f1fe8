"""Laws of routing, over the table of routers, and each router's definition."""

import functools

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from mom_jax import routing
from mom_jax.routing import balance, selection, token_choice

GROUPS = (3, 2)
E = sum(GROUPS)
ROUTERS = pytest.mark.parametrize('name', sorted(routing.ROUTERS))


def _inputs(seed, B=2, T=12, padding=0.2):
  """Scores, allowed experts of random modalities, and a random router state."""
  rng = np.random.default_rng(seed)
  scores_BTE = jnp.asarray(rng.normal(size=(B, T, E)), jnp.float32)
  modality_BT = rng.integers(0, len(GROUPS), (B, T))
  modality_BT[rng.random((B, T)) < padding] = -1
  state_E = jnp.asarray(rng.uniform(0.3, 0.6, E), jnp.float32)
  return scores_BTE, _allowed(modality_BT), state_E


def _allowed(modality_BT):
  name_E = np.repeat(np.arange(len(GROUPS)), GROUPS)
  return jnp.asarray(np.asarray(modality_BT)[..., None] == name_E)


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6, 7))
def _arrays(name, scores_BTE, allowed_BTE, state_E, top_k, capacity, pool,
            groups):
  return routing.get(name).route(
      scores_BTE, allowed_BTE, state_E, top_k=top_k, capacity=capacity,
      pool=pool, groups=groups, **_more(name, scores_BTE),
  )[:4]


def _more(name, scores_BTE):
  """Auxiliary logits, of the token alone as they must be."""
  if not routing.get(name).auxiliary:
    return {}
  return {'auxiliary_BTE': jnp.sin(3 * scores_BTE)}


def _route(name, scores_BTE, allowed_BTE, state_E, *, top_k=2, capacity=1.0,
           pool='sequence', groups=GROUPS):
  return _arrays(name, scores_BTE, allowed_BTE, state_E, top_k, capacity, pool,
                 groups)


@functools.partial(jax.jit, static_argnums=1)
def _dense(arrays, shape):
  """The assignment as a [B, T, E] array of weights."""
  row_R, group_R, weight_R, _ = arrays
  B, T, E = shape
  column_R = jnp.where(group_R < 0, E, group_R)
  weight_NE = jnp.zeros((B * T, E)).at[row_R, column_R].add(
      weight_R, mode='drop')
  return weight_NE.reshape(shape)


# Laws of every router.


@ROUTERS
@pytest.mark.parametrize('pool', ['sequence', 'device', 'global'])
@pytest.mark.parametrize('capacity', [0.4, 2.5])
def test_rows_say_what_selected_says(name, pool, capacity):
  """Every selected pair is one row, no other row names an expert."""
  scores, allowed, state = _inputs(0)
  got = _route(name, scores, allowed, state, pool=pool, capacity=capacity)
  row_R, group_R, weight_R = map(np.asarray, got[:3])
  aux = got[3]
  selected_NE = np.asarray(aux['selected_BTE']).reshape(-1, E)
  assert selected_NE.any()
  real_R = group_R >= 0
  pairs = sorted(zip(row_R[real_R].tolist(), group_R[real_R].tolist()))
  assert pairs == [tuple(p) for p in np.argwhere(selected_NE).tolist()]
  assert (weight_R[~real_R] == 0).all() and (group_R[~real_R] == -1).all()
  assert not (selected_NE & ~np.asarray(allowed).reshape(-1, E)).any()
  assert not np.asarray(aux['probs_BTE'])[~np.asarray(allowed)].any()
  choices = []
  jax.eval_shape(lambda s: choices.append(routing.get(name).route(
      s, allowed, state, top_k=2, capacity=capacity, pool=pool,
      groups=GROUPS, **_more(name, s)).choices), scores)
  choices = choices[0]
  if choices is not None:
    want = np.repeat(np.arange(len(selected_NE)), choices)
    np.testing.assert_array_equal(row_R, want)


@ROUTERS
@pytest.mark.parametrize('modality', [-1, 0, 1])
def test_one_modality_or_padding_alone(name, modality):
  scores, _, state = _inputs(1)
  allowed = _allowed(np.full(scores.shape[:2], modality))
  got = _route(name, scores, allowed, state)
  assert np.isfinite(got[2]).all()
  selected = np.asarray(got[3]['selected_BTE'])
  assert selected.any() == (modality >= 0)
  assert not (selected & ~np.asarray(allowed)).any()


@ROUTERS
@pytest.mark.parametrize('B', [1, 3])
def test_causal_routers_never_see_the_future(name, B):
  """Scores after t leave rows up to t bit-equal; others are shown to fail."""
  *inputs, state = _inputs(2, B=B, T=16, padding=0.1)
  # Slices of numpy arrays are not compiled.
  scores, allowed = map(np.asarray, inputs)
  other, other_allowed = map(
      np.asarray, _inputs(3, B=B, T=16, padding=0.1)[:2])
  dense = lambda *inputs: np.asarray(
      _dense(_route(name, *inputs, state), scores.shape))
  before = dense(scores, allowed)
  same = []
  for t in range(1, 16):
    mixed = np.concatenate([scores[:, :t], other[:, t:]], 1)
    mixed_allowed = np.concatenate([allowed[:, :t], other_allowed[:, t:]], 1)
    after = dense(mixed, mixed_allowed)
    same.append(bool((before[:, :t] == after[:, :t]).all()))
  if routing.get(name).causal:
    assert all(same)
  else:
    assert not all(same)


@ROUTERS
def test_a_sample_alone_is_the_sample_among_others(name):
  """Holds for sequence pools, expert choice too, and fails for its device pool.
  """
  *inputs, state = _inputs(4, B=3)
  scores, allowed = map(np.asarray, inputs)
  for pool in ('sequence', 'device'):
    route = functools.partial(_route, name, state_E=state, pool=pool)
    among = np.asarray(_dense(route(scores, allowed), scores.shape))
    same = [
        np.array_equal(
            _dense(route(scores[b:b + 1], allowed[b:b + 1]), (1, 12, E))[0],
            among[b]) for b in range(3)
    ]
    assert all(same) == (pool == 'sequence' or routing.get(name).causal)


@ROUTERS
def test_text_never_changes_which_image_tokens_are_picked(name):
  *inputs, state = _inputs(5)
  scores, allowed = map(np.asarray, inputs)
  image = allowed[..., -1:]
  other = np.where(image, scores, _inputs(6)[0])
  a, b = (np.asarray(_dense(_route(name, s, allowed, state), scores.shape))
          for s in (scores, other))
  image = image[..., 0]
  np.testing.assert_array_equal(a[image], b[image])
  assert (a != b).any()


@ROUTERS
def test_gradients_are_those_of_the_weights(name):
  """Weights are smooth where the selection stays; checked by differences."""
  scores, allowed, state = _inputs(7, T=6)
  dense = lambda s: _dense(_route(name, s, allowed, state), s.shape)
  check_grads(dense, (scores,), 1, ['rev'], atol=2e-3, rtol=2e-3, eps=1e-3)


@pytest.mark.parametrize(
    'name', [n for n, r in routing.ROUTERS.items() if r.update])
def test_no_modality_changes_the_state_of_another(name):
  router = routing.get(name)
  scores, _, state = _inputs(8)
  allowed = _allowed(np.zeros(scores.shape[:2]))
  selected = _route(name, scores, allowed, state)[3]['selected_BTE']
  new = router.update(state, scores, allowed, selected, rate=0.1, top_k=2,
                      capacity=1.0, groups=GROUPS)
  assert (np.asarray(new)[:3] != np.asarray(state)[:3]).any()
  np.testing.assert_array_equal(new[3:], state[3:])


def test_unknown_router_lists_the_known():
  with pytest.raises(ValueError, match="'softmax-topk' must be one of aux_cau"):
    routing.get('softmax-topk')


# Softmax top-k.


def test_softmax_topk_is_softmax_over_the_picked_logits():
  scores, allowed, _ = _inputs(9)
  got = _dense(_route('softmax_topk', scores, allowed, None), scores.shape)
  masked = np.where(allowed, scores, -np.inf)
  order = np.argsort(-masked, -1, kind='stable')[..., :2]
  picked = np.zeros(masked.shape, bool)
  np.put_along_axis(picked, order, True, -1)
  picked &= np.asarray(allowed)
  e = np.where(picked, np.exp(scores), 0)
  total = e.sum(-1, keepdims=True)
  want = e / np.where(total > 0, total, 1)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_equal_scores_go_to_the_lowest_index():
  allowed = jnp.ones((1, 4, 4), bool)
  zeros = jnp.zeros((1, 4, 4))
  for name in ('softmax_topk', 'token_choice'):
    group_R = _route(name, zeros, allowed, None, groups=None)[1]
    np.testing.assert_array_equal(group_R, [0, 1] * 4)
  row_R, group_R, *_ = _route(
      'expert_choice', zeros, allowed, None, groups=None, capacity=2.0)
  for e in range(4):
    np.testing.assert_array_equal(np.sort(row_R[group_R == e]), [0, 1])


def test_a_weight_that_underflows_still_counts():
  scores = jnp.asarray([[[0.0, -300.0, -400.0]]])
  allowed = jnp.ones((1, 1, 3), bool)
  _, group_R, weight_R, aux = _route(
      'softmax_topk', scores, allowed, None, groups=None)
  np.testing.assert_array_equal(group_R, [0, 1])
  np.testing.assert_array_equal(weight_R, [1, 0])
  np.testing.assert_array_equal(aux['selected_BTE'][0, 0], [True, True, False])


def test_a_group_smaller_than_top_k_is_taken_whole():
  scores, allowed, _ = _inputs(10, padding=0)
  for name in ('softmax_topk', 'token_choice'):
    selected = _route(name, scores, allowed, None, top_k=3)[3]['selected_BTE']
    np.testing.assert_array_equal(selected, allowed)


# Token choice and its balance bias.


def test_bias_picks_and_never_weighs():
  scores = jnp.asarray([[[2.0, 1.0, 0.0]]])
  allowed = jnp.ones((1, 1, 3), bool)
  bias = jnp.asarray([0.0, 0.0, 5.0])
  _, group_R, weight_R, _ = _route(
      'token_choice', scores, allowed, bias, top_k=1, groups=None)
  np.testing.assert_array_equal(group_R, [2])
  np.testing.assert_allclose(weight_R, [0.5])


def test_bias_balances_a_skewed_router():
  router = routing.get('token_choice')
  skew = jnp.asarray([2.0, 0.0, -2.0, 1.0, -1.0])[None, None]
  allowed = _allowed(np.arange(256).reshape(1, -1) % 2)

  @jax.jit
  def step(state, key):
    scores = jax.random.normal(key, (1, 256, E)) + skew
    selected = router.route(
        scores, allowed, state, top_k=1, capacity=1.0, pool='sequence',
        groups=GROUPS).aux['selected_BTE']
    new = router.update(state, scores, allowed, selected, rate=0.01, top_k=1,
                        capacity=1.0, groups=GROUPS)
    return new, selected.sum((0, 1))

  state, loads = jax.lax.scan(
      step, router.init_state(E), jax.random.split(jax.random.key(0), 200))
  first, last = np.asarray(loads[0]), np.asarray(loads[-50:]).mean(0)
  assert first[0] > 2 * 128 / 3 and first[3] > 1.3 * 64
  np.testing.assert_allclose(last, [128 / 3] * 3 + [64] * 2, rtol=0.15)
  np.testing.assert_allclose(state[:3].sum(), 0, atol=1e-4)
  np.testing.assert_allclose(state[3:].sum(), 0, atol=1e-4)


def test_bias_steps_by_the_sign_of_the_load_error():
  selected = jnp.asarray([[[1, 0, 0, 1, 0], [1, 0, 0, 0, 1], [0, 1, 0, 0, 0]]],
                         bool)
  state = jnp.zeros(E)
  new = token_choice.update_bias(
      state, jnp.zeros((1, 3, E)), jnp.ones((1, 3, E), bool), selected,
      rate=0.3, top_k=1, capacity=1.0, groups=GROUPS)
  # Loads 2, 1, 0 | 1, 1: signs -1, 0, 1 | 0, 0, already centred.
  np.testing.assert_allclose(new, [-0.3, 0, 0.3, 0, 0], atol=1e-7)


# Threshold.


def test_threshold_needs_its_state():
  scores, allowed, _ = _inputs(11)
  with pytest.raises(ValueError, match='softmax_topk'):
    _route('threshold', scores, allowed, None)


def test_threshold_takes_what_is_above():
  scores, allowed, state = _inputs(12)
  got = _route('threshold', scores, allowed, state)[3]['selected_BTE']
  want = np.asarray(allowed) & (
      np.asarray(jax.nn.sigmoid(scores)) > np.asarray(state))
  np.testing.assert_array_equal(got, want)
  assert set(want.sum(-1).ravel()) >= {0, 1, 2}


def test_threshold_moves_to_the_kth_largest_score():
  scores, allowed, state = _inputs(13, T=20)
  new = routing.update_threshold(
      state, scores, allowed, allowed, rate=0.25, top_k=1, capacity=1.0,
      groups=GROUPS)
  for e, size in enumerate(np.repeat(GROUPS, GROUPS)):
    mine = np.asarray(jax.nn.sigmoid(scores))[..., e][allowed[..., e]]
    kth = np.sort(mine)[-int(np.ceil(len(mine) / size))]
    np.testing.assert_allclose(new[e], 0.75 * state[e] + 0.25 * kth, rtol=1e-6)


@pytest.mark.parametrize('capacity', [0.5, 1.0])
def test_threshold_converges_to_capacity(capacity):
  router = routing.get('threshold')
  skew = jnp.asarray([2.0, 0.0, -2.0, 1.0, -1.0])[None, None]
  allowed = _allowed(np.arange(512).reshape(1, -1) % 2)

  def step(state, key):
    scores = jax.random.normal(key, (1, 512, E)) + skew
    selected = router.route(
        scores, allowed, state, top_k=1, capacity=capacity, pool='sequence',
        groups=GROUPS).aux['selected_BTE']
    new = router.update(state, scores, allowed, selected, rate=0.1, top_k=1,
                        capacity=capacity, groups=GROUPS)
    return new, selected.sum((0, 1))

  _, loads = jax.lax.scan(
      step, router.init_state(E), jax.random.split(jax.random.key(1), 120))
  share = np.asarray(loads[-60:]).mean(0) / 256
  want = capacity / np.repeat(GROUPS, GROUPS)
  np.testing.assert_allclose(share, want, rtol=0.05)


# Expert choice.


@pytest.mark.parametrize('pool', ['sequence', 'device'])
@pytest.mark.parametrize('capacity', [0.1, 1.0, 1.5, 9.0])
def test_every_expert_takes_exactly_its_capacity(pool, capacity):
  """The k_e best valid tokens of its modality in each pool, padding never."""
  scores, allowed, _ = _inputs(14, B=3, T=17)
  got = _route('expert_choice', scores, allowed, None, capacity=capacity,
               pool=pool)[3]['selected_BTE']
  pools = 3 if pool == 'sequence' else 1
  shape = (pools, -1, E)
  for scores_NE, allowed_NE, got_NE in zip(
      np.asarray(scores).reshape(shape), np.asarray(allowed).reshape(shape),
      np.asarray(got).reshape(shape)):
    for e, size in enumerate(np.repeat(GROUPS, GROUPS)):
      b = allowed_NE[:, e].sum()
      k = min(b, max(1, int(np.ceil(capacity * b / size))))
      best = np.argsort(-np.where(allowed_NE[:, e], scores_NE[:, e], -np.inf))
      np.testing.assert_array_equal(
          np.flatnonzero(got_NE[:, e]), np.sort(best[:k]))


def test_expert_choice_weights_are_the_bare_scores():
  scores, allowed, _ = _inputs(15)
  got = _route('expert_choice', scores, allowed, None)
  want = np.where(got[3]['selected_BTE'], jax.nn.sigmoid(scores), 0)
  np.testing.assert_array_equal(_dense(got, scores.shape), want)


@pytest.mark.parametrize('T', [1, 7, 64])
@pytest.mark.parametrize('capacity', [0.3, 1.1, 4.0])
def test_rows_of_expert_choice_hold_every_mixture(T, capacity):
  """No selected pair is dropped, from all text to all image."""
  for images in {0, 1, T // 3, T - 1, T}:
    modality = np.arange(T)[None] < images
    scores = _inputs(16, B=1, T=T)[0]
    _, group_R, _, aux = _route(
        'expert_choice', scores, _allowed(modality), None, capacity=capacity)
    assert (np.asarray(group_R) >= 0).sum() == aux['selected_BTE'].sum()


def test_a_capacity_that_binary_cannot_hold_rounds_as_written():
  """1.1 tokens an expert of 10 are 11, not 12."""
  allowed = jnp.ones((1, 20, 2), bool)
  got = _route('expert_choice', _inputs(17, B=1, T=20)[0][..., :2], allowed,
               None, capacity=1.1, groups=None)
  assert got[3]['selected_BTE'].sum(1).tolist() == [[11, 11]]


@pytest.mark.parametrize('mean', [0.3, 1.0, 1.1, 2.5])
def test_room_holds_what_an_expert_takes(mean):
  """Of a pool without padding, and so of any; none to spare but in large ones.
  """
  count = jax.jit(selection.capacity, static_argnums=(1, 2))
  for tokens in (1, 2, 7, 10, 64, 97):
    for experts in (1, 3, 8):
      allowed = jnp.ones((1, tokens, experts), bool)
      want = int(count(allowed, mean, None).max())
      assert selection.room(tokens, mean, experts) == want
  many = int(count(jnp.ones((1, 200001, 7), bool), mean, None).max())
  assert many <= selection.room(200001, mean, 7) <= many + 1


def test_saturated_scores_are_ties():
  """Sigmoids of 40 and 50 are both 1: the earlier token wins."""
  scores = jnp.asarray([[[40.0], [50.0], [-200.0], [45.0]]])
  allowed = jnp.ones((1, 4, 1), bool)
  got = _route('expert_choice', scores, allowed, None, capacity=0.5,
               groups=None)
  assert got[3]['selected_BTE'][0, :, 0].tolist() == [True, True, False, False]


def test_unknown_pool_lists_the_known():
  scores, allowed, _ = _inputs(18)
  with pytest.raises(ValueError, match="'batch'; known: device, glob"):
    _route('expert_choice', scores, allowed, None, pool='batch')


# Auxiliary routers, and errors.


def test_auxiliary_routers_pick_and_never_weigh():
  """What their sigmoid puts above 1/2; the weight is the main router's."""
  scores, allowed, _ = _inputs(21)
  other = _inputs(22)[0]
  got = routing.aux_causal(
      scores, allowed, None, top_k=1, capacity=1.0, pool='sequence',
      groups=GROUPS, auxiliary_BTE=other)
  want = np.asarray(allowed) & (np.asarray(jax.nn.sigmoid(other)) > 0.5)
  np.testing.assert_array_equal(got.aux['selected_BTE'], want)
  np.testing.assert_array_equal(
      _dense(got[:4], scores.shape),
      np.where(want, jax.nn.sigmoid(scores), 0))
  assert set(want.sum(-1).ravel()) >= {0, 1, 2}
  with pytest.raises(ValueError, match='needs auxiliary routers'):
    routing.aux_causal(
        scores, allowed, None, top_k=1, capacity=1.0, pool='sequence')


@pytest.mark.parametrize('rate', [0.0, 0.1, 1.0])
@pytest.mark.parametrize('exact_k', [False, True])
def test_errors_are_as_many_as_asked_for(rate, exact_k):
  """Of all decisions; with exact_k each replaces one that was right."""
  modality = np.arange(4000).reshape(2, -1) % 3 - 1
  allowed = _allowed(modality)
  scores = jax.random.normal(jax.random.key(1), allowed.shape)
  name = 'token_choice' if exact_k else 'threshold'
  selected = _route(
      name, scores, allowed, jnp.full(E, 0.5), top_k=1)[3]['selected_BTE']
  got = selection.with_errors(
      jax.random.key(0), rate, selected, allowed, exact_k)
  assert not np.asarray(got & ~allowed).any()
  changed = np.asarray(got ^ selected).sum()
  if exact_k:
    np.testing.assert_array_equal(got.sum(-1), selected.sum(-1))
    share = changed / 2 / selected.sum()
  else:
    share = changed / allowed.sum()
  np.testing.assert_allclose(share, rate, atol=0.012)


def test_an_error_needs_another_expert():
  """Two of two cannot be wrong, two of three can in one of them."""
  allowed = jnp.asarray([[[True] * 3 + [False] * 2, [False] * 3 + [True] * 2]])
  selected = allowed & jnp.asarray([True, True, False, True, True])[None, None]
  got = selection.with_errors(jax.random.key(0), 1.0, selected, allowed, True)
  assert got[0, 0].tolist() in ([False, True, True, False, False],
                                [True, False, True, False, False])
  np.testing.assert_array_equal(got[0, 1], selected[0, 1])


# Terms and noise.


def test_switch_loss_is_k_when_balanced_and_m_when_collapsed():
  """M = 4, K = 2: 2 for a balanced router, 4 for a collapsed one."""
  valid = jnp.asarray([[True] * 6, [True] * 2 + [False] * 4])
  balanced = jnp.asarray(np.arange(4) // 2 == (np.arange(6) % 2)[:, None])
  balanced = jnp.broadcast_to(balanced[None], (2, 6, 4))
  uniform = jnp.full((2, 6, 4), 0.25)
  np.testing.assert_allclose(
      balance.switch_loss(uniform, balanced, valid), 2, rtol=1e-6)
  picked = jnp.broadcast_to(jnp.asarray([True, True, False, False]), (2, 6, 4))
  probs = jnp.where(picked, 0.5, 0.0)
  np.testing.assert_allclose(
      balance.switch_loss(probs, picked, valid), 4, rtol=1e-6)


def test_switch_loss_is_the_sum_over_valid_tokens():
  scores, allowed, _ = _inputs(19)
  valid = allowed.any(-1)
  aux = _route('softmax_topk', scores, allowed, None)[3]
  f = np.asarray(aux['selected_BTE'])[np.asarray(valid)].mean(0)
  p = np.asarray(aux['probs_BTE'])[np.asarray(valid)].mean(0)
  got = balance.switch_loss(aux['probs_BTE'], aux['selected_BTE'], valid)
  np.testing.assert_allclose(got, E * (f * p).sum(), rtol=1e-5)


def test_switch_loss_pushes_towards_balance():
  """A step against its gradient lowers the load of the fullest expert."""
  scores = _inputs(20, B=1, T=200)[0]
  scores += jnp.asarray([1.0, 0, 0, 0, 0])[None, None]
  allowed = jnp.ones(scores.shape, bool)

  def loss(bias_E):
    aux = _route('softmax_topk', scores + bias_E[None, None], allowed, None,
                 groups=None)[3]
    return balance.switch_loss(
        aux['probs_BTE'], aux['selected_BTE'], allowed[..., 0])

  grad = jax.grad(loss)(jnp.zeros(E))
  assert grad[0] > 0 and (grad[1:] < 0).all()


def test_weights_of_the_memory_routers():
  """Renormalised or not; a bias picks but does not weigh."""
  scores, allowed, _ = _inputs(21, padding=0)
  allowed = jnp.ones_like(allowed)
  route = lambda name, state=None: _route(
      name, scores, allowed, state, groups=None)
  for name, renormalised in (
      ('softmax_topk', True), ('softmax_topk_raw', False),
      ('sigmoid_topk', True), ('softmax_topk_bias', True),
      ('token_choice', False)):
    arrays = route(name)
    weight = _dense(arrays, scores.shape)
    probs, took = arrays[3]['probs_BTE'], arrays[3]['selected_BTE']
    want = jnp.where(took, probs, 0)
    if renormalised:
      want /= want.sum(-1, keepdims=True)
    np.testing.assert_allclose(weight, want, rtol=1e-6)
  np.testing.assert_array_equal(
      route('softmax_topk_bias')[1], route('softmax_topk')[1])
  bias = jnp.asarray([0, 9.0, 0, 0, 0])
  arrays = route('softmax_topk_bias', bias)
  assert arrays[3]['selected_BTE'][..., 1].all()
  np.testing.assert_array_equal(
      arrays[3]['probs_BTE'], route('softmax_topk')[3]['probs_BTE'])


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
  assert balance.switch_loss(took, took > 0, valid) == 1
  half = jnp.full((2, 5, 2), 0.5)
  assert balance.sample_loss(half, took > 0, valid) == 1


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
  assert balance.switch_loss(probs, probs > 0, none) == 0
  assert balance.entropy(probs, none) == 0


def test_noise_is_standard_logistic():
  """Mean 0, variance pi^2 / 3, P(> 1) = sigmoid(-1)."""
  noise = np.asarray(routing.add_noise(jax.random.key(0), jnp.zeros(200_000)))
  assert abs(noise.mean()) < 0.02
  np.testing.assert_allclose(noise.var(), np.pi**2 / 3, rtol=0.02)
  np.testing.assert_allclose((noise > 1).mean(), 1 / (1 + np.e), atol=0.005)
  shifted = routing.add_noise(jax.random.key(0), jnp.full(200_000, 3.0))
  np.testing.assert_allclose(shifted - noise, 3, atol=1e-5)
