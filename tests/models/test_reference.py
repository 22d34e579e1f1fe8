"""The layers equal their definitions, in outputs and in gradients."""

import dataclasses

import contract
import jax
import jax.numpy as jnp
import mom_cases
import numpy as np
import pytest

from mom_jax import config, routing
from mom_jax.models import block, moma, reference
from mom_jax.training import optimizer

B, T, D, F = 3, 12, 8, 6

# Every router, every arrangement of experts, and what only some depend on.
MOMA = {
    router: dict(router=router, experts=(4, 4), top_k=2)
    for router in sorted(routing.ROUTERS)
} | {
    f'{router}-{"+".join(map(str, experts))}': dict(
        router=router, experts=experts)
    for router in ('expert_choice', 'threshold', 'token_choice')
    for experts in ((6, 2), (8,), (1, 1))
} | {
    'softmax_topk-6+2': dict(router='softmax_topk', experts=(6, 2), top_k=2),
    'device': dict(router='expert_choice', experts=(4, 4), pool='device'),
    'global': dict(router='expert_choice', experts=(4, 4), pool='global'),
    'device-8': dict(router='expert_choice', experts=(8,), pool='device'),
    'few_tokens': dict(router='expert_choice', experts=(4, 4), capacity=0.3),
    'many_tokens': dict(router='expert_choice', experts=(6, 2), capacity=1.5),
    'three_modalities': dict(router='expert_choice', experts=(2, 3, 1)),
    'shared': dict(router='expert_choice', experts=(6, 2), shared=2),
    'shared-1': dict(router='token_choice', experts=(1,), shared=1),
}


def _inputs(modalities=2, padding=0.2, seed=1):
  rng = np.random.default_rng(seed)
  modality = rng.integers(0, modalities, (B, T))
  modality[rng.random((B, T)) < padding] = -1
  x = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
  return x, jnp.asarray(modality)


def _moma(experts, shared=0, **settings):
  """The layer, and parameters large enough for outputs of order 1."""
  layer = moma.Moma(
      D, experts, F, shared, router_collection='params', **settings)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), *_inputs())['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda p: jnp.asarray(rng.normal(0, 0.5, p.shape), p.dtype), shapes)
  state = routing.get(settings['router']).state
  if state and state.name in params:  # each its own, so that it matters
    params[state.name] = jnp.linspace(0.1, 0.7, sum(experts))
  return layer, params


@pytest.mark.parametrize('settings', MOMA.values(), ids=MOMA)
def test_moma_is_its_definition(settings):
  layer, params = _moma(**settings)
  x, modality = _inputs(max(2, len(settings['experts'])))
  weight = jax.random.normal(jax.random.key(3), x.shape)
  state = getattr(routing.get(settings['router']).state, 'name', None)

  def definition(params, x):
    return reference.moma_ref(
        layer, params, x, modality, params.get(state))

  def mine(params, x):
    y, aux = layer.apply({'params': params}, x, modality)
    return y, aux.stats.selected_BTE

  def run(f):
    def loss(params, x):
      y, selected = f(params, x)
      return (y * weight).sum() + (y**2).sum(), (y, selected)
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)

  (_, (y, selected)), grads = run(mine)
  (_, (want, want_selected)), want_grads = run(definition)
  np.testing.assert_array_equal(selected, want_selected)
  np.testing.assert_allclose(y, want, atol=1e-5, rtol=1e-5)
  assert np.abs(want).max() > 0.1
  np.testing.assert_array_equal(y[modality < 0], 0)
  for path, g in jax.tree_util.tree_leaves_with_path(grads[0]):
    fixed = path[0].key in (state, 'auxiliary')  # no gradient
    assert np.abs(g).max() > 1e-3 or fixed, path
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4),
      grads, want_grads)


def test_an_undefined_router_is_named():
  layer = moma.Moma(D, router='new')
  with pytest.raises(ValueError, match="router='new' has no definition"):
    reference.moma_ref(layer, {}, *_inputs())


