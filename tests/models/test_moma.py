"""Laws of the MoMa and SwiGLU channel mixers, over the table of routers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import config, routing
from mom_jax.models import flops, mlp, moma
from mom_jax.parallel import sharding

D, F, T = 8, 6, 12
EXPERTS = (3, 2)
E = sum(EXPERTS)
ROUTERS = pytest.mark.parametrize('name', sorted(routing.ROUTERS))
POOLS = pytest.mark.parametrize(
    'name, pool',
    [(name, 'sequence') for name in sorted(routing.ROUTERS)]
    + [('expert_choice', 'device'), ('expert_choice', 'global')],
)


def _moma(router='token_choice', experts=EXPERTS, **settings):
  settings = dict(
      top_k=2, balance_rate=0.1, threshold_rate=0.1, hidden=F) | settings
  return moma.Moma(
      D, experts, router=router, router_collection='params', **settings)


@functools.cache
def _layer(layer):
  """The layer and parameters large enough for outputs of order 1."""
  shapes = jax.eval_shape(layer.init, jax.random.key(0), *_batch(1))['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda p: jnp.asarray(rng.normal(0, 0.5, p.shape), p.dtype), shapes)
  router = routing.get(layer.router)
  if router.state and router.state.name in params:
    params[router.state.name] = router.state.init(sum(layer.experts))
  return layer, params


def _batch(B, seed=1, padding=0.2):
  rng = np.random.default_rng(seed)
  modality = rng.integers(0, 2, (B, T))
  modality[rng.random((B, T)) < padding] = -1
  x = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
  return x, jnp.asarray(modality)


@functools.partial(jax.jit, static_argnums=0)
def _apply(layer, params, x, modality, key=None):
  rngs = None if key is None else {'routing': key}
  return layer.apply({'params': params}, x, modality, rngs=rngs)


def _swiglu(x, gate_up_D2F, down_FD):
  gate, up = x @ gate_up_D2F[:, 0], x @ gate_up_D2F[:, 1]
  return (jax.nn.silu(gate) * up) @ down_FD


@ROUTERS
@pytest.mark.parametrize('B, noise', [(1, False), (3, False), (1, True)])
def test_prefix_is_bit_equal_for_causal_routers_only(name, B, noise):
  """Tokens after t, modality included; in training mode with noise too."""
  layer, params = _layer(_moma(name, noise=noise))
  key = jax.random.key(5) if noise else None
  x, modality = _batch(B)
  other, other_modality = _batch(B, seed=2)
  before = _apply(layer, params, x, modality, key)[0]
  same = []
  for t in range(1, T, 2):
    after = _apply(
        layer, params, jnp.concatenate([x[:, :t], other[:, t:]], 1),
        jnp.concatenate([modality[:, :t], other_modality[:, t:]], 1), key)[0]
    same.append(bool((before[:, :t] == after[:, :t]).all()))
  if routing.get(name).causal:
    assert all(same)
  else:
    assert not all(same)


@POOLS
def test_a_sample_alone_is_the_sample_among_others(name, pool):
  """Fails, as it must, where all samples compete in one pool."""
  layer, params = _layer(_moma(name, pool=pool))
  x, modality = _batch(3)
  among, _ = _apply(layer, params, x, modality)
  same = []
  for b in range(3):
    alone, _ = _apply(layer, params, x[b:b + 1], modality[b:b + 1])
    same.append(np.allclose(alone[0], among[b], atol=1e-5))
  assert all(same) == (pool == 'sequence')  # in training and evaluation


@ROUTERS
def test_text_tokens_never_change_image_tokens(name):
  layer, params = _layer(_moma(name))
  x, modality = _batch(3)
  image = np.asarray(modality == 1)
  other = jnp.where(image[..., None], x, _batch(3, seed=4)[0])
  a, aux_a = _apply(layer, params, x, modality)
  b, aux_b = _apply(layer, params, other, modality)
  np.testing.assert_array_equal(
      aux_a.stats.selected_BTE[image], aux_b.stats.selected_BTE[image])
  np.testing.assert_allclose(a[image], b[image], atol=1e-5)
  assert np.abs(a - b)[~image].max() > 1e-2


@ROUTERS
@pytest.mark.parametrize('modality', [-1, 0, 1])
def test_one_modality_or_padding_alone(name, modality):
  layer, params = _layer(_moma(name))
  x, _ = _batch(3)
  y, aux = _apply(layer, params, x, jnp.full((3, T), modality))
  selected = np.asarray(aux.stats.selected_BTE)
  groups = np.split(selected, [3], -1)
  assert groups[0].any() == (modality == 0)
  assert groups[1].any() == (modality == 1)
  assert bool(np.asarray(y).any()) == (modality >= 0)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, aux)))


@ROUTERS
def test_tokens_that_no_expert_takes_get_zero(name):
  layer, params = _layer(_moma(name, capacity=0.5))
  x, modality = _batch(3)
  y, aux = _apply(layer, params, x, modality)
  taken = np.asarray(aux.stats.selected_BTE).any(-1)
  assert not taken[np.asarray(modality) < 0].any()
  np.testing.assert_array_equal(np.asarray(y).any(-1), taken)


def test_expert_choice_counts():
  """Every expert takes ceil(c b / E) of the b tokens of its modality."""
  layer, params = _layer(_moma('expert_choice'))
  x, modality = _batch(3)
  _, aux = _apply(layer, params, x, modality)
  for b in range(3):
    tokens = [int((modality[b] == m).sum()) for m in range(2)]
    want = [-(-tokens[0] // 3)] * 3 + [-(-tokens[1] // 2)] * 2
    assert aux.stats.selected_BTE[b].sum(0).tolist() == want


@ROUTERS
def test_one_expert_a_modality_is_an_ffn_per_modality(name):
  """No router, no buffers; weight 1; entropy 0."""
  layer, params = _layer(_moma(name, experts=(1, 1), top_k=1))
  assert sorted(params) == ['down', 'gate_up']
  x, modality = _batch(3)
  y, aux = _apply(layer, params, x, modality)
  for m in range(2):
    mine = np.asarray(modality) == m
    want = _swiglu(x, params['gate_up'][m], params['down'][m])
    np.testing.assert_allclose(y[mine], want[mine], atol=1e-5)
  assert not np.asarray(y)[np.asarray(modality) < 0].any()
  assert aux.state == {} and aux.stats.entropy == 0


@ROUTERS
def test_one_group_is_shared_by_all_modalities(name):
  """The paper's moe_8x: as if all tokens were of one modality."""
  layer, params = _layer(_moma(name, experts=(4,)))
  x, modality = _batch(3)
  y, aux = _apply(layer, params, x, modality)
  same = jnp.where(modality >= 0, 0, -1)
  want, want_aux = _apply(layer, params, x, same)
  np.testing.assert_array_equal(y, want)
  np.testing.assert_array_equal(
      aux.stats.selected_BTE, want_aux.stats.selected_BTE)
  for m in range(2):
    mine = np.asarray(modality) == m
    assert np.asarray(aux.stats.selected_BTE)[mine].any(0).all()
  if name == 'expert_choice':
    for b in range(3):
      tokens = int((modality[b] >= 0).sum())
      assert aux.stats.selected_BTE[b].sum(0).tolist() == [-(-tokens // 4)] * 4


@pytest.mark.parametrize('experts', [(4,), (1,)])
@pytest.mark.parametrize('pool', ['sequence', 'device'])
def test_equal_groups_in_one_product_equal_ragged_ones(experts, pool):
  """Padding, which leaves room, and gradients included."""
  layer, params = _layer(
      _moma('expert_choice', experts=experts, pool=pool, top_k=1))
  named = layer.clone(backend='xla')
  x, modality = _batch(3)

  def run(layer):
    return jax.jit(jax.value_and_grad(
        lambda p, x: (layer.apply({'params': p}, x, modality)[0]**2).sum(),
        (0, 1)))(params, x)

  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
      run(layer), run(named))


def test_equal_groups_cost_what_they_are_to_cost():
  """XLA's count, which it cannot make of a ragged loop."""
  cfg = config.Moma(hidden=256, experts=(8,), router='expert_choice')
  x = jnp.zeros((2, 256, 64))
  modality = jnp.zeros((2, 256), jnp.int32)
  layer = moma.Moma(64, **vars(cfg))
  params = jax.eval_shape(layer.init, jax.random.key(0), x, modality)
  compiled = jax.jit(lambda p: layer.apply(p, x, modality)[0]).lower(
      params).compile()
  counted = compiled.cost_analysis()['flops'] / 512
  assert counted == pytest.approx(flops._moma(64, cfg), rel=0.05)


def test_any_number_of_modalities_has_groups_of_its_own():
  """Three of them, uneven; each is what it would be alone."""
  layer, params = _layer(_moma('expert_choice', experts=(2, 3, 1)))
  config.validate(config.Config(
      model=config.Model(
          modalities=('text', 'image', 'speech'),
          moma=config.Moma(experts=layer.experts)),
      loss=config.Loss(modality_weights=(1.0, 1.0, 1.0))))
  x, _ = _batch(2)
  modality = jnp.asarray(np.arange(2 * T).reshape(2, T) % 4 - 1)
  y, aux = _apply(layer, params, x, modality)
  for m, experts in enumerate(((0, 1), (2, 3, 4), (5,))):
    alone = jnp.where(modality == m, m, -1)
    mine = np.asarray(modality) == m
    got, _ = _apply(layer, params, x, alone)
    np.testing.assert_allclose(y[mine], got[mine], atol=1e-6)
    others = sorted(set(range(6)) - set(experts))
    assert not np.asarray(aux.stats.selected_BTE)[mine][:, others].any()
    assert aux.stats.selected_BTE[..., experts].any()


@pytest.mark.parametrize('experts', [EXPERTS, (4,), (1, 1)])
def test_shared_experts_add_a_plain_mlp(experts):
  """Two of them are one of twice the width, whatever the router does."""
  layer, params = _layer(
      _moma('token_choice', experts=experts, top_k=1, shared=2))
  bare = {k: v for k, v in params.items() if not k.startswith('shared')}
  x, modality = _batch(3)
  y, _ = _apply(layer, params, x, modality)
  rest, _ = _apply(layer.clone(shared=0), bare, x, modality)
  assert params['shared_down']['kernel'].shape == (2 * F, D)
  want = _swiglu(x, params['shared_gate_up']['kernel'],
                 params['shared_down']['kernel'])
  valid = (modality >= 0)[..., None]
  np.testing.assert_allclose(y, rest + jnp.where(valid, want, 0), atol=1e-5)


@ROUTERS
def test_errors_turn_decisions_around(name):
  """As many as the collection 'errors' says; none with rate 0."""
  layer, params = _layer(_moma(name, top_k=1))
  x, modality = _batch(3)
  plain, aux = _apply(layer, params, x, modality)

  def wrong(rate):
    return layer.apply(
        {'params': params, 'errors': {'error_prob': jnp.float32(rate)}}, x,
        modality,
        rngs={'errors': jax.random.key(2)})

  y, none = wrong(0.0)
  np.testing.assert_allclose(y, plain, atol=1e-6)
  np.testing.assert_array_equal(none.stats.selected_BTE, aux.stats.selected_BTE)
  y, all_wrong = wrong(1.0)
  allowed = np.asarray(moma.Moma.allowed(modality, EXPERTS))
  flipped = np.asarray(all_wrong.stats.selected_BTE ^ aux.stats.selected_BTE)
  if routing.get(name).exact_k:
    np.testing.assert_array_equal(
        flipped.sum(-1), 2 * np.asarray(modality >= 0))
  else:
    np.testing.assert_array_equal(flipped, allowed)
  assert np.isfinite(y).all() and np.abs(y - plain).max() > 1e-2


def test_one_expert_is_the_plain_mlp():
  layer, params = _layer(_moma(experts=(1,), top_k=1))
  x, _ = _batch(3)
  modality = jnp.zeros(x.shape[:2], jnp.int32)
  plain = {
      'gate_up': {'kernel': params['gate_up'][0]},
      'down': {'kernel': params['down'][0]},
  }
  want, aux = mlp.Mlp(D, F).apply({'params': plain}, x)
  assert aux.stats is None and aux.state == {}
  np.testing.assert_allclose(
      _apply(layer, params, x, modality)[0], want, atol=1e-5)
  np.testing.assert_allclose(
      want, _swiglu(x, params['gate_up'][0], params['down'][0]), atol=1e-5)


def test_mlp_has_three_matrices():
  params = mlp.Mlp(D, F).init(jax.random.key(0), _batch(3)[0])
  assert sum(p.size for p in jax.tree.leaves(params)) == 3 * D * F


@ROUTERS
def test_parameters_at_the_start(name):
  """N(0, 0.02) matrices, the router's state, and nothing else."""
  layer = _moma(name, hidden=32)
  params = jax.jit(layer.init)(jax.random.key(0), *_batch(1))['params']
  router = routing.get(name)
  if router.state:
    np.testing.assert_array_equal(
        params.pop(router.state.name), router.state.init(E))
  if router.needs_aux_logits:
    auxiliary = params.pop('auxiliary')
    assert sum(p.size for p in jax.tree.leaves(auxiliary)) == (
        2 * D * D // 2 + D // 2 * E)
  assert sum(p.size for p in jax.tree.leaves(params)) == D * E + 3 * E * D * 32
  for leaf in jax.tree.leaves(params):
    # Four standard errors of the deviation of this many samples.
    np.testing.assert_allclose(
        leaf.std(), 0.02, rtol=4 / np.sqrt(2 * leaf.size))


@pytest.mark.parametrize(
    'name', [n for n, r in routing.ROUTERS.items() if r.state])
def test_router_state_serves_the_next_step(name):
  """The update is the router's, on this batch; the output uses the old state.
  """
  state = routing.get(name).state
  layer, params = _layer(_moma(name))
  x, modality = _batch(3)
  y, aux = _apply(layer, params, x, modality)
  assert list(aux.state) == [state.name]
  new = aux.state[state.name]
  name_E = np.repeat(np.arange(2), EXPERTS)
  inputs = routing.RouterInputs(
      x @ params['router']['kernel'],
      modality[..., None] == jnp.asarray(name_E)[None, None],
      params[state.name])
  want = state.update(
      inputs, aux.stats.selected_BTE,
      routing.RouterSettings(top_k=2, experts=EXPERTS, update_rate=0.1))
  np.testing.assert_allclose(new, want, atol=1e-6)
  assert np.abs(new - params[state.name]).max() > 1e-3
  far = params | {state.name: jnp.linspace(0, 0.9, E)}
  changed = np.abs(_apply(layer, far, x, modality)[0] - y).max() > 1e-3
  # Expert choice and its auxiliary routers keep it for `threshold`.
  assert changed == (name not in (
      'expert_choice', 'expert_choice_oracle', 'aux_causal'))


@POOLS
def test_two_devices_equal_one(name, pool):
  """Rows are sorted on each device; router state comes from all tokens.

  With pool 'device' the tokens of each device compete among themselves, with
  'global' all do.
  """
  layer, params = _layer(_moma(name, pool=pool))
  x, modality = _batch(4)
  mesh = sharding.make_mesh(devices=jax.devices()[:2])
  with jax.set_mesh(mesh):
    batch = jax.device_put((x, modality), sharding.batch_sharding(mesh))
    got, got_aux = _apply(
        layer, jax.device_put(params, sharding.replicated_sharding(mesh)),
        *batch)
  want, want_aux = _apply(layer, params, x, modality)
  if pool == 'device':
    assert np.abs(np.asarray(got) - want).max() > 1e-2
    want = jnp.concatenate([
        _apply(layer, params, x[i:i + 2], modality[i:i + 2])[0]
        for i in (0, 2)])
  np.testing.assert_allclose(np.asarray(got), want, atol=1e-5)
  if pool != 'device':
    assert got_aux.state.keys() == want_aux.state.keys()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), b, atol=1e-6),
        got_aux, want_aux)