def test_moma_ref_takes_the_first_of_equals():
  """As the layer does: equal tokens, equal scores."""
  layer, params = _moma((4, 4), router='expert_choice')
  x, modality = _inputs(padding=0)
  x = jnp.broadcast_to(x[:, :1], x.shape)
  _, selected = jax.jit(
      lambda x: reference.moma_ref(layer, params, x, modality))(x)
  _, aux = jax.jit(layer.apply)({'params': params}, x, modality)
  np.testing.assert_array_equal(selected, aux.stats.selected_BTE)
  assert selected.any()


# Compiled in a few seconds each; the others are slow tests, some in CI.
QUICK = ('gated_delta', 'kda', 'rwkv7', 'plain', 'group_norm')
SLOW_LAWS = ('single_kv', 'two_writes', 'biased')


def _mom(width, **mixer):
  mixer = dict(num_heads=2, key_dim=8, value_dim=8, chunk=8) | mixer
  return block.MIXERS['mom'].make(dataclasses.replace(
      config.Config().model, width=width, mixer=config.Mixer(**mixer)))


def _large(params, seed=0):
  """Parameters for outputs of order 1, and routers and biases that matter."""
  rng = np.random.default_rng(seed)
  kept = optimizer.NOT_DECAYED | {'weight', 'map_q', 'map_k', 'shift_out'}

  def one(path, p):
    p, name = np.asarray(p), path[-1].key
    if name == 'balance_bias':
      return jnp.linspace(0, 0.3, len(p))
    if name.startswith('conv'):
      return jnp.asarray(p + rng.normal(size=p.shape) * 0.1, p.dtype)
    return jnp.asarray(p if name in kept else p * 15)

  return jax.tree_util.tree_map_with_path(one, params)


@pytest.mark.parametrize('settings', [
    pytest.param(settings, id=name, marks=(
        () if name in QUICK else pytest.mark.slow_law if name in SLOW_LAWS
        else pytest.mark.slow))
    for name, settings in zip(mom_cases.IDS, mom_cases.ALL)])
def test_mom_is_its_definition(settings):
  """Two samples; the first holds two documents, the second ends in padding."""
  layer, T = _mom(D, **settings), 13
  x = jax.random.normal(jax.random.key(1), (2, T, D))
  segment = jnp.asarray([[1] * 5 + [2] * 8, [3] * 9 + [0] * 4], jnp.int32)
  params = _large(layer.init(jax.random.key(0), x)['params'])
  weight = jax.random.normal(jax.random.key(2), x.shape)

  def definition(params, x):
    one = lambda x, segment: reference.mom_ref(
        layer, params, x, segment, bias_M=params.get('balance_bias'))
    y = jax.vmap(one)(x, segment)
    return (y * weight).sum(), y

  def fast(params, x):
    y, _, _ = layer.apply({'params': params}, x, None, segment)
    return (y * weight).sum(), y

  both = [
      jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(params, x)
      for run in (fast, definition)]
  ((_, got), got_grads), ((_, want), want_grads) = both
  contract.outputs_agree(got, want)
  jax.tree_util.tree_map_with_path(
      lambda path, a, b: contract.gradients_agree(a, b, name=str(path)),
      got_grads, want_grads)


def test_a_modality_has_projections_of_its_own():
  layer = dataclasses.replace(_mom(D), num_modality_copies=2)
  x = jax.random.normal(jax.random.key(1), (1, 13, D))
  modality = jnp.asarray([[0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 0, -1]])
  segment = (modality >= 0).astype(jnp.int32)
  params = _large(layer.init(
      jax.random.key(0), x, None, segment, modality)['params'])
  got, _, _ = jax.jit(layer.apply)(
      {'params': params}, x, None, segment, modality)
  want = jax.jit(reference.mom_ref, static_argnums=0)(
      layer, params, x[0], segment[0], modality[0])
  contract.outputs_agree(got[0], want)