def test_noise_needs_its_setting_and_its_key():
  x, modality = _batch(3)
  quiet, params = _layer(_moma('expert_choice'))
  noisy, _ = _layer(_moma('expert_choice', noise=True))
  want, _ = _apply(quiet, params, x, modality)
  key = jax.random.key(7)
  np.testing.assert_array_equal(_apply(quiet, params, x, modality, key)[0],
                                want)
  np.testing.assert_array_equal(_apply(noisy, params, x, modality)[0], want)
  a, aux_a = _apply(noisy, params, x, modality, key)
  b, aux_b = _apply(noisy, params, x, modality, jax.random.key(8))
  assert np.abs(a - want).max() > 1e-3 and np.abs(a - b).max() > 1e-3
  assert (aux_a.stats.selected_BTE != aux_b.stats.selected_BTE).any()


def test_noise_leaves_the_router_state_alone():
  """Thresholds serve inference, which has no noise."""
  layer, params = _layer(_moma('expert_choice', noise=True))
  x, modality = _batch(3)
  _, a = _apply(layer, params, x, modality, jax.random.key(7))
  _, b = _apply(layer, params, x, modality)
  np.testing.assert_array_equal(
      a.state['threshold'], b.state['threshold'])


def test_noise_changes_weights_where_selection_cannot():
  layer, params = _layer(_moma('token_choice', experts=(2, 2), noise=True))
  x, modality = _batch(3)
  a, aux_a = _apply(layer, params, x, modality, jax.random.key(7))
  b, aux_b = _apply(layer, params, x, modality)
  np.testing.assert_array_equal(
      aux_a.stats.selected_BTE, aux_b.stats.selected_BTE)
  assert np.abs(a - b).max() > 1e-3


@ROUTERS
def test_bfloat16_routes_in_float32(name):
  layer, params = _layer(_moma(name))
  x, modality = _batch(3)
  x = x.astype(jnp.bfloat16)
  y, aux = _apply(layer, params, x, modality)
  want, exact = _apply(layer, params, x.astype(jnp.float32), modality)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
      aux.stats.selected_BTE, exact.stats.selected_BTE)
  assert aux.stats.entropy.dtype == jnp.float32
  scale = np.abs(want).max()
  np.testing.assert_allclose(y.astype(jnp.float32), want, atol=0.03 * scale)


def test_a_norm_on_the_output_hides_the_gate_of_one_expert_tokens():
  """norm(g f) = norm(f): without several experts the router learns nothing."""
  layer, params = _layer(_moma('token_choice', top_k=1))
  x, modality = _batch(3)
  target = jax.random.normal(jax.random.key(9), x.shape)

  def loss(kernel, norm):
    p = params | {'router': {'kernel': kernel}}
    y = layer.apply({'params': p}, x, modality)[0]
    if norm:
      y = y * jax.lax.rsqrt((y**2).mean(-1, keepdims=True) + 1e-12)
    return (y * target).sum()

  grad = jax.jit(jax.grad(loss), static_argnums=1)
  kernel = params['router']['kernel']
  assert np.abs(grad(kernel, True)).max() < 1e-4
  assert np.abs(grad(kernel, False)).max() > 1e-1


@pytest.mark.parametrize(
    'settings, key',
    [
        (dict(experts=(4, 4, 4)), 'experts'),
        (dict(router='softmax_topk', top_k=3, experts=(4, 2)), 'top_k'),
        (dict(router='threshold', noise=True), 'noise'),
        (dict(router='expert_choice', experts=(1, 1), capacity=0.5),
         'capacity'),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, key):
  model = dataclasses.replace(
      config.Config().model, moma=config.Moma(**settings))
  with pytest.raises(config.UserError, match=f'config.model.moma.{key}='):
    config.validate(config.Config(model=model))


def test_loss_is_the_mean_balance_over_modalities():
  """E f P of each modality's own experts and tokens, with its weight."""
  layer, params = _layer(_moma('softmax_topk', top_k=1, balance_weight=0.5))
  x, modality = _batch(3)
  _, aux = _apply(layer, params, x, modality)
  logits = np.asarray(x @ params['router']['kernel'])
  losses, first = [], 0
  for m, size in enumerate(EXPERTS):
    mine, group = np.asarray(modality) == m, slice(first, first + size)
    probs = jax.nn.softmax(logits[mine][:, group])
    load = np.asarray(aux.stats.selected_BTE)[mine][:, group].mean(0)
    losses.append(size * (load * np.asarray(probs).mean(0)).sum())
    first += size
  np.testing.assert_allclose(aux.loss, 0.5 * np.mean(losses), rtol=1e-5)
